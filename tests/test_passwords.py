"""Password hashing: the stored forms, verification and its timing."""

from __future__ import annotations

import base64
import hashlib
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import bcrypt
import pytest

from credentials import passwords
from tests.cases import each
from tests.conftest import COST

PLAIN = re.compile(rb"\$2b\$04\$[./A-Za-z0-9]{53}")
LONG = re.compile(rb"\$bcrypt-sha256\$v=2,t=2b,r=4\$[./A-Za-z0-9]{22}\$[./A-Za-z0-9]{31}")

CYRILLIC = "пароль" * 43  # 258 letters, 516 bytes

# Hashes from other programs: passlib's documentation, and the test vectors of crypt_blowfish. Its three prefixes mean
# the same bcrypt for ASCII passwords.
PASSLIB = "$bcrypt-sha256$v=2,t=2b,r=12$n79VH.0Q2TMWmt3Oqt9uku$Kq4Noyk3094Y2QlB8NdRT8SvGiI4ft2"
PASSLIB_FIRST = "$bcrypt-sha256$2a,8$UE3dIZ.0I6XZtA/LdMrrle$Ag04/5zYu./12.OSqInXZnJ.WZoh1ua"  # its version 1
CRYPT_BLOWFISH = "$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW"

UNREADABLE = [
    b"",
    b"nothash",
    b"plain text of the password",
    b"5f4dcc3b5aa765d61d8327deb882cf99",
    b"$1$salt$qJH7.N4xYta3aEG/dfqo/0",
    b"$2b$04$",
    b"$2b$04$" + b"." * 52,
    b"$2b$04$" + b"." * 54,
    b"$2b$04$" + b"." * 53 + b"\n",
    b"$2b$04$" + b"." * 52 + b"\xff",
    b"$2b$03$" + b"." * 53,
    b"$2b$32$" + b"." * 53,
    b"$2b$99$" + b"." * 53,
    b"$2z$04$" + b"." * 53,
    b"$2b$04$" + b"." * 21 + b"+" + b"." * 31,
    b"$bcrypt-sha256$v=1,t=2b,r=4$" + b"." * 22 + b"$" + b"." * 31,
    b"$bcrypt-sha256$2y,4$" + b"." * 22 + b"$" + b"." * 31,
    b"$bcrypt-sha256$2a,04$" + b"." * 22 + b"$" + b"." * 31,
    b"$bcrypt-sha256$2a,3$" + b"." * 22 + b"$" + b"." * 31,
    b"$bcrypt-sha256$2a,4$" + b"." * 22 + b"." * 31,
    b"$bcrypt-sha256$v=2,t=2b,r=3$" + b"." * 22 + b"$" + b"." * 31,
    b"$bcrypt-sha256$v=2,t=2b,r=99$" + b"." * 22 + b"$" + b"." * 31,
    b"$bcrypt-sha256$v=2,t=2b,r=4$" + b"." * 21 + b"/$" + b"." * 31,
    b"$bcrypt-sha256$v=2,t=2b,r=4$" + b"." * 22 + b"$" + b"." * 30,
]


def hashed(password: str) -> bytes:
    return passwords.hash_password(password, COST)


def verifies(password: str, stored: str | bytes | None) -> bool:
    return passwords.verify(password, stored, COST)


@each("password", ["a" * 71, "a" * 72, "é" * 36, " ", "b4l0u"])
def test_passwords_up_to_72_bytes_are_stored_as_plain_bcrypt(password: str) -> None:
    stored = hashed(password)
    assert PLAIN.fullmatch(stored)
    assert bcrypt.checkpw(password.encode(), stored)


@each("password", ["a" * 73, "a" * 74, "é" * 36 + "a", "a\0", "\0", CYRILLIC, "a" * 1024])
def test_passwords_over_72_bytes_or_with_nul_are_stored_as_bcrypt_sha256(password: str) -> None:
    assert LONG.fullmatch(hashed(password))


@each("length", [1, 71, 72, 73, 74, 1023, 1024])
def test_every_byte_of_a_password_counts(length: int) -> None:
    password = "a" * length
    stored = hashed(password)
    assert verifies(password, stored)
    assert not verifies(password[:-1] + "b", stored)
    assert not verifies(password[:-1], stored)
    assert not verifies(password + "a", stored)


def test_the_last_letter_of_a_long_cyrillic_password_counts() -> None:
    stored = hashed(CYRILLIC)
    assert verifies(CYRILLIC, stored)
    assert not verifies(CYRILLIC[:-1] + "я", stored)


