"""Every state of every page, in two widths, colour schemes and languages, in Chromium and in Firefox, with axe in each.

The languages are that with the longest words and that with the longest texts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Literal, NamedTuple

import pytest
from playwright.sync_api import Browser

from tests import page_states
from tests.browser import EVERYTHING, CheapSite, Visit, Visitor, add_account, check_accessibility
from tests.firefox import Firefox, Guest, Look
from tests.mail_server import MailServer
from tests.page_states import Person

pytest_plugins = ["tests.browser", "tests.firefox"]
pytestmark = [pytest.mark.long, pytest.mark.process, pytest.mark.browser]

LANGUAGES = "de", "fr"
WIDTHS = 320, 1280
SCHEMES: tuple[Literal["dark", "light"], ...] = ("dark", "light")  # a page is loaded in the last


class Walk(NamedTuple):
    """A way through states of the pages, and the fixture with its site."""

    site: str
    states: Callable[[Person, str, MailServer], Iterator[str]]


def with_account(bob: Person, address: str, _: MailServer) -> Iterator[str]:
    add_account(bob.site, address)
    return page_states.walk(bob, address)


WALKS = {
    "pages": Walk("site", with_account),
    "refusals": Walk("site", lambda bob, address, _: page_states.walk_through_refusals(bob, address)),
    "account": Walk("site", page_states.walk_through_an_account),
    "confirmation": Walk("confirming_site", page_states.walk_through_a_confirmation),
    "club": Walk("club", lambda bob, address, _: page_states.walk_through_a_club(bob, address)),
    "closed": Walk("closed_site", lambda bob, _, __: page_states.walk_through_a_closed_site(bob)),
}
every_walk = pytest.mark.parametrize("name", WALKS)
every_width = pytest.mark.parametrize("width", WIDTHS)
every_language = pytest.mark.parametrize("language", LANGUAGES)


@pytest.fixture(scope="module")
def closed_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CheapSite]:
    with closing(CheapSite(tmp_path_factory.mktemp("closed"), {"AUTHSVC_REGISTRATION": "closed"})) as shared:
        yield shared


@pytest.fixture
def site_of(request: pytest.FixtureRequest, name: str) -> CheapSite:
    shared: CheapSite = request.getfixturevalue(WALKS[name].site)
    shared.forget_attempts()
    return shared


@every_walk
@every_width
@every_language
def test_every_state_in_chromium(
    browser: Browser, site_of: CheapSite, mail: MailServer, language: str, width: int, name: str
) -> None:
    """No error, no violation of the policy and no layout shift either: a ``Visitor`` notes them."""
    address = f"chromium-{language}-{width}-{name}@example.com"
    with Visitor(browser, site_of, locale=language, viewport={"width": width, "height": 800}) as bob:
        for state in WALKS[name].states(bob, address, mail):
            assert bob.run("document.documentElement.lang") == language
            for scheme in SCHEMES:
                bob.page.emulate_media(color_scheme=scheme)
                check_accessibility(bob.page, f"{state}, {scheme}")


@pytest.fixture
def guest(firefox: Firefox, site_of: CheapSite, language: str, width: int) -> Iterator[Guest]:
    """A guest in Firefox. At the end no page may have caused an error or violated its policy."""
    firefox.errors()
    yield Guest(firefox, site_of, Look(width, SCHEMES[-1], language))
    firefox.forget()
    assert firefox.errors() == []


@every_walk
@every_width
@every_language
def test_every_state_in_firefox(guest: Guest, mail: MailServer, language: str, width: int, name: str) -> None:
    address = f"firefox-{language}-{width}-{name}@example.com"
    for state in WALKS[name].states(guest, address, mail):
        assert guest.run("document.documentElement.lang") == language
        for scheme in SCHEMES:
            guest.set_look(Look(width, scheme, language))
            guest.check_look()
            guest.expect_no_axe_violation(EVERYTHING, f"{state}, {scheme}")


def test_the_sign_in_page_is_painted_within_a_tenth_of_a_second(visit: Visit) -> None:
    """On an idle machine."""
    bob, times = visit(), []
    for _ in range(9):
        bob.page.goto(bob.url("/login"), wait_until="networkidle")
        times.append(bob.page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
    print(f"first paint, ms: median {statistics.median(times):.0f}, longest {max(times):.0f}")
    assert statistics.median(times) < 100, times
