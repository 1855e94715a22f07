"""The pages for users: each of them in each language, built once from the files in ``web/pages/``."""

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from settings import Settings
from web.languages import LANGUAGES
from web.responses import PAGE_POLICY, VARY, Response

FILES = Path(__file__).with_name("pages")
NAMES = "login", "register", "forgot", "reset", "account", "logout", "confirm", "change"

_GAP = re.compile(r"\{(\w+)\}")  # in a page: the name of a text, or of a value below
_SECTION = re.compile(r'<section id="(\w+)".*?</section>', re.DOTALL)


def load_pages(settings: Settings, passkey_host: str) -> Callable[[str, str], Response]:
    """Return a function that takes a path and a language, and returns the response.

    All files are read now, so that an upgrade in place does not mix those of two releases. A page is built when it is
    first asked for: a service without visitors starts sooner and takes less memory.
    """
    document, style, script = map(_read, ("index.html", "style.css", "script.js"))
    texts = {language: _read(f"texts/{language}.json") for language in LANGUAGES}
    files = {"/pages/style.css": _response("css", style), "/pages/script.js": _response("javascript", script)}

    @functools.cache
    def page(name: str, language: str) -> Response:
        from html import escape  # takes 0.5 MB, for the names of all characters

        content = json.loads(texts[language])
        shown = {key: escape(text) for key, text in content.pop("page").items()}
        site, logo = settings.site_name or urlsplit(settings.origin).hostname or "", settings.logo
        values = {
            "site": escape(site),
            "mark": f'<img src="{logo}" alt="">' if logo else escape(site[0].upper()),
            "domain": settings.cookie_domain,
            "confirm": "on" if settings.confirms_email else "off",
            "contact": escape(settings.contact) or shown["ask_operator"],
            "passkeys": passkey_host,
            "registration": settings.registration,
            "mail": "off" if settings.production and not settings.smtp_url else "on",
            "minimum": str(settings.password_min if settings.production else 1),
            "language": language,
            "page": name,
            "title": shown[f"{name}_title"],
        }
        shown["texts"] = escape(json.dumps(content, ensure_ascii=False), quote=False)
        # Its own section, and the one to sign in, which the account page shows after a deletion. The values come after
        # the texts, so that nothing in a value is taken for the name of a text.
        return _response("html", _fill(_fill(_only({"login", name}, document), shown), values))

    return lambda path, language: files.get(path) or page(path[1:], language)


def _only(names: set[str], template: str) -> str:
    return _SECTION.sub(lambda section: section[0] if section[1] in names else "", template)


def _fill(template: str, values: dict[str, str]) -> str:
    return _GAP.sub(lambda gap: values.get(gap[1], gap[0]), template)


def _read(name: str) -> str:
    """Return a file without indentation, empty lines and comments of one line, which are a sixth of the script."""
    text = (FILES / name).read_text(encoding="utf-8")
    return re.sub(r"^(?:\s|//.*\n|/\*.*\*/\n|<!--.*-->\n)+", "", text, flags=re.MULTILINE)


def _response(kind: str, text: str) -> Response:
    content = text.encode()
    headers = [("Content-Type", f"text/{kind}; charset=utf-8"), ("Content-Length", str(len(content)))]
    return Response(200, content, [*headers, ("Vary", f"Accept-Language, {VARY}"), PAGE_POLICY])
