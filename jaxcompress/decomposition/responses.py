"""Low rank of a layer's responses, after its nonlinearity and from inputs that are off already."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.arrays.base import is_compressed
from jaxcompress.arrays.low_rank import LowRankArray
from jaxcompress.decomposition.modes import matmul
from jaxcompress.decomposition.weighted import factors
from jaxcompress.errors import SpecError
from jaxcompress.gradients.batches import hashable
from jaxcompress.interpret import compressed
from jaxcompress.rules import KernelAxes, check_axes, default_axes, flatten, map_with_path
from jaxcompress.specs import is_count, is_number


class Responses(NamedTuple):
    """What `asymmetric` found: `y ~ y_hat @ left @ right + bias`.

    Attributes:
      left: `[d, rank]`.
      right: `[rank, d]`.
      bias: `[d]`.
      objectives: float32, the relaxed objective after each step, one row for each penalty; of a
        linear layer empty.
      errors: float32, the mean square of what is off after the nonlinearity: at the start, which is
        the linear solution, and at the end.
    """

    left: jax.Array
    right: jax.Array
    bias: jax.Array
    objectives: jax.Array
    errors: jax.Array


def asymmetric(
    y: jax.Array,
    y_hat: jax.Array | None,
    rank: int,
    *,
    nonlinearity: str | None = "relu",
    penalties: Sequence[float] = (0.01, 1.0),
    steps: int = 25,
    fit_bias: bool = True,
) -> Responses:
    """The projection of responses on few dimensions that is best after the nonlinearity.

        minimize over M of rank r and b:  sum_n |relu(y_n) - relu(M y_hat_n + b)|**2

    `y` are the responses of the original network, `y_hat` those of the same layer to the inputs
    that the compressed layers before it give: so errors are made up for and do not add up. With
    targets z that may differ from the responses, each penalty `l` in turn relaxes it to

        sum_n |relu(y_n) - relu(z_n)|**2 + l |z_n - M y_hat_n - b|**2,

    by turns minimized over z, in closed form for each element (the better of `min(0, t)` and
    `max(0, (l t + relu(y)) / (l + 1))`, `t = M y_hat + b`), and over M and b, a regression of
    reduced rank. The start is the linear solution, and the end no worse than that after the
    nonlinearity: the best of the start and of the ends of the penalties is returned.

    Args:
      y: `[n, d]`, responses before the nonlinearity.
      y_hat: `[n, d]`; None: the same as `y`.
      rank: from 1 to d; static.
      nonlinearity: `"relu"`, or None for the regression alone, which for `y_hat = y` is the
        principal components of the responses.
      penalties: in the order in which they are used, positive.
      steps: alternations for each penalty; static.
      fit_bias: whether there is a b; without it, `bias` is zero.

    Returns:
      The factors in the dtype of `y`, in the convention of kernels, inputs before outputs.

    Raises:
      SpecError: for shapes that do not fit, and options that are none.

    References:
      Zhang, Zou, He and Sun, *Accelerating Very Deep Convolutional Networks for Classification and
      Detection*, 2015.

    Examples:
      >>> import jax.numpy as jnp
      >>> y = jnp.outer(jnp.linspace(-1.0, 1.0, 9), jnp.array([1.0, 2.0])) + jnp.array([0.0, 3.0])
      >>> found = asymmetric(y, None, 1, nonlinearity=None)
      >>> bool(jnp.allclose(y @ found.left @ found.right + found.bias, y, atol=1e-4))
      True
    """
    y_hat = y if y_hat is None else y_hat
    if y.ndim != 2 or y.shape != y_hat.shape or not y.size:
        raise SpecError(
            f"responses {tuple(y.shape)} and {tuple(y_hat.shape)}: write both as [n, d], one row "
            "for each example and place"
        )
    if not is_count(rank, 1, y.shape[1]):
        raise SpecError(f"rank={rank!r}: write a whole number from 1 to {y.shape[1]}")
    if nonlinearity not in ("relu", None):
        raise SpecError(f"nonlinearity={nonlinearity!r}: write 'relu' or None")
    if not all(is_number(p) and p > 0 for p in penalties):
        raise SpecError(f"penalties={penalties!r}: write numbers above 0, such as (0.01, 1.0)")
    if not is_count(steps, 1):
        raise SpecError(f"steps={steps!r}: write a whole number of at least 1")
    weights = jnp.asarray(penalties if nonlinearity else (), jnp.float32)
    return _asymmetric(y, y_hat, weights, rank, steps, nonlinearity is not None, fit_bias)


class _Regression(NamedTuple):
    """What a regression on fixed responses needs, and is done once."""

    x: jax.Array  # centered
    mean: jax.Array
    gram: jax.Array
    inverse: jax.Array
    fit_bias: bool


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _asymmetric(
    y: jax.Array, y_hat: jax.Array, penalties: jax.Array, rank: int, steps: int, relu: bool,
    fit_bias: bool,
) -> Responses:  # fmt: skip
    dtype, y, x = y.dtype, y.astype(jnp.float32), y_hat.astype(jnp.float32)
    scale = jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(y))), jnp.finfo(jnp.float32).tiny)
    y, x = y / scale, x / scale
    regression = _prepared(x, fit_bias)
    after = jax.nn.relu if relu else lambda t: t
    target = after(y)

    def out(found: Any) -> jax.Array:
        left, right, bias = found
        return matmul(matmul(x, left), right) + bias

    off = lambda found: jnp.mean(jnp.square(target - after(out(found))))

    def step(penalty: jax.Array, found: Any) -> Any:
        z = nearest_targets(target, out(found), penalty)
        found = _reduced(regression, z, rank)
        gap = jnp.square(target - jax.nn.relu(z)) + penalty * jnp.square(z - out(found))
        return found, jnp.mean(gap)

    def relaxed(state: Any, penalty: jax.Array) -> Any:
        found, best = state
        found, objectives = lax.scan(
            lambda found, _: step(penalty, found), found, None, length=steps
        )
        better = off(found) < off(best)
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), found, best)
        return (found, best), objectives

    start = _reduced(regression, y, rank)
    (_, best), objectives = lax.scan(relaxed, (start, start), penalties)
    left, right, bias = best
    errors = jnp.stack([off(start), off(best)]) * jnp.square(scale)
    return Responses(
        left.astype(dtype), right.astype(dtype), (bias * scale).astype(dtype),
        objectives * jnp.square(scale), errors,
    )  # fmt: skip


def nearest_targets(target: jax.Array, t: jax.Array, penalty: Any) -> jax.Array:
    """The z of `min (target - relu(z))**2 + penalty (z - t)**2` for each element; `target >= 0`.

    Examples:
      >>> import jax.numpy as jnp
      >>> nearest_targets(jnp.array([0.0, 2.0]), jnp.array([-3.0, 0.0]), 1.0).tolist()
      [-3.0, 1.0]
    """
    low = jnp.minimum(t, 0.0)
    high = jnp.maximum((penalty * t + target) / (penalty + 1.0), 0.0)
    cost = lambda z: jnp.square(target - jax.nn.relu(z)) + penalty * jnp.square(z - t)
    return jnp.where(cost(low) <= cost(high), low, high)


def _prepared(x: jax.Array, fit_bias: bool) -> _Regression:
    mean = jnp.mean(x, axis=0) * fit_bias
    x = x - mean
    gram = matmul(x.T, x)
    values, vectors = jnp.linalg.eigh(gram)
    # What is below is noise: of directions in which the responses do not vary.
    sound = values > gram.shape[0] * jnp.finfo(jnp.float32).eps * values[-1]
    inverse = jnp.where(sound, 1 / jnp.where(sound, values, 1.0), 0.0)
    inverse = matmul(vectors * inverse, vectors.T)
    return _Regression(x, mean, gram, inverse, fit_bias)


def _reduced(on: _Regression, z: jax.Array, rank: int) -> Any:
    """The regression of z of reduced rank: the full one, then low rank in the metric of its inputs.

    `|z - x L R|**2` is that of the full regression C and `tr((C - L R)' x'x (C - L R))`.
    """
    mean = jnp.mean(z, axis=0) * on.fit_bias
    full = matmul(on.inverse, matmul(on.x.T, z - mean))
    left, right = factors(full, on.gram, rank, 0.0)
    return left, right, mean - matmul(matmul(on.mean, left), right)


def reduce_responses(
    responses: Callable[..., Any],
    params: Any,
    path: str,
    batches: Iterable[Any],
    rank: int,
    *,
    bias: str | None = None,
    reduced: Any = None,
    samples: int | None = None,
    key: jax.Array | None = None,
    axes: Mapping[str, KernelAxes] | None = None,
    **options: Any,
) -> tuple[dict[str, Any], Responses]:
    """A layer of low rank and its bias, fitted to its responses: `asymmetric` on one layer.

    A convolution becomes one with `rank` features and a 1 x 1 after it, a dense layer two thin
    ones. Go from the first layer to the last, each with the tree as it is by then as `reduced`.

    Args:
      responses: `responses(params, *batch)` for batches that are tuples, `responses(params, batch)`
        for others: what the layer gives, bias included and before the nonlinearity, `[..., d]`
        with its features last.
      params: the original tree.
      path: the layer's kernel, inputs before its one axis of outputs.
      batches: what to run it on.
      rank: the number of dimensions.
      bias: the path of the layer's bias; None: it has none, and none is fitted.
      reduced: the tree with the layers before this one compressed; None: none are.
      samples: how many rows of each batch to draw, such as ten places for each image; None: all.
      key: for drawing.
      axes: the input and output axes of leaves by path; Flax's conventions for all others.
      **options: of `asymmetric`.

    Returns:
      The changed leaves by path, a `LowRankArray` for the kernel and the new bias, and the
      `Responses`. Put them in with `jaxcompress.rules.map_with_path`.

    Raises:
      SpecError: for paths and responses that do not fit, a layer whose responses are not linear in
        all its inputs and the kernel, as those of groups are not, and as `asymmetric`.

    References:
      Zhang, Zou, He and Sun, *Accelerating Very Deep Convolutional Networks for Classification and
      Detection*, 2015.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> params = {"kernel": jax.random.normal(keys[0], (5, 6)), "bias": jnp.ones(6)}
      >>> layer = lambda params, x: x @ params["kernel"] + params["bias"]
      >>> batches = [jax.random.normal(keys[1], (200, 5))]
      >>> changed, found = reduce_responses(layer, params, "kernel", batches, 2, bias="bias")
      >>> changed["kernel"], changed["bias"].shape
      (LowRankArray(float32[5, 6], rank 2), (6,))
    """
    kernel, old = _layer(params, path, bias, axes)
    batches = list(batches)
    rows = _rows(responses, params, batches, samples, key)
    off = rows if reduced is None else _rows(responses, reduced, batches, samples, key)
    if rows.shape[1] != kernel.shape[-1]:
        raise SpecError(
            f"{path}: responses have {rows.shape[1]} features and the kernel "
            f"{tuple(kernel.shape)} gives {kernel.shape[-1]}; write what this layer gives"
        )
    found = asymmetric(rows, off, rank, fit_bias=bias is not None, **options)
    thin = jnp.tensordot(
        kernel.astype(jnp.float32), found.left.astype(jnp.float32), 1, precision="highest"
    )
    leaf = LowRankArray.of(
        thin.astype(kernel.dtype), found.right.astype(kernel.dtype), left_ndim=kernel.ndim - 1
    )
    changed: dict[str, Any] = {path: leaf}
    if bias is not None:
        moved = matmul(matmul(old.astype(jnp.float32), found.left), found.right) + found.bias
        changed[bias] = moved.astype(old.dtype)
    _check_changed(responses, params if reduced is None else reduced, changed, batches[0], found)
    return changed, found


def _check_changed(
    fn: Any, params: Any, changed: dict[str, Any], batch: Any, found: Responses
) -> None:
    """Whether the changed layer gives the projected responses; nothing else tells of groups.

    Kernels and operands of bfloat16, as products of accelerators take them, each round to 2**-9 of
    their values, four times in all at most: 2**-7. A layer that is not what it is taken for is off
    by a share of the responses themselves.
    """
    run = _runner(fn)
    tree = map_with_path(lambda name, leaf: changed.get(name, leaf), params)
    before, after = (run(p, batch).astype(jnp.float32) for p in (params, tree))
    left, right, moved = (x.astype(jnp.float32) for x in (found.left, found.right, found.bias))
    wanted = matmul(matmul(before, left), right) + moved
    rms = lambda x: float(jnp.sqrt(jnp.mean(jnp.square(x))))
    if rms(after - wanted) > 2**-6 * max(rms(wanted), rms(before)):
        raise SpecError(
            f"{next(iter(changed))}: responses do not follow the kernel as those of one layer do; "
            "write a function that gives what this layer gives, before its nonlinearity; layers "
            "of groups, such as depthwise ones, are not reduced by this"
        )


def _layer(params: Any, path: str, bias: str | None, axes: Any) -> tuple[jax.Array, Any]:
    leaves = dict(flatten(params)[0])
    check_axes(axes or {}, list(leaves.items()))
    for name in (path, bias):
        if name is not None and (name not in leaves or is_compressed(leaves[name])):
            raise SpecError(
                f"{name!r} names no dense leaf; the paths are such as {list(leaves)[:3]}"
            )
    kernel = jnp.asarray(leaves[path])
    where = (axes or {}).get(path, default_axes(path, kernel.ndim))
    inputs = tuple(range(-kernel.ndim, -1))
    if where.output != (-1,) or tuple(sorted(where.input)) != inputs:
        raise SpecError(
            f"{path}: shape {tuple(kernel.shape)} with inputs {where.input} and outputs "
            f"{where.output}: a kernel [*inputs, features] is wanted"
        )
    return kernel, None if bias is None else jnp.asarray(leaves[bias])


def _runner(fn: Any) -> Callable[[Any, Any], jax.Array]:
    """The function on a tree and a batch, which gives several arguments if it is a tuple."""
    run = jax.jit(compressed(hashable(fn)))
    return lambda params, batch: run(params, *(batch if isinstance(batch, tuple) else (batch,)))


def _rows(fn: Any, params: Any, batches: Any, samples: int | None, key: Any) -> jax.Array:
    """The responses of all batches, `[n, d]`, or as many of each as are asked for."""
    if samples is not None and (not is_count(samples, 1) or key is None):
        raise SpecError(
            f"samples={samples!r}: write a whole number of at least 1, and key=jax.random.key(0)"
        )
    run, out = _runner(fn), []
    for i, batch in enumerate(batches):
        y = run(params, batch)
        y = jnp.asarray(y).reshape(-1, y.shape[-1])
        if samples is not None and samples < len(y):
            y = y[jax.random.permutation(jax.random.fold_in(key, i), len(y))[:samples]]
        out.append(y)
    if not out:
        raise SpecError("batches is empty: give at least one batch")
    return jnp.concatenate(out)
