"""Specs of structured matrices: separable filters, Kronecker products, Monarch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxcompress.decomposition.factored import (
    FactoredSpec,
    Network,
    View,
    Weight,
    check_rank_or_share,
    even_split,
    share_of,
)
from jaxcompress.decomposition.kronecker import kronecker
from jaxcompress.decomposition.monarch import monarch
from jaxcompress.decomposition.svd import truncated_svd
from jaxcompress.errors import SpecError
from jaxcompress.specs import is_count, register_spec


@register_spec("separable")
@dataclasses.dataclass(frozen=True, repr=False)
class Separable(FactoredSpec):
    """A convolution as one along the first axis of its window and one along the second.

        w[h, w, i, o] ~ sum_r a[h, i, r] b[w, r, o]

    The best approximation of this form is a truncated SVD of the kernel read as the matrix
    `[h in, w out]`.

    Args:
      rank: the number of channels between: a whole number, cut to what is possible, or a share of
        it.

    Raises:
      SpecError: for a leaf that is no convolution with a window of two axes, and a rank that saves
        nothing.

    References:
      Jaderberg, Vedaldi and Zisserman, *Speeding up Convolutional Neural Networks with Low Rank
      Expansions*, 2014 (scheme 2).

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.Separable(8)(jnp.ones((3, 3, 16, 32)))
      FactoredArray(float32[3, 3, 16, 32], Separable 8)
    """

    rank: int | float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rank_or_share(self.rank, "Separable")

    def network(self, weight: Weight, leaf: Any) -> Network:
        """Two factors that share the channels between them."""
        if len(weight.window) != 2:
            raise SpecError(
                f"{weight.path}: {self!r} needs a kernel with a window of two axes, and shape "
                f"{weight.shape} has {len(weight.window)}; let the rule match such kernels only"
            )
        (h, w), (i, o) = weight.window, weight.channels
        n = weight.shape
        sides = n[h] * n[i], n[w] * n[o]
        rank = share_of(self.rank, min(sides))
        names = {h: "h", w: "w", i: "i", o: "o"}
        expression = f"hiR,Rwo->{','.join(names[a] for a in range(4))}"
        shapes = ((n[h], n[i], rank), (rank, n[w], n[o]))
        return Network(View(n, (h, i, w, o), sides), expression, (rank,), shapes)

    def factors(self, x: jax.Array, network: Network) -> Sequence[jax.Array]:
        """By `truncated_svd`."""
        return truncated_svd(x, network.ranks[0])


def _check_parts(weight: Weight, spec: Any, ins: tuple[int, ...], outs: tuple[int, ...]) -> None:
    """Refuses parts that do not make up the one input and the one output axis."""
    single = len(weight.inputs) == len(weight.outputs) == 1
    if not single or (math.prod(ins), math.prod(outs)) != _sides(weight):
        raise SpecError(
            f"{weight.path}: {spec!r} is of a matrix of {math.prod(ins)} inputs and "
            f"{math.prod(outs)} outputs, and shape {weight.shape} has the input axes "
            f"{weight.inputs} and the output axes {weight.outputs}"
        )


def _sides(weight: Weight) -> tuple[int, int]:
    count = lambda axes: math.prod(weight.shape[a] for a in axes)
    return count(weight.inputs), count(weight.outputs)


@register_spec("kronecker")
@dataclasses.dataclass(frozen=True, repr=False)
class Kronecker(FactoredSpec):
    """A matrix as a sum of Kronecker products, `W ~ sum_t A_t (x) B_t`.

    `w[(a, b), (i, j)] ~ sum_t A[t, a, i] B[t, b, j]`, the nearest of that form: a truncated SVD of
    W with its blocks as rows.

    Args:
      terms: how many products.
      block: the shape `(inputs, outputs)` of B; None: as near to the square root of either side
        as it divides.

    Raises:
      SpecError: for a leaf that is no matrix of one input and one output axis, a block that does
        not divide it, and terms that save nothing.

    References:
      Van Loan and Pitsianis, *Approximation with Kronecker Products*, 1993.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> leaf = jc.Kronecker(block=(4, 8))(jnp.ones((64, 64)))
      >>> leaf, [f.shape for f in leaf.factors]
      (FactoredArray(float32[64, 64], Kronecker 1), [(1, 16, 8), (1, 4, 8)])
    """

    terms: int = 1
    _: dataclasses.KW_ONLY
    block: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_count(self.terms, 1):
            raise SpecError(f"Kronecker({self.terms!r}): write a whole number of at least 1")
        if self.block is not None and not (
            len(self.block) == 2 and all(is_count(n, 1) for n in self.block)
        ):
            raise SpecError(f"Kronecker(block={self.block!r}): write (inputs, outputs)")

    def network(self, weight: Weight, leaf: Any) -> Network:
        """The two factors of every term."""
        rows, columns = _sides(weight)
        b, j = self.block or (even_split(rows, 2)[0], even_split(columns, 2)[0])
        a, i = max(1, rows // b), max(1, columns // j)
        _check_parts(weight, self, (a, b), (i, j))
        most = min(a * i, b * j)
        terms = min(self.terms, most)
        swapped = weight.inputs > weight.outputs
        view = View(weight.shape, (1, 0) if swapped else (0, 1), (rows, columns))
        axes = "ij,ab" if swapped else "ab,ij"
        shapes = ((terms, a, i), (terms, b, j))
        return Network(view, f"Tai,Tbj->{axes}", (terms, b, j), shapes)

    def factors(self, x: jax.Array, network: Network) -> Sequence[jax.Array]:
        """By `decomposition.kronecker`."""
        terms, *block = network.ranks
        return kronecker(x, (block[0], block[1]), terms)


@register_spec("monarch")
@dataclasses.dataclass(frozen=True, repr=False)
class Monarch(FactoredSpec):
    """A matrix as two block-diagonal ones with a permutation between.

    `w[(k, i), (c, d)] ~ left[k, i, c] right[k, c, d]`: each of the `blocks` input blocks goes to
    one value for each output block. The nearest of that form: each block `[i, d]` by its leading
    singular pair.

    Args:
      blocks: the number of blocks of inputs, and as many of outputs.

    Raises:
      SpecError: for a leaf that is no matrix of one input and one output axis, or that the blocks
        do not divide.

    References:
      Dao et al., *Monarch: Expressive Structured Matrices for Efficient and Accurate Training*,
      2022.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> leaf = jc.Monarch(8)(jnp.ones((64, 64)))
      >>> leaf.nbytes, leaf.size * 4
      (4096, 16384)
    """

    blocks: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_count(self.blocks, 1):
            raise SpecError(f"Monarch({self.blocks!r}): write a whole number of at least 1")

    def network(self, weight: Weight, leaf: Any) -> Network:
        """The two block-diagonal factors."""
        rows, columns = _sides(weight)
        n = self.blocks
        i, d = max(1, rows // n), max(1, columns // n)
        _check_parts(weight, self, (n, i), (n, d))
        swapped = weight.inputs > weight.outputs
        view = View(weight.shape, (1, 0) if swapped else (0, 1), (rows, columns))
        axes = "cd,ki" if swapped else "ki,cd"
        return Network(view, f"kic,ckd->{axes}", (n,), ((n, i, n), (n, n, d)))

    def factors(self, x: jax.Array, network: Network) -> Sequence[jax.Array]:
        """By `decomposition.monarch`."""
        return monarch(x, self.blocks)
