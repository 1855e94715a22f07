"""The languages of the pages and of the mails, and which of them a browser asks for."""

import re

LANGUAGES = "en", "de", "fr", "es"  # the first is for everybody who asks for none of them
LANGUAGE = re.compile("[a-z]{2}")
MAX_RANGES = 20  # of a header, that are read
RANGE = re.compile(r"([a-z]{2})(?:-[a-z0-9-]+)?[ \t]*(?:;[ \t]*q=([01](?:\.[0-9]{0,3})?))?")  # such as de-CH;q=0.7


def choose_language(header: str) -> str:
    """Return the language that an ``Accept-Language`` header prefers (RFC 9110, 12.5.4).

    A malformed part of the header is skipped, as is a wildcard, which says nothing about what somebody reads.
    """
    best, highest = LANGUAGES[0], 0.0
    for part in header.lower().split(",")[:MAX_RANGES]:
        found = RANGE.fullmatch(part.strip(" \t"))
        if found and found[1] in LANGUAGES and (weight := float(found[2] or 1)) > highest:
            best, highest = found[1], weight
    return best
