"""Errors that say what to do. The command line prints their text alone and leaves with exit code 2."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Real
from typing import Any


class EngramError(ValueError):
    """Something the user can mend: the message names the thing and says what would be right."""


def at_least(name: str, value: Any, least: float = -math.inf) -> None:
    """EngramError for a number below `least`, and for what is no number."""
    if not (isinstance(value, Real) and float(value) >= least):
        right = "a number" if least == -math.inf else f"{least} or more"
        raise EngramError(f"{name} is {value}; give {right}")


def nearest(name: object, names: Iterable[str]) -> str | None:
    """The name that is most like one that does not exist; None if none is."""
    return next(iter(get_close_matches(str(name), list(names), n=1, cutoff=0.5)), None)


def unknown(kind: str, name: object, choices: Iterable[object]) -> EngramError:
    """The error for a name that does not exist, with the nearest one that does."""
    names = sorted({str(choice) for choice in choices})
    near = nearest(name, names)
    shown = ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
    hint = (
        f"did you mean {near!r}?"
        if near is not None
        else f"there {'is' if len(names) == 1 else 'are'}: {shown or 'none'}."
    )
    return EngramError(f"unknown {kind} {str(name)!r}; {hint}")
