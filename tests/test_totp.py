"""One-time codes: the vectors of both RFCs, how far a clock may differ, and what an app and a person are given."""

from __future__ import annotations

import base64
import re
import sys
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

import pytest

import totp

SEED = base64.b32encode(b"12345678901234567890").decode()  # of the RFCs
NOW = 1_800_000_000  # where a step begins
STEP = NOW // 30
CODE = totp.code(SEED, STEP)


# Codes


@pytest.mark.parametrize(
    ("seconds", "code"),
    [
        (59, "287082"),
        (1_111_111_109, "081804"),
        (1_111_111_111, "050471"),
        (1_234_567_890, "005924"),
        (2_000_000_000, "279037"),
        (20_000_000_000, "353130"),
    ],
)
def test_the_vectors_of_rfc_6238(seconds: int, code: str) -> None:
    assert totp.code(SEED, seconds // 30) == code
    assert totp.matching_step(SEED, code, seconds) == seconds // 30


@pytest.mark.parametrize(
    ("count", "code"),
    list(
        enumerate(
            ["755224", "287082", "359152", "969429", "338314", "254676", "287922", "162583", "399871", "520489"],
        )
    ),
)
def test_the_vectors_of_rfc_4226(count: int, code: str) -> None:
    assert totp.code(SEED, count) == code


@pytest.mark.parametrize("second", [0, 29])
@pytest.mark.parametrize(("steps", "good"), [(-2, False), (-1, True), (0, True), (1, True), (2, False)])
def test_a_clock_may_differ_by_one_step_either_way(second: int, steps: int, good: bool) -> None:
    found = totp.matching_step(SEED, totp.code(SEED, STEP + steps), NOW + second)
    assert found == (STEP + steps if good else None)


def test_a_code_of_two_steps_is_that_of_the_later() -> None:
    # Else it would work twice: 1 in 10**6 is the same as the one before.
    twin, later = "186519", 37_079_357
    assert totp.code(SEED, later - 1) == totp.code(SEED, later) == twin
    assert totp.matching_step(SEED, twin, later * 30) == later


def test_a_code_is_good_for_its_own_seed() -> None:
    assert totp.matching_step(totp.new_seed(), totp.code(SEED, STEP), NOW) is None


@pytest.mark.parametrize("typed", [f"{CODE[:3]} {CODE[3:]}", f" {CODE}", " ".join(CODE)])
def test_spaces_in_a_code_do_not_count(typed: str) -> None:
    assert totp.matching_step(SEED, typed, NOW) == STEP


@pytest.mark.parametrize(
    "given",
    [
        "",
        " ",
        CODE[:5],
        CODE[1:],
        f"{CODE}0",
        f"0{CODE}",
        f"{CODE}\n",
        f"{CODE}\0",
        f"{CODE[:3]}-{CODE[3:]}",
        f"+{CODE[1:]}",
        str(int(CODE) + 1),
        CODE.translate({ord(digit): ord(digit) + 0xFEE0 for digit in "0123456789"}),  # full-width
        CODE.translate({ord(digit): ord(digit) + 0x630 for digit in "0123456789"}),  # Arabic
        "é" * 6,
        "\ud800",
        "0" * 100_000,
    ],
    ids=ascii,
)
def test_what_is_no_code_matches_nothing(given: str) -> None:
    assert totp.matching_step(SEED, given, NOW) is None


def test_a_code_keeps_its_leading_zeros() -> None:
    assert totp.matching_step(SEED, "5924", 1_234_567_890) is None
    assert totp.matching_step(SEED, "005924", 1_234_567_890) is not None


# Seeds


def test_a_new_seed_is_160_random_bits_in_base32() -> None:
    seeds = {totp.new_seed() for _ in range(20)}
    assert len(seeds) == 20
    assert {len(base64.b32decode(seed)) for seed in seeds} == {20}
    assert not any("=" in seed for seed in seeds)


# The link


@pytest.mark.parametrize("issuer", ["auth.example.com", "authsvc", "a & b?=/%#"])
@pytest.mark.parametrize(
    "email",
    [
        "bob@x.io",
        "bob+tag@x.io",
        "o'brien@x.io",
        'a "b"@x',
        "a?b&issuer=evil#c",
        "a&secret=AAAA",
        "a/../b%2F@x",
        "a:b@x",
        "почта@x",
        "%",
    ],
)
def test_the_link_says_what_was_put_into_it(email: str, issuer: str) -> None:
    link = totp.uri(SEED, email, issuer)
    assert re.fullmatch("[!-~]+", link)
    parts = urlsplit(link)
    assert (parts.scheme, parts.netloc, parts.fragment) == ("otpauth", "totp", "")
    assert parts.path.count("/") == 1
    assert unquote(parts.path) == f"/{issuer}:{email}"
    assert parse_qs(parts.query, strict_parsing=True) == {"secret": [SEED], "issuer": [issuer]}


def test_the_link_is_plain_where_nothing_is_odd() -> None:
    link = totp.uri(SEED, "bob@x.io", "auth.example.com")
    assert link == f"otpauth://totp/auth.example.com%3Abob@x.io?secret={SEED}&issuer=auth.example.com"


# The picture


def svg(text: str) -> ElementTree.Element:
    picture = totp.picture(text)
    assert picture
    media_type, _, content = picture.partition(",")
    assert media_type.startswith("data:image/svg+xml")
    return ElementTree.fromstring(unquote(content))


def test_the_picture_is_an_image_of_the_link() -> None:
    link = totp.uri(SEED, "bob@x.io", "auth.example.com")
    one, same, other = svg(link), svg(link), svg(totp.uri(SEED, "eve@x.io", "auth.example.com"))
    assert one.tag.endswith("svg")
    assert ElementTree.tostring(one) == ElementTree.tostring(same) != ElementTree.tostring(other)


def test_the_picture_is_a_code_that_every_app_reads() -> None:
    assert int(svg("1").attrib["width"]) >= 21 * 4  # a micro QR code, which few read, has fewer modules


def test_without_segno_there_is_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segno", None)
    assert totp.picture(totp.uri(SEED, "bob@x.io", "authsvc")) is None


# Recovery codes


def test_ten_recovery_codes_of_120_random_bits_each() -> None:
    codes = totp.new_recovery_codes()
    assert len(codes) == len(set(codes)) == 10
    assert all(re.fullmatch("([a-z2-7]{4}-){5}[a-z2-7]{4}", code) for code in codes)  # 24 letters of 5 bits
    assert all(len(set(letters)) > 1 for place, letters in enumerate(zip(*codes)) if place % 5 != 4)
    assert not set(codes) & set(totp.new_recovery_codes())


@pytest.mark.parametrize(
    "typed",
    [
        "{}",
        " {}\n",
        "{upper}",
        "{bare}",
        "{spaced}",
        "{wide}",
    ],
)
def test_a_recovery_code_is_read_however_it_was_typed(typed: str) -> None:
    code = totp.new_recovery_codes()[0]
    given = typed.format(
        code,
        upper=code.upper(),
        bare=code.replace("-", ""),
        spaced=code.replace("-", " "),
        wide=" - ".join(code.replace("-", "").upper()),
    )
    assert totp.recovery_hash(given) == totp.recovery_hash(code)


def test_a_recovery_code_is_kept_as_a_digest_that_no_other_has() -> None:
    codes = [*totp.new_recovery_codes(), "", "a", "b", "\ud800", "é"]
    hashes = {totp.recovery_hash(code) for code in codes}
    assert len(hashes) == len(codes)
    assert all(re.fullmatch("[0-9a-f]{64}", kept) for kept in hashes)
    assert not any(code.replace("-", "") in kept for code in codes[:10] for kept in hashes)


def test_a_clock_that_was_never_set_is_no_crash() -> None:
    assert totp.matching_step("A" * 32, totp.code("A" * 32, 0), 0) == 0
    assert totp.matching_step("A" * 32, "not it", 0) is None
