"""Checks of the numbers that gates, penalties and solvers are given."""

from __future__ import annotations

from typing import Any

from jaxcompress.errors import SpecError
from jaxcompress.specs import is_number


def check_number(name: str, x: Any, example: float) -> float:
    """A finite number.

    Raises:
      SpecError: says what to write, like all of these.
    """
    if not is_number(x):
        raise SpecError(f"{name}={x!r}: write a finite number, such as {example}")
    return float(x)


def check_positive(name: str, x: Any, example: float) -> float:
    """A finite number above 0."""
    if not is_number(x, 0) or x == 0:
        raise SpecError(f"{name}={x!r}: write a number above 0, such as {example}")
    return float(x)


def check_strength(name: str, x: Any, example: float = 1e-4) -> float:
    """A finite number of at least 0."""
    if not is_number(x, 0):
        raise SpecError(f"{name}={x!r}: write a number of at least 0, such as {example}")
    return float(x)


def check_inside(name: str, x: Any, example: float) -> float:
    """A number strictly between 0 and 1."""
    if not is_number(x, 0, 1) or x in (0, 1):
        raise SpecError(f"{name}={x!r}: write a number between 0 and 1, such as {example}")
    return float(x)


def check_share(name: str, x: Any, what: str) -> float:
    """A number from 0 to 1, both included; `what` says of what."""
    if not is_number(x, 0, 1):
        raise SpecError(f"{name}={x!r}: write {what}, from 0 to 1")
    return float(x)
