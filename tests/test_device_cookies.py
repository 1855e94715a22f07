"""Device cookies: how a known browser is told from a stranger's, and what strangers, neighbours and thieves can do."""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from auth import UNCOUNTED, Auth
from authsvc import Handlers, create_app
from credentials import device, passwords, totp
from engines.errors import StorageUnavailable
from settings import Settings
from storage import DB
from tests.cases import each
from tests.conftest import COST, Answer, Client, Clock
from tests.production import BOB, PASSWORD, production_settings

HOME, AWAY = "192.0.2.1", "198.51.100.7"
NEW_PASSWORD = "une autre tarte flambée"
SECRET, KEY, NOW, DAY = hmac.new(b"secret", digestmod=hashlib.sha256), "key", 1_800_000_000, 86_400


@pytest.fixture
def settings(database: str) -> Settings:
    return production_settings(database)


class Browser:
    """A browser that keeps the cookies of the service. Without ``address`` each request comes from HOME."""

    def __init__(self, call: Client, address: str = HOME) -> None:
        self._call = call
        self.address = address
        self.cookies: dict[str, str] = {}

    def __call__(self, method: str, path: str, **form: str) -> Answer:
        cookie = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        answer = self._call(method, path, form, cookie=cookie or None, REMOTE_ADDR=self.address)
        self.cookies |= answer.cookies
        return answer

    def log_in(self, email: str = BOB, password: str = PASSWORD, **form: str) -> int:
        return self("POST", "/sessions", email=email, password=password, **form).status

    def sign_out(self) -> None:
        self("DELETE", "/sessions")
        del self.cookies["__Host-session_id"]

    @property
    def device(self) -> str:
        return self.cookies["__Host-device"]


@pytest.fixture
def owner(call: Client, auth: Auth) -> Browser:
    """Bob's browser. He has signed in, and out again."""
    auth.register_user(BOB, PASSWORD)
    browser = Browser(call)
    assert browser.log_in() == 200
    browser.sign_out()
    return browser


def stranger(call: Client, number: int, email: str = BOB, password: str = "wrong") -> int:
    """Guess from an address of its own."""
    return Browser(call, f"10.9.{number // 250}.{number % 250}").log_in(email, password)


# Tokens


def tokens(*user_ids: int, kind: str = "full", now: int = NOW) -> list[device.Device]:
    return [device.issue(SECRET, user_id, KEY, kind, now) for user_id in user_ids]


def is_accepted(found: Sequence[device.Device], user_id: int = 1, key: str | None = KEY, now: int = NOW) -> bool:
    return device.verified(found, SECRET, user_id, key, now=now, latest=now + 300) is not None


def test_a_token_belongs_to_one_user_one_key_and_one_secret() -> None:
    (token,) = found = device.parse(str(tokens(1)[0]))
    assert is_accepted(found)
    assert not is_accepted(found, user_id=2)
    assert not is_accepted([token._replace(user_id=2)], user_id=2)
    assert not is_accepted(found, key="another")
    assert not is_accepted(found, key=None)
    assert device.verified(found, hmac.new(b"another", digestmod=hashlib.sha256), 1, KEY, now=NOW, latest=NOW) is None


@each("field", ["user_id", "issued_at", "kind", "nonce", "mac"])
def test_an_edited_token_is_not_accepted(field: str) -> None:
    (token,) = tokens(1, kind="reset")
    edited: dict[str, Any] = {"user_id": 11, "issued_at": NOW + 1, "kind": "full", "nonce": "A" * 16, "mac": "A" * 43}
    assert not is_accepted([token._replace(**{field: edited[field]})], user_id=11 if field == "user_id" else 1)


@each(("age", "accepted"), [(-301, False), (-300, True), (0, True), (90 * DAY - 1, True), (90 * DAY, False)])
def test_a_token_is_accepted_for_90_days(age: int, accepted: bool) -> None:
    assert is_accepted(tokens(1), now=NOW + age) is accepted


