"""Users in files: how each line is parsed, and that written users read back equal."""

from __future__ import annotations

import io
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auth import _check_email
from cli import user_files
from cli.user_files import Record, UnknownFormat
from storage import User

NOW = 1_800_000_000
HASH = "$2b$12$" + "a" * 21 + "e" + "b" * 31
LONG = "$bcrypt-sha256$v=2,t=2b,r=12$" + "a" * 21 + "e$" + "b" * 31
SEED = "JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP"


def check_email(email: str) -> None:
    _check_email(email, production=False)


def records(text: str | bytes, form: str) -> list[tuple[int, Any]]:
    content = text.encode() if isinstance(text, str) else text
    return list(user_files.read_records(io.BytesIO(content), form))


def refusal(record: Record) -> str:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as refused:
        user_files.parse_user(record, check_email, NOW)
    return str(refused.value)


def user(**fields: Any) -> User:
    return user_files.parse_user({"email": "bob@x.io", "hashed_password": HASH, **fields}, check_email, NOW)


# Parsing lines


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
def test_the_format_is_chosen_or_detected_by_the_name(path: str, chosen: str | None, form: str) -> None:
    assert user_files.detect_format(path, chosen) == form


@pytest.mark.parametrize("path", ["users.txt", "users", "csv", "users.csv.gz"])
def test_an_unknown_name_is_refused_with_a_hint_at_the_option(path: str) -> None:
    with pytest.raises(UnknownFormat, match="--format"):
        user_files.detect_format(path, None)


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
def test_a_csv_header_names_the_columns(text: str, line: int) -> None:
    ((number, record),) = records(text, "csv")
    assert (number, record["email"], record["hashed_password"]) == (line, "bob@x.io", "h")


@pytest.mark.parametrize("text", ["", "\n", "email\nbob@x.io", "bob@x.io,h\n", '"email"x,hash\n', "email;hash\n"])
def test_a_csv_file_without_the_required_columns_is_refused(text: str) -> None:
    with pytest.raises(UnknownFormat, match="email and hashed_password"):
        records(text, "csv")


def test_a_wrong_line_does_not_stop_the_others() -> None:
    found = records('email,hash\na@x,h\nb@x\n"c"d,h\nd@x,h,more\ne@x,h\n', "csv")
    assert [(line, isinstance(record, ValueError)) for line, record in found] == [
        *((2, False), (3, True), (4, True), (5, True), (6, False))
    ]


def test_each_json_line_is_an_object() -> None:
    found = records('{"email": "bob@x.io", "hash": "h"}\n\n[]\nnonsense\n' + "[" * 100_000 + "\n", "jsonl")
    assert found[0] == (1, {"email": "bob@x.io", "hashed_password": "h"})
    assert [(line, str(record)) for line, record in found[1:]] == [(line, "not a JSON object") for line in (3, 4, 5)]


def test_each_htpasswd_line_is_a_user() -> None:
    found = records("# people\nbob@x.io:h:i\n\neve\n", "htpasswd")
    assert found == [(2, {"email": "bob@x.io", "hashed_password": "h:i"}), (4, {"email": "eve", "hashed_password": ""})]


@given(st.binary(max_size=300), st.sampled_from(["csv", "jsonl", "htpasswd"]))
def test_arbitrary_bytes_never_crash_the_parser(content: bytes, form: str) -> None:
    for head in b"", b"email,hash\n":
        try:
            found = records(head + content, form)
        except UnknownFormat:
            continue
        for _, record in found:
            with suppress(ValueError):
                user_files.parse_user(record, check_email, NOW)


# Parsing users


@pytest.mark.parametrize("hashed", [HASH, HASH.replace("$2b", "$2a"), HASH.replace("$2b", "$2y"), LONG, "!"])
def test_a_hash_is_imported_unchanged(hashed: str) -> None:
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
        ({"hashed_password": ""}, "not a bcrypt hash"),
        ({"hashed_password": "b4l0u"}, "not a bcrypt hash"),
        ({"hashed_password": "$apr1$abc$def"}, "not a bcrypt hash"),
        ({"hashed_password": HASH + "\n"}, "not a bcrypt hash"),
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
def test_an_invalid_user_is_refused_with_the_reason(fields: dict[str, Any], reason: str) -> None:
    assert reason in refusal({"email": "bob@x.io", "hashed_password": HASH, **fields})


@pytest.mark.parametrize(
    ("disabled", "since"), [(True, NOW), ("TRUE", NOW), ("1", NOW), (False, None), ("", None), ("no", None)]
)
def test_a_disabled_user_is_imported_as_disabled(disabled: Any, since: int | None) -> None:
    assert user(disabled=disabled).disabled_at == since


def test_a_second_factor_is_imported() -> None:
    imported = user(totp_secret=f" {SEED[:16].lower()} {SEED[16:]} ")
    assert (imported.totp_secret, imported.totp_since) == (SEED, NOW)
    assert user(totp_secret=SEED[:26]).totp_secret == SEED[:26] + "======"


@pytest.mark.parametrize("created", ["2020-01-01T00:00:00Z", "2020-01-01 00:00:00", "2020-01-01T01:00:00+01:00"])
def test_the_creation_time_is_imported(created: str) -> None:
    assert user(created=created).created_at == 1_577_836_800


# Writing users


def written(form: str, *users: User) -> tuple[str, int, int]:
    file = io.StringIO()
    counts = Counter(user_files.write_users(users, file, form))
    return file.getvalue(), counts[True], counts[False]


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
def test_written_users_read_back_equal(users: list[User], form: str) -> None:
    text, count, left_out = written(form, *users)
    assert (count, left_out) == (len(users), 0)
    assert [user_files.parse_user(record, check_email, NOW) for _, record in records(text, form)] == users


def test_an_unconfirmed_seed_is_not_exported() -> None:
    text, *_ = written("csv", User(1, "bob@x.io", HASH.encode(), totp_secret=SEED))
    assert text == f"email,hashed_password,created,disabled,totp_secret\nbob@x.io,{HASH},,,\n"


def test_htpasswd_leaves_out_users_that_it_cannot_represent() -> None:
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
