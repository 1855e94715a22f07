"""Moving in and out: what each line of a file becomes, and that what is written reads back."""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moving
from auth import _check_email
from moving import FormatUnknown, Record
from storage import User

NOW = 1_800_000_000
HASH = "$2b$12$" + "a" * 21 + "e" + "b" * 31
LONG = "$bcrypt-sha256$v=2,t=2b,r=12$" + "a" * 21 + "e$" + "b" * 31
SEED = "JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP"


def check_email(email: str) -> None:
    _check_email(email, production=False)


def read(text: str | bytes, form: str) -> list[tuple[int, Any]]:
    content = text.encode() if isinstance(text, str) else text
    return list(moving.records(io.BytesIO(content), form))


def refusal(record: Record) -> str:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as refused:
        moving.account(record, check_email, NOW)
    return str(refused.value)


def user(**fields: Any) -> User:
    return moving.account({"email": "bob@x.io", "hashed_password": HASH, **fields}, check_email, NOW)


# Lines


@pytest.mark.parametrize(
    ("path", "chosen", "form"),
    [
        ("users.csv", None, "csv"),
        ("/srv/users.jsonl", None, "jsonl"),
        (".htpasswd", None, "htpasswd"),
        ("staff.htpasswd", None, "htpasswd"),
        ("users.txt", "csv", "csv"),
        ("users.csv", "jsonl", "jsonl"),
    ],
)
def test_a_format_is_chosen_or_told_by_the_name(path: str, chosen: str | None, form: str) -> None:
    assert moving.format_of(path, chosen) == form


@pytest.mark.parametrize("path", ["users.txt", "users", "csv", "users.csv.gz"])
def test_a_name_that_does_not_tell_is_asked_about(path: str) -> None:
    with pytest.raises(FormatUnknown, match="--format"):
        moving.format_of(path, None)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("email,hashed_password\nbob@x.io,h\n", 2),
        ("hashed_password,name,email\nh,Bob,bob@x.io\n", 2),
        ("email,hash\r\n\r\nbob@x.io,h\r\n", 3),
        ("\ufeffemail,password_hash\nbob@x.io,h", 2),
        (' email , hash \n"bob@x.io","h"', 2),
    ],
)
def test_a_csv_file_names_its_columns(text: str, line: int) -> None:
    ((number, record),) = read(text, "csv")
    assert (number, record["email"], record["hashed_password"]) == (line, "bob@x.io", "h")


@pytest.mark.parametrize("text", ["", "\n", "email\nbob@x.io", "bob@x.io,h\n", '"email"x,hash\n', "email;hash\n"])
def test_a_csv_file_that_does_not_is_refused(text: str) -> None:
    with pytest.raises(FormatUnknown, match="email and hashed_password"):
        read(text, "csv")


def test_what_is_wrong_with_a_line_stops_none_of_the_others() -> None:
    found = read('email,hash\na@x,h\nb@x\n"c"d,h\nd@x,h,more\ne@x,h\n', "csv")
    assert [(line, isinstance(record, ValueError)) for line, record in found] == [
        *((2, False), (3, True), (4, True), (5, True), (6, False)),
    ]


def test_json_lines_are_objects() -> None:
    found = read('{"email": "bob@x.io", "hash": "h"}\n\n[]\nnonsense\n' + "[" * 100_000 + "\n", "jsonl")
    assert found[0] == (1, {"email": "bob@x.io", "hashed_password": "h"})
    assert [(line, str(record)) for line, record in found[1:]] == [(line, "no JSON object") for line in (3, 4, 5)]


def test_htpasswd_has_a_user_a_line() -> None:
    found = read("# people\nbob@x.io:h:i\n\neve\n", "htpasswd")
    assert found == [
        (2, {"email": "bob@x.io", "hashed_password": "h:i"}),
        (4, {"email": "eve", "hashed_password": ""}),
    ]


@given(st.binary(max_size=300), st.sampled_from(["csv", "jsonl", "htpasswd"]))
def test_no_bytes_are_a_crash(content: bytes, form: str) -> None:
    for head in b"", b"email,hash\n":
        try:
            found = read(head + content, form)
        except FormatUnknown:
            continue
        for _, record in found:
            with suppress(ValueError):
                moving.account(record, check_email, NOW)


# Users