@each(
    ("password", "other"),
    [
        ("a", "a\0a"),  # bcrypt repeats its key, with a NUL in between, so it cannot tell these two apart
        ("ab", "ab\0ab\0ab"),
        ("abc\0def", "abc\0xyz"),
        ("abc", "abc\0"),
        ("pass", " pass"),
        ("pass", "pass "),
        ("pass", "pass\n"),
        ("\u00e9", "e\u0301"),
        ("fi", "\ufb01"),
        ("a", "A"),
    ],
)
def test_similar_passwords_do_not_match_each_other(password: str, other: str) -> None:
    for one, another in ((password, other), (other, password)):
        stored = hashed(one)
        assert verifies(one, stored)
        assert not verifies(another, stored)


@pytest.mark.parametrize("password", ["b4l0u", "a" * 73])
def test_two_hashes_of_a_password_differ(password: str) -> None:
    assert hashed(password) != hashed(password)


@pytest.mark.parametrize("password", ["b4l0u", "a" * 73])
def test_a_hash_verifies_as_text_and_as_bytes(password: str) -> None:
    stored = hashed(password)
    assert verifies(password, stored)
    assert verifies(password, stored.decode())


@pytest.mark.slow
@pytest.mark.parametrize("stored", [PASSLIB, PASSLIB_FIRST])
def test_a_hash_made_by_passlib_verifies(stored: str) -> None:
    assert passwords.verify("password", stored, COST)
    assert not passwords.verify("password\0", stored, COST)
    assert not passwords.verify("Password", stored, COST)


def in_first_version(password: str, version: str = "2b") -> str:
    """Return a hash in version 1 of passlib's format."""
    key = base64.b64encode(hashlib.sha256(password.encode()).digest())
    plain = bcrypt.hashpw(key, bcrypt.gensalt(COST)).decode()
    return f"$bcrypt-sha256${version},{COST}${plain[7:29]}${plain[29:]}"


@each("version", ["2a", "2b"])
@each("length", [1, 72, 73, 1024])
def test_every_byte_counts_in_the_first_version_of_a_passlib_hash(version: str, length: int) -> None:
    stored = in_first_version("a" * length, version)
    assert verifies("a" * length, stored)
    assert not verifies("a" * (length - 1) + "b", stored)


# Hashes of passlib 1.5.2, of a password and with unused bits in the salt, from its issue 25; and one of BCrypt.Net.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("password", "stored"),
    [
        ("loppux", "$2a$12$oaQbBqq8JnSM1NHRPQGXORm4GCUMqp7meTnkft4zgSnrbhoKdDV0C"),
        ("vlaflip", "$2a$12$GqDY2k0khMlI69U5LN9m11tN2XCF1NH5d53SKdjfa/jmgnIN8rVb6"),
        ("abc", "$2b$06$DCq7YPn5Rq63x1Lad4cll/c0VtM7rnZyLHqSZkwNoYUuYeikWFfzq"),
    ],
)
def test_a_published_hash_with_unused_bits_in_its_salt_verifies(password: str, stored: str) -> None:
    assert verifies(password, stored)
    assert not verifies(password + "x", stored)


ALPHABET = "./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"  # of bcrypt's base64


@pytest.mark.parametrize(("position", "unused"), [(28, 16), (59, 4)], ids=["salt", "digest"])
def test_unused_bits_of_salt_and_digest_mean_nothing_and_all_others_count(position: int, unused: int) -> None:
    stored = bcrypt.hashpw(b"password", b"$2b$04$" + b"C" * 21 + b"O").decode()
    first = ALPHABET.index(stored[position])
    assert first % unused == 0
    same = range(first, first + unused)
    for index, letter in enumerate(ALPHABET):
        changed = stored[:position] + letter + stored[position + 1 :]
        assert verifies("password", changed) is (index in same), changed


CUT = bcrypt.hashpw(b"a" * 72, b"$2a$04$" + b"C" * 21 + b"O").decode()  # of "aaa…" of any length, cut at 72 bytes