def test_a_cookie_holds_the_newest_four_accounts() -> None:
    cookie = ""
    for token in tokens(1, 2, 3, 4, 5):
        cookie = device.with_new(device.parse(cookie), token)
    assert [token.user_id for token in device.parse(cookie)] == [5, 4, 3, 2]
    (again,) = tokens(3)
    cookie = device.with_new(device.parse(cookie), again)
    assert [token.user_id for token in device.parse(cookie)] == [3, 5, 4, 2]
    assert again in device.parse(cookie)


@each("malform", [
    lambda text: "",
    lambda text: text + "~",
    lambda text: "~".join([text] * 5),
    lambda text: text + "=",
    lambda text: "0" + text,
    lambda text: text.replace("full", "none"),
    lambda text: text[:-1],
    lambda text: text + "\n",
    lambda text: text.replace(".", ","),
    lambda text: "9" * 30 + text,
])  # fmt: skip
def test_a_malformed_cookie_counts_as_none(malform: Any) -> None:
    assert device.parse(malform(str(tokens(1)[0]))) == ()


def test_two_tokens_of_one_browser_differ() -> None:
    one, other = tokens(1, 1)
    assert one.nonce != other.nonce


# The cookie


def test_a_sign_in_sets_the_cookie(call: Client, auth: Auth) -> None:
    auth.register_user(BOB, PASSWORD)
    answer = call("POST", "/sessions", {"email": BOB, "password": PASSWORD}, REMOTE_ADDR=HOME)
    (cookie,) = [one for one in answer.set_cookies if one.startswith("__Host-device=")]
    value, _, attributes = cookie.partition("; ")
    assert attributes == "HttpOnly; Path=/; SameSite=Lax; Secure; Max-Age=7776000"
    assert [one.kind for one in device.parse(value.partition("=")[2])] == ["full"]
    assert answer.set_cookies[0].startswith("__Host-session_id=")


def test_the_cookie_is_not_shared_with_sibling_hosts(database: str, db: DB, clock: Clock) -> None:
    settings = production_settings(database, cookie_domain="example.com")
    auth = Auth(db, settings, clock)
    auth.register_user(BOB, PASSWORD)
    browser = Browser(Client(create_app(settings, auth)))
    answer = browser("POST", "/sessions", email=BOB, password=PASSWORD)
    assert ["Domain=example.com" in cookie for cookie in answer.set_cookies] == [True, False, False]
    assert device.parse(browser.device)


def test_signing_out_can_forget_the_browser(call: Client, owner: Browser) -> None:
    forgotten = "__Host-device=; HttpOnly; Path=/; SameSite=Lax; Secure; Max-Age=0"
    owner.log_in()
    for query in ("", "?forget=0", "?forget=1&a=b", "?forget=1"):
        answer = owner("DELETE", f"/sessions{query}")
        assert (answer.status, answer.set_cookies[1:]) == (302, [forgotten] if query == "?forget=1" else [])
        owner.log_in()
    owner.sign_out()
    assert owner("DELETE", "/sessions?forget=1").set_cookies[1:] == [forgotten]  # there is no session left to end
    assert owner("DELETE", "/sessions?forget=0").status == 403


def test_a_refused_request_sets_no_cookie(call: Client, owner: Browser) -> None:
    for form in ({"password": "wrong"}, {"password": PASSWORD, "email": "nobody@x.io"}):
        assert owner("POST", "/sessions", **{"email": BOB, **form}).set_cookies == []


