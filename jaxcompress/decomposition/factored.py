"""What the specs share that write a weight as a network of factors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxcompress.arrays.factored_conv import FactoredArray
from jaxcompress.errors import SpecError, ValuesNeededError
from jaxcompress.specs import LeafContext, Plan, Spec, is_number

LETTERS = "abcdefghijklmnop"  # of the axes of the weight and of their parts
RANKS = "RSTUVWXYZ"


class Weight(NamedTuple):
    """One weight of a stack, as a spec sees it.

    Attributes:
      path: of the leaf, for messages.
      shape: of one weight.
      inputs: its input axes, from 0.
      outputs: its output axes, from 0.
    """

    path: str
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def channels(self) -> tuple[int, int]:
        """The input axis of the channels, and the last output axis.

        That next to the outputs, beyond which the window lies: `[*window, in, out]` and `[out, in,
        *window]`. Where inputs lie on both sides of the outputs, as those of a transposed
        convolution `[*window, out, in]`, that which is alone on its side.
        """
        first, last = min(self.outputs), max(self.outputs)
        before = [a for a in self.inputs if a < first]
        after = [a for a in self.inputs if a > last]
        if before and after:
            return (after[0] if len(after) == 1 else before[-1]), last
        return (before[-1] if before else after[0]), last

    @property
    def window(self) -> tuple[int, ...]:
        """The input axes that are no channels, where there is one output axis."""
        if len(self.outputs) != 1:
            return ()
        return tuple(a for a in self.inputs if a != self.channels[0])


class View(NamedTuple):
    """A weight with its axes split, in another order, and joined anew.

    Attributes:
      split: the sizes of all parts, in the order of the weight.
      order: of the parts.
      shape: of what comes out.
    """

    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.transpose(x.reshape(self.split), self.order).reshape(self.shape)


class Network(NamedTuple):
    """What a spec settled for one leaf; static.

    Attributes:
      view: of the weight, for the decomposition.
      expression: of the factors.
      ranks: of the decomposition.
      shapes: of the factors.
    """

    view: View
    expression: str
    ranks: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]


class FactoredSpec(Spec):
    """A decomposition to a `FactoredArray`; a subclass defines `network` and `factors`."""

    def __post_init__(self) -> None:
        """Turns lists into tuples, which a hash takes."""
        super().__post_init__()
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))

    def network(self, weight: Weight, leaf: Any) -> Network:
        """Settles everything static. `leaf` is the whole stack, for what reads values."""
        raise NotImplementedError

    def factors(self, x: jax.Array, network: Network) -> Sequence[jax.Array]:
        """The factors of one weight, given as its view; pure."""
        raise NotImplementedError

    @property
    def kind(self) -> str:
        """The name for tables."""
        return type(self).__name__

    def plan(self, leaf: Any, context: LeafContext) -> Plan:
        """Settles the network, and refuses one that saves nothing."""
        inputs, outputs = context.axes.input, context.axes.output
        if not inputs or not outputs:
            raise SpecError(
                f"{context.path}: {self!r} needs input and output axes, and shape {leaf.shape} "
                f"has {inputs} and {outputs}; let the rule match kernels only, such as "
                "'**/kernel', or pass axes=jc.kernel_axes(fn, ...)"
            )
        batch = context.axes.batch_ndim(leaf.ndim)
        ndim = leaf.ndim - batch
        weight = Weight(
            context.path,
            tuple(leaf.shape[batch:]),
            tuple(a + ndim for a in inputs),
            tuple(a + ndim for a in outputs),
        )
        try:
            network = self.network(weight, leaf)
        except ValuesNeededError:
            raise
        except SpecError as error:  # of a function on arrays, which knows no path
            if str(error).startswith(context.path):
                raise
            raise SpecError(f"{context.path}: {error}") from error
        size = sum(math.prod(shape) for shape in network.shapes)
        if size >= math.prod(weight.shape):
            raise SpecError(
                f"{context.path}: {self!r} makes {size} values of the "
                f"{math.prod(weight.shape)} of shape {weight.shape}, which saves nothing; write "
                "smaller ranks or leave the leaf dense"
            )
        return _FactoredPlan(self, network, batch)


@dataclasses.dataclass(frozen=True)
class _FactoredPlan(Plan):
    spec: FactoredSpec
    network: Network
    batch_ndim: int

    def apply(self, leaf: jax.Array, key: jax.Array | None) -> FactoredArray:
        def one(x: jax.Array) -> tuple[jax.Array, ...]:
            # In float32: of orthonormal factors one has all of the weight's norm.
            found = self.spec.factors(self.network.view(x.astype(jnp.float32)), self.network)
            shaped = [f.reshape(s) for f, s in zip(found, self.network.shapes, strict=True)]
            return tuple(f.astype(leaf.dtype) for f in evened(shaped))

        for _ in range(self.batch_ndim):
            one = jax.vmap(one)
        return FactoredArray.of(one(leaf), self.network.expression, kind=self.spec.kind)


def evened(factors: Sequence[jax.Array]) -> list[jax.Array]:
    """Factors of the same product whose largest magnitudes are alike, to a power of two.

    So that those of a float16 weight are finite where it is, and all train at one rate.

    Examples:
      >>> [f.tolist() for f in evened([jnp.array([64.0]), jnp.array([1.0]), jnp.array([1.0])])]
      [[4.0], [4.0], [4.0]]
    """
    if any(f.size == 0 for f in factors):
        return list(factors)
    largest = jnp.stack([jnp.max(jnp.abs(f)) for f in factors])
    logs = jnp.where(jnp.all(largest > 0), jnp.log2(jnp.maximum(largest, 1e-30)), 0.0)
    shifts = jnp.round(jnp.mean(logs) - logs)
    shifts = shifts.at[-1].set(-jnp.sum(shifts[:-1]))
    return [jnp.ldexp(f, n) for f, n in zip(factors, shifts.astype(jnp.int32))]


def parts_of(sizes: Sequence[int], cores: int, path: str, spec: Any) -> tuple[tuple[int, ...], ...]:
    """The parts of each axis of a side of a matrix, `cores` in all.

    One axis is split as evenly as it goes; as many axes as there are cores are their own parts.
    """
    if len(sizes) == cores:
        return tuple((n,) for n in sizes)
    if len(sizes) == 1:
        return (even_split(sizes[0], cores),)
    raise SpecError(
        f"{path}: axes of sizes {tuple(sizes)} do not make {cores} parts; write {spec} with "
        f"cores={len(sizes)}"
    )


def even_split(n: int, count: int) -> tuple[int, ...]:
    """`count` factors of a size whose product it is, the largest of them as small as can be.

    Examples:
      >>> even_split(384, 3), even_split(30, 2), even_split(7, 2)
      ((6, 8, 8), (5, 6), (1, 7))
    """
    best: tuple[int, ...] = (1,) * (count - 1) + (n,)

    def search(rest: int, least: int, left: int, taken: tuple[int, ...]) -> None:
        nonlocal best
        if left == 1:
            if rest >= least and (rest, -least) < (best[-1], -best[0]):
                best = (*taken, rest)
            return
        for d in range(least, round(rest ** (1 / left)) + 1):
            if rest % d == 0:
                search(rest // d, d, left - 1, (*taken, d))

    search(n, 1, count, ())
    return best


def share_of(rank: Any, size: int) -> int:
    """A rank: a number as it is, cut to what is possible, or a share of an axis.

    A share that comes to eight or more is rounded to a multiple of eight: convolutions of 35
    channels take twice as long as of 32, since vector units work on whole registers.

    Examples:
      >>> share_of(35, 64), share_of(0.55, 64), share_of(0.55, 8), share_of(100, 64)
      (35, 32, 4, 64)
    """
    if not isinstance(rank, float):
        return min(int(rank), size)
    wanted = rank * size
    return max(1, round(wanted)) if wanted < 8 else min(size, 8 * round(wanted / 8))


def check_rank_or_share(rank: Any, spec: str) -> None:
    """Refuses what is neither a whole number from 1 nor a share in (0, 1)."""
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    share = isinstance(rank, float) and is_number(rank, 0, 1) and 0 < rank < 1
    if not (whole or share):
        raise SpecError(
            f"{spec}: rank {rank!r}; write a whole number of at least 1, or a share of an axis "
            "such as 0.25"
        )
