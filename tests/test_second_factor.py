"""Two-factor authentication: setting it up, codes at login, recovery codes, switching it off, and requiring it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from auth import (
    UNCOUNTED,
    Auth,
    AuthError,
    Caller,
    CodeRequired,
    LoginFailed,
    ReauthenticationFailed,
    SecondFactorNotShown,
    SecondFactorRejected,
    SecondFactorRequired,
    SessionCodeRequired,
    SessionRequired,
    TokenRejected,
    TooManyAttempts,
    _hash_password,
)
from credentials import totp
from settings import Settings
from storage import DB, User
from tests import accounts
from tests.accounts import (
    ACCOUNT_CHANGES,
    DAY,
    EMAIL,
    ENROLMENT,
    FOREIGN_ADDRESS,
    NEW_PASSWORD,
    OTHER,
    OWN_ADDRESS,
    PASSWORD,
    SESSION_ACTIONS,
    Action,
    Factor,
    Query,
    Row,
    after_code_check,
    after_password_check,
    at_once,
    begin,
    current_code,
    digest,
    in_production,
    live,
    sign_in,
    switch_off,
    switch_on,
)
from tests.conftest import COST, Clock

user, other_user, row, query = accounts.user, accounts.other_user, accounts.row, accounts.query
three_sessions, hash_calls, factor = accounts.three_sessions, accounts.hash_calls, accounts.factor

WRONG_CODE = r"^wrong one-time code$"


# Setting it up and switching it off


@pytest.mark.both_engines
def test_a_second_factor_works_from_its_setup_to_its_removal(auth: Auth, clock: Clock, user: User, row: Row) -> None:
    mine = sign_in(auth)
    former = mine
    seed, uri, qr_code, mine = auth.begin_totp(mine, PASSWORD, caller=UNCOUNTED)
    assert live(auth, former, mine) == [False, True]
    assert row().session_id == digest(mine)
    assert uri == totp.uri(seed, EMAIL, "authsvc")
    assert qr_code == totp.qr_code(uri)
    assert (row().totp_secret, row().totp_since) == (seed, None)
    confirmed, mine, recovery_codes = auth.confirm_totp(mine, current_code(seed, clock), caller=UNCOUNTED)
    assert confirmed.id == user.id
    assert len(set(recovery_codes)) == 10
    assert (row().totp_secret, row().totp_since) == (seed, int(clock()))
    clock.advance(30)
    with pytest.raises(CodeRequired):
        sign_in(auth)
    mine = sign_in(auth, otp=current_code(seed, clock))
    clock.advance(30)
    removed, mine = auth.remove_totp(mine, PASSWORD, current_code(seed, clock), caller=UNCOUNTED)
    assert removed.id == user.id
    assert live(auth, mine) == [True]
    assert (row().totp_secret, row().totp_since) == (None, None)
    assert live(auth, sign_in(auth)) == [True]


def test_an_app_shows_the_host_of_a_production_service(db: DB, settings: Settings, clock: Clock, user: User) -> None:
    auth = Auth(db, in_production(settings), clock)
    seed, uri, *_ = auth.begin_totp(auth.create_session(EMAIL), PASSWORD, caller=UNCOUNTED)
    assert uri == totp.uri(seed, EMAIL, "auth.example.com")


def test_a_login_needs_no_code_before_the_seed_is_confirmed(auth: Auth, clock: Clock, user: User) -> None:
    begin(auth, auth.create_session(EMAIL))
    assert live(auth, sign_in(auth)) == [True]
    assert live(auth, sign_in(auth, otp="000000")) == [True]


def test_a_new_seed_replaces_an_unconfirmed_one(auth: Auth, clock: Clock, user: User) -> None:
    mine = auth.create_session(EMAIL)
    replaced, mine = begin(auth, mine)
    seed, mine = begin(auth, mine)
    with pytest.raises(ReauthenticationFailed):
        auth.confirm_totp(mine, current_code(replaced, clock), caller=UNCOUNTED)
    auth.confirm_totp(mine, current_code(seed, clock), caller=UNCOUNTED)


def test_a_setup_needs_the_password(auth: Auth, user: User, row: Row) -> None:
    mine = auth.create_session(EMAIL)
    with pytest.raises(ReauthenticationFailed, match=r"^wrong password$"):
        auth.begin_totp(mine, "wrong", caller=UNCOUNTED)
    assert row().totp_secret is None


@pytest.mark.parametrize("later", [-2, 2, None])
def test_a_second_factor_is_switched_on_only_with_a_right_code(
    auth: Auth, clock: Clock, user: User, row: Row, query: Query, later: int | None
) -> None:
    mine = auth.create_session(EMAIL)
    seed, mine = begin(auth, mine)
    with pytest.raises(ReauthenticationFailed, match=WRONG_CODE):
        auth.confirm_totp(mine, "" if later is None else current_code(seed, clock, later), caller=UNCOUNTED)
    assert row().totp_since is None
    assert query("SELECT * FROM recovery_codes") == []
    assert live(auth, mine) == [True]


def test_a_setup_that_was_not_begun_cannot_be_confirmed(auth: Auth, user: User) -> None:
    mine = auth.create_session(EMAIL)
    with pytest.raises(SecondFactorRejected, match=r"^no second factor is being set up$"):
        auth.confirm_totp(mine, "000000", caller=UNCOUNTED)


def test_a_second_factor_cannot_be_switched_on_twice(auth: Auth, clock: Clock, factor: Factor, row: Row) -> None:
    before = row()
    with pytest.raises(SecondFactorRejected, match=r"^a second factor is on already$"):
        begin(auth, factor.session_id)
    with pytest.raises(SecondFactorRejected, match=r"^no second factor is being set up$"):
        auth.confirm_totp(factor.session_id, current_code(factor.seed, clock), caller=UNCOUNTED)
    assert row() == before
    assert live(auth, sign_in(auth, otp=factor.recovery_codes[0])) == [True]


def test_a_second_factor_that_is_not_on_cannot_be_switched_off(
    auth: Auth, clock: Clock, hash_calls: list[bytes]
) -> None:
    mine = str(auth.create_session(EMAIL))
    with pytest.raises(SecondFactorRejected, match=r"^no second factor is on$"):
        switch_off(auth, mine, "000000")
    assert hash_calls == []
    seed, mine = begin(auth, mine)
    with pytest.raises(SecondFactorRejected, match=r"^no second factor is on$"):
        switch_off(auth, mine, current_code(seed, clock))


@pytest.mark.both_engines
def test_switching_it_on_or_off_leaves_this_session_alone_under_a_new_id(
    three_sessions: Auth, clock: Clock, user: User, other_user: User, row: Row
) -> None:
    auth = three_sessions
    theirs = auth.create_session(OTHER)
    elsewhere, mine = auth.create_session(EMAIL), auth.create_session(EMAIL)
    seed, mine = begin(auth, mine)
    assert live(auth, elsewhere, mine) == [True, True]
    _, new_id, _ = auth.confirm_totp(mine, current_code(seed, clock), caller=UNCOUNTED)
    assert live(auth, elsewhere, mine, new_id, theirs) == [False, False, True, True]
    assert row().session_id == digest(new_id)
    clock.advance(30)
    elsewhere = sign_in(auth, otp=current_code(seed, clock))
    clock.advance(30)
    last = switch_off(auth, new_id, current_code(seed, clock))
    assert live(auth, elsewhere, new_id, last, theirs) == [False, False, True, True]
    assert row().session_id == digest(last)


@pytest.mark.both_engines
def test_switching_it_on_or_off_revokes_a_reset_token(auth: Auth, clock: Clock, user: User) -> None:
    mine = auth.create_session(EMAIL)
    seed, mine = begin(auth, mine)
    token = auth.get_reset_password_token(EMAIL)
    _, mine, _ = auth.confirm_totp(mine, current_code(seed, clock), caller=UNCOUNTED)
    with pytest.raises(TokenRejected):
        auth.update_password(token, NEW_PASSWORD)
    token = auth.get_reset_password_token(EMAIL)
    switch_off(auth, mine, current_code(seed, clock, 1))
    with pytest.raises(TokenRejected):
        auth.update_password(token, NEW_PASSWORD)


@pytest.mark.parametrize(("password", "right_code"), [("wrong", True), (PASSWORD, False), ("wrong", False)])
def test_switching_it_off_needs_the_password_and_a_code(
    auth: Auth, clock: Clock, factor: Factor, row: Row, password: str, right_code: bool
) -> None:
    before = row()
    code = current_code(factor.seed, clock)
    with pytest.raises(ReauthenticationFailed) as refusal:
        switch_off(auth, factor.session_id, code if right_code else "000000", password)
    assert refusal.value.message == ("wrong password" if password == "wrong" else "wrong one-time code")
    assert row() == before
    assert live(auth, factor.session_id) == [True]
    switch_off(auth, factor.session_id, code)  # a wrong password does not use up the code


@pytest.mark.parametrize("address", [FOREIGN_ADDRESS, "unknown", "", None], ids=repr)
@pytest.mark.parametrize("password", ["wrong", PASSWORD])
def test_an_attempt_to_switch_it_off_is_counted_for_every_address_but_none(
    auth: Auth, factor: Factor, query: Query, password: str, address: str | None
) -> None:
    assert query("SELECT * FROM throttle") == []
    with suppress(AuthError):
        auth.remove_totp(factor.session_id, password, "000000", caller=Caller(address))
    assert (query("SELECT * FROM throttle") != []) is (address is not None)


@pytest.mark.both_engines
def test_a_sign_out_during_a_confirmation_makes_it_fail(
    auth: Auth, clock: Clock, user: User, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = auth.create_session(EMAIL)
    seed, mine = begin(auth, mine)
    after_code_check(monkeypatch, lambda: auth.log_out(mine))
    with pytest.raises(SessionRequired):
        auth.confirm_totp(mine, current_code(seed, clock), caller=UNCOUNTED)
    assert row().totp_since is None
    assert live(auth, sign_in(auth)) == [True]


@pytest.mark.both_engines
def test_a_seed_replaced_while_its_code_is_checked_is_not_switched_on(
    auth: Auth, clock: Clock, user: User, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = auth.create_session(EMAIL)
    seed, mine = begin(auth, mine)
    after_code_check(monkeypatch, lambda: begin(auth, mine))
    with pytest.raises(SessionRequired):
        auth.confirm_totp(mine, current_code(seed, clock), caller=UNCOUNTED)
    assert row().totp_since is None


@pytest.mark.both_engines
def test_a_sign_out_during_a_removal_makes_it_fail(
    auth: Auth, clock: Clock, factor: Factor, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_code_check(monkeypatch, lambda: auth.log_out(factor.session_id))
    with pytest.raises(SessionRequired):
        switch_off(auth, factor.session_id, current_code(factor.seed, clock))
    assert row().totp_secret == factor.seed
    with pytest.raises(CodeRequired):
        sign_in(auth)


# A code at login


@pytest.mark.parametrize("later", [-1, 0, 1])
def test_a_code_of_this_step_or_the_next_or_previous_signs_in(
    auth: Auth, clock: Clock, factor: Factor, later: int
) -> None:
    clock.advance(30)
    assert live(auth, sign_in(auth, otp=current_code(factor.seed, clock, later))) == [True]


@pytest.mark.parametrize("later", [-2, 2])
def test_a_code_of_any_other_step_is_refused(auth: Auth, clock: Clock, factor: Factor, later: int) -> None:
    clock.advance(60)
    with pytest.raises(LoginFailed, match=WRONG_CODE) as refusal:
        sign_in(auth, otp=current_code(factor.seed, clock, later))
    assert refusal.value.user_id == 1
    assert live(auth, factor.session_id) == [True]


@pytest.mark.both_engines
def test_a_malformed_code_is_a_wrong_one(auth: Auth, factor: Factor) -> None:
    for otp in ("0", "00000", "0000000", "１２３４５６", "\ud800", "\0", "a" * 2000, " ", "'"):
        with pytest.raises(LoginFailed, match=WRONG_CODE):
            sign_in(auth, otp=otp)


@pytest.mark.both_engines
def test_a_code_works_once(auth: Auth, clock: Clock, factor: Factor) -> None:
    code = current_code(factor.seed, clock)
    mine = sign_in(auth, otp=code)
    for _ in range(2):
        with pytest.raises(LoginFailed, match=WRONG_CODE):
            sign_in(auth, otp=code)
        with pytest.raises(ReauthenticationFailed, match=WRONG_CODE):
            switch_off(auth, mine, code)
        clock.advance(30)
    assert live(auth, mine) == [True]


@pytest.mark.both_engines
def test_the_code_that_confirmed_the_setup_does_not_sign_in(auth: Auth, clock: Clock, user: User) -> None:
    mine = auth.create_session(EMAIL)
    seed, mine = begin(auth, mine)
    code = current_code(seed, clock)
    auth.confirm_totp(mine, code, caller=UNCOUNTED)
    with pytest.raises(LoginFailed, match=WRONG_CODE):
        sign_in(auth, otp=code)
    assert live(auth, sign_in(auth, otp=current_code(seed, clock, 1))) == [True]


@pytest.mark.both_engines
def test_no_earlier_code_works_after_a_later_one(auth: Auth, clock: Clock, factor: Factor) -> None:
    clock.advance(60)
    sign_in(auth, otp=current_code(factor.seed, clock, 1))
    for later in (-1, 0, 1):
        with pytest.raises(LoginFailed):
            sign_in(auth, otp=current_code(factor.seed, clock, later))
    clock.advance(30)
    sign_in(auth, otp=current_code(factor.seed, clock, 1))


@pytest.mark.parametrize("seconds", [DAY, -DAY, 301, -331])
def test_a_code_works_again_once_after_a_jump_of_the_clock(
    auth: Auth, clock: Clock, factor: Factor, seconds: int
) -> None:
    sign_in(auth, otp=current_code(factor.seed, clock))
    clock.advance(seconds)
    code = current_code(factor.seed, clock)
    sign_in(auth, otp=code)
    with pytest.raises(LoginFailed):
        sign_in(auth, otp=code)


@pytest.mark.both_engines
def test_codes_still_work_after_the_clock_was_a_day_ahead(auth: Auth, clock: Clock, factor: Factor) -> None:
    clock.advance(DAY)
    sign_in(auth, otp=current_code(factor.seed, clock))
    clock.advance(-DAY)
    code = current_code(factor.seed, clock)
    sign_in(auth, otp=code)
    with pytest.raises(LoginFailed):
        sign_in(auth, otp=code)


@pytest.mark.parametrize("seconds", [30, 60, 300])
def test_no_code_works_twice_after_the_clock_was_set_back_a_little(
    auth: Auth, clock: Clock, factor: Factor, seconds: int
) -> None:
    clock.advance(600)
    used = current_code(factor.seed, clock, -1)
    sign_in(auth, otp=used)
    sign_in(auth, otp=current_code(factor.seed, clock))
    clock.advance(-seconds)
    for code in (used, current_code(factor.seed, clock)):
        with pytest.raises(LoginFailed):
            sign_in(auth, otp=code)


def test_a_wrong_password_is_refused_alike_with_any_code(auth: Auth, clock: Clock, factor: Factor) -> None:
    code, recovery_code = current_code(factor.seed, clock), factor.recovery_codes[0]
    refusals = set()
    for email, otp in ((EMAIL, code), (EMAIL, ""), (EMAIL, "000000"), (EMAIL, recovery_code), (OTHER, code)):
        with pytest.raises(LoginFailed) as refusal:
            sign_in(auth, "wrong", otp, email=email)
        refusals.add((type(refusal.value), str(refusal.value), refusal.value.message))
    assert refusals == {(LoginFailed, "wrong email or password", "wrong email or password")}
    # A wrong password uses up neither code.
    sign_in(auth, otp=code)
    sign_in(auth, otp=recovery_code)


@pytest.mark.both_engines
def test_a_code_works_for_its_own_user_only(auth: Auth, clock: Clock, other_user: User) -> None:
    mine, theirs = switch_on(auth, clock), switch_on(auth, clock, OTHER)
    for code in (current_code(theirs.seed, clock), theirs.recovery_codes[0]):
        with pytest.raises(LoginFailed):
            sign_in(auth, otp=code)
    sign_in(auth, otp=theirs.recovery_codes[0], email=OTHER)
    sign_in(auth, otp=current_code(theirs.seed, clock), email=OTHER)
    sign_in(auth, otp=current_code(mine.seed, clock))


@pytest.mark.both_engines
@pytest.mark.parametrize("kind", ["code", "recovery code"])
def test_of_8_threads_with_one_code_one_signs_in(three_sessions: Auth, clock: Clock, user: User, kind: str) -> None:
    factor = switch_on(three_sessions, clock)
    otp = current_code(factor.seed, clock) if kind == "code" else factor.recovery_codes[0]
    results = at_once(8, lambda: sign_in(three_sessions, otp=otp))
    assert sorted(type(result).__name__ for result in results) == ["LoginFailed"] * 7 + ["str"]


@pytest.mark.both_engines
def test_of_8_concurrent_confirmations_one_succeeds(auth: Auth, clock: Clock, user: User, query: Query) -> None:
    mine = auth.create_session(EMAIL)
    seed, mine = begin(auth, mine)
    code = current_code(seed, clock)
    results = at_once(8, lambda: auth.confirm_totp(mine, code, caller=UNCOUNTED))
    assert sum(isinstance(result, tuple) for result in results) == 1
    assert {type(result) for result in results} <= {tuple, SessionRequired, SecondFactorRejected}
    assert query("SELECT count(*) FROM recovery_codes") == [(10,)]


# Changes during a login


@pytest.mark.both_engines
def test_a_login_needs_a_code_if_the_factor_is_switched_on_meanwhile(
    auth: Auth, clock: Clock, user: User, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = auth.create_session(EMAIL)
    seed, mine = begin(auth, mine)
    after_password_check(monkeypatch, lambda: auth.confirm_totp(mine, current_code(seed, clock), caller=UNCOUNTED))
    with pytest.raises(CodeRequired):
        sign_in(auth)
    assert query("SELECT count(*) FROM sessions") == [(1,)]


@pytest.mark.both_engines
def test_a_login_needs_a_code_of_the_new_factor_if_it_is_replaced_meanwhile(
    auth: Auth, clock: Clock, factor: Factor, db: DB, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace_factor() -> None:
        db.remove_totp(1)
        switch_on(auth, clock)
        db.end_sessions(1)

    after_code_check(monkeypatch, replace_factor)
    with pytest.raises(LoginFailed, match=WRONG_CODE):
        sign_in(auth, otp=current_code(factor.seed, clock, 1))  # the new factor has not used this step
    assert query("SELECT * FROM sessions") == []


@pytest.mark.both_engines
@pytest.mark.parametrize("kind", ["code", "recovery code"])
def test_a_password_reset_while_a_code_is_checked_starts_no_session(
    auth: Auth, clock: Clock, factor: Factor, query: Query, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    token = auth.get_reset_password_token(EMAIL)
    after_code_check(monkeypatch, lambda: auth.update_password(token, NEW_PASSWORD))
    with pytest.raises(LoginFailed, match=r"^wrong email or password$"):
        sign_in(auth, otp=current_code(factor.seed, clock) if kind == "code" else factor.recovery_codes[0])
    assert query("SELECT * FROM sessions") == []


@pytest.mark.both_engines
def test_a_new_hash_while_a_code_is_checked_does_not_need_a_second_code(
    auth: Auth, clock: Clock, factor: Factor, db: DB, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = _hash_password(PASSWORD, COST)
    after_code_check(monkeypatch, lambda: db.update_user(1, hashed_password=hashed))
    assert live(auth, sign_in(auth, otp=current_code(factor.seed, clock))) == [True]


# A new password


@pytest.mark.both_engines
def test_a_second_factor_survives_a_reset_of_the_password(auth: Auth, clock: Clock, factor: Factor, row: Row) -> None:
    auth.update_password(auth.get_reset_password_token(EMAIL), NEW_PASSWORD)
    assert row().totp_secret == factor.seed
    assert live(auth, factor.session_id) == [False]
    with pytest.raises(CodeRequired):
        sign_in(auth, NEW_PASSWORD)
    with pytest.raises(LoginFailed):
        sign_in(auth, NEW_PASSWORD, "000000")
    sign_in(auth, NEW_PASSWORD, current_code(factor.seed, clock))
    sign_in(auth, NEW_PASSWORD, factor.recovery_codes[0])


@pytest.mark.both_engines
def test_a_second_factor_survives_a_change_of_the_password(auth: Auth, clock: Clock, factor: Factor) -> None:
    auth.change_password(factor.session_id, PASSWORD, NEW_PASSWORD, caller=UNCOUNTED)
    with pytest.raises(CodeRequired):
        sign_in(auth, NEW_PASSWORD)
    sign_in(auth, NEW_PASSWORD, factor.recovery_codes[0])


# Recovery codes


@pytest.mark.both_engines
def test_each_of_ten_recovery_codes_signs_in_once(auth: Auth, clock: Clock, factor: Factor, query: Query) -> None:
    assert len(factor.recovery_codes) == 10
    for spent, code in enumerate(factor.recovery_codes, start=1):
        typed = code.upper().replace("-", " ")
        assert live(auth, sign_in(auth, otp=typed)) == [True]
        assert query("SELECT count(*) FROM recovery_codes") == [(10 - spent,)]
    for code in factor.recovery_codes:
        with pytest.raises(LoginFailed, match=WRONG_CODE):
            sign_in(auth, otp=code)
    sign_in(auth, otp=current_code(factor.seed, clock))


def test_a_recovery_code_switches_the_factor_off(auth: Auth, factor: Factor) -> None:
    switch_off(auth, factor.session_id, factor.recovery_codes[0])
    assert live(auth, sign_in(auth)) == [True]


def test_a_recovery_code_does_not_confirm_a_setup(auth: Auth, factor: Factor) -> None:
    mine = switch_off(auth, factor.session_id, factor.recovery_codes[0])
    _, mine = begin(auth, mine)
    with pytest.raises(ReauthenticationFailed):
        auth.confirm_totp(mine, factor.recovery_codes[1], caller=UNCOUNTED)


@pytest.mark.both_engines
def test_recovery_codes_are_deleted_with_their_factor(auth: Auth, clock: Clock, factor: Factor, query: Query) -> None:
    switch_off(auth, factor.session_id, current_code(factor.seed, clock))
    assert query("SELECT * FROM recovery_codes") == []
    again = switch_on(auth, clock)
    assert query("SELECT count(*) FROM recovery_codes") == [(10,)]
    for code in (factor.recovery_codes[0], current_code(factor.seed, clock)):
        with pytest.raises(LoginFailed):
            sign_in(auth, otp=code)
    sign_in(auth, otp=again.recovery_codes[0])


def test_the_files_hold_no_recovery_code(auth: Auth, factor: Factor, tmp_path: Path) -> None:
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for code in factor.recovery_codes:
        assert totp.recovery_hash(code).encode() in stored
        assert code.encode() not in stored
        assert code.replace("-", "").encode() not in stored


def test_the_repr_of_a_user_holds_no_seed(auth: Auth, factor: Factor, row: Row) -> None:
    assert factor.seed not in repr(row())


# Changes of the account: the code is asked for again

DIRECT = UNCOUNTED._replace(direct=True)
SENSITIVE_CHANGES: dict[str, Callable[..., object]] = {
    "change password": lambda auth, held, otp, **more: auth.change_password(
        held, PASSWORD, NEW_PASSWORD, otp, **{"caller": DIRECT, **more}
    ),
    "delete account": lambda auth, held, otp, **more: auth.delete_account(
        held, PASSWORD, otp, **{"caller": DIRECT, **more}
    ),
    "ask for a new email": lambda auth, held, otp, **more: auth.begin_email_change(
        held, PASSWORD, "new@x.io", otp, **{"caller": DIRECT, **more}
    ),
    "create an access token": lambda auth, held, otp, **more: auth.create_token(
        held, PASSWORD, "git", "", otp, **{"caller": DIRECT, **more}
    ),
}
sensitive = pytest.mark.parametrize("change", SENSITIVE_CHANGES.values(), ids=SENSITIVE_CHANGES)


@pytest.mark.both_engines
@sensitive
@pytest.mark.parametrize("way", ["confirmed", "code", "recovery code"])
def test_a_change_needs_no_code_for_ten_minutes_after_one(
    auth: Auth, clock: Clock, factor: Factor, change: Callable[..., object], way: str
) -> None:
    clock.advance(-totp.STEP)
    mine = factor.session_id
    if way != "confirmed":
        clock.advance(10_000)
        mine = sign_in(auth, otp=current_code(factor.seed, clock) if way == "code" else factor.recovery_codes[0])
    clock.advance(600)
    with pytest.raises(SessionCodeRequired, match=r"^one-time code required$"):
        change(auth, mine, "")
    clock.advance(-1)
    change(auth, mine, "")


@sensitive
def test_a_stolen_session_and_the_password_change_nothing_without_a_code(
    three_sessions: Auth, clock: Clock, factor: Factor, row: Row, query: Query, change: Callable[..., object]
) -> None:
    auth = three_sessions
    mine, unshown = factor.session_id, auth.create_session(EMAIL)  # the latter as from before an upgrade
    clock.advance(600)
    columns = "SELECT session_hash, factor_at FROM sessions"  # the last use of a session changes
    before = row(), query(columns)
    for held in (mine, unshown):
        with pytest.raises(SessionCodeRequired):
            change(auth, held, "")
        for wrong in ("000000", "wrong", current_code(factor.seed, clock, 9)):
            with pytest.raises(ReauthenticationFailed, match=WRONG_CODE):
                change(auth, held, wrong)
    assert (row(), query(columns)) == before
    assert (SessionCodeRequired.status, ReauthenticationFailed.status) == (403, 403)


@sensitive
def test_wrong_codes_at_a_change_are_limited_like_those_at_a_sign_in(
    auth: Auth, clock: Clock, factor: Factor, change: Callable[..., object]
) -> None:
    clock.advance(600)
    for _ in range(5):
        with pytest.raises(ReauthenticationFailed):
            change(auth, factor.session_id, "000000", caller=DIRECT._replace(address=OWN_ADDRESS))
    code = current_code(factor.seed, clock)
    with pytest.raises(TooManyAttempts):
        change(auth, factor.session_id, code, caller=DIRECT._replace(address=OWN_ADDRESS))
    with pytest.raises(TooManyAttempts):
        sign_in(auth, otp=code, caller=Caller(FOREIGN_ADDRESS))


def test_a_wrong_password_is_refused_before_the_code_is_asked_for(auth: Auth, clock: Clock, factor: Factor) -> None:
    clock.advance(600)
    for otp in ("", current_code(factor.seed, clock)):
        with pytest.raises(ReauthenticationFailed, match=r"^wrong password$"):
            auth.change_password(factor.session_id, "wrong", NEW_PASSWORD, otp, caller=UNCOUNTED)
    sign_in(auth, otp=current_code(factor.seed, clock))  # the code was not spent


@pytest.mark.both_engines
@pytest.mark.parametrize("recovery", [False, True])
def test_a_code_that_a_change_asked_for_counts_for_the_next_change(
    auth: Auth, clock: Clock, factor: Factor, recovery: bool
) -> None:
    clock.advance(600)
    code = factor.recovery_codes[0] if recovery else current_code(factor.seed, clock)
    _, mine = auth.change_password(factor.session_id, PASSWORD, NEW_PASSWORD, code, caller=UNCOUNTED)
    with pytest.raises(LoginFailed, match=WRONG_CODE):
        sign_in(auth, NEW_PASSWORD, code)
    clock.advance(599)
    _, mine = auth.change_password(mine, NEW_PASSWORD, PASSWORD, caller=UNCOUNTED)
    clock.advance(1)
    with pytest.raises(SessionCodeRequired):
        auth.delete_account(mine, PASSWORD, caller=UNCOUNTED)


@pytest.mark.parametrize(("ahead", "counts"), [(300, True), (301, False)])
def test_a_factor_shown_in_the_future_does_not_count(
    auth: Auth, db: DB, clock: Clock, factor: Factor, ahead: int, counts: bool
) -> None:
    db.record_factor(1, int(clock()) + ahead)
    with nullcontext() if counts else pytest.raises(SessionCodeRequired):
        auth.change_password(factor.session_id, PASSWORD, NEW_PASSWORD, caller=UNCOUNTED)


def test_switching_it_off_needs_a_code_at_any_time(auth: Auth, clock: Clock, factor: Factor) -> None:
    for seconds in (0, -30, -60):  # also at the time of the code that confirmed it, and where the clock was set back
        clock.advance(seconds)
        with pytest.raises(SessionCodeRequired):
            switch_off(auth, factor.session_id, "")
        with pytest.raises(ReauthenticationFailed, match=WRONG_CODE):
            switch_off(auth, factor.session_id, "000000")


# A required second factor


@pytest.fixture
def strict(db: DB, settings: Settings, clock: Clock, user: User) -> Auth:
    """The rules of a service where every user must have a second factor."""
    return Auth(db, replace(settings, require_second_factor=True), clock)


FORBIDDEN_ACTIONS: dict[str, Action] = {
    **SESSION_ACTIONS,
    **ACCOUNT_CHANGES,
    "identify": lambda auth, held: auth.identify(held),
}


@pytest.mark.parametrize("act", FORBIDDEN_ACTIONS.values(), ids=FORBIDDEN_ACTIONS)
def test_a_session_without_a_required_factor_can_only_set_one_up(strict: Auth, row: Row, act: Action) -> None:
    mine = sign_in(strict)
    before = row()
    with pytest.raises(SecondFactorRequired, match=r"^set up a second factor first$"):
        act(strict, mine)
    assert row() == before
    assert strict.get_user_from_session_id(mine) is None
    assert strict.identify(mine, enrolling=True).email == EMAIL


@pytest.mark.both_engines
@pytest.mark.parametrize(
    "act", [*FORBIDDEN_ACTIONS.values(), *ENROLMENT.values()], ids=[*FORBIDDEN_ACTIONS, *ENROLMENT]
)
def test_a_session_that_has_not_shown_the_required_factor_can_only_sign_out(
    strict: Auth, clock: Clock, row: Row, act: Action
) -> None:
    factor = switch_on(strict, clock)
    mine = strict.create_session(EMAIL)  # without the code, as a session from before an upgrade
    before = row()
    for _ in range(2):
        with pytest.raises(SecondFactorNotShown, match=r"^sign in with your second factor$"):
            act(strict, mine)
        clock.advance(30)
    assert row() == before
    assert strict.get_user_from_session_id(mine) is None
    strict.log_out(mine)
    with pytest.raises(SessionRequired, match=r"^not logged in$"):
        strict.identify(mine)
    assert live(strict, sign_in(strict, otp=current_code(factor.seed, clock))) == [True]


def test_a_session_without_a_required_factor_can_sign_out(strict: Auth, query: Query) -> None:
    strict.log_out(sign_in(strict))
    assert query("SELECT * FROM sessions") == []


@pytest.mark.both_engines
def test_a_session_that_switches_a_required_factor_off_is_not_live(
    db: DB, settings: Settings, clock: Clock, user: User
) -> None:
    queued: list[Callable[[], object]] = []
    auth = Auth(db, replace(settings, require_second_factor=True), clock, queued.append)
    factor = switch_on(auth, clock)
    clock.advance(30)
    mine = switch_off(auth, factor.session_id, current_code(factor.seed, clock))
    for write in queued:  # a service records the code after its answer
        write()
    assert live(auth, mine) == [False]
    assert begin(auth, mine)


@pytest.mark.both_engines
def test_a_session_is_live_once_it_has_set_up_a_required_factor(strict: Auth, clock: Clock) -> None:
    mine = sign_in(strict)
    seed, mine = begin(strict, mine)
    assert live(strict, mine) == [False]  # an unconfirmed seed is not enough
    _, mine, _ = strict.confirm_totp(mine, current_code(seed, clock), caller=UNCOUNTED)
    assert live(strict, mine) == [True]
    clock.advance(30)
    assert live(strict, sign_in(strict, otp=current_code(seed, clock))) == [True]


def test_switching_a_required_factor_off_restricts_the_session_again(strict: Auth, clock: Clock) -> None:
    factor = switch_on(strict, clock)
    mine = switch_off(strict, factor.session_id, current_code(factor.seed, clock))
    assert live(strict, mine) == [False]
    begin(strict, mine)
