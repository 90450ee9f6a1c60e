"""Functions that are compiled one way for a single CPU device, and another way elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex

from jaxcompress import compat

by_devices_p = compat.Primitive("by_devices")
by_devices_p.multiple_results = True


def by_devices(everywhere: Callable[..., Any], one_cpu: Callable[..., Any]) -> Callable[..., Any]:
    """`everywhere`, but lowered to `one_cpu` in programs for one CPU device.

    For what XLA:CPU does well in a roundabout way only, which would cost communication on a mesh.
    How many devices a program is for is not known before it is lowered.

    Args:
      everywhere: a function of arrays, to one array.
      one_cpu: one with the same result; neither is differentiated.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> twice = by_devices(lambda x: 2 * x, lambda x: x + x)
      >>> jax.vmap(twice)(jnp.arange(3)).tolist()
      [0, 2, 4]
    """

    def call(*args: jax.Array) -> jax.Array:
        if any(map(compat.is_explicit, args)):  # no single device, or none that matters
            return everywhere(*args)
        plain, single = (jax.make_jaxpr(f)(*args) for f in (everywhere, one_cpu))
        return by_devices_p.bind(*args, everywhere=plain, one_cpu=single)[0]

    return call


@by_devices_p.def_impl
def _impl(*args: Any, everywhere: Any, one_cpu: Any) -> Any:
    return jex.jaxpr_as_fun(everywhere)(*args)


@by_devices_p.def_abstract_eval
def _abstract_eval(*_: Any, everywhere: Any, one_cpu: Any) -> Any:
    return everywhere.out_avals


def _single(*args: Any, everywhere: Any, one_cpu: Any) -> Any:
    return jex.jaxpr_as_fun(one_cpu)(*args)


def _batch(vmap: Any, args: Any, dims: Any, *, everywhere: Any, one_cpu: Any) -> Any:
    mapped = (vmap(jex.jaxpr_as_fun(jaxpr)) for jaxpr in (everywhere, one_cpu))
    plain, single = (jax.make_jaxpr(f)(*args) for f in mapped)
    return by_devices_p.bind(*args, everywhere=plain, one_cpu=single), [0]


compat.register_batching(by_devices_p, _batch)
compat.register_lowering(by_devices_p, _impl, _single)
