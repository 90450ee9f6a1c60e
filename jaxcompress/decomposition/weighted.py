"""Low rank in the metric of data: of the inputs that meet a layer, or of the loss's curvature."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.decomposition.modes import matmul
from jaxcompress.decomposition.svd import balanced, squared_singular_values, truncated_svd
from jaxcompress.errors import SpecError
from jaxcompress.layerwise.hessian import check_damping, check_finite
from jaxcompress.numerics import unit_scale
from jaxcompress.specs import is_count


def activation_svd(
    w: jax.Array, gram: jax.Array, rank: int, *, damping: float = 1e-5
) -> tuple[jax.Array, jax.Array]:
    """The factors of a given rank that change a layer's outputs least.

        minimize tr((w - L R)' H (w - L R)),   H = gram + damping mean(diag(gram)) I

    With `H = S S'` the best `S' L R` is the truncated SVD of `S' w` (Eckart and Young). Its right
    singular vectors V, the eigenvectors of `w' H w`, are all that is needed, since it equals
    `S' w V V'`: so `L R = w V V'`, nothing is divided by S, and H may be singular. The damping
    settles what data leave open, as plain SVD would; for it the error in the metric of `gram` is
    above the least one by at most `damping mean(diag(gram)) |w|**2`, and in float32 by a small
    multiple of `eps tr(w' H w)` more.

    Args:
      w: `[..., K, N]` of any float dtype, inputs before outputs.
      gram: `[..., K, K]`, `sum x x'` of the inputs, as `observe` has it; or `[..., K]`, the
        diagonal of a diagonal metric.
      rank: from 1 to `min(K, N)`; static.
      damping: the share of the mean diagonal that is added; 0 for none.

    Returns:
      `left` `[..., K, rank]` and `right` `[..., rank, N]` of equal scale, in the dtype of `w`.

    Raises:
      SpecError: for shapes that do not fit, an impossible rank or damping, or a metric that is not
        finite.

    References:
      Chen, Yu, Dhillon and Hsieh, *DRONE: Data-aware Low-rank Compression for Large NLP Models*,
      2021; Wang, Zheng, Wan and Zhang, *SVD-LLM: Truncation-aware Singular Value Decomposition for
      Large Language Model Compression*, 2024.

    Examples:
      >>> import jax.numpy as jnp
      >>> w, gram = jnp.diag(jnp.array([3.0, 2.0])), jnp.diag(jnp.array([1.0, 4.0]))
      >>> left, right = activation_svd(w, gram, 1)  # the second input is twice as large
      >>> (left @ right).round(4).tolist()
      [[0.0, 0.0], [0.0, 2.0]]
    """
    _check(w, gram, rank, damping, "activation_svd")
    return factors(w, gram, rank, damping)


def asvd(
    w: jax.Array, abs_mean: jax.Array, rank: int, *, alpha: float = 0.5
) -> tuple[jax.Array, jax.Array]:
    """Low rank of a weight whose inputs are scaled by their mean magnitude, and scaled back.

        L R = S**-1 svd_r(S w),   S = diag(abs_mean**alpha)

    Args:
      w: `[..., K, N]`, inputs before outputs.
      abs_mean: `[..., K]`, the mean of `|x|` over the inputs, as `observe` has it.
      rank: from 1 to `min(K, N)`; static.
      alpha: how much the magnitudes count; 0 is plain SVD.

    Returns:
      As `activation_svd`.

    Raises:
      SpecError: as `activation_svd`.

    References:
      Yuan, Shang, Song, Wu, Yan and Sun, *ASVD: Activation-aware Singular Value Decomposition for
      Compressing Large Language Models*, 2023.

    Examples:
      >>> import jax.numpy as jnp
      >>> left, right = asvd(jnp.diag(jnp.array([3.0, 2.0])), jnp.array([1.0, 4.0]), 1)
      >>> (left @ right).round(4).tolist()
      [[0.0, 0.0], [0.0, 2.0]]
    """
    return activation_svd(w, magnitudes(abs_mean, alpha), rank)


def magnitudes(abs_mean: jax.Array, alpha: float) -> jax.Array:
    """The diagonal metric of `asvd`, `abs_mean**(2 alpha)` in units of the largest mean."""
    x = jnp.asarray(abs_mean).astype(jnp.float32)
    most = jnp.max(x, axis=-1, keepdims=True, initial=0.0)
    return jnp.where(most > 0, x / jnp.where(most > 0, most, 1.0), 1.0) ** (2 * alpha)


def fisher_svd(
    w: jax.Array, fisher: jax.Array, rank: int, *, damping: float = 1e-5
) -> tuple[jax.Array, jax.Array]:
    """Low rank in which an input's weights count by how much the loss depends on them.

        minimize sum_i f_i sum_j (w - L R)_ij**2,   f_i = sum_j fisher_ij

    Args:
      w: `[..., K, N]`, inputs before outputs.
      fisher: `[..., K, N]`, the mean over examples of the squared gradients, or its sums over the
        outputs `[..., K]`.
      rank: from 1 to `min(K, N)`; static.
      damping: the share of the mean of f that is added to it.

    Returns:
      As `activation_svd`.

    Raises:
      SpecError: as `activation_svd`.

    References:
      Hsu, Hua, Chang, Lou, Shen and Jin, *Language Model Compression with Weighted Low-Rank
      Factorization*, 2022.

    Examples:
      >>> import jax.numpy as jnp
      >>> w = jnp.diag(jnp.array([3.0, 2.0]))
      >>> left, right = fisher_svd(w, jnp.array([[1.0, 0.0], [0.0, 9.0]]), 1)
      >>> (left @ right).round(4).tolist()
      [[0.0, 0.0], [0.0, 2.0]]
    """
    if fisher.shape == w.shape:
        fisher = jnp.sum(fisher.astype(jnp.float32), axis=-1)
    _check(w, fisher, rank, damping, "fisher_svd")
    return factors(w, fisher, rank, damping)


def factors(
    w: jax.Array, metric: jax.Array, rank: int, damping: Any
) -> tuple[jax.Array, jax.Array]:
    """`activation_svd` on what was checked."""
    a, scale = _unit(w)
    v = _right_vectors(a, _damped(_normal(metric, w.ndim)[0], w.ndim, damping), rank)
    right, left = balanced(v, jnp.swapaxes(matmul(a, v), -1, -2))
    left, right = (jnp.swapaxes(x, -1, -2) * jnp.sqrt(scale) for x in (left, right))
    return left.astype(w.dtype), right.astype(w.dtype)


def weighted_spectrum(w: jax.Array, metric: jax.Array) -> jax.Array:
    """The squared singular values of `S' w` with `S S'` the metric, descending, in float32.

    The sum of those behind the r-th is the least error of rank r in that metric. Each is exact to a
    small multiple of `eps tr(w' metric w)`.

    Args:
      w: `[..., K, N]`, inputs before outputs.
      metric: `[..., K, K]`, or `[..., K]` of a diagonal one.

    Returns:
      `[..., min(K, N)]`.

    Examples:
      >>> import jax.numpy as jnp
      >>> w = jnp.diag(jnp.array([3.0, 2.0]))
      >>> weighted_spectrum(w, jnp.array([1.0, 4.0])).round(4).tolist()
      [16.0, 9.0]
    """
    a, scale = _unit(w)
    metric, size = _normal(metric, w.ndim)
    if _is_short(a, metric):
        values = jnp.maximum(jnp.linalg.eigvalsh(_squared(a, metric))[..., ::-1], 0.0)
    else:
        values = squared_singular_values(_rooted(a, metric))
    return values * scale[..., 0] * size[..., None] * scale[..., 0]


def _is_short(a: jax.Array, metric: jax.Array) -> bool:
    """Whether `a' metric a` is the smaller square, which needs no root of the metric."""
    return metric.ndim == a.ndim and a.shape[-1] <= a.shape[-2]


def _right_vectors(a: jax.Array, metric: jax.Array, rank: int) -> jax.Array:
    """The leading right singular vectors of `S' a`, orthonormal, `[..., N, rank]`."""
    if _is_short(a, metric):
        return jnp.linalg.eigh(_squared(a, metric))[1][..., ::-1][..., :rank]
    _, right = truncated_svd(_rooted(a, metric), rank)
    return jnp.linalg.qr(jnp.swapaxes(right, -1, -2))[0]


def _squared(a: jax.Array, metric: jax.Array) -> jax.Array:
    return matmul(jnp.swapaxes(a, -1, -2), matmul(metric, a))


def _rooted(a: jax.Array, metric: jax.Array) -> jax.Array:
    """`S' a` for `metric = S S'`; what rounding made negative counts as zero."""
    if metric.ndim < a.ndim:
        return jnp.sqrt(jnp.maximum(metric, 0.0))[..., None] * a
    values, vectors = jnp.linalg.eigh(metric)
    root = jnp.sqrt(jnp.maximum(values, 0.0))
    return root[..., None] * matmul(jnp.swapaxes(vectors, -1, -2), a)


def _unit(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A weight in float32 near 1, and its scale, so that squares neither overflow nor vanish."""
    a = w.astype(jnp.float32)
    scale, inverse = unit_scale(jnp.max(jnp.abs(a), axis=(-1, -2), keepdims=True))
    return a * inverse, scale


def _normal(metric: jax.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
    """A metric in float32 near 1, and its scale `[...]`."""
    metric = metric.astype(jnp.float32)
    scale, inverse = unit_scale(jnp.max(_diagonal(metric, ndim), axis=-1))
    return metric * inverse.reshape(*inverse.shape, *[1] * (metric.ndim - inverse.ndim)), scale


def _damped(metric: jax.Array, ndim: int, damping: Any) -> jax.Array:
    """A metric with a share of its mean diagonal added; without any data, that of plain SVD."""
    mean = jnp.mean(_diagonal(metric, ndim), axis=-1)
    more = jnp.where(mean > 0, damping * mean, 1.0)
    if metric.ndim < ndim:
        return metric + more[..., None]
    return metric + more[..., None, None] * jnp.eye(metric.shape[-1])


def _diagonal(metric: jax.Array, ndim: int) -> jax.Array:
    return jnp.diagonal(metric, axis1=-2, axis2=-1) if metric.ndim == ndim else metric


def _check(w: Any, metric: Any, rank: Any, damping: Any, name: str) -> None:
    if w.ndim < 2 or metric.shape not in (w.shape[:-1], (*w.shape[:-1], w.shape[-2])):
        raise SpecError(
            f"{name}: weights {tuple(w.shape)} and a metric {tuple(metric.shape)} do not fit: "
            "write weights [..., K, N], inputs before outputs, and [..., K, K] or, of a diagonal "
            "metric, [..., K]"
        )
    if not is_count(rank, 1, min(w.shape[-2:])):
        raise SpecError(
            f"{name}: rank={rank!r} is impossible for weights {tuple(w.shape)}; write a whole "
            f"number from 1 to {min(w.shape[-2:])}"
        )
    check_damping(damping)
    check_finite(metric, name)
