"""Specs of tensor decompositions: Tucker, CP, tensor trains and rings, block terms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxcompress.decomposition.block_term import block_term
from jaxcompress.decomposition.cp import cp
from jaxcompress.decomposition.factored import (
    LETTERS,
    RANKS,
    FactoredSpec,
    Network,
    View,
    Weight,
    check_rank_or_share,
    parts_of,
    share_of,
)
from jaxcompress.decomposition.ranks import vbmf_ranks
from jaxcompress.decomposition.spec import check_readable
from jaxcompress.decomposition.tensor_ring import tensor_ring
from jaxcompress.decomposition.tensor_train import by_ranks, tensor_train
from jaxcompress.decomposition.tucker import tucker
from jaxcompress.errors import SpecError
from jaxcompress.specs import is_count, is_number, register_spec

Rank = int | float


def _whole(shape: tuple[int, ...]) -> View:
    return View(shape, tuple(range(len(shape))), shape)


@register_spec("tucker")
@dataclasses.dataclass(frozen=True, repr=False)
class Tucker(FactoredSpec):
    """The Tucker decomposition of a kernel along some of its axes.

    Along the channels of a convolution, which is the default, a kernel `[h, w, in, out]` becomes
    `[in, r]`, `[h, w, r, s]` and `[out, s]`, and the convolution one of a pixel, one with the
    window on fewer channels, and one of a pixel again:

        w[h, w, i, o] ~ sum_rs a[i, r] core[h, w, r, s] b[o, s]

    By higher-order orthogonal iteration; see `decomposition.tucker`. Each weight of a stack has its
    own factors.

    Args:
      ranks: of the axes: whole numbers, cut to the axis, or shares of it, which are rounded to
        multiples of eight; one for all, or a tuple; or `"vbmf"`, for as many as stand out of the
        noise (see `decomposition.vbmf_ranks`; in a stack the largest), of two axes.
      axes: the axes that get a factor, negative; None: the input axis next to the outputs and the
        last output axis, which are the channels of a convolution; "all": each of them.
      iterations: at most so many sweeps; 0 is the truncated higher-order SVD.

    Raises:
      SpecError: for ranks that do not fit the axes or save nothing.
      ValuesNeededError: for `"vbmf"` inside of jit.

    References:
      Kim et al., *Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile
      Applications*, 2016; De Lathauwer, De Moor and Vandewalle, *On the Best Rank-1 and Rank-(R1,
      R2, .., RN) Approximation of Higher-Order Tensors*, 2000.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.Tucker((4, 8))(jnp.ones((3, 3, 16, 32)))
      FactoredArray(float32[3, 3, 16, 32], Tucker 4x8)
    """

    ranks: Rank | tuple[Rank, ...] | str
    _: dataclasses.KW_ONLY
    axes: tuple[int, ...] | str | None = None
    iterations: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        ranks = self.ranks if isinstance(self.ranks, tuple) else (self.ranks,)
        for rank in () if self.ranks == "vbmf" else ranks:
            check_rank_or_share(rank, "Tucker")
        numbers = isinstance(self.axes, tuple) and all(is_count(-a, 1) for a in self.axes)
        if not (self.axes in (None, "all") or numbers):
            raise SpecError(f"Tucker(axes={self.axes!r}): write negative axes, 'all' or None")
        if not is_count(self.iterations, 0):
            raise SpecError(f"Tucker(iterations={self.iterations!r}): write a whole number")

    def network(self, weight: Weight, leaf: Any) -> Network:
        """The core and a factor for each axis."""
        ndim = len(weight.shape)
        if self.axes is None:
            axes: Sequence[int] = weight.channels
        elif isinstance(self.axes, str):
            axes = range(ndim)
        else:
            axes = [a + ndim for a in self.axes]
            if min(axes) < 0 or len(set(axes)) != len(axes):
                raise SpecError(
                    f"{weight.path}: axes {self.axes} are not those of shape {weight.shape}"
                )
        if self.ranks == "vbmf":
            ranks = self._by_noise(weight, leaf, axes)
        else:
            ranks = self.ranks if isinstance(self.ranks, tuple) else (self.ranks,) * len(axes)
        if len(ranks) != len(axes):
            raise SpecError(
                f"{weight.path}: {len(ranks)} ranks for the axes {[a - ndim for a in axes]} of "
                f"shape {weight.shape}; write one for each, or one for all"
            )
        found = tuple(share_of(r, weight.shape[a]) for r, a in zip(ranks, axes))
        letters, inner = list(LETTERS[:ndim]), dict(zip(axes, RANKS))
        core = "".join(inner.get(a, c) for a, c in enumerate(letters))
        sizes = list(weight.shape)
        for a, r in zip(axes, found):
            sizes[a] = r
        terms = [core, *(letters[a] + inner[a] for a in axes)]
        shapes = (tuple(sizes), *((weight.shape[a], r) for a, r in zip(axes, found)))
        return Network(
            _whole(weight.shape), f"{','.join(terms)}->{','.join(letters)}", found, shapes
        )

    def _by_noise(self, weight: Weight, leaf: Any, axes: Sequence[int]) -> tuple[Any, ...]:
        check_readable(leaf, weight.path, "Tucker")
        if len(axes) != 2:
            raise SpecError(f"{weight.path}: 'vbmf' is for two axes, not {len(axes)}; write ranks")
        found = [vbmf_ranks(x, (axes[0], axes[1])) for x in leaf.reshape(-1, *weight.shape)]
        return tuple(max(pair) for pair in zip(*found)) or (1, 1)

    def factors(self, x: jax.Array, network: Network) -> Sequence[jax.Array]:
        """By `decomposition.tucker`."""
        letters = network.expression.partition("->")[2].split(",")
        terms = network.expression.partition("->")[0].split(",")[1:]
        modes = tuple(letters.index(term[0]) for term in terms)
        core, factors = tucker(x, network.ranks, modes, iterations=self.iterations)
        return (core, *factors)


@register_spec("cp")
@dataclasses.dataclass(frozen=True, repr=False)
class CP(FactoredSpec):
    """The CP decomposition of a kernel: a sum of `rank` outer products.

        w[h, w, i, o] ~ sum_r a[h, r] b[w, r] c[i, r] d[o, r]

    A convolution becomes one of a pixel to r channels, one along each axis of the window on every
    channel by itself, and one of a pixel. By alternating least squares; see `decomposition.cp`.

    Args:
      rank: the number of terms.
      iterations: at most so many sweeps.

    Raises:
      SpecError: for a rank that saves nothing.

    References:
      Lebedev et al., *Speeding-up Convolutional Neural Networks Using Fine-tuned
      CP-Decomposition*, 2015.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.CP(8)(jnp.ones((3, 3, 16, 32)))
      FactoredArray(float32[3, 3, 16, 32], CP 8)
    """

    rank: int
    _: dataclasses.KW_ONLY
    iterations: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_count(self.rank, 1) or not is_count(self.iterations, 1):
            raise SpecError(f"{self!r}: write whole numbers of at least 1")

    def network(self, weight: Weight, leaf: Any) -> Network:
        """A factor for each axis."""
        letters = LETTERS[: len(weight.shape)]
        terms = ",".join(c + RANKS[0] for c in letters)
        shapes = tuple((n, self.rank) for n in weight.shape)
        expression = f"{terms}->{','.join(letters)}"
        return Network(_whole(weight.shape), expression, (self.rank,), shapes)

    def factors(self, x: jax.Array, network: Network) -> Sequence[jax.Array]:
        """By `decomposition.cp`."""
        return cp(x, self.rank, iterations=self.iterations)


def _tensorized(weight: Weight, cores: int, spec: Any) -> tuple[View, list[str], list[str], Any]:
    """A weight as the tensor that a train runs along.

    Returns:
      the view, the letters of each of its axes, the letters of each axis of the weight, and the
      sizes of the letters.
    """
    shape = weight.shape
    if weight.window:
        # Inputs, window, outputs: the ranks next to the channels are those of fewer channels.
        order = (weight.channels[0], *weight.window, weight.channels[1])
        letters = LETTERS[: len(shape)]
        sizes = dict(zip(letters, shape))
        view = View(shape, order, tuple(shape[a] for a in order))
        return view, [letters[a] for a in order], list(letters), sizes
    split: dict[int, tuple[int, ...]] = {}
    for side in (weight.inputs, weight.outputs):
        found = parts_of([shape[a] for a in side], cores, weight.path, type(spec).__name__)
        split.update(zip(side, found))
    names, sizes, spare = [], {}, iter(LETTERS)
    for a in range(len(shape)):
        mine = [next(spare) for _ in split[a]]
        sizes.update(zip(mine, split[a]))
        names.append("".join(mine))
    sides = ["".join(names[a] for a in side) for side in (weight.inputs, weight.outputs)]
    pairs = [i + o for i, o in zip(*sides, strict=True)]
    flat = "".join(names)
    view = View(
        tuple(sizes[c] for c in flat),
        tuple(flat.index(c) for c in "".join(pairs)),
        tuple(math.prod(sizes[c] for c in pair) for pair in pairs),
    )
    return view, pairs, names, sizes


@dataclasses.dataclass(frozen=True, repr=False)
class _Chain(FactoredSpec):
    """What trains and rings share."""

    ranks: int | tuple[int, ...] | None = None
    _: dataclasses.KW_ONLY
    cores: int = 2
    error: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if (self.ranks is None) == (self.error is None):
            raise SpecError(f"{name}: write one of ranks and error: {name}(16), {name}(error=0.1)")
        ranks = self.ranks if isinstance(self.ranks, tuple) else (self.ranks or 1,)
        if not all(is_count(r, 1) for r in ranks):
            raise SpecError(f"{name}({self.ranks!r}): write whole numbers of at least 1")
        if self.error is not None and not (is_number(self.error) and 0 <= self.error < 1):
            raise SpecError(f"{name}(error={self.error!r}): write a share of the norm in [0, 1)")
        if not is_count(self.cores, 2, 6):
            raise SpecError(f"{name}(cores={self.cores!r}): write a whole number from 2 to 6")

    def _cores(self, x: jax.Array) -> Sequence[jax.Array]:
        raise NotImplementedError

    def _settled(self, weight: Weight, leaf: Any, view: View) -> list[tuple[int, int]]:
        """The ranks on either side of each core."""
        if self.error is None:
            one = jax.ShapeDtypeStruct(view.shape, np.dtype("float32"))
            shapes = [tuple(c.shape) for c in jax.eval_shape(self._cores, one)]
            return [(s[0], s[-1]) for s in shapes]
        check_readable(leaf, weight.path, type(self).__name__)
        found = [
            [(c.shape[0], c.shape[-1]) for c in self._cores(view(x))]
            for x in leaf.reshape(-1, *weight.shape)
        ]
        if not found:  # an empty stack
            return [(1, 1)] * len(view.shape)
        return [tuple(max(p) for p in zip(*pairs)) for pairs in zip(*found)]

    def network(self, weight: Weight, leaf: Any) -> Network:
        """A core for each part, in a row or a ring."""
        view, parts, names, sizes = _tensorized(weight, self.cores, self)
        ranks = self._settled(weight, leaf, view)
        d = len(parts)
        terms, shapes = [], []
        for k, part in enumerate(parts):
            left, right = RANKS[k - 1] if k else RANKS[d], RANKS[k] if k < d - 1 else RANKS[d]
            before, after = ranks[k]
            # The ends of a train have a rank of one, which needs no axis.
            ring = ranks[0][0] > 1
            left = left if k or ring else ""
            right = right if k < d - 1 or ring else ""
            terms.append(left + part + right)
            shapes.append(
                (*([before] if left else []), *(sizes[c] for c in part),
                 *([after] if right else []))
            )  # fmt: skip
        expression = f"{','.join(terms)}->{','.join(names)}"
        return Network(view, expression, tuple(r for _, r in ranks), tuple(shapes))


@register_spec("tensor_train")
@dataclasses.dataclass(frozen=True, repr=False)
class TensorTrain(_Chain):
    """The tensor train of a kernel: a chain of small cores.

    A matrix is read with its inputs and outputs in `cores` parts each,
    `w[(i1..id), (o1..od)] ~ G1[i1, o1] @ .. @ Gd[id, od]`; a size is split as evenly as it goes,
    and several output axes, such as heads and depth, are their own parts. A kernel of several input
    axes and one output axis is read as a convolution, the train of its inputs, the axes of its
    window and its outputs, whatever `cores` says.

    Args:
      ranks: those between the cores, or one for all, which is cut to what is possible.
      cores: into how many parts a matrix is split.
      error: in place of ranks, the largest relative error in the Frobenius norm.

    Raises:
      SpecError: unless one of `ranks` and `error` is given and saves something.

    References:
      Oseledets, *Tensor-Train Decomposition*, 2011; Novikov et al., *Tensorizing Neural
      Networks*, 2015; Garipov et al., *Ultimate Tensorization*, 2016 (convolutions).

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.TensorTrain(4, cores=3)(jnp.ones((64, 125)))
      FactoredArray(float32[64, 125], TensorTrain 4x4)
    """

    def _cores(self, x: jax.Array) -> Sequence[jax.Array]:
        return tensor_train(x, self.ranks, error=self.error)

    def factors(self, x: jax.Array, network: Network) -> Sequence[jax.Array]:
        """By `decomposition.tensor_train`."""
        # Ranks by an error may be more than those of the next core need.
        return by_ranks(x, network.ranks[:-1])


@register_spec("tensor_ring")
@dataclasses.dataclass(frozen=True, repr=False)
class TensorRing(_Chain):
    """The tensor ring of a kernel: a chain of small cores whose ends are joined.

    `w[(i1..id), (o1..od)] ~ trace(G1[i1, o1] @ .. @ Gd[id, od])`; the parts are those of
    `TensorTrain`.

    Args:
      ranks: one before each core, or one for all.
      cores: into how many parts a matrix is split.
      error: not for rings; write ranks.

    Raises:
      SpecError: for ranks that save nothing.

    References:
      Zhao et al., *Tensor Ring Decomposition*, 2016; Wang et al., *Wide Compression: Tensor Ring
      Nets*, 2018.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.TensorRing(2, cores=3)(jnp.ones((64, 125))).shape
      (64, 125)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.error is not None:
            raise SpecError("TensorRing(error=...): a ring has no such bound; write ranks")

    def _cores(self, x: jax.Array) -> Sequence[jax.Array]:
        assert self.ranks is not None
        return tensor_ring(x, self.ranks)

    def factors(self, x: jax.Array, network: Network) -> Sequence[jax.Array]:
        """By `decomposition.tensor_ring`."""
        return self._cores(x)


