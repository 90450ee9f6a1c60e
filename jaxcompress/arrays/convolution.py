"""Convolutions with their axes in the order that XLA:CPU has fast code for.

XLA:CPU puts the axes of a convolution in that order only where it is in no branch and no loop.
Elsewhere one that is not so, as the gradients of a convolution are, takes fifteen times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jax import lax
from jax.extend import core as jex

from jaxcompress import compat


def with_ordered_convolutions(closed: compat.ClosedJaxpr) -> Callable[..., list[Any]]:
    """The function of a jaxpr, its own convolutions in the order of `ordered`."""
    jaxpr = closed.jaxpr
    if not any(eqn.primitive is lax.conv_general_dilated_p for eqn in jaxpr.eqns):
        return jex.jaxpr_as_fun(closed)

    def run(*args: Any) -> list[Any]:
        names = [*jaxpr.constvars, *jaxpr.invars]
        values: dict[Any, Any] = dict(zip(names, [*closed.consts, *args]))
        read = lambda atom: values[atom] if isinstance(atom, compat.Var) else atom.val
        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            with compat.context(eqn):
                if eqn.primitive is lax.conv_general_dilated_p:
                    found = [ordered(operands[0], operands[1], eqn.params)]
                else:
                    found = compat.bind(eqn, operands)
            values.update(zip(eqn.outvars, found))
        return [read(atom) for atom in jaxpr.outvars]

    return run


def ordered(lhs: Any, rhs: Any, params: dict[str, Any]) -> Any:
    """A convolution with the axes `[batch, space, inputs]` and `[space, inputs, outputs]`.

    Args:
      lhs: the input.
      rhs: the kernel.
      params: those of `conv_general_dilated_p`.

    Returns:
      what the primitive returns, with its axes.
    """
    numbers = params["dimension_numbers"]
    left, right, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    last = len(left) - 1
    space = tuple(range(1, last))
    usual = lax.ConvDimensionNumbers(
        (0, last, *space), (last, last - 1, *range(last - 1)), (0, last, *space)
    )
    if (left, right, out) == tuple(usual) or params["batch_group_count"] != 1:
        return lax.conv_general_dilated_p.bind(lhs, rhs, **params)
    lhs = lax.transpose(lhs, (left[0], *left[2:], left[1]))
    rhs = lax.transpose(rhs, (*right[2:], right[1], right[0]))
    found = lax.conv_general_dilated_p.bind(lhs, rhs, **{**params, "dimension_numbers": usual})
    return lax.transpose(found, tuple(np.argsort((out[0], *out[2:], out[1]))))
