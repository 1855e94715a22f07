"""The pages for users: each of them in each language, built once at the start from the files in ``web/pages/``."""

import json
import re
from html import escape
from pathlib import Path
from urllib.parse import urlsplit

from settings import Settings
from web.languages import LANGUAGES
from web.responses import PAGE_POLICY, VARY, Response

FILES = Path(__file__).with_name("pages")
NAMES = "login", "register", "forgot", "reset", "account", "logout", "confirm", "change"

_GAP = re.compile(r"\{(\w+)\}")  # in a page: the name of a text, or of a value below
_SECTION = re.compile(r'<section id="(\w+)".*?</section>', re.DOTALL)


def build_pages(settings: Settings, passkey_host: str) -> dict[str, dict[str, Response]]:
    """Return the response to each path in each language. The stylesheet and the script are the same in all of them."""
    style, script = _response("css", _read("style.css")), _response("javascript", _read("script.js"))
    pages = {"/pages/style.css": dict.fromkeys(LANGUAGES, style), "/pages/script.js": dict.fromkeys(LANGUAGES, script)}
    site, logo = settings.site_name or urlsplit(settings.origin).hostname or "", settings.logo
    document = _read("index.html")
    values = {
        "site": escape(site),
        "mark": f'<img src="{logo}" alt="">' if logo else escape(site[0].upper()),
        "domain": settings.cookie_domain,
        "confirm": "on" if settings.confirms_email else "off",
        "passkeys": passkey_host,
        "registration": settings.registration,
        "mail": "off" if settings.production and not settings.smtp_url else "on",
        "minimum": str(settings.password_min if settings.production else 1),
    }
    for language in LANGUAGES:
        texts = json.loads(_read(f"texts/{language}.json"))
        shown = {name: escape(text) for name, text in texts.pop("page").items()}
        template = _fill(document, shown | {"texts": escape(json.dumps(texts, ensure_ascii=False), quote=False)})
        # After the texts, so that nothing in a value is taken for the name of a text.
        values |= {"language": language, "contact": escape(settings.contact) or shown["ask_operator"]}
        for name in NAMES:
            # Its own section, and the one to sign in, which the account page shows after a deletion.
            page = _fill(_only({"login", name}, template), values | {"page": name, "title": shown[f"{name}_title"]})
            pages.setdefault(f"/{name}", {})[language] = _response("html", page)
    return pages


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