def test_development_knows_no_devices(database: str, db: DB, clock: Clock) -> None:
    settings = Settings(database=database, bcrypt_cost=COST)
    auth = Auth(db, settings, clock)
    user = auth.register_user(BOB, PASSWORD)
    browser = Browser(Client(create_app(settings, auth)), "127.0.0.1")
    answer = browser("POST", "/sessions", email=BOB, password=PASSWORD)
    assert [cookie.partition("=")[0] for cookie in answer.set_cookies] == ["session_id"]
    assert len(browser("DELETE", "/sessions?forget=1").set_cookies) == 1
    assert browser("DELETE", "/sessions?forget=1").status == 403
    genuine = device.issue(auth._limiter.keyed, user.id, user.device_key, "full", int(clock()))
    browser.cookies["__Host-device"] = str(genuine)
    assert [browser.log_in(password="wrong") for _ in range(11)] == [401] * 10 + [429]
    assert browser.log_in() == 429


def test_one_browser_is_known_to_several_accounts(call: Client, auth: Auth, owner: Browser) -> None:
    auth.register_user("eve@x.io", PASSWORD)
    assert owner.log_in("eve@x.io") == 200
    for email in (BOB, "eve@x.io"):
        for number in range(40):
            stranger(call, number, email)
        assert owner.log_in(email) == 200


def test_a_known_browser_is_a_stranger_to_other_accounts(call: Client, auth: Auth, owner: Browser) -> None:
    auth.register_user("eve@x.io", PASSWORD)
    for number in range(20):
        assert stranger(call, number, "eve@x.io") == 401
    assert owner.log_in("eve@x.io") == 429


# Strangers, neighbours and thieves


def test_a_neighbour_at_the_same_address_does_not_delay_a_known_browser(call: Client, owner: Browser) -> None:
    neighbour = Browser(call)
    guesses = Counter(neighbour.log_in(f"nobody{number}@x.io", "wrong") for number in range(60))
    assert guesses == {401: 30, 429: 30}
    assert owner.log_in() == 200


@pytest.mark.slow
@pytest.mark.usefixtures("db")
def test_a_stranger_who_polls_for_each_refill_delays_no_owner(
    call: Client, auth: Auth, owner: Browser, clock: Clock
) -> None:
    """One address guesses every 10 s for 12 h. The owner signs in, changes the password and resets it meanwhile."""
    poller, guesses, owners = Browser(call, AWAY), Counter[int](), Counter[int]()
    password = PASSWORD
    for number in range(12 * 360):
        clock.advance(10)
        guesses[poller.log_in(password="wrong")] += 1
        if number % 360 == 0:  # every hour
            owners[owner.log_in(password=password)] += 1
            changed = f"{NEW_PASSWORD} {number}"
            owners[owner("PUT", "/password", password=password, new_password=changed).status] += 1
            token = auth.get_reset_password_token(BOB)
            password = f"{PASSWORD} {number}"
            fresh = Browser(call, f"203.0.113.{number // 360}")
            form = {"email": BOB, "reset_token": token, "new_password": password}
            owners[fresh("PUT", "/reset_password", **form).status] += 1
            owners[fresh.log_in(password=password)] += 1
            owners[owner.log_in(password=password)] += 1  # a stranger since the reset, at an address of its own
    assert owners == {200: 60}
    assert guesses[401] <= 12  # 10 at once and the refill until they are used; each refusal empties the bucket again


def test_the_next_attempt_after_a_pause_is_allowed(call: Client, clock: Clock, owner: Browser) -> None:
    poller = Browser(call, AWAY)
    assert Counter(poller.log_in(password="wrong") for _ in range(20)) == {401: 10, 429: 10}
    clock.advance(59)
    assert poller.log_in(password="wrong") == 429
    clock.advance(59)
    assert poller.log_in(password="wrong") == 429
    clock.advance(60)
    assert poller.log_in(password="wrong") == 401


@pytest.mark.slow
def test_a_poller_takes_nothing_from_a_neighbour_who_is_unknown_too(
    call: Client, clock: Clock, auth: Auth, owner: Browser
) -> None:
    auth.register_user("eve@x.io", PASSWORD)
    poller = Browser(call)
    for _ in range(300):  # 50 minutes of one account from one address
        clock.advance(10)
        poller.log_in(password="wrong")
    assert Counter(Browser(call).log_in("nobody@x.io", "wrong") for _ in range(10)) == {401: 10}
    assert Browser(call).log_in("eve@x.io") == 200


