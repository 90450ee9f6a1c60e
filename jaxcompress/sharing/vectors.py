"""k-means of vectors, by blocks of them: no table of all distances exists at any time."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.errors import SpecError
from jaxcompress.numerics import unit_scale
from jaxcompress.sharing.seeds import SAMPLE, plus_plus
from jaxcompress.specs import is_count

INITS = ("k-means++", "random")
# A block's table of distances to 256 centroids takes 1 MB, and stays in a cache.
_BLOCK = 1024
# Up to so many values in a vector, a matrix product takes longer than plain arithmetic.
_FEW = 16
_HIGHEST = lax.Precision.HIGHEST


class Clusters(NamedTuple):
    """What `kmeans` found.

    Attributes:
      centroids: float32 `[k, d]`.
      indices: the cluster of each vector, int32 `[n]`, or `[p, n]` for vectors in parts.
      inertia: the error, summed.
    """

    centroids: jax.Array
    indices: jax.Array
    inertia: jax.Array


class _Rows(NamedTuple):
    """Vectors in blocks `[blocks, B, d]`, none of which crosses a part.

    Attributes:
      x: the vectors, zeros where there is none.
      weight: of each vector, 0 where there is none, `[blocks, B]`.
      weights: of each coordinate, or None.
      metric: the metrics of parts `[p, d, d]`, or None.
      part: of each block.
    """

    x: jax.Array
    weight: jax.Array
    weights: jax.Array | None
    metric: jax.Array | None
    part: jax.Array


def kmeans(
    x: jax.Array,
    k: int,
    *,
    weights: jax.Array | None = None,
    metric: jax.Array | None = None,
    init: str | Any = "k-means++",
    iterations: int = 25,
    key: jax.Array | None = None,
) -> Clusters:
    """Lloyd's iteration for vectors, in the metric that is asked for.

    Alternates the nearest centroid of each vector and the best centroid of each cluster, which
    never raises the error

    - `sum_i |x_i - c|**2`, c the centroid of i,
    - `sum_i h_i |x_i - c|**2` with a weight for each vector,
    - `sum_i sum_j h_ij (x_ij - c_j)**2` with one for each coordinate, or
    - `sum_p sum_i (x_pi - c)' M_p (x_pi - c)` in the metrics of parts, where a centroid is
      `(sum_i M_p(i))^-1 sum_i M_p(i) x_i`: with `M = X' X` the squared error of the outputs
      of a layer with inputs X.

    until no centroid moves. A cluster that is empty, or without weight, moves to the vector of
    largest error, a second one to the next: since it held nothing, no error rises.

    Args:
      x: `[n, d]`, or `[p, n, d]`, vectors in parts that have the centroids in common. Computed in
        float32.
      k: the number of centroids; static.
      weights: `[n]` or `[n, d]`, or the same after p; not negative.
      metric: `[d, d]`, or `[p, d, d]` with x in parts: symmetric and positive definite. Not
        together with weights.
      init: `k-means++` or `random` (vectors drawn without replacement while there are enough), both
        with a key, or the starting centroids `[k, d]`. Drawn by plain distances; k-means++ looks at
        65,536 vectors at most, drawn at random.
      iterations: at most so many; static.
      key: a random key.

    Returns:
      The centroids, the nearest one of each vector and the error.

    Raises:
      SpecError: for shapes that do not fit, an unknown init, or one that draws without a key.

    References:
      Lloyd, *Least squares quantization in PCM*, 1982; Arthur and Vassilvitskii, *k-means++: The
      Advantages of Careful Seeding*, 2007; Stock et al., *And the Bit Goes Down: Revisiting the
      Quantization of Neural Networks*, 2020 (the metric of inputs).

    Examples:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([[0.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
      >>> found = kmeans(x, 2, init=x[1:])
      >>> found.centroids.tolist(), found.indices.tolist(), float(found.inertia)
      ([[0.0, 0.5], [5.0, 5.0]], [0, 0, 1], 0.5)
    """
    _check(x, k, weights, metric, init, key)
    d = x.shape[-1]
    if not x.size:
        return Clusters(jnp.zeros((k, d)), jnp.zeros(x.shape[:-1], jnp.int32), jnp.zeros(()))
    x = jnp.asarray(x, jnp.float32)
    weights = None if weights is None else jnp.asarray(weights, jnp.float32)
    metric = None if metric is None else jnp.asarray(metric, jnp.float32)
    given = None if isinstance(init, str) else jnp.asarray(init, jnp.float32)
    how = init if isinstance(init, str) else ""
    return _fitted(x, weights, metric, given, key, k, how, int(iterations))


@functools.partial(jax.jit, static_argnums=(5, 6, 7))  # a loop is not traced anew by each call
def _fitted(
    x: jax.Array, weights: Any, metric: Any, given: Any, key: Any, k: int, how: str, turns: int
) -> Clusters:
    d = x.shape[-1]
    # Distances to the middle are as small as they can be: |c|^2 - 2 x c then loses least. Brought
    # near 1 before, since the sum of the largest floats overflows, and after.
    first, back = unit_scale(jnp.max(jnp.abs(x)))
    x = x * back
    middle = jnp.mean(x, axis=tuple(range(x.ndim - 1)))
    scale, inverse = unit_scale(jnp.max(jnp.abs(x - middle)))
    moved = (x - middle) * inverse
    rows = _rows(moved, weights, metric)
    if given is None:
        start = _start(moved.reshape(-1, d), weights, k, how, key)
    else:
        start = (given * back - middle) * inverse

    def unfinished(state: Any) -> jax.Array:
        return (state[0] < turns) & state[2]

    def step(state: Any) -> Any:
        count, centroids, _ = state
        after = _improved(rows, centroids)
        return count + 1, after, jnp.any(after != centroids)

    _, centroids, _ = lax.while_loop(unfinished, step, (jnp.int32(0), start, jnp.bool_(True)))
    indices, errors = lax.map(lambda block: _nearest(block, centroids, rows.metric), _each(rows))
    indices = _unblocked(indices, _parts(rows), x.shape[:-1])
    heaviest = 1.0 if weights is None else unit_scale(jnp.max(weights))[0]
    inertia = jnp.sum(errors) * (scale * first) * (scale * first) * heaviest
    return Clusters((centroids * scale + middle) * first, indices, inertia)


def _check(x: Any, k: int, weights: Any, metric: Any, init: Any, key: Any) -> None:
    if not is_count(k, 1):
        raise SpecError(f"k={k!r}: write a whole number of at least 1")
    if x.ndim not in (2, 3):
        raise SpecError(f"vectors of shape {x.shape}: write [n, d], or [p, n, d] in parts")
    if weights is not None and weights.shape not in (x.shape, x.shape[:-1]):
        raise SpecError(f"weights {weights.shape} for vectors {x.shape}: one a vector, or a value")
    if metric is not None and metric.shape != (*x.shape[:-2], x.shape[-1], x.shape[-1]):
        raise SpecError(
            f"a metric {metric.shape} for vectors {x.shape}: write [d, d] for each part"
        )
    if metric is not None and weights is not None:
        raise SpecError("weights and a metric: write one of them; a metric may be scaled by part")
    if isinstance(init, str):
        if init not in INITS:
            raise SpecError(f"init={init!r}: write {' or '.join(INITS)}, or centroids [k, d]")
        if key is None:
            raise SpecError(f"init={init!r} draws the centroids: pass key=jax.random.key(0)")
    elif jnp.shape(init) != (k, x.shape[-1]):
        raise SpecError(f"centroids {jnp.shape(init)} to start from: write {(k, x.shape[-1])}")


def _rows(x: jax.Array, weights: jax.Array | None, metric: jax.Array | None) -> _Rows:
    d, each = x.shape[-1], None
    weight = jnp.ones(x.shape[:-1], jnp.float32)
    if weights is not None:
        scaled = weights * unit_scale(jnp.max(weights))[1]
        weight, each = (scaled, None) if weights.ndim < x.ndim else (weight, scaled)
    if metric is None or x.ndim == 2:  # one part
        x, weight = x.reshape(1, -1, d), weight.reshape(1, -1)
        each = None if each is None else each.reshape(x.shape)
        metric = None if metric is None else metric.reshape(1, d, d)
    size = min(_BLOCK, x.shape[1])
    count = -(-x.shape[1] // size)

    def blocked(v: jax.Array | None) -> jax.Array | None:
        if v is None:
            return None
        wide = [(0, 0)] * v.ndim
        wide[1] = (0, -v.shape[1] % size)
        return jnp.pad(v, wide).reshape(v.shape[0] * count, size, *v.shape[2:])

    part = jnp.repeat(jnp.arange(x.shape[0]), count)
    return _Rows(blocked(x), blocked(weight), blocked(each), metric, part)  # type: ignore[arg-type]


def _parts(rows: _Rows) -> int:
    return 1 if rows.metric is None else rows.metric.shape[0]


def _each(rows: _Rows) -> Any:
    """What a loop over blocks takes apart."""
    return rows._replace(metric=None)


def _unblocked(values: jax.Array, parts: int, shape: tuple[int, ...]) -> jax.Array:
    """Values of blocks `[blocks, B]` as those of vectors `shape`, without those that were added."""
    return values.reshape(parts, -1)[:, : math.prod(shape) // parts].reshape(shape)


def _quadratic(centroids: jax.Array, metric: jax.Array) -> jax.Array:
    """`c' M c`, `[k]`."""
    return jnp.sum(centroids * jnp.matmul(centroids, metric, precision=_HIGHEST), axis=-1)


def _seen(block: Any, metric: jax.Array | None) -> jax.Array:
    """The vectors as centroids see them: `M x`."""
    if block.weights is not None:
        return block.weights * block.x
    if metric is not None:
        return jnp.matmul(block.x, metric[block.part], precision=_HIGHEST)
    return block.x


def _nearest(
    block: Any, centroids: jax.Array, metric: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The nearest centroid of each vector of a block, ties to the lower, and its error."""
    indices = _least(_scores(block, centroids, metric), len(centroids), block.x.shape[0])
    # Not from the score, which near the centroid is a difference of large numbers.
    away = block.x - centroids[indices]
    far = _seen(block._replace(x=away), metric)
    return indices, block.weight * jnp.maximum(jnp.sum(away * far, axis=-1), 0.0)


def _scores(block: Any, centroids: jax.Array, metric: jax.Array | None) -> Any:
    """A function from the number of a centroid to its distances, less `x' M x`."""
    seen = _seen(block, metric).T
    if block.weights is not None:
        weights = block.weights.T
        if len(weights) > _FEW:
            own = jnp.matmul(jnp.square(centroids), weights, precision=_HIGHEST)
            all_scores = own - 2 * jnp.matmul(centroids, seen, precision=_HIGHEST)
            return lambda i: all_scores[i]
        terms = lambda c: [h * a - 2 * x for h, a, x in zip(weights, c, seen)]
        return lambda i: _dot(centroids[i], terms(centroids[i]))
    if metric is not None:
        own = _quadratic(centroids, metric[block.part])
    else:
        own = jnp.sum(jnp.square(centroids), axis=-1)
    if len(seen) > _FEW:
        products = jnp.matmul(centroids, seen, precision=_HIGHEST)
        return lambda i: own[i] - 2 * products[i]
    return lambda i: own[i] - 2 * _dot(centroids[i], seen)


def _dot(a: Any, b: Any) -> jax.Array:
    return sum((x * y for x, y in zip(a[1:], b[1:])), a[0] * b[0])


def _least(scores: Any, k: int, n: int) -> jax.Array:
    """Which of k scores is least, for each of n vectors.

    One after the other: a row of scores is a short loop over vectors that stays in registers, six
    times as fast as a table and its argmin.
    """

    def step(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        score = scores(i)
        return jnp.minimum(best[0], score), jnp.where(score < best[0], i, best[1])

    start = jnp.full(n, jnp.inf), jnp.zeros(n, jnp.int32)
    return lax.fori_loop(0, k, step, start)[1]


def _improved(rows: _Rows, centroids: jax.Array) -> jax.Array:
    """The centroids after one iteration."""
    k, d = centroids.shape
    parts = _parts(rows)
    wide = d if rows.weights is not None else 1

    def add(state: Any, block: Any) -> Any:
        sums, lost, mass = state
        indices, errors = _nearest(block, centroids, rows.metric)
        weight = block.weight[:, None]
        seen = weight * _seen(block, rows.metric)
        held = weight if block.weights is None else weight * block.weights
        # Added up block by block, and what rounding loses kept: clusters may be of millions.
        more = jnp.zeros((k, d), jnp.float32).at[indices].add(seen)
        total = sums + more
        part = total - sums
        lost = lost + ((sums - (total - part)) + (more - part))
        mass = mass.at[block.part, indices].add(held)
        return (total, lost, mass), errors

    zeros = jnp.zeros((k, d), jnp.float32)
    start = (zeros, zeros, jnp.zeros((parts, k, wide), jnp.float32))
    (sums, lost, mass), errors = lax.scan(add, start, _each(rows))
    sums = sums + lost
    if rows.metric is None:
        held = mass[0]
        best = jnp.where(held > 0, sums / jnp.where(held > 0, held, 1.0), centroids)
        full = jnp.any(held > 0, axis=-1)
    else:
        full = jnp.any(mass > 0, axis=(0, 2))
        matrix = jnp.einsum("pk,pij->kij", mass[..., 0], rows.metric, precision=_HIGHEST)
        matrix = jnp.where(full[:, None, None], matrix, jnp.eye(d))
        best = jnp.linalg.solve(matrix, sums[..., None])[..., 0]
        best = jnp.where(full[:, None], best, centroids)
    return lax.cond(jnp.all(full), lambda: best, lambda: _repaired(rows, best, full, errors))


def _repaired(rows: _Rows, best: jax.Array, full: jax.Array, errors: jax.Array) -> jax.Array:
    """With each empty cluster at a vector of large error, the largest first."""
    k, d = best.shape
    flat = errors.reshape(-1)
    few = min(k, flat.size)
    worst, at = lax.top_k(flat, few)
    rank = jnp.clip(jnp.cumsum(~full) - 1, 0, few - 1)
    there = rows.x.reshape(-1, d)[at[rank]]
    use = ~full & (worst[rank] > 0) & (jnp.cumsum(~full) <= few)
    return jnp.where(use[:, None], there, best)


def _start(
    x: jax.Array, weights: jax.Array | None, k: int, init: str, key: jax.Array | None
) -> jax.Array:
    assert key is not None
    n = x.shape[0]
    if init == "random":
        return jax.random.choice(key, x, (k,), replace=k > n)
    some = jnp.ones(n, jnp.float32)
    if weights is not None:
        some = weights.reshape(n, -1).mean(axis=-1)
    if n > SAMPLE:
        where = jax.random.randint(jax.random.fold_in(key, 1), (SAMPLE,), 0, n)
        x, some = x[where], some[where]
    return plus_plus(x, some, k, key)
