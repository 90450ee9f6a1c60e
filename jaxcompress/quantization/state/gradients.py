"""`quantize_gradients`: gradients of few bits, right in the mean."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress import compat
from jaxcompress.arrays.dynamic import block_shares
from jaxcompress.errors import SpecError
from jaxcompress.numerics import divide
from jaxcompress.quantization.state.blockwise import block_axis, is_floating, round_with
from jaxcompress.specs import is_count


class QuantizeGradientsState(NamedTuple):
    """The state of `quantize_gradients`.

    Attributes:
      step: updates so far, int32.
      key: the random key; each update folds its number in.
    """

    step: jax.Array
    key: jax.Array


def quantize_gradients(
    bits: int = 8, key: jax.Array | int = 0, *, per: str = "tensor", block_size: int = 256
) -> optax.GradientTransformation:
    """Rounds gradients to few levels at random, so that their mean stays what it was.

        q = s r / n,   r = floor(n g / s) + (u < n g / s - floor(n g / s)),   n = 2**(bits-1) - 1

    with s the largest magnitude and u uniform in [0, 1). Then E[q] = g, and the variance is at
    most `(s / n)**2 / 4` a value. What is zero stays zero. With `bits=2` it is TernGrad. The
    updates that come out have the dtype that went in; a narrow one rounds once more.

    Args:
      bits: 2 to 16.
      key: a random key, or its seed.
      per: `tensor`: one s for each gradient; `block`: one for each block.
      block_size: values to a block, along the last axis that has so many, else the longest.

    Returns:
      An optax transformation; put it before the optimizer in a chain.

    Raises:
      SpecError: for other bits, another `per`, or an empty block.

    References:
      Alistarh et al., *QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding*,
      2017; Wen et al., *TernGrad: Ternary Gradients to Reduce Communication in Distributed Deep
      Learning*, 2017.

    Examples:
      >>> import jax.numpy as jnp
      >>> tx = quantize_gradients(bits=2)
      >>> grads = {"w": jnp.array([1.0, -1.0, 0.0, 0.5])}
      >>> updates, state = tx.update(grads, tx.init(grads))
      >>> updates["w"][:3].tolist(), float(updates["w"][3]) in (0.0, 1.0)
      ([1.0, -1.0, 0.0], True)
    """
    if not is_count(bits, 2, 16):
        raise SpecError(f"bits={bits!r}: write a whole number from 2 to 16")
    if per not in ("tensor", "block"):
        raise SpecError(f"per={per!r}: write 'tensor' or 'block'")
    if not is_count(block_size, 1):
        raise SpecError(f"block_size={block_size!r}: write a whole number from 1 on")
    levels = 2 ** (bits - 1) - 1

    def init(params: Any) -> QuantizeGradientsState:
        start = jax.random.key(key) if isinstance(key, int) else key
        return QuantizeGradientsState(jnp.zeros((), jnp.int32), start)

    def rounded(g: jax.Array, key: jax.Array) -> jax.Array:
        x = g.astype(jnp.float32)
        if per == "tensor" or x.ndim == 0:
            largest = jnp.max(jnp.abs(x))
            share = divide(x, jnp.where(largest == 0, 1, largest))
        else:
            axis = block_axis(x.shape, block_size)
            size = min(block_size, x.shape[axis])
            largest, share = block_shares(x, axis, size)
            largest = jnp.repeat(largest, size, axis=axis)
            largest = jax.lax.slice_in_dim(largest, 0, x.shape[axis], axis=x.ndim + axis)
        # Whole levels are divided first: the largest comes out as it went in.
        return (largest * divide(round_with(share * levels, key), levels)).astype(g.dtype)

    def update(
        updates: Any, state: QuantizeGradientsState, params: Any = None
    ) -> tuple[Any, QuantizeGradientsState]:
        turn = jax.random.fold_in(state.key, state.step)
        leaves, structure = jax.tree.flatten(updates)
        out = [
            compat.auto_like(rounded, (g, jax.random.fold_in(turn, i)), g)
            if is_floating(g) and g.size
            else g
            for i, g in enumerate(leaves)
        ]
        new = QuantizeGradientsState(optax.safe_increment(state.step), state.key)
        return jax.tree.unflatten(structure, out), new

    return optax.GradientTransformation(init, update)