@register_spec("block_term")
@dataclasses.dataclass(frozen=True, repr=False)
class BlockTerm(FactoredSpec):
    """A sum of small Tucker terms: the block-term decomposition.

        w ~ sum_n core_n x_1 a_n x_2 b_n ..

    A matrix is read in parts, as by `TensorTrain`, each part with its inputs and outputs; a
    convolution along all of its axes.

    Args:
      terms: how many.
      ranks: of each term: whole numbers, cut to the axis, or shares of it; one for all axes, or a
        tuple.
      cores: into how many parts a matrix is split.
      iterations: at most so many sweeps.

    Raises:
      SpecError: for ranks that do not fit the axes or save nothing.

    References:
      De Lathauwer, *Decompositions of a Higher-Order Tensor in Block Terms*, 2008; Ye et al.,
      *Learning Compact Recurrent Neural Networks with Block-Term Tensor Decomposition*, 2018.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> jc.BlockTerm(2, 3)(jnp.ones((36, 64)))
      FactoredArray(float32[36, 64], BlockTerm 2x3x3)
    """

    terms: int
    ranks: Rank | tuple[Rank, ...]
    _: dataclasses.KW_ONLY
    cores: int = 2
    iterations: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        for rank in self.ranks if isinstance(self.ranks, tuple) else (self.ranks,):
            check_rank_or_share(rank, "BlockTerm")
        if not (is_count(self.terms, 1) and is_count(self.iterations, 0)):
            raise SpecError(f"{self!r}: write whole numbers, terms of at least 1")
        if not is_count(self.cores, 2, 6):
            raise SpecError(f"BlockTerm(cores={self.cores!r}): write a whole number from 2 to 6")

    def network(self, weight: Weight, leaf: Any) -> Network:
        """The cores, and for each axis the factors, of all terms."""
        view, parts, names, sizes = _tensorized(weight, self.cores, self)
        d = len(parts)
        ranks = self.ranks if isinstance(self.ranks, tuple) else (self.ranks,) * d
        if len(ranks) != d:
            raise SpecError(f"{weight.path}: {len(ranks)} ranks for {d} axes; write one for each")
        found = tuple(share_of(r, n) for r, n in zip(ranks, view.shape))
        count, inner = RANKS[-1], RANKS[:d]
        terms = [count + inner, *(count + part + r for part, r in zip(parts, inner))]
        shapes = [(self.terms, *found)]
        for part, r in zip(parts, found):
            shapes.append((self.terms, *(sizes[c] for c in part), r))
        expression = f"{','.join(terms)}->{','.join(names)}"
        return Network(view, expression, found, tuple(shapes))

    def factors(self, x: jax.Array, network: Network) -> Sequence[jax.Array]:
        """By `decomposition.block_term`."""
        core, factors = block_term(x, self.terms, network.ranks, iterations=self.iterations)
        return (core, *factors)
