"""What is done with gates all over a tree: draw their noise, price them, report on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import CompressedArray, is_compressed, materialize
from jaxcompress.arrays.noisy import NoisyArray
from jaxcompress.errors import CompressError
from jaxcompress.pruning.gates.base import GateArray
from jaxcompress.pruning.gates.gaussian import GaussianArray
from jaxcompress.rules import flatten, match
from jaxcompress.tables import Tabular

if TYPE_CHECKING:  # rich is imported when a table is drawn, not with the package
    from rich.table import Table


def sample(tree: Any, key: jax.Array) -> Any:
    """Draws the noise of one training step into every gate, or other leaf, that has any.

    `compressed(fn)(sample(params, key), x)` is then the sampled forward pass, differentiable with
    respect to what is trained; `params` themselves stay without noise, and so deterministic.
    Nothing is hidden: another key is another draw, and all of it maps, scans and compiles. Map over
    keys and examples together for gates that are drawn per example.

    Args:
      tree: any tree; leaves without noise are returned as they are.
      key: a random key; each leaf that draws gets one of its own.

    Returns:
      The same tree with noise in it.

    Examples:
      >>> import jax, jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.pruning import gates
      >>> params = jc.compress({"w": jnp.ones((2, 3))}, {"w": gates.L0HardConcrete(keep=0.5)})
      >>> loss = jc.compressed(lambda params: jnp.sum(params["w"]))
      >>> trainable, rest = jc.partition(params)
      >>> key = jax.random.key(0)
      >>> grads = jax.grad(lambda t: loss(gates.sample(jc.combine(t, rest), key)))(trainable)
      >>> grads["w"].weight.shape
      (2, 3)
    """
    count = 0

    def draw(leaf: NoisyArray) -> NoisyArray:
        nonlocal count
        count += 1
        return leaf.drawn(jax.random.fold_in(key, count))

    return jax.tree.map(lambda x: _map_noisy(draw, x), tree, is_leaf=is_compressed)


def quiet(tree: Any) -> Any:
    """The tree without the noise that `sample` put in.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxcompress.pruning import gates
      >>> drawn = sample({"w": gates.L0HardConcrete()(jnp.ones(2))}, jax.random.key(0))
      >>> drawn["w"].noise.shape, quiet(drawn)["w"].noise
      ((2,), None)
    """
    off: Callable[[NoisyArray], NoisyArray] = lambda leaf: leaf.quiet()
    return jax.tree.map(lambda x: _map_noisy(off, x), tree, is_leaf=is_compressed)


def _map_noisy(fn: Callable[[NoisyArray], NoisyArray], x: Any) -> Any:
    """A leaf with `fn` applied to it if it draws, else to the leaves inside."""
    if isinstance(x, NoisyArray):
        return fn(x)
    if not isinstance(x, CompressedArray):
        return x
    inner = {name: getattr(x, name) for name in x.children}
    return x.replace(**{name: _map_noisy(fn, child) for name, child in inner.items()})


def _gates(tree: Any) -> Iterator[tuple[str, GateArray]]:
    """All gates of a tree with their paths."""
    for path, leaf in flatten(tree)[0]:
        yield from _inside(path, leaf)


def _inside(path: str, leaf: Any) -> Iterator[tuple[str, GateArray]]:
    if isinstance(leaf, GateArray):
        yield path, leaf
    elif isinstance(leaf, CompressedArray):
        for name in leaf.children:
            yield from _inside(f"{path}.{name}", getattr(leaf, name))


def gate_penalty(tree: Any, factors: Mapping[str, float] | None = None) -> jax.Array:
    """The sum of what all gates of a tree cost: an expected number of weights, or a divergence.

    Beside a loss that is the mean over examples, divide a divergence by the number of training
    examples; an expected number wants a factor of its own.

    Args:
      tree: any tree; leaves that are no gates cost nothing.
      factors: `{glob: factor}` over the paths of gates, the first match counts; without, or where
        none matches, 1.

    Returns:
      A scalar, differentiable.

    Raises:
      RuleError: for a glob that matches no gate.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.pruning import gates
      >>> params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
      >>> params = jc.compress(params, {"*": gates.L0HardConcrete(keep=0.5)})
      >>> round(float(gates.gate_penalty(params)), 3)
      6.655
      >>> round(float(gates.gate_penalty(params, {"a": 2.0, "b": 0.0})), 3)
      6.655
    """
    found = list(_gates(tree))
    hits = match(factors or {}, [path for path, _ in found])
    total = jnp.zeros(())
    for (_, leaf), hit in zip(found, hits):
        total = total + leaf.penalty() * (1.0 if hit is None else hit[1])
    return total


def posterior_bits(tree: Any) -> dict[str, int]:
    """How many bits the posterior of Gaussian weights allows for, by leaf.

    The least b for which a symmetric code of b bits, of step `max|w| / (2**(b-1) - 1)`, is off by
    no more than the posterior's own standard deviation: half a step is at most the root mean
    variance of the weights that stay. At least 2 and at most the bits of the leaf's dtype, which
    are needed where there is hardly any noise; `jc.Quantize(f"int{b}")` takes up to 8.

    Args:
      tree: a tree with `VariationalDropout` or `Horseshoe` leaves, concrete.

    Returns:
      `{path: bits}`.

    References:
      Louizos, Ullrich and Welling, *Bayesian Compression for Deep Learning*, 2017 (the bit width
      from the posterior variance).

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.pruning import gates
      >>> params = jc.compress({"w": jnp.ones(9)}, {"w": gates.VariationalDropout(-6.0)})
      >>> posterior_bits(params)
      {'w': 5}
    """
    out = {}
    for path, leaf in _gates(tree):
        if isinstance(leaf, GaussianArray):
            mask = np.asarray(leaf.mask())
            largest = float(np.max(np.abs(np.asarray(leaf.pruned(), np.float64)), initial=0))
            # A variance is a difference, and rounding may take it below 0.
            var = np.maximum(np.asarray(leaf.variance(), np.float64)[mask], 0)
            half = np.sqrt(var.mean()) if largest else 1.0
            most = 8 * leaf.dtype.itemsize
            enough = 2.0**most * half > largest
            bits = 1 + int(np.ceil(np.log2(largest / (2 * half) + 1))) if enough else most
            out[path] = min(max(2, bits), most)
    return out


@dataclasses.dataclass(frozen=True)
class GateReport(Tabular):
    """A table of gated leaves; prints in a terminal, shows in a notebook.

    Attributes:
      rows: one dict a leaf: `path`, `form`, `size` in weights, `expected` nonzero ones in training,
        `kept` by `finalize`, their `sparsity`; and how the finalized weight differs from that of
        the deterministic pass: `largest` and, in Euclidean norm, `relative`.
    """

    rows: list[dict[str, Any]]

    @property
    def kept(self) -> int:
        """How many weights stay, all together."""
        return sum(row["kept"] for row in self.rows)

    @property
    def size(self) -> int:
        """How many weights there are, all together."""
        return sum(row["size"] for row in self.rows)

    @property
    def sparsity(self) -> float:
        """The share that `finalize` removes."""
        return 1 - self.kept / self.size if self.size else 0.0

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(title="gates")
        for name in ("leaf", "form"):
            table.add_column(name, overflow="fold")
        for name in ("expected", "kept", "of", "sparsity", "gap", "relative"):
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(
                Text(row["path"]),  # a plain string would be read as markup
                row["form"],
                f"{row['expected']:,.1f}",
                f"{row['kept']:,}",
                f"{row['size']:,}",
                f"{100 * row['sparsity']:.2f}%",
                f"{row['largest']:.2e}",
                f"{row['relative']:.2e}",
            )
        return table

    def __repr__(self) -> str:
        return (
            f"GateReport({len(self.rows)} leaves, {self.kept} of {self.size} kept, "
            f"{100 * self.sparsity:.4g}% sparse)"
        )


def gate_report(tree: Any) -> GateReport:
    """What gates will leave, and what `finalize` changes in the deterministic pass, leaf by leaf.

    Hard gates have no gap, nor have hard concrete ones. Where the deterministic pass computes with
    posterior means, what `finalize` cuts off is the gap.

    Args:
      tree: a tree with gates, concrete; noise in them is left out.

    Returns:
      A `GateReport`, to print or to read row by row.

    Raises:
      CompressError: for a tree without gates.

    Examples:
      >>> import jax.numpy as jnp, jaxcompress as jc
      >>> from jaxcompress.pruning import gates
      >>> w = {"kernel": jnp.array([3.0, 4.0, 0.0005])}
      >>> report = gates.gate_report(jc.compress(w, {"kernel": gates.VariationalDropout()}))
      >>> row = report.rows[0]
      >>> report, round(row["largest"], 6), round(row["relative"], 6)
      (GateReport(1 leaves, 2 of 3 kept, 33.33% sparse), 0.0005, 0.0001)
    """
    rows = [_row(path, leaf.quiet()) for path, leaf in _gates(tree)]
    if not rows:
        raise CompressError(
            "the tree has no gates to report on; put them in with compress(params, {glob: "
            "L0HardConcrete()}), before finalize"
        )
    return GateReport(rows)


def _row(path: str, leaf: GateArray) -> dict[str, Any]:
    before = np.asarray(jax.jit(materialize)(leaf), np.float64)
    after = np.asarray(materialize(leaf.finalize()), np.float64)
    norm, kept = float(np.linalg.norm(before)), int(np.count_nonzero(after))
    change = np.abs(before - after)
    return {
        "path": path,
        "form": leaf.describe(),
        "size": leaf.size,
        "expected": float(leaf.expected()),
        "kept": kept,
        "sparsity": 1 - kept / leaf.size if leaf.size else 0.0,
        "largest": float(np.max(change, initial=0)),
        "relative": float(np.linalg.norm(change)) / norm if norm else 0.0,
    }