@pytest.mark.slow
def test_a_thief_is_a_stranger_after_the_reset(call: Client, auth: Auth, owner: Browser, clock: Clock) -> None:
    thief = Browser(call, AWAY)
    assert thief.log_in() == 200
    owner(
        "PUT", "/reset_password", email=BOB, reset_token=auth.get_reset_password_token(BOB), new_password=NEW_PASSWORD
    )
    guesses = 0
    for number in range(86_400 // 30):  # guesses for a day, from other addresses, too
        clock.advance(30)
        thief.address = f"10.1.{number // 250}.{number % 250}"
        guesses += thief.log_in(password="wrong") == 401
    assert guesses <= 20 + 96  # those of all strangers together
    assert owner.log_in(password=NEW_PASSWORD) == 200


@pytest.mark.slow
def test_code_guesses_with_many_device_cookies_share_one_bucket(call: Client, auth: Auth, clock: Clock, db: DB) -> None:
    """The attacker has the password, and copies of many cookies: some of sign-ins with a code, one of a reset."""
    user = auth.register_user(BOB, PASSWORD)
    owner = Browser(call)
    assert owner.log_in() == 200
    early = Browser(call, AWAY)
    early.cookies["__Host-device"] = owner.device
    clock.advance(60)
    owner("POST", "/totp", password=PASSWORD)
    seed = db.find_user_by(id=user.id).totp_secret or ""
    owner("PUT", "/totp", otp=totp.code(seed, int(clock()) // totp.STEP))
    browsers = [Browser(call, f"10.0.0.{number}") for number in range(20)]
    for browser in browsers:
        clock.advance(totp.STEP)
        assert browser.log_in(otp=totp.code(seed, int(clock()) // totp.STEP)) == 200
    browsers.append(owner)  # which has a cookie since the second factor is on
    wrong = next(code for code in ("000000", "111111") if totp.matching_step(seed, code, int(clock())) is None)
    reset = Browser(call, "10.0.1.1")
    reset.cookies["__Host-device"] = auth.device_cookie(db.find_user_by(id=user.id), None, "reset") or ""

    def guess(number: int) -> int:
        return browsers[number % 21].log_in(otp=wrong)

    assert Counter(guess(number) for number in range(60)) == {401: 5, 429: 55}
    for _ in range(4):  # one hour
        clock.advance(900)
        assert Counter(guess(number) for number in range(21)) == {401: 1, 429: 20}
    clock.advance(DAY)
    others = [early, *(Browser(call, f"10.0.2.{number}") for number in range(6))]  # ``early`` is a stranger's by now
    assert Counter(other.log_in(otp=wrong) for other in others) == {401: 5, 429: 2}
    # A reset's browser is apart from both: the owner's code is accepted after others have used up theirs.
    assert Counter(reset.log_in(otp=wrong) for _ in range(4)) == {401: 4}
    clock.advance(totp.STEP)
    assert reset.log_in(otp=totp.code(seed, int(clock()) // totp.STEP)) == 200


def edit(browser: Browser) -> None:
    """Change the last character of the device cookie."""
    browser.cookies["__Host-device"] = browser.device[:-1] + ("B" if browser.device.endswith("A") else "A")


@pytest.mark.parametrize(
    ("change", "known"),
    [
        (lambda owner, auth, db, clock: clock.advance(91 * DAY), False),
        (lambda owner, auth, db, clock: clock.advance(89 * DAY), True),
        (lambda owner, auth, db, clock: edit(owner), False),
        (lambda owner, auth, db, clock: auth.update_password(auth.get_reset_password_token(BOB), PASSWORD), False),
        (lambda owner, auth, db, clock: auth.change_password(
            auth.create_session(BOB), PASSWORD, PASSWORD, caller=UNCOUNTED), False),
        (lambda owner, auth, db, clock: [db.disable_user(1, 0), db.enable_user(1)], False),
        (lambda owner, auth, db, clock: db.end_sessions(1, devices=True), False),
        (lambda owner, auth, db, clock: db.end_all_sessions(), False),
        (lambda owner, auth, db, clock: auth.destroy_session(1), True),
        (lambda owner, auth, db, clock: db.replace_hash(
            1, db.find_user_by(id=1).hashed_password, passwords.hash_password(PASSWORD, 5)), True),
    ],
    ids=["91 days", "89 days", "edited", "reset", "password change", "disabled", "sessions end", "sessions end --all",
         "signed out", "cost change"],
)  # fmt: skip
def test_when_a_browser_stays_known(
    call: Client, auth: Auth, db: DB, clock: Clock, owner: Browser, change: Any, known: bool
) -> None:
    change(owner, auth, db, clock)
    for number in range(20):
        assert stranger(call, number) == 401
    assert owner.log_in() == (200 if known else 429)


def test_a_cookie_of_another_account_is_a_strangers(call: Client, auth: Auth, owner: Browser) -> None:
    auth.register_user("eve@x.io", PASSWORD)
    eve = Browser(call, AWAY)
    assert eve.log_in("eve@x.io") == 200
    stolen = device.parse(eve.device)[0]
    for number in range(20):
        stranger(call, number)
    assert eve.log_in() == 429
    eve.cookies["__Host-device"] = str(stolen._replace(user_id=1))
    assert eve.log_in() == 429
    assert owner.log_in() == 200


def test_two_different_device_cookies_count_as_none(call: Client, owner: Browser) -> None:
    for number in range(20):
        stranger(call, number)
    cookie = f"__Host-device={owner.device}; __Host-device={owner.device}x"
    form = {"email": BOB, "password": PASSWORD}
    assert call("POST", "/sessions", form, cookie=cookie, REMOTE_ADDR=HOME).status == 429
    assert owner.log_in() == 200


def test_a_copied_cookie_leaves_the_owner_the_chances_of_a_stranger(call: Client, clock: Clock, owner: Browser) -> None:
    thief = Browser(call, AWAY)
    thief.cookies["__Host-device"] = owner.device
    guesses = Counter(thief.log_in(password="wrong") for _ in range(60))
    assert guesses == {401: 20, 429: 40}  # 10 of the device, 10 of the account and this address
    assert owner.log_in() == 200
    clock.advance(60)
    assert thief.log_in(password="wrong") == 401  # the device's refill; the owner's browser has a new token by now
    assert owner.log_in() == 200


@pytest.mark.slow
def test_the_browsers_of_one_account_share_100_attempts(call: Client, owner: Browser) -> None:
    browsers = [Browser(call, f"10.0.0.{number}") for number in range(12)]
    assert {browser.log_in() for browser in browsers} == {200}
    guesses = Counter(browser.log_in(password="wrong") for browser in browsers for _ in range(10))
    assert guesses[401] == 100 + 20  # with the strangers' 20


@pytest.mark.slow
def test_one_network_with_many_people(call: Client, auth: Auth, clock: Clock, owner: Browser) -> None:
    """A stale client polls, somebody tries junk reset tokens, and 60 people sign in for the first time in a minute."""
    people = [f"person{number}@x.io" for number in range(60)]
    for person in people:
        auth.register_user(person, PASSWORD)
    stale, junk, first, owners = Browser(call), Browser(call), Counter[int](), Counter[int]()
    for number, person in enumerate(people):
        clock.advance(1)
        stale.log_in("old@x.io", "wrong")
        junk("PUT", "/reset_password", email=BOB, reset_token="junk", new_password=NEW_PASSWORD)
        first[Browser(call).log_in(person)] += 1
        owners[owner.log_in()] += 1
        if number % 20 == 0:
            token = auth.get_reset_password_token(person)
            form = {"email": person, "reset_token": token, "new_password": NEW_PASSWORD}
            assert Browser(call)("PUT", "/reset_password", **form).status == 200
    assert owners == {200: 60}
    assert first == {200: 60}


# Which request is hashed first


@pytest.fixture
def rank(auth: Auth, settings: Settings) -> Any:
    handlers = Handlers(auth, settings)

    def ranked(browser: Browser, method: str, path: str, **form: str) -> tuple[bool, str]:
        seen: list[tuple[bool, str]] = []

        def application(environ: Any, start_response: Any) -> list[bytes]:
            seen.append(handlers.rank(environ))
            start_response("200 OK", [])
            return []

        asking = Browser(Client(application), browser.address)
        asking.cookies = dict(browser.cookies)
        asking(method, path, **form)
        return seen[0]

    return ranked


def name(email: str) -> str:
    """Return the short name of an account that was not looked up."""
    return hashlib.sha256(email.encode()).hexdigest()[:16]


def test_a_known_browser_goes_first_for_its_own_account_only(
    rank: Any, call: Client, auth: Auth, owner: Browser
) -> None:
    auth.register_user("eve@x.io", PASSWORD)
    assert rank(owner, "POST", "/sessions", email=BOB, password="wrong") == (True, "1")
    assert rank(owner, "POST", "/reset_password", email=BOB) == (True, "1")
    assert rank(owner, "POST", "/sessions", email="eve@x.io", password="wrong") == (False, name("eve@x.io"))
    assert rank(owner, "POST", "/sessions", email="nobody@x.io", password="wrong") == (False, name("nobody@x.io"))
    assert rank(Browser(call), "POST", "/sessions", email=BOB, password=PASSWORD) == (False, name(BOB))
    assert rank(owner, "POST", "/users", email=BOB, password=PASSWORD) == (False, name(BOB))


def test_all_spellings_of_an_email_are_one_account(rank: Any, call: Client, owner: Browser) -> None:
    assert rank(owner, "POST", "/sessions", email=BOB.upper(), password="wrong") == (True, "1")
    assert rank(Browser(call), "POST", "/sessions", email=BOB.upper(), password="wrong") == (False, name(BOB))


def test_an_email_of_any_length_has_a_short_name_and_is_unknown(rank: Any, call: Client, owner: Browser) -> None:
    long = BOB + "x" * 10_000
    assert rank(owner, "POST", "/sessions", email=long, password=PASSWORD) == (False, name(long))
    assert owner("POST", "/sessions", email=long, password=PASSWORD).status == 401


def test_a_live_session_goes_first_for_its_own_changes_only(rank: Any, owner: Browser, auth: Auth, db: DB) -> None:
    change = {"password": PASSWORD, "new_password": NEW_PASSWORD}
    assert rank(owner, "PUT", "/password", **change) == (False, "")
    owner.log_in()
    for method, path in (("PUT", "/password"), ("DELETE", "/profile"), ("POST", "/totp"), ("DELETE", "/sessions")):
        assert rank(owner, method, path, **change) == (True, "1")
    del owner.cookies["__Host-device"]
    assert rank(owner, "POST", "/sessions", email=BOB, password=PASSWORD) == (False, name(BOB))
    assert rank(owner, "POST", "/users", email="new@x.io", password=PASSWORD) == (False, name("new@x.io"))
    db.end_sessions(1)
    assert rank(owner, "PUT", "/password", **change) == (False, "")


def test_a_live_reset_token_goes_first_with_its_own_email(rank: Any, auth: Auth, owner: Browser, call: Client) -> None:
    auth.register_user("eve@x.io", PASSWORD)
    token, spare = auth.get_reset_password_token(BOB), Browser(call)
    form = {"new_password": NEW_PASSWORD}
    assert rank(spare, "PUT", "/reset_password", reset_token=token, email=BOB.upper(), **form) == (True, "1")
    assert rank(spare, "PUT", "/reset_password", reset_token="junk", email=BOB, **form) == (False, name(BOB))
    eve = "eve@x.io"
    assert rank(spare, "PUT", "/reset_password", reset_token=token, email=eve, **form) == (False, name(eve))


def test_attempts_beyond_a_limit_cost_a_browser_its_place(rank: Any, owner: Browser, clock: Clock) -> None:
    for _ in range(9):
        owner.log_in(password="wrong")
    assert rank(owner, "POST", "/sessions", email=BOB, password=PASSWORD) == (True, "1")
    owner.log_in(password="wrong")
    assert rank(owner, "POST", "/sessions", email=BOB, password=PASSWORD) == (False, "1")
    clock.advance(60)
    assert rank(owner, "POST", "/sessions", email=BOB, password=PASSWORD) == (True, "1")


def test_attempts_beyond_a_limit_cost_a_session_its_place(rank: Any, owner: Browser) -> None:
    owner.log_in()
    change = {"password": "wrong", "new_password": NEW_PASSWORD}
    for _ in range(10):
        assert rank(owner, "PUT", "/password", **change) == (True, "1")
        assert owner("PUT", "/password", **change).status == 403
    assert rank(owner, "PUT", "/password", **change) == (False, "1")


def test_many_hashes_within_minutes_cost_an_account_its_place(
    rank: Any, call: Client, auth: Auth, owner: Browser, clock: Clock
) -> None:
    def goes_first() -> bool:
        return bool(rank(owner, "POST", "/sessions", email=BOB, password=PASSWORD)[0])

    for _ in range(29):
        assert owner.log_in() == 200
    assert goes_first()
    owner.log_in()
    assert not goes_first()
    owner.log_in()
    assert rank(owner, "PUT", "/password", password=PASSWORD, new_password=NEW_PASSWORD) == (False, "1")
    assert owner.log_in() == 200  # it loses nothing else
    clock.advance(60)
    assert goes_first()


def test_a_known_browser_that_counts_as_a_stranger_uses_up_its_place_too(rank: Any, owner: Browser, auth: Auth) -> None:
    change = {"password": "wrong", "new_password": NEW_PASSWORD}
    owner.cookies["__Host-session_id"] = auth.create_session(BOB) or ""
    for _ in range(9):
        owner("PUT", "/password", **change)
    assert [owner.log_in(password="wrong") for _ in range(20)] == [401] * 20  # ten of them from the strangers' limits
    assert rank(owner, "PUT", "/password", **change) == (True, "1")
    owner("PUT", "/password", **change)
    owner.cookies["__Host-session_id"] = auth.create_session(BOB) or ""
    assert rank(owner, "PUT", "/password", **change) == (False, "1")


def test_without_a_database_a_request_goes_last(
    rank: Any, owner: Browser, db: DB, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StorageUnavailable("no database")

    monkeypatch.setattr(db, "find_user_by", fail)
    assert rank(owner, "POST", "/sessions", email=BOB, password=PASSWORD) == (False, "")


@pytest.mark.parametrize("body", [b"", b"email=%ff", b"email=a&email=b", b"{", b"x" * 20_000])
def test_a_malformed_request_goes_last_and_fails_in_its_route(
    auth: Auth, settings: Settings, call: Client, body: bytes
) -> None:
    ranked: list[tuple[bool, str]] = []

    def application(environ: Any, start_response: Any) -> list[bytes]:
        ranked.append(Handlers(auth, settings).rank(environ))
        start_response("200 OK", [])
        return []

    Client(application)("POST", "/sessions", body=body)
    assert [preferred for preferred, _ in ranked] == [False]
    assert call("POST", "/sessions", body=body).status in (400, 413)
