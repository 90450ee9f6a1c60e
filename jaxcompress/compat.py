"""Everything that depends on the version of jax, in one place.

The walk over a jaxpr needs four facts that are not part of jax's stable interface: how an
equation is bound again, how many constants and carries a `scan` equation has, in which context an
equation was traced, and what kind of value a traced function accepts. They differ between jax
0.10 and 0.12; nothing outside this file knows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import numpy as np

Jaxpr = jex_core.Jaxpr
JaxprEqn = jex_core.JaxprEqn
Literal = jex_core.Literal


def bind(eqn: JaxprEqn, args: Sequence[Any]) -> list[Any]:
    """Binds an equation's primitive to other arguments; always returns a list."""
    outs = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return list(outs) if eqn.primitive.multiple_results else [outs]


def context(eqn: JaxprEqn) -> contextlib.AbstractContextManager[Any]:
    """The context (mesh, compute type, ...) an equation was traced in."""
    return eqn.ctx.manager if eqn.ctx is not None else contextlib.nullcontext()


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """The body and the constants of a jaxpr that an equation carries, closed or not."""
    if hasattr(jaxpr, "consts") and hasattr(jaxpr, "jaxpr"):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, ()


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """The numbers of constants and of carried values of a `scan` equation."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts.vals)), len(list(carry.vals))


def is_traceable(x: Any) -> bool:
    """Whether `x` is an array (concrete, traced, numpy or a typed PRNG key)."""
    return isinstance(x, (jax.Array, np.ndarray, np.generic))
