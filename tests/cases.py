"""Tables of cases that one test runs through.

Where no case changes what the next one uses, a test of its own for each would take more time than the case.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest

Test = Callable[..., None]


def each(names: str | tuple[str, ...], cases: Iterable[Any]) -> Callable[[Test], Test]:
    """Run a test for each case. The first that fails ends the test, and the error names the case.

    The arguments are those of ``pytest.mark.parametrize``: a case is a value, a tuple with a value for each of several
    names, or a ``pytest.param`` with an id. Only fixtures that many tests share may be used.
    """
    arguments = (names,) if isinstance(names, str) else names
    listed = [
        case if hasattr(case, "marks") else pytest.param(*((case,) if isinstance(names, str) else case))
        for case in cases
    ]
    assert listed

    def decorate(test: Test) -> Test:
        signature = inspect.signature(test)

        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            for case in listed:
                try:
                    test(**fixtures, **dict(zip(arguments, case.values, strict=True)))
                except BaseException as error:
                    error.add_note(f"in the case {case.id or case.values!r}")
                    raise

        others = [parameter for name, parameter in signature.parameters.items() if name not in arguments]
        run.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        return run

    return decorate
