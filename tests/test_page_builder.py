"""The pages in their languages: every text is there and used, every message has its sentence, settings are shown."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import auth
import authsvc
from credentials import passwords
from settings import Settings
from tests.cases import each
from tests.conftest import Client
from tests.product import TREES, nodes_of
from web.languages import LANGUAGES
from web.page_builder import FILES, NAMES, load_pages

TEXTS: dict[str, dict[str, dict[str, str]]] = {
    language: json.loads((FILES / f"texts/{language}.json").read_text(encoding="utf-8")) for language in LANGUAGES
}
INDEX, SCRIPT = ((FILES / name).read_text(encoding="utf-8") for name in ("index.html", "script.js"))
PRODUCTION = Settings(public_url="https://auth.example.com", bcrypt_cost=10)

# Messages that no page can cause.
ELSEWHERE = {
    "not allowed here",  # GET /verify
    "invalid access token",  # the same
    "the query may only contain login=# and group=NAME",  # the same
    "a group is up to # of a-z, #-#, _ and -, and begins with a letter or a digit",  # commands
    "a user can be in at most # groups",
}


def page(settings: Settings, name: str = "login", language: str = "en") -> str:
    return load_pages(settings, "localhost")(f"/{name}", language).body.decode()


def gaps(text: str) -> list[str]:
    """Return what is filled into a text: names, and # for a number."""
    return sorted(re.findall(r"\{\w+\}|#", text))


@each("language", LANGUAGES)
def test_every_language_has_the_same_texts(language: str) -> None:
    assert TEXTS[language].keys() == TEXTS["en"].keys() == {"page", "script", "messages"}
    for part, texts in TEXTS["en"].items():
        translated = TEXTS[language][part]
        assert list(translated) == list(texts)
        assert all(text == text.strip() != "" for text in translated.values())
        assert {name: gaps(text) for name, text in translated.items()} == {
            name: gaps(text) for name, text in texts.items()
        }


def test_english_german_french_and_spanish_are_offered() -> None:
    options = re.findall('<option value="([a-z]+)" lang="([a-z]+)">', INDEX)
    assert sorted(options) == [(language, language) for language in sorted(LANGUAGES)]
    assert sorted(path.stem for path in (FILES / "texts").iterdir()) == sorted(LANGUAGES)


def test_every_text_is_used() -> None:
    shown = set(re.findall(r"\{(\w+)\}", INDEX)) | {f"{name}_title" for name in NAMES} | {"ask_operator"}
    assert TEXTS["en"]["page"].keys() <= shown
    named = set(re.findall(r'text\("([\w-]+)"', SCRIPT)) | set(re.findall(r'refuse\("([\w-]+)"\)', SCRIPT))
    named |= {"show", "hide", "NotAllowedError", "InvalidStateError"}  # chosen by a condition
    named |= {"weak"}  # in the sentences for messages
    assert TEXTS["en"]["script"].keys() == named


def test_every_gap_of_a_page_is_filled() -> None:
    pages = load_pages(PRODUCTION, "auth.example.com")
    for path in ("/pages/style.css", "/pages/script.js", *(f"/{name}" for name in NAMES)):
        for language in LANGUAGES:
            text = pages(path, language).body.decode().partition('<template id="texts">')[0]
            assert not re.search(r"<!--|/\*|^ *//", text, re.MULTILINE)  # nor has it a comment
            if text.startswith("<!doctype html>"):
                assert not re.search("[{}]", text)


def messages_in(module: str) -> set[str]:
    """Return what a module refuses with: texts that are raised, and those of the classes of its errors."""
    found: list[ast.expr] = []
    for node in nodes_of(TREES[module]):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found += node.exc.args
        elif isinstance(node, ast.ClassDef):
            found += [word.value for word in node.keywords if word.arg == "message"]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("self._rejected", "json_response"):
            found += node.args[:1]
            found += [word.value for word in node.keywords if word.arg == "message" and "503" in ast.unparse(node)]
        elif isinstance(node, ast.FunctionDef) and node.name in ("strength_error", "length_error"):
            found += [one.value for one in ast.walk(node) if isinstance(one, ast.Return) and one.value]
    return set(filter(None, map(message_of, found)))