def test_a_marked_hash_matches_a_longer_password_by_its_first_72_bytes() -> None:
    salt = passwords.salt_of(CUT)
    for password in "a" * 72, "a" * 73, "a" * 72 + "b" * 900, "a" * 72 + "\0":
        assert passwords.verify(password, CUT, COST, salt), password
    for password in "a" * 71, "a" * 71 + "bb", "a" * 71 + "\0a", "b" + "a" * 100, "a" * 1025:
        assert not passwords.verify(password, CUT, COST, salt), password
    stored = bcrypt.hashpw(b"a" + b"\xc3\xa9" * 35 + b"\xc3", bcrypt.gensalt(COST))  # cut in the middle of a letter
    assert passwords.verify("a" + "é" * 40, stored, COST, passwords.salt_of(stored))


@each("salt", [None, "", "." * 22, CUT[7:28] + "P", CUT[7:28]])
def test_a_hash_that_is_not_marked_matches_no_longer_password(salt: str | None) -> None:
    for password in "a" * 73, "a" * 72 + "\0":
        assert not passwords.verify(password, CUT, COST, salt)
    assert passwords.verify("a" * 72, CUT, COST, salt)


def test_every_byte_counts_where_a_marked_hash_is_of_another_form() -> None:
    for stored in passwords.hash_password("a" * 80, COST).decode(), in_first_version("a" * 80):
        salt = re.findall(r"\$([./A-Za-z0-9]{22})\$", stored)[0]
        assert not passwords.verify("a" * 79 + "b", stored, COST, salt)
        assert passwords.salt_of(stored) is None


def test_a_hash_is_current_in_the_forms_that_are_made_today_at_their_cost() -> None:
    forms = hashed("a"), hashed("a" * 73), CUT, in_first_version("a"), b"!"
    assert [passwords.is_current(stored, COST) for stored in forms] == [True, True, True, False, False]
    assert not any(passwords.is_current(stored, COST + 1) for stored in forms)


@pytest.mark.parametrize("prefix", ["$2a", "$2b", "$2y"])
def test_a_bcrypt_hash_made_elsewhere_verifies(prefix: str) -> None:
    assert verifies("U*U", prefix + CRYPT_BLOWFISH)
    assert not verifies("U*V", prefix + CRYPT_BLOWFISH)


@each("stored", UNREADABLE)
def test_no_password_matches_an_unreadable_hash(stored: bytes) -> None:
    assert verifies("", stored) is False
    assert verifies("password", stored) is False
    assert verifies("password", stored.decode("latin-1")) is False


@each("password", ["", "a", "\0", "." * 53, "a" * 73])
def test_no_password_matches_a_missing_hash(password: str) -> None:
    assert verifies(password, None) is False


@each(("password", "why"), [("", "empty"), ("a" * 1025, "1024 bytes"), ("é" * 513, "1024 bytes"), ("a\ud800", "text")])
def test_an_empty_too_long_or_invalid_password_is_refused_with_the_reason(password: str, why: str) -> None:
    assert why in (passwords.length_error(password) or "")


@each("password", ["a", " ", "\0", "b4l0u", "a" * 1024, "é" * 512, CYRILLIC])
def test_any_text_up_to_1024_bytes_can_be_a_password(password: str) -> None:
    assert passwords.length_error(password) is None


