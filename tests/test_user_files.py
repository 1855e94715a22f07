"""Users in files: how each line is parsed, and that written users read back equal."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections import Counter
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auth import GROUP, MAX_GROUPS, _check_email
from cli import user_files
from cli.user_files import Record, UnknownFormat
from storage import User
from tests.cases import each

NOW = 1_800_000_000
HASH = "$2b$12$" + "a" * 21 + "e" + "b" * 31
DIRTY = "$2b$12$" + "a" * 22 + "b" * 31  # with bits in the last letter of the salt that mean nothing
LONG = "$bcrypt-sha256$v=2,t=2b,r=12$" + "a" * 21 + "e$" + "b" * 31
MD5, SHA = "$1$salt$q.7.N/xYt./EG.dfqo/0", "{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g="
FIRST_LONG = "$bcrypt-sha256$2a,12$" + "a" * 21 + "e$" + "b" * 31
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


@each(
    ("path", "chosen", "form"),
    [
        ("users.csv", None, "csv"),
        ("USERS.CSV", None, "csv"),
        (".HTPASSWD", None, "htpasswd"),
        ("/srv/users.jsonl", None, "jsonl"),
        (".htpasswd", None, "htpasswd"),
        ("staff.htpasswd", None, "htpasswd"),
        ("users.tsv", None, "csv"),
        ("users.ndjson", None, "jsonl"),
        ("users.txt", "csv", "csv"),
        ("users.csv", "jsonl", "jsonl"),
    ],
)
def test_the_format_is_chosen_or_detected_by_the_name(path: str, chosen: str | None, form: str) -> None:
    assert user_files.detect_format(path, chosen) == form


@each("path", ["users.txt", "users", "csv", "users.csv.gz"])
def test_an_unknown_name_is_refused_with_a_hint_at_the_option(path: str) -> None:
    with pytest.raises(UnknownFormat, match="--format"):
        user_files.detect_format(path, None)


@each(
    ("text", "line"),
    [
        ("email,hashed_password\nbob@x.io,h\n", 2),
        ("hashed_password,name,email\nh,Bob,bob@x.io\n", 2),
        ("email,hash\r\n\r\nbob@x.io,h\r\n", 3),
        ("email,hash\rbob@x.io,h\r", 2),
        ("\ufeffemail,password_hash\nbob@x.io,h", 2),
        ("\ufeff\ufeffemail,hash\nbob@x.io,h", 2),
        (' email , hash \n"bob@x.io","h"', 2),
        ("\tEMAIL,\u00a0Password Hash\nbob@x.io,h", 2),
        ("E-Mail,Hashed-Password\nbob@x.io,h", 2),
        ("email,passwordHash\nbob@x.io,h", 2),
        ("id,email,encrypted_password\n7,bob@x.io,h", 2),
        ("email;hash\nbob@x.io;h", 2),
        (" email ; hash \n bob@x.io ; h ", 2),
        ('hash, email\n"h", "bob@x.io"', 2),
        ('"email";"hash"\r\n"bob@x.io";"h"\r\n', 2),
        ("Name\tEmail\tHash\nBob, the first\tbob@x.io\th", 2),
        ("email|hash\nbob@x.io|h", 2),
        ("sep=;\nemail;hash\nbob@x.io;h", 3),
        ('\ufeff"SEP=;"\r\nEmail;Hash\r\nbob@x.io;h\r\n', 3),
        ("sep=\t\nemail\thash\nbob@x.io\th", 3),
        ("sep=^\nemail^hash\nbob@x.io^h", 3),
        ("sep=,\nemail,hash\nbob@x.io,h", 3),
        ('email;hash;note\n"bob@x.io";h;"a\r\nb;c"', 3),
    ],
)
@each("encoding", ["utf-8", "utf-16-le", "utf-16-be"])
def test_a_csv_header_names_the_columns(text: str, line: int, encoding: str) -> None:
    text = "\ufeff" + text.removeprefix("\ufeff") if encoding[6:] else text
    ((number, record),) = records(text.encode(encoding), "csv")
    assert (number, record["email"], record["hashed_password"]) == (line, "bob@x.io", "h")


@each("text", ["", "\n", "sep=;", "bob@x.io,h\n", '"email"x,hash\n', "email:hash\n", "name,hash"])
def test_a_csv_file_without_a_column_of_emails_is_refused(text: str) -> None:
    with pytest.raises(UnknownFormat, match="email and hashed_password"):
        records(text, "csv")


@each(
    ("names", "reason"),
    [
        (["email", "EMAIL", "hash"], "email is named twice"),
        (["hash", "Email", "password"], "hashed_password is named twice"),
        (["email", "hash", "disabled", "Disabled"], "disabled is named twice"),
        (["email", "user_pass"], "is 'user_pass' the hash"),
        (["email", "PWD_MD5"], "is 'PWD_MD5' the hash"),
        (["email", "bcrypt-digest"], "is 'bcrypt-digest' the hash"),
    ],
)
def test_names_that_could_mean_two_things_are_refused(names: list[str], reason: str) -> None:
    with pytest.raises(UnknownFormat, match=reason):
        records(",".join(names), "csv")
    members = (f'"{name}": "x"' for name in names)
    ((number, record),) = records(f"{{{', '.join(members)}}}", "jsonl")
    assert (number, reason in refusal(record)) == (1, True)


@pytest.mark.parametrize("name", ["bcrypt", "secret", "pw crypt"])
def test_a_hash_under_another_name_is_refused(name: str) -> None:
    reason = f"is '{name}' the hash of the password? Name it hashed_password, or remove it"
    (_, in_csv), (_, in_json) = (
        *records(f"email,{name}\nbob@x.io,{HASH}\n", "csv"),
        *records(json.dumps({"email": "bob@x.io", name: HASH}), "jsonl"),
    )
    assert (refusal(in_csv), refusal(in_json)) == (reason, reason)


def test_a_repeated_name_in_json_is_refused() -> None:
    ((_, record),) = records('{"email": "bob@x.io", "email": "eve@x.io"}', "jsonl")
    assert refusal(record) == "email is named twice"


@each("encoding", ["utf-8-sig", "utf-16"])
@each("end", ["\n", "\r\n", "\r"])
@each(
    ("form", "lines"),
    [
        ("csv", ["email;hash", "é@x.io;h", "", "ж@x.io;h"]),
        ("jsonl", ['{"EMAIL": "é@x.io", "Hash": "h"}', "", " ", '{"email": "ж@x.io", "hash": "h"}']),
        ("htpasswd", ["# people", "é@x.io:h", "", "ж@x.io:h:Ж"]),
    ],
)
def test_a_file_is_read_in_each_encoding_and_with_each_end_of_a_line(
    form: str, lines: list[str], end: str, encoding: str
) -> None:
    found = records(end.join([*lines, ""]).encode(encoding), form)
    assert [line for line, _ in found] == [1 if form == "jsonl" else 2, 4]
    assert [record for _, record in found] == [
        {"email": email, "hashed_password": "h"} for email in ("é@x.io", "ж@x.io")
    ]


@each("form", ["csv", "jsonl", "htpasswd"])
@each("encoding", ["utf-16-le", "utf-16-be", "utf-32"])
def test_a_file_of_another_encoding_is_refused_by_name(form: str, encoding: str) -> None:
    with pytest.raises(UnknownFormat, match="convert it to UTF-8"):
        records("email,hash\nbob@x.io,h".encode(encoding), form)


@pytest.mark.parametrize("form", ["csv", "jsonl", "htpasswd"])
def test_a_utf_16_file_that_ends_in_half_a_letter_is_refused(form: str) -> None:
    with pytest.raises(UnknownFormat, match="begins as UTF-16"):
        records("email,hash\nbob@x.io,h".encode("utf-16")[:-1], form)


def test_a_line_with_invalid_utf_8_is_refused_and_the_others_are_not() -> None:
    found = records(f"email,hash\na@x.io,{HASH}\n\udcff@x.io,{HASH}\n".encode(errors="surrogateescape"), "csv")
    assert [line for line, _ in found] == [2, 3]
    assert user_files.parse_user(found[0][1], check_email, NOW).email == "a@x.io"
    assert "email is not valid text" in refusal(found[1][1])


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
    found = records("\ufeff# people\nbob@x.io:h\r\n\neve@x.io:\n", "htpasswd")
    assert found == [
        (2, {"email": "bob@x.io", "hashed_password": "h"}),
        (4, {"email": "eve@x.io", "hashed_password": ""}),
    ]


@each("more", ["", ":", ":Bob Smith:bob@y.io", ":1000:1000::/home/bob::userdb_quota=1:x"])
def test_further_fields_of_an_htpasswd_line_are_ignored(more: str) -> None:
    assert records(f"bob@x.io:{HASH}{more}\n", "htpasswd") == [(1, {"email": "bob@x.io", "hashed_password": HASH})]


def test_an_htpasswd_line_without_a_colon_is_refused() -> None:
    ((number, record),) = records("bob@x.io\n", "htpasswd")
    assert (number, refusal(record)) == (1, "expected name:hash")


@given(st.binary(max_size=300), st.sampled_from(["csv", "jsonl", "htpasswd"]))
@pytest.mark.slow
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


@each("hashed", [HASH, HASH.replace("$2b", "$2a"), HASH.replace("$2b", "$2y"), LONG, FIRST_LONG, DIRTY, "!"])
def test_a_hash_is_imported_unchanged(hashed: str) -> None:
    assert user(hashed_password=hashed) == User(0, "bob@x.io", hashed, created_at=NOW)


@pytest.mark.parametrize("scheme", ["{BLF-CRYPT}", "{crypt}", "{bcrypt}"])
def test_the_name_of_the_scheme_before_a_hash_is_taken_off(scheme: str) -> None:
    assert user(hashed_password=f" {scheme}{HASH}\t").hashed_password == HASH


@each(
    ("fields", "reason"),
    [
        ({"email": ""}, "blank"),
        ({"email": "a\nb"}, "control"),
        ({"email": "a" * 255}, "254 bytes"),
        ({"email": "\udcff"}, "valid text"),
        ({"email": 5}, "must be text"),
        ({"email": ["a"]}, "must be text"),
        ({"hashed_password": "b4l0u"}, "not a bcrypt hash"),
        ({"hashed_password": "$apr1$abc$def"}, "not a bcrypt hash"),
        ({"hashed_password": HASH + "\n"}, "not a bcrypt hash"),
        ({"hashed_password": HASH.replace("$12$", "$16$")}, "cost 16"),
        ({"hashed_password": LONG.replace("r=12", "r=31")}, "cost 31"),
        ({"hashed_password": FIRST_LONG.replace(",12$", ",16$")}, "cost 16"),
        ({"hashed_password": FIRST_LONG.replace(",12$", ",3$")}, "not a bcrypt hash"),
        ({"hashed_password": "*"}, "not a bcrypt hash"),
        ({"hashed_password": "{CRYPT}"}, "not a bcrypt hash"),
        ({"hashed_password": "{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g="}, "not a bcrypt hash"),
        ({"hashed_password": "{CRYPT}{CRYPT}" + HASH}, "not a bcrypt hash"),
        ({"hashed_password": 0}, "must be text"),
        ({"hashed_password": "x" + HASH}, "hashed_password is not"),
        ({"disabled": "maybe"}, "disabled 'maybe': it must be true or false"),
        ({"disabled": 2}, "disabled '2': it must be true or false"),
        ({"disabled": []}, "disabled must be text"),
        ({"cut_at_72": "perhaps"}, "cut_at_72 'perhaps': it must be true or false"),
        ({"created": "yesterday"}, "created 'yesterday': it must be a time"),
        ({"created": "01/02/2024"}, "created '01/02/2024': it must be a time"),
        ({"created": "2024"}, "created '2024': it must be a time"),
        ({"created": "2024-01-02 03:04:05 CET"}, "it must be a time"),
        ({"created": True}, "it must be a time"),
        ({"created": float("nan")}, "it must be a time"),
        ({"created": 10**30}, "it must be a time"),
        ({"created": -86_400}, "it must be a time"),
        ({"created": "0001-01-01T00:00:00+23:59"}, "since 1970"),
        ({"created": "2099-01-01T00:00:00Z"}, "not in the future"),
        ({"created": NOW + 301}, "not in the future"),
        ({"created": (NOW + 301) * 1000}, "not in the future"),
        ({"totp_secret": "A" * 8}, "totp_secret has 40 bits: it must have 128 to 512 bits"),
        ({"totp_secret": "A" * 16}, "totp_secret has 80 bits: it must have 128 to 512 bits"),
        ({"totp_secret": "gezd gnbv gy3t qojq gezd gnbv"}, "totp_secret has 120 bits"),
        ({"totp_secret": "A" * 160}, "totp_secret has 800 bits"),
        ({"totp_secret": "not base32!"}, "totp_secret is not base32"),
        ({"totp_secret": SEED[:-1] + "0"}, "totp_secret is not base32"),
        ({"totp_secret": SEED[:-1] + "8"}, "totp_secret is not base32"),
        ({"totp_secret": SEED[:-1] + "ſ"}, "totp_secret is not base32"),
        ({"totp_secret": SEED[:27]}, "totp_secret is not base32"),
        ({"totp_secret": "AA==" + SEED}, "totp_secret is not base32"),
        ({"totp_secret": f"otpauth://totp/bob?secret={SEED}"}, "totp_secret is not base32"),
        ({"totp_secret": 5}, "totp_secret must be text"),
        ({"groups": "wiki Admin"}, "groups 'wiki Admin': a group is up to 64 of a-z"),
        ({"groups": "wiki,admin"}, "groups 'wiki,admin': a group is"),
        ({"groups": "NULL"}, "groups 'NULL': a group is"),
        ({"groups": "-a"}, "a group is"),
        ({"groups": "é"}, "a group is"),
        ({"groups": "a\0"}, "a group is"),
        ({"groups": "a" * 65}, "a group is"),
        ({"groups": " ".join(f"g{number}" for number in range(33))}, "a user can be in at most 32 groups"),
        ({"groups": 5}, "groups must be text"),
        ({"groups": ["wiki"]}, "groups must be text"),
    ],
)
def test_an_invalid_user_is_refused_with_the_reason(fields: dict[str, Any], reason: str) -> None:
    assert reason in refusal({"email": "bob@x.io", "hashed_password": HASH, **fields})


@each("secret", [SEED, SEED.lower(), SEED[:16], "JBSW Y3DP EHPK 3PXP JBSW", HASH[1:], LONG, FIRST_LONG, MD5, SHA])
def test_no_refusal_shows_a_hash_or_a_seed_even_in_the_wrong_column(secret: str) -> None:
    harms = ["", "\0", "!", *(["@x.io"] if len(secret) >= 24 else [])]  # a word of 16 letters with an @ is an email
    for name, harm in itertools.product(user_files.FIELDS, harms):
        fields = {"email": "a\tb", "hashed_password": "x", name: secret + harm}
        shown = refusal({**fields, "email": secret + harm + "\0"} if name == "email" else fields)
        assert not any(part in shown for part in re.findall("[^ ${},]{4,}", secret)), name


def test_a_refusal_shows_the_value_of_an_email_and_not_all_of_a_long_one() -> None:
    assert refusal({"email": "bob@x.io\n"}) == r"email 'bob@x.io\n': email must not contain control characters"
    for email in "christophermueller@x.io", "bob@christophermueller.io":
        assert email in refusal({"email": f"{email}\n"})
    assert len(refusal({"email": "bob@x.io " * 1000, "hashed_password": HASH})) < 160


@each(
    ("disabled", "since"),
    [
        *((value, NOW) for value in (True, 1, "TRUE", "True", "t", "T", "1", "yes", "Y", "on", "ON", " true\t")),
        *(
            (value, None)
            for value in (False, 0, "FALSE", "f", "F", "0", "no", "N", "off", "Off", "", " ", None, "NULL")
        ),
    ],
)
def test_a_disabled_user_is_imported_as_disabled(disabled: Any, since: int | None) -> None:
    assert user(disabled=disabled).disabled_at == since


def test_a_second_factor_is_imported() -> None:
    imported = user(totp_secret=f" {SEED[:16].lower()} {SEED[16:]} ")
    assert (imported.totp_secret, imported.totp_since) == (SEED, NOW)
    assert user(totp_secret=SEED[:26]).totp_secret == SEED[:26] + "======"


@each(
    "shown",
    [
        SEED[:26].lower(),
        SEED[:26] + "======",
        SEED[:26] + "=",
        "jbsw y3dp ehpk 3pxp jbsw y3dp eh",
        "JBSW\u00a0Y3DP\u00a0EHPK\u00a03PXP\tJBSWY3DPEH",
        "JBSW-Y3DP-EHPK-3PXP-JBSW-Y3DP-EH",
    ],
)
def test_a_seed_of_128_bits_is_imported_as_apps_show_it(shown: str) -> None:
    assert user(totp_secret=shown).totp_secret == SEED[:26] + "======"


@each(
    ("text", "groups"),
    [
        *((value, "") for value in ("", " ", None)),
        ("wiki", "wiki"),
        ("wiki admin  wiki\t0_a-b", "0_a-b,admin,wiki"),
        ("none null", "none,null"),
        ("a" * 64, "a" * 64),
    ],
)
def test_the_groups_of_a_user_are_imported(text: Any, groups: str) -> None:
    assert user(groups=text).groups == groups


@each("missing", [{"hashed_password": value} for value in ("", None, "null", "NULL", r"\N", " ")])
def test_a_user_without_a_password_waits_for_an_invitation(missing: dict[str, Any]) -> None:
    assert user(**missing) == User(0, "bob@x.io", "!", created_at=NOW)


def test_a_file_without_a_column_of_passwords_has_users_who_wait_for_an_invitation() -> None:
    lines = {"csv": "email,disabled\nbob@x.io,f\n", "jsonl": '{"Email": "bob@x.io"}', "htpasswd": "bob@x.io:\n"}
    for form, text in lines.items():
        ((_, record),) = records(text, form)
        assert user_files.parse_user(record, check_email, NOW) == User(0, "bob@x.io", "!", created_at=NOW)


def test_an_email_is_imported_as_it_is() -> None:
    assert [user(email=email).email for email in ("null", " Bob ", "'=x")] == ["null", " Bob ", "'=x"]
    assert [record["email"] for _, record in records('email,hash\n Bob ,h\n" Bob ",h', "csv")] == [" Bob ", " Bob "]


@each(
    "created",
    [
        *("2020-01-01T00:00:00Z", "2020-01-01 00:00:00", "2020-01-01T01:00:00+01:00", "2020-01-01t00:00:00z"),
        *("2020-01-01 00:00:00 UTC", "2020-01-01 00:00:00 utc", "2020-01-01T00:00:00GMT", "2020-01-01 00:00:00.999 Z"),
        *("2020-01-01 00:00:00+00", "2020-01-01 05:30:00.123456789+05:30", "2019-12-31 19:00:00 -0500"),
        *("2020-01-01 00:00:00.123456789 +0000 UTC", "2020-01-01 01:00:00 +0100 CET"),
        *("2019-12-31 16:00:00.5 -08:00", "2020-01-01", "20200101", " 2020-01-01T00:00 "),
        *("1577836800", "1577836800.25", "1577836800000", "1577836800999", "1577836800000000", "1577836800000000000"),
        *(1_577_836_800, 1_577_836_800.9, 1_577_836_800_000, 1_577_836_800_000.0),
    ],
)
def test_the_creation_time_is_imported(created: Any) -> None:
    assert user(created=created).created_at == 1_577_836_800


@given(st.integers(10**8, NOW), st.integers(-1439, 1439), st.sampled_from(["s", "ms", "iso", "blank", "utc"]))
@pytest.mark.slow
def test_every_form_of_a_time_means_the_same(moment: int, offset: int, form: str) -> None:
    at = datetime.fromtimestamp(moment, timezone(timedelta(minutes=offset)))
    utc = at.astimezone(timezone.utc)
    forms = {"s": str(moment), "ms": f"{moment}999", "iso": at.isoformat(), "utc": f"{utc:%Y-%m-%d %H:%M:%S} UTC"}
    forms["blank"] = f"{at:%Y-%m-%d %H:%M:%S.75 %z}"
    assert user(created=forms[form]).created_at == moment


def test_only_plain_hashes_are_marked_as_cut() -> None:
    def imported(hashed: str, **fields: str) -> str | None:
        record = {"email": "bob@x.io", "hashed_password": hashed, **fields}
        return user_files.parse_user(record, check_email, NOW, cut_at_72=not fields).cut_salt

    assert [imported(hashed) for hashed in (HASH, DIRTY, LONG, FIRST_LONG, "")] == [
        HASH[7:29],
        DIRTY[7:29],
        *[None] * 3,
    ]
    assert [imported(HASH, cut_at_72=flag) for flag in ("t", "false")] == [HASH[7:29], None]


# Writing users


def written(form: str, *users: User) -> tuple[str, int, int]:
    file = io.StringIO()
    counts = Counter(user_files.write_users(users, file, form))
    return file.getvalue(), counts[True], counts[False]


words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60)
formulas = st.from_regex(r"[ ']{0,3}[=+@;,'＝－ -]{1,3}[a-z\"]{0,3}", fullmatch=True)
groups = st.from_regex(GROUP, fullmatch=True) | st.sampled_from(["none", "null"])
group_lists = st.sets(groups, max_size=MAX_GROUPS).map(sorted).map(",".join)
texts = st.one_of(words, formulas).filter(str.strip)


@pytest.mark.slow
@given(
    st.lists(
        st.builds(
            User,
            st.just(0),
            texts,
            st.sampled_from([HASH, DIRTY, LONG, FIRST_LONG, "!"]),
            created_at=st.integers(0, NOW),
            disabled_at=st.sampled_from([None, NOW]),
            totp_secret=st.just(SEED),
            totp_since=st.just(NOW),
            cut_salt=st.none(),
            groups=group_lists,
            session_id=st.none(),
            reset_token=st.none(),
            device_key=st.none(),
            last_login_at=st.none(),
        )
        | texts.map(lambda email: User(0, email, HASH, created_at=NOW, cut_salt=HASH[7:29])),
        max_size=5,
    ),
    st.sampled_from(["csv", "jsonl"]),
)
def test_written_users_read_back_equal(users: list[User], form: str) -> None:
    text, count, left_out = written(form, *users)
    assert (count, left_out) == (len(users), 0)
    if form == "csv":
        for cell in (cell for row in csv.reader(io.StringIO(text)) for cell in row):
            assert not re.match(r"\s*[=+\-@\t\r＝＋－＠]", cell)
    assert [user_files.parse_user(record, check_email, NOW) for _, record in records(text, form)] == users


def test_an_unconfirmed_seed_is_not_exported() -> None:
    text, *_ = written("csv", User(1, "bob@x.io", HASH.encode(), totp_secret=SEED))
    assert text == f"email,hashed_password,created,disabled,totp_secret,cut_at_72,groups\nbob@x.io,{HASH},,,,,\n"


@each("email", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", " =1", "'=1", "＝1", "＠SUM"])
def test_an_exported_value_is_no_formula_and_is_imported_as_it_was(email: str) -> None:
    text, *_ = written("csv", User(1, email, HASH))
    assert list(csv.reader(io.StringIO(text, newline="")))[1][0] == f"'{email}"
    assert records(text, "csv")[0][1]["email"] == email


def test_no_part_of_an_exported_email_becomes_a_cell_where_semicolons_split() -> None:
    text, *_ = written("csv", User(1, "bob;=1+1", HASH))
    assert [row[0] for row in csv.reader(io.StringIO(text), delimiter=";")][1].startswith("bob;=1+1")


def test_a_mark_of_another_hash_is_not_exported() -> None:
    marked = written("csv", User(1, "bob@x.io", HASH, cut_salt=HASH[7:29]))[0]
    changed = written("csv", User(1, "bob@x.io", HASH.encode(), cut_salt="." * 22))[0]
    assert (marked.endswith(",true,\n"), changed.endswith(",,\n")) == (True, True)


def test_htpasswd_leaves_out_users_that_it_cannot_represent() -> None:
    text, count, left_out = written(
        "htpasswd",
        User(1, "bob@x.io", HASH, groups="admin,wiki"),
        User(2, "long@x.io", LONG),
        User(3, "invited@x.io", "!"),
        User(4, "disabled@x.io", HASH, disabled_at=1),
        User(5, "factor@x.io", HASH, totp_secret=SEED, totp_since=1),
        User(6, "a:b@x.io", HASH),
        User(7, "#c@x.io", HASH),
    )
    assert (text, count, left_out) == (f"bob@x.io:{HASH}\n", 1, 6)