@pytest.mark.parametrize("hashed", [HASH, HASH.replace("$2b", "$2a"), HASH.replace("$2b", "$2y"), LONG, "!"])
def test_a_hash_moves_in_as_it_is(hashed: str) -> None:
    assert user(hashed_password=hashed) == User(0, "bob@x.io", hashed, created_at=NOW)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"email": ""}, "blank"),
        ({"email": "a\nb"}, "control"),
        ({"email": "a" * 255}, "254 bytes"),
        ({"email": "\udcff"}, "valid text"),
        ({"email": 5}, "must be text"),
        ({"email": ["a"]}, "must be text"),
        ({"hashed_password": ""}, "no bcrypt hash"),
        ({"hashed_password": "b4l0u"}, "no bcrypt hash"),
        ({"hashed_password": "$apr1$abc$def"}, "no bcrypt hash"),
        ({"hashed_password": HASH + "\n"}, "no bcrypt hash"),
        ({"hashed_password": HASH.replace("$12$", "$16$")}, "cost 16"),
        ({"hashed_password": LONG.replace("r=12", "r=31")}, "cost 31"),
        ({"disabled": "maybe"}, "true or false"),
        ({"created": "yesterday"}, "isoformat"),
        ({"created": "0001-01-01T00:00:00+23:59"}, "since 1970"),
        ({"created": "2099-01-01T00:00:00Z"}, "not in the future"),
        ({"totp_secret": "A" * 8}, "10 to 64 bytes"),
        ({"totp_secret": "A" * 160}, "10 to 64 bytes"),
        ({"totp_secret": "not base32!"}, "10 to 64 bytes"),
    ],
)
def test_what_is_no_user_is_refused_with_the_reason(fields: dict[str, Any], reason: str) -> None:
    assert reason in refusal({"email": "bob@x.io", "hashed_password": HASH, **fields})


@pytest.mark.parametrize(
    ("disabled", "since"), [(True, NOW), ("TRUE", NOW), ("1", NOW), (False, None), ("", None), ("no", None)]
)
def test_who_is_disabled_stays_so(disabled: Any, since: int | None) -> None:
    assert user(disabled=disabled).disabled_at == since


def test_a_second_factor_moves_in() -> None:
    moved = user(totp_secret=f" {SEED[:16].lower()} {SEED[16:]} ")
    assert (moved.totp_secret, moved.totp_since) == (SEED, NOW)
    assert user(totp_secret=SEED[:26]).totp_secret == SEED[:26] + "======"


@pytest.mark.parametrize("created", ["2020-01-01T00:00:00Z", "2020-01-01 00:00:00", "2020-01-01T01:00:00+01:00"])
def test_the_moment_of_registering_moves_in(created: str) -> None:
    assert user(created=created).created_at == 1_577_836_800


# Out again


def written(form: str, *users: User) -> tuple[str, int, int]:
    file = io.StringIO()
    count, left_out = moving.write(users, file, form)
    return file.getvalue(), count, left_out


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60).filter(str.strip)


@given(
    st.lists(
        st.builds(
            User,
            st.just(0),
            texts,
            st.sampled_from([HASH, LONG, "!"]),
            created_at=st.integers(0, NOW),
            disabled_at=st.sampled_from([None, NOW]),
            totp_secret=st.just(SEED),
            totp_since=st.just(NOW),
        ),
        max_size=5,
    ),
    st.sampled_from(["csv", "jsonl"]),
)
def test_what_is_written_reads_back(users: list[User], form: str) -> None:
    text, count, left_out = written(form, *users)
    assert (count, left_out) == (len(users), 0)
    assert [moving.account(record, check_email, NOW) for _, record in read(text, form)] == users


def test_a_seed_that_is_not_in_force_stays_here() -> None:
    text, *_ = written("csv", User(1, "bob@x.io", HASH.encode(), totp_secret=SEED))
    assert text == f"email,hashed_password,created,disabled,totp_secret\nbob@x.io,{HASH},,,\n"


def test_htpasswd_leaves_out_what_cannot_stand_in_it() -> None:
    text, count, left_out = written(
        "htpasswd",
        User(1, "bob@x.io", HASH),
        User(2, "long@x.io", LONG),
        User(3, "invited@x.io", "!"),
        User(4, "disabled@x.io", HASH, disabled_at=1),
        User(5, "factor@x.io", HASH, totp_secret=SEED, totp_since=1),
        User(6, "a:b@x.io", HASH),
        User(7, "#c@x.io", HASH),
    )
    assert (text, count, left_out) == (f"bob@x.io:{HASH}\n", 1, 6)