def message_of(node: ast.expr) -> str:
    """Return a text with # in the place of each number that is filled in."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    texts = [part.value if isinstance(part, ast.Constant) else "#" for part in parts]
    text = "".join(part for part in texts if isinstance(part, str))
    return re.sub("[0-9]+", "#", text) if " " in text else ""


def test_every_message_of_the_service_has_its_sentence() -> None:
    found = messages_in("auth") | messages_in("credentials.passwords") | messages_in("authsvc")
    found -= {"registration is #", "AUTHSVC_LISTEN=#: #", "unknown credential id", "revoked by a reset of the password"}
    found -= {message for message in found if message.startswith(("challenge used", "known credential id"))}  # logged
    found |= {"registration is closed", "registration is by invitation only", "internal error", "use https"}
    found |= {re.sub("[0-9]+", "#", auth.NAME_RULE), "busy, try again later", "request body too large"}
    found |= {"cross-origin request refused", "this is a development service, for its own machine only"}
    assert TEXTS["en"]["messages"].keys() == found - ELSEWHERE
    assert len(found) > 40


def test_the_messages_of_weak_passwords_begin_as_the_script_expects() -> None:
    weak = ["", "a" * 2000, "short", "a" * 15, "qwertyuiopasdfghj", "password1234567", "example.com auth bob"]
    for password in weak:
        message = passwords.length_error(password) or passwords.strength_error(password, "bob@example.com auth", 15)
        assert message
        assert message.startswith("password ")
        assert re.sub("[0-9]+", "#", message) in TEXTS["en"]["messages"]
    assert re.search("REFUSED = [^;]* password: ", SCRIPT)


@each(
    ("cookie", "accepted", "language"),
    [
        (None, "fr", "fr"),
        ("language=de", "fr", "de"),
        ("language=xx", "fr", "fr"),
        ("language=", "fr", "fr"),
        ("__Host-language=de", "fr", "fr"),
        ("language=de; language=es", "fr", "de"),
    ],
)
def test_the_language_that_was_chosen_counts_before_the_preferred_one(
    tmp_path: Path, cookie: str | None, accepted: str, language: str
) -> None:
    call = Client(authsvc.create_app(Settings(database=str(tmp_path / "db"))))
    answer = call("GET", "/login", cookie=cookie, HTTP_ACCEPT_LANGUAGE=accepted)
    assert f'<html lang="{language}" dir="ltr">' in answer.body.decode()
    assert answer.headers["Vary"] == "Accept-Language, Cookie, Authorization"


def test_in_production_the_chosen_language_is_in_a_cookie_of_this_host(tmp_path: Path) -> None:
    call = Client(authsvc.create_app(replace(PRODUCTION, database=str(tmp_path / "db"))))
    for cookie, language in ("__Host-language=de", "de"), ("language=de", "en"):
        assert f'<html lang="{language}"' in call("GET", "/login", cookie=cookie).body.decode()


@each(
    ("changed", "attributes"),
    [
        ({}, {"registration": "open", "mail": "off", "minimum": "15", "confirm": "off", "domain": ""}),
        ({"registration": "closed", "password_min": 20}, {"registration": "closed", "minimum": "20"}),
        ({"smtp_url": "smtp://127.0.0.1:25", "mail_from": "a@b.io"}, {"mail": "on", "confirm": "on"}),
        ({"public_url": ""}, {"mail": "on", "minimum": "1"}),
    ],
)
def test_a_page_knows_the_settings(changed: dict[str, Any], attributes: dict[str, str]) -> None:
    found = dict(re.findall(r'data-(\w+)="([^"]*)"', page(replace(PRODUCTION, **changed))))
    assert found == found | attributes


def test_the_name_and_the_contact_are_text_on_a_page() -> None:
    settings = replace(PRODUCTION, site_name="<b>{contact}", contact='{site} "&" <i>')
    text = page(settings, "forgot")
    assert "<title>Reset your password – &lt;b&gt;{contact}</title>" in text
    assert "{site} &quot;&amp;&quot; &lt;i&gt;</p>" in text
    assert not re.search("<[bi]>", text)


def test_a_page_has_its_own_section_and_the_one_to_sign_in() -> None:
    for name in NAMES:
        assert set(re.findall('<section id="([a-z]+)"', page(PRODUCTION, name))) == {name, "login"}


def test_without_a_name_the_host_is_shown() -> None:
    assert "<title>Sign in – auth.example.com</title>" in page(PRODUCTION)
    assert "<title>Anmelden – localhost</title>" in page(Settings(), language="de")


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_page_with_its_files_takes_at_most_56_kb(language: str) -> None:
    pages = load_pages(PRODUCTION, "auth.example.com")
    loaded = ("/account", "/pages/style.css", "/pages/script.js")
    assert sum(len(pages(path, language).body) for path in loaded) <= 56_000