def test_an_empty_password_matches_no_hash() -> None:
    assert verifies("", bcrypt.hashpw(b"", bcrypt.gensalt(COST))) is False


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the cost of each bcrypt call."""
    spent: list[int] = []

    def counted(original: Callable[[bytes, bytes], object]) -> Callable[[bytes, bytes], object]:
        def run(secret: bytes, salt: bytes) -> object:
            result = original(secret, salt)
            spent.append(int(salt[4:6]))
            return result

        return run

    monkeypatch.setattr(bcrypt, "checkpw", counted(bcrypt.checkpw))
    monkeypatch.setattr(bcrypt, "hashpw", counted(bcrypt.hashpw))
    return spent


SHORT_STORED = bcrypt.hashpw(b"password", bcrypt.gensalt(5))
LONG_STORED = passwords.hash_password("a" * 73, 5)
MARKED = bcrypt.hashpw(b"a" * 72, bcrypt.gensalt(5))
UNUSED_BITS = SHORT_STORED[:28] + b"z" + SHORT_STORED[29:]
FIRST_STORED = LONG_STORED.replace(b"v=2,t=2b,r=", b"2a,")


@pytest.mark.parametrize(
    ("password", "stored"),
    [
        pytest.param("password", SHORT_STORED, id="right"),
        pytest.param("wrong", SHORT_STORED, id="wrong"),
        pytest.param("a" * 73, LONG_STORED, id="right, long"),
        pytest.param("wrong", LONG_STORED, id="short against long"),
        pytest.param("a" * 73, SHORT_STORED, id="long against short"),
        pytest.param("a" * 1025, LONG_STORED, id="too long"),
        pytest.param("a" * 100_000, None, id="far too long, unknown"),
        pytest.param("a\0a", SHORT_STORED, id="nul"),
        pytest.param("", SHORT_STORED, id="empty"),
        pytest.param("\ud800", SHORT_STORED, id="surrogate"),
        pytest.param("password", None, id="unknown"),
        pytest.param("", None, id="empty, unknown"),
        pytest.param("a" * 72, MARKED, id="right, marked"),
        pytest.param("a" * 99, MARKED, id="right, marked, long"),
        pytest.param("b" * 99, MARKED, id="wrong, marked, long"),
        pytest.param("b" * 1025, MARKED, id="too long, marked"),
        pytest.param("a\0a" * 50, MARKED, id="nul, marked, long"),
        pytest.param("a" * 99, UNUSED_BITS, id="unused bits, long"),
        pytest.param("password", UNUSED_BITS, id="unused bits"),
        pytest.param("a" * 99, FIRST_STORED, id="wrong, first version"),
        *(pytest.param("password", stored, id=f"unreadable {n}") for n, stored in enumerate(UNREADABLE)),
    ],
)
def test_every_check_runs_one_bcrypt_of_the_configured_cost(
    costs: list[int], password: str, stored: bytes | None
) -> None:
    passwords.verify(password, stored, 5, passwords.salt_of(MARKED))
    assert costs == [5]


def test_at_most_one_hash_per_core_runs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = 0
    changed = threading.Condition()
    leave = threading.Event()

    def held(original: Callable[[bytes, bytes], object]) -> Callable[[bytes, bytes], object]:
        def run(secret: bytes, salt: bytes) -> object:
            nonlocal inside
            with changed:
                inside += 1
                changed.notify_all()
            leave.wait(60)
            return original(secret, salt)

        return run

    monkeypatch.setattr(bcrypt, "checkpw", held(bcrypt.checkpw))
    monkeypatch.setattr(bcrypt, "hashpw", held(bcrypt.hashpw))
    each = passwords.CORES + 1  # calls of each kind: enough to notice if only one kind is limited
    with ThreadPoolExecutor(2 * each) as pool:
        for _ in range(each):
            pool.submit(hashed, "a")
            pool.submit(verifies, "a", None)
        with changed:  # calls block inside bcrypt until as many as can have entered
            full = changed.wait_for(lambda: inside >= passwords.CORES, 10)
            too_many = changed.wait_for(lambda: inside > passwords.CORES, 0.1)
        leave.set()
    assert full
    assert not too_many


@each(
    ("stored", "cost"),
    [
        (PASSLIB, 12),
        (PASSLIB_FIRST, 8),
        pytest.param(UNUSED_BITS, 5, id="unused bits"),
        pytest.param(SHORT_STORED, 5, id="short"),  # a random salt: its text would be another id in each process
        pytest.param(LONG_STORED, 5, id="long"),
        pytest.param(LONG_STORED.decode(), 5, id="long text"),
        ("$2a" + CRYPT_BLOWFISH, 5),
        ("$2y" + CRYPT_BLOWFISH, 5),
        *((stored, None) for stored in UNREADABLE),
    ],
)
def test_the_cost_of_a_stored_hash_is_read(stored: str | bytes, cost: int | None) -> None:
    assert passwords.cost_of(stored) == cost


@pytest.mark.parametrize(("stored", "configured"), [(4, 4), (4, 6), (5, 6), (6, 4)])
def test_a_wrong_password_takes_the_configured_cost_or_that_of_its_hash(
    monkeypatch: pytest.MonkeyPatch, stored: int, configured: int
) -> None:
    hashed = passwords.hash_password("right", stored)
    rounds: list[int] = []
    check = bcrypt.checkpw

    def counted(secret: bytes, target: bytes) -> bool:
        rounds.append(2 ** int(target[4:6]))
        return check(secret, target)

    monkeypatch.setattr(bcrypt, "checkpw", counted)
    assert not passwords.verify("wrong", hashed, configured)
    assert sum(rounds) == 2 ** max(stored, configured)
    rounds.clear()
    assert passwords.verify("right", hashed, configured)
    assert rounds == [2**stored]
