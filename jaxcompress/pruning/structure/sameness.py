"""Whether two functions of the same params are one: by the numbers in them, and by trial."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress import compat
from jaxcompress.arguments import apart

# Both functions do the same in the same order, but for what the compiler makes of them: a few
# roundings of 6e-8. A divisor that differs by one in 8,192 shows at this bound; what computes in
# bfloat16 rounds by 4e-3, and there it is the numbers of the program that tell.
_NEAR, _NEAR_LOW = 1e-4, 5e-2

# Fills; that these are of other sizes is what is asked for.
_FILLS = ("broadcast_in_dim", "pad", "copy", "convert_element_type")
_LOOPS = ("scan", "while")  # of which a number may be what is carried at first


def difference(
    want: Callable[..., Any], got: Callable[..., Any], params: Any, args: Any, kwargs: Any
) -> str | None:
    """Why a function is not another one, or None.

    Args:
      want: a function of params and the other arguments.
      got: likewise.
      params: arrays. They are changed at random, so that what happens to be zero hides nothing.
      args: the other arguments; shapes stand for random arrays.
      kwargs: likewise.
    """
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: _moved(x, rng), params)
    arrays, full = apart((args, kwargs))
    arrays = [_drawn(x, rng) for x in arrays]

    def called(fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(params: Any, arrays: Any) -> Any:
            args, kwargs = full(arrays)
            return fn(params, *args, **kwargs)

        return call

    want, got = called(want), called(got)
    try:
        theirs = jax.make_jaxpr(got)(params, arrays)
    except Exception as error:  # whatever a module raises for widths that do not fit each other
        return f"it fails, {type(error).__name__}: {error}".splitlines()[0]
    why = _numbers_differ(jax.make_jaxpr(want)(params, arrays).jaxpr, theirs.jaxpr)
    return why or _values_differ(jax.jit(want)(params, arrays), jax.jit(got)(params, arrays))


def _moved(x: Any, rng: np.random.Generator) -> Any:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    host = np.asarray(x).astype(np.float32)
    return jnp.asarray(host + 0.1 * (1 + abs(host)) * rng.uniform(size=x.shape), x.dtype)


def _drawn(x: Any, rng: np.random.Generator) -> Any:
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.asarray(rng.normal(size=x.shape) if floating else np.zeros(x.shape), x.dtype)


def _numbers(
    jaxpr: compat.Jaxpr,
    found: dict[tuple[str, float], list[str]],
    known: Mapping[Any, Any],
    around: str = "",
) -> None:
    """The places of each number in a program, by the primitive that it goes into.

    `known` are the numbers that a call hands to its body: the smaller function has no calls.
    """
    for eqn in jaxpr.eqns:
        name, place = eqn.primitive.name, compat.place(eqn)
        read = lambda v: v.val if isinstance(v, compat.Literal) else known.get(v)
        values = [read(v) for v in eqn.invars]
        bodies = list(compat.sub_jaxprs(eqn))
        for body in bodies:
            own = list(zip(reversed(body.invars), reversed(values)))
            handed = {} if name in _LOOPS else {v: x for v, x in own if x is not None}
            _numbers(body, found, handed, f", in {place}{around}")
        for value in [] if bodies or name in _FILLS else values:
            if value is not None and np.ndim(value) == 0 and _is_floating(value):
                found[name, float(value)].append(f"{place}{around}")


def _is_floating(value: Any) -> bool:
    return bool(jnp.issubdtype(np.asarray(value).dtype, jnp.floating))


def _numbers_differ(want: compat.Jaxpr, got: compat.Jaxpr) -> str | None:
    """A number that only one of two programs has, as a divisor that is a count of channels."""
    ours: dict[tuple[str, float], list[str]] = collections.defaultdict(list)
    theirs: dict[tuple[str, float], list[str]] = collections.defaultdict(list)
    _numbers(want, ours, {})
    _numbers(got, theirs, {})
    for (name, value), places in theirs.items():
        if len(places) > len(ours.get((name, value), ())):
            more = [v for (n, v), there in ours.items()
                    if n == name and len(there) > len(theirs.get((n, v), ()))]  # fmt: skip
            told = f", and the masked model {more[0]:g}" if more else ""
            return f"in {places[0]}, it has {value:g}{told}"
    fewer = [key for key, places in ours.items() if len(places) > len(theirs.get(key, ()))]
    return f"it has no {fewer[0][0]} with {fewer[0][1]:g}" if fewer else None


def _values_differ(want: Any, got: Any) -> str | None:
    structure: Any = jax.tree.structure(want)
    if structure != jax.tree.structure(got):
        return "it returns another structure"
    for x, y in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
        if x.shape != y.shape or x.dtype != y.dtype:
            return f"it returns {y.dtype}{list(y.shape)} instead of {x.dtype}{list(x.shape)}"
        near = 0.0
        if jnp.issubdtype(x.dtype, jnp.inexact):
            near = _NEAR if jnp.finfo(x.dtype).eps < 1e-5 else _NEAR_LOW
        a, b = (np.asarray(z).astype(np.float64) for z in (x, y))
        if not np.isfinite(a).all():
            return "what the masked model returns on random weights is not finite"
        if a.size and abs(a - b).max() > near * abs(a).max():
            return f"results differ by {abs(a - b).max() / abs(a).max():.1e} of the largest"
    return None
