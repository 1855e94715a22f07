"""One-time codes: RFC test vectors, clock drift, links, QR codes and recovery codes."""

from __future__ import annotations

import base64
import hashlib
import re
import sys
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

import pytest

from credentials import totp
from tests.cases import each

SEED = base64.b32encode(b"12345678901234567890").decode()  # the seed in both RFCs
NOW = 1_800_000_000  # the beginning of a step
STEP = NOW // 30
CODE = totp.code(SEED, STEP)


# Codes


@each(
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
def test_codes_match_the_vectors_of_rfc_6238(seconds: int, code: str) -> None:
    assert totp.code(SEED, seconds // 30) == code
    assert totp.matching_step(SEED, code, seconds) == seconds // 30


@each(
    ("count", "code"),
    list(
        enumerate(["755224", "287082", "359152", "969429", "338314", "254676", "287922", "162583", "399871", "520489"])
    ),
)
def test_codes_match_the_vectors_of_rfc_4226(count: int, code: str) -> None:
    assert totp.code(SEED, count) == code


@each("second", [0, 29])
@each(("steps", "good"), [(-2, False), (-1, True), (0, True), (1, True), (2, False)])
def test_a_clock_may_differ_by_one_step_either_way(second: int, steps: int, good: bool) -> None:
    found = totp.matching_step(SEED, totp.code(SEED, STEP + steps), NOW + second)
    assert found == (STEP + steps if good else None)


def test_a_code_shared_by_two_steps_counts_as_the_later_one() -> None:
    # One code in a million equals the code before it. Counted as the earlier step, it would be accepted twice.
    twin, later = "186519", 37_079_357
    assert totp.code(SEED, later - 1) == totp.code(SEED, later) == twin
    assert totp.matching_step(SEED, twin, later * 30) == later


def test_a_code_is_valid_for_its_own_seed_only() -> None:
    assert totp.matching_step(totp.new_seed(), totp.code(SEED, STEP), NOW) is None


BLANKS = " \t\n\r\u00a0\u2007\u2009\u202f\u3000\u200b\u2060\ufeff"  # some have no width
HYPHENS = "-\u00ad\u2010\u2011\u2012\u2013\u2014\u2212\u30fc\uff70\ufe63\uff0d"


@each("between", [*BLANKS, *HYPHENS, " - "])
def test_blanks_and_hyphens_in_a_code_are_ignored(between: str) -> None:
    for typed in (between.join((CODE[:3], CODE[3:])), f"{between}{CODE}{between}", between.join(CODE)):
        assert totp.is_code(typed)
        assert totp.matching_step(SEED, typed, NOW) == STEP


@each("zero", "\uff10\u0660\u06f0\u0966\U0001d7ce")
def test_a_code_may_have_the_digits_of_any_script(zero: str) -> None:
    typed = "".join(chr(ord(zero) + int(digit)) for digit in CODE)
    for given in (typed, f"{typed[:3]}\u202f{typed[3:]}", CODE[:2] + typed[2:]):
        assert totp.is_code(given)
        assert totp.matching_step(SEED, given, NOW) == STEP


@each(
    "given",
    [
        "",
        " ",
        CODE[:5],
        CODE[1:],
        f"{CODE}0",
        f"0{CODE}",
        f"{CODE}\0",
        f"{CODE[:3]}.{CODE[3:]}",
        f"{CODE[:3]}_{CODE[3:]}",
        f"+{CODE}",
        str(int(CODE) + 1),
        CODE.translate(dict(zip(b"0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))),  # digits in value only
        CODE.translate(dict(zip(b"0123456789", "⓪①②③④⑤⑥⑦⑧⑨"))),
        " " * 115 + CODE,
        "é" * 6,
        "\ud800",
        "0" * 100_000,
        CODE + "\ufdfa" * 16_000,
    ],
)
def test_text_that_is_not_a_code_does_not_match(given: str) -> None:
    assert totp.matching_step(SEED, given, NOW) is None


def test_a_code_needs_its_leading_zeros() -> None:
    assert totp.matching_step(SEED, "5924", 1_234_567_890) is None
    assert totp.matching_step(SEED, "005924", 1_234_567_890) is not None


# Seeds


def test_a_new_seed_is_160_random_bits_in_base32() -> None:
    seeds = {totp.new_seed() for _ in range(20)}
    assert len(seeds) == 20
    assert {len(base64.b32decode(seed)) for seed in seeds} == {20}
    assert not any("=" in seed for seed in seeds)


# The link


@each("issuer", ["auth.example.com", "authsvc", "a & b?=/%#"])
@each(
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
def test_the_link_holds_the_seed_email_and_issuer_unchanged(email: str, issuer: str) -> None:
    link = totp.uri(SEED, email, issuer)
    assert re.fullmatch("[!-~]+", link)
    parts = urlsplit(link)
    assert (parts.scheme, parts.netloc, parts.fragment) == ("otpauth", "totp", "")
    assert parts.path.count("/") == 1
    assert unquote(parts.path) == f"/{issuer}:{email}"
    assert parse_qs(parts.query, strict_parsing=True) == {"secret": [SEED], "issuer": [issuer]}


def test_the_link_has_the_documented_form() -> None:
    link = totp.uri(SEED, "bob@x.io", "auth.example.com")
    assert link == f"otpauth://totp/auth.example.com%3Abob@x.io?secret={SEED}&issuer=auth.example.com"


# The QR code


def svg(text: str) -> ElementTree.Element:
    data_url = totp.qr_code(text)
    assert data_url
    media_type, _, content = data_url.partition(",")
    assert media_type.startswith("data:image/svg+xml")
    return ElementTree.fromstring(unquote(content))


@pytest.mark.usefixtures("qr_codes")
def test_the_qr_code_is_an_svg_image_of_the_link() -> None:
    link = totp.uri(SEED, "bob@x.io", "auth.example.com")
    one, same, other = svg(link), svg(link), svg(totp.uri(SEED, "eve@x.io", "auth.example.com"))
    assert one.tag.endswith("svg")
    assert ElementTree.tostring(one) == ElementTree.tostring(same) != ElementTree.tostring(other)


@pytest.mark.usefixtures("qr_codes")
def test_the_qr_code_is_never_a_micro_qr_code() -> None:
    assert int(svg("1").attrib["width"]) >= 21 * 4  # micro QR codes have fewer modules, and few apps read them


def test_without_segno_there_is_no_qr_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "segno", None)
    assert totp.qr_code(totp.uri(SEED, "bob@x.io", "authsvc")) is None


# Recovery codes


def test_there_are_ten_recovery_codes_of_128_random_bits() -> None:
    codes = totp.new_recovery_codes()
    assert len(codes) == len(set(codes)) == 10
    assert all(re.fullmatch("([a-z2-7]{4}-){6}[a-z2-7]{2}", code) for code in codes)  # 25 letters of 5 bits, one of 3
    assert all(len(set(letters)) > 1 for database, letters in enumerate(zip(*codes)) if database % 5 != 4)
    assert not set(codes) & set(totp.new_recovery_codes())


@each(
    "typed",
    ["{}", " {}\n", "{upper}", "{bare}", "{spaced}", "{wide}", "{full_width}", "{dashes}", "\u2060{nbsp}\ufeff"],
)
def test_case_blanks_and_hyphens_of_a_recovery_code_are_ignored(typed: str) -> None:
    code = totp.new_recovery_codes()[0]
    given = typed.format(
        code,
        upper=code.upper(),
        bare=code.replace("-", ""),
        spaced=code.replace("-", " "),
        wide=" - ".join(code.replace("-", "").upper()),
        full_width="".join(chr(ord(letter) + 0xFEE0) for letter in code.upper()),
        dashes=code.replace("-", "\u2013"),
        nbsp=code.replace("-", "\u00a0"),
    )
    assert totp.recovery_hash(given) == totp.recovery_hash(code)


def test_a_recovery_code_of_an_earlier_release_has_the_same_hash() -> None:
    stored = hashlib.sha256(b"abcdefghijklmnopqrstuvwx").hexdigest()  # of 24 letters, 120 bits
    assert totp.recovery_hash("abcd-efgh-ijkl-mnop-qrst-uvwx") == stored


def test_recovery_codes_have_distinct_sha256_hashes() -> None:
    codes = [*totp.new_recovery_codes(), "", "a", "b", "\ud800", "é"]
    hashes = {totp.recovery_hash(code) for code in codes}
    assert len(hashes) == len(codes)
    assert all(re.fullmatch("[0-9a-f]{64}", kept) for kept in hashes)
    assert not any(code.replace("-", "") in kept for code in codes[:10] for kept in hashes)


def test_a_clock_at_1970_does_not_crash() -> None:
    assert totp.matching_step("A" * 32, totp.code("A" * 32, 0), 0) == 0
    assert totp.matching_step("A" * 32, "not it", 0) is None
