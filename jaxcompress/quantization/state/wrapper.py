"""`quantize_state`: the moments of any optimizer in eight bits between its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax

from jaxcompress import compat
from jaxcompress.arrays.base import is_compressed
from jaxcompress.errors import SpecError
from jaxcompress.optimizer_state import owner
from jaxcompress.quantization.state.blockwise import Blockwise, is_floating
from jaxcompress.rules import path_str
from jaxcompress.specs import is_count, on_auto_axes, placed_like

# Names under which optimizers keep means of squares.
UNSIGNED = ("nu", "nu_max", "v", "sum_of_squares", "e_g", "e_x")
# Names of what is no moment: sums of gradients so far, and copies of the params.
DENSE = ("acc_grads", "z", "slow", "fast", "prev_params", "init_params", "ema")


class QuantizedState(NamedTuple):
    """The state of `quantize_state`.

    Attributes:
      inner: that of the wrapped optimizer, its moments compressed leaves.
      key: for rounding at random, or None.
    """

    inner: Any
    key: Any


def quantize_state(
    inner: optax.GradientTransformation,
    format: str = "dynamic8",
    block_size: int = 256,
    *,
    min_size: int = 4096,
    key: jax.Array | None = None,
    unsigned: Sequence[str] = UNSIGNED,
    dense: Sequence[str] = DENSE,
) -> optax.GradientTransformationExtraArgs:
    """Keeps an optimizer's moments in eight bits; it computes in the dtype it always did.

        moments = expand(state);  updates, moments = inner(grads, moments);  state = round(moments)

    A part of the state is a moment if it has the path and shape of a leaf of the params, as `mu`
    and `nu` of any optax state do. A block of `block_size` values along one axis shares a float32
    scale, its largest magnitude s; rounding moves a value by at most `s / 254` (`int8`: linear
    codes) or `0.9 s / 128` and less the smaller the value (`dynamic8`: see `dynamic_map`; half of
    it without signs). Zero stays zero. A mean of squares that is not zero never becomes it, since
    the update divides by its root. Adam's state takes 2 bytes a weight and 1/32 instead of 8.

    Wrap what holds the moments, such as the whole chain. Put it around `sparsify`, not inside:
    weights that come back have their moments set back only where those are arrays.

    Args:
      inner: the optimizer.
      format: `dynamic8`, which spans seven decades in each block, or `int8`, which is finer near
        the largest value and coarser below.
      block_size: values that share a scale, along the last axis that has so many, else along the
        longest.
      min_size: moments of fewer values stay as they are.
      key: a random key: rounds at random to one of both neighbours, the mean being the moment. It
        is part of the state.
      unsigned: names in the state under which means of squares are, coded without signs.
      dense: names under which there is no moment: accumulated gradients, copies of the params.

    Returns:
      An optax transformation, its state a `QuantizedState` of real compressed leaves, which `jit`,
      `scan`, shardings and `jc.save` take like others; a key is saved as `jax.random.key_data`.

    Raises:
      SpecError: for another format, sizes below 1, and an optimizer whose state changes its
        structure from step to step.

    References:
      Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, 2022.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, jaxcompress as jc
      >>> params = {"kernel": jnp.ones((256, 256)), "bias": jnp.zeros(256)}
      >>> tx = quantize_state(optax.adam(1e-3))
      >>> state = tx.init(params)
      >>> updates, state = jax.jit(tx.update)(params, state, params)
      >>> state.inner[0].nu["kernel"]
      DynamicArray(float32[256, 256], udynamic8/256)
      >>> jc.nbytes(state), jc.nbytes(optax.adam(1e-3).init(params))
      (135172, 526340)
    """
    how = Blockwise(format, block_size)
    how.check()
    if not is_count(min_size, 0):
        raise SpecError(f"min_size={min_size!r}: write a whole number from 0 on")
    inner = optax.with_extra_args_support(inner)
    squares, others = frozenset(unsigned), frozenset(dense)

    def init(params: Any) -> QuantizedState:
        paths = [tuple(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
        shapes = [getattr(x, "shape", None) for x in jax.tree.leaves(params)]
        found, structure = jax.tree_util.tree_flatten_with_path(
            inner.init(params), is_leaf=is_compressed
        )
        out = []
        for path, x in found:
            place = owner(tuple(path), paths)
            mine = place is not None and is_floating(x) and x.shape == shapes[place]
            names = set() if place is None else _names(path[: len(path) - len(paths[place])])
            if mine and not is_compressed(x) and x.size >= max(1, min_size) and not names & others:
                x = _start(how, x, not names & squares)
            out.append(x)
        return QuantizedState(jax.tree.unflatten(structure, out), key)

    def update(
        updates: Any, state: QuantizedState, params: Any = None, **extra: Any
    ) -> tuple[Any, QuantizedState]:
        flat: tuple[list[Any], Any] = jax.tree.flatten(state.inner, is_leaf=_is_moment)
        old, structure = flat
        full = jax.tree.unflatten(structure, [x.materialize() if _is_moment(x) else x for x in old])
        updates, after = inner.update(updates, full, params, **extra)
        try:
            new = structure.flatten_up_to(after)
        except ValueError as error:
            raise SpecError(
                "the optimizer's state has another structure after a step: "
                f"{str(error).splitlines()[0][:200]}"
            ) from None
        turn, next_key = (None, None) if state.key is None else jax.random.split(state.key)
        out = []
        for i, (was, now) in enumerate(zip(old, new)):
            if _is_moment(was):
                mine = None if turn is None else jax.random.fold_in(turn, i)
                now = _stored(how, was, now, mine)
            out.append(now)
        return updates, QuantizedState(jax.tree.unflatten(structure, out), next_key)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_moment(x: Any) -> bool:
    return is_compressed(x)


def _names(path: Sequence[Any]) -> set[str]:
    return set(path_str(path).split("/"))


def _is_signed(leaf: Any) -> bool:
    return leaf.signed if hasattr(leaf, "signed") else leaf.format == "int8"


def _start(how: Blockwise, x: jax.Array, signed: bool) -> Any:
    """The first state of a moment, where it lay."""
    auto, mesh = on_auto_axes(x)
    return placed_like(how.encode(auto, signed, None), auto, mesh)


def _stored(how: Blockwise, was: Any, now: jax.Array, key: jax.Array | None) -> Any:
    """A moment after a step, as it was stored before."""
    signed = _is_signed(was)
    return compat.auto_like(lambda x, key: how.encode(x, signed, key), (now, key), was)
