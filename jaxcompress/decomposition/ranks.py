"""How many: ranks by energy, by variational Bayes, and those that save anything."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from jaxcompress.errors import SpecError
from jaxcompress.specs import is_number


def saving_rank(rows: int, columns: int) -> int:
    """The largest rank r whose factors are smaller than the matrix, `r (m + n) < m n`; 0 if none.

    Examples:
      >>> saving_rank(64, 64), saving_rank(3, 100), saving_rank(2, 2)
      (31, 2, 0)
    """
    return max(0, (rows * columns - 1) // (rows + columns)) if rows and columns else 0


def check_possible(rank: int, rows: int, columns: int, path: str) -> None:
    """Refuses a rank that the matrix cannot have.

    Raises:
      SpecError: names the largest.
    """
    if rank > min(rows, columns):
        raise SpecError(
            f"{path}: rank {rank} is impossible for a {rows} x {columns} matrix; write at most "
            f"{min(rows, columns)}"
        )


def check_saving(rank: int, rows: int, columns: int, path: str) -> None:
    """Refuses a rank whose factors take as much as the dense matrix or more.

    Raises:
      SpecError: names the largest rank that saves anything.
    """
    most = saving_rank(rows, columns)
    if rank <= most:
        return
    instead = (
        f"write a rank of at most {most}" if most else "no rank saves anything, so leave it dense"
    )
    raise SpecError(
        f"{path}: rank {rank} of a {rows} x {columns} matrix takes {rank * (rows + columns)} "
        f"values, and dense it takes {rows * columns}; {instead}, put {path!r}: None before the "
        "rule, or write allow_larger=True"
    )


def energy_rank(squares: Any, energy: float) -> int:
    """The least rank that keeps a share of the squared singular values.

        min r:  sum_{i<=r} s_i**2 >= energy * sum_i s_i**2

    Args:
      squares: `[..., k]`, squared singular values, descending.
      energy: in (0, 1].

    Returns:
      The rank, of a stack the largest.

    Examples:
      >>> energy_rank([8.0, 1.0, 1.0], 0.8), energy_rank([8.0, 1.0, 1.0], 0.85)
      (1, 2)
    """
    squares = np.asarray(squares, np.float64)
    share = np.cumsum(squares.reshape(-1, squares.shape[-1]), axis=-1)
    # The float64 sum's own last place decides whether energy=1 asks for a zero more.
    wanted = energy * share[:, -1:] * (1 - 1e-12)
    return int(np.max(np.argmax(share >= wanted, axis=-1), initial=0)) + 1


class VBMF(NamedTuple):
    """What variational Bayesian matrix factorization says of a matrix.

    Attributes:
      rank: how many singular values stand out of the noise; may be 0.
      values: those, shrunk to the posterior mean, float64 `[rank]`.
      noise: the variance of the noise in each entry.
    """

    rank: int
    values: np.ndarray
    noise: float


def vbmf(w: Any, shape: tuple[int, int] | None = None, *, noise: float | None = None) -> VBMF:
    """The rank of a noisy matrix by empirical variational Bayes, its global optimum in closed form.

    The model is `V = B A' + E`, with Gaussian priors on the columns of A and B whose variances are
    estimated, and `E_ij ~ N(0, sigma**2)`. For L x M with `L <= M`, `alpha = L / M`, and the tau
    that solves `phi(tau) + phi(tau / alpha) = 0` with `phi(z) = log(z + 1) / z - 1 / 2`, a singular
    value g is kept if

        g**2 >= sigma**2 M (1 + tau) (1 + alpha / tau),

    and becomes `g / 2 (1 - q + sqrt((1 - q)**2 - 4 L M sigma**4 / g**4))`, `q = (L + M) sigma**2 /
    g**2`. A noise that is not known minimizes the free energy, a function of one variable, between
    the published bounds.

    Args:
      w: a matrix, or its singular values with `shape`. Computed in float64 on the host.
      shape: of the matrix, where singular values are given: all `min(m, n)` of them, for the small
        ones tell the noise.
      noise: `sigma**2`, the variance of the noise in each entry, where it is known.

    Returns:
      A `VBMF`.

    Raises:
      SpecError: for what is no finite matrix, singular values that are not all there, and a noise
        that is not positive.

    References:
      Nakajima, Sugiyama, Babacan and Tomioka, *Global Analytic Solution of Fully-observed
      Variational Bayesian Matrix Factorization*, 2013.

    Examples:
      >>> import numpy as np
      >>> rng = np.random.default_rng(0)
      >>> planted = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 60))
      >>> found = vbmf(planted + 0.1 * rng.normal(size=(40, 60)))
      >>> found.rank, round(found.noise, 3)
      (3, 0.01)
    """
    values, (small, large) = _singular_values(w, shape)
    if noise is not None and (not is_number(noise) or noise <= 0):
        raise SpecError(f"noise={noise!r}: write a variance, a number above 0")
    unit = float(values.max(initial=0.0))  # so that no square overflows
    if unit == 0:
        return VBMF(0, np.zeros(0), 0.0 if noise is None else float(noise))
    g = values / unit
    _, edge = threshold(small / large)
    if noise is None:
        variance = _least_free_energy(g**2 / large, small / large, edge)
    else:
        variance = float(noise) / unit / unit
    kept = g[g**2 >= variance * large * edge]
    q = (small + large) * variance / kept**2
    inside = (1 - q) ** 2 - 4 * small * large * (variance / kept**2) ** 2
    shrunk = kept / 2 * (1 - q + np.sqrt(np.maximum(inside, 0.0)))
    return VBMF(len(kept), shrunk * unit, variance * unit * unit)


def vbmf_ranks(kernel: Any, axes: tuple[int, int] = (-2, -1)) -> tuple[int, int]:
    """The two ranks of a Tucker-2 decomposition, by `vbmf` of the unfoldings of two axes.

    Args:
      kernel: such as `[kh, kw, in, out]`.
      axes: those that are decomposed.

    Returns:
      A rank for each axis, at least 1 and at most its length.

    Raises:
      SpecError: for fewer than two axes, and as `vbmf`.

    References:
      Kim, Park, Yoo, Choi, Yang and Shin, *Compression of Deep Convolutional Neural Networks for
      Fast and Low Power Mobile Applications*, 2016.

    Examples:
      >>> import numpy as np
      >>> rng = np.random.default_rng(0)
      >>> core = rng.normal(size=(3, 3, 2, 4))
      >>> u, v = rng.normal(size=(24, 2)), rng.normal(size=(32, 4))
      >>> kernel = np.einsum("hwrs,ir,os->hwio", core, u, v)
      >>> vbmf_ranks(kernel + 0.1 * rng.normal(size=kernel.shape))
      (2, 4)
    """
    x = np.asarray(kernel, np.float64)
    if x.ndim < 2:
        raise SpecError(f"shape {x.shape}: write a kernel of at least two axes")
    first, second = (np.moveaxis(x, a, 0).reshape(x.shape[a], -1) for a in axes)
    return max(1, vbmf(first).rank), max(1, vbmf(second).rank)


def _singular_values(w: Any, shape: tuple[int, int] | None) -> tuple[np.ndarray, tuple[int, int]]:
    x: Any = np.asarray(w, np.float64)
    if not np.all(np.isfinite(x)):
        raise SpecError("vbmf: the matrix holds values that are NaN or infinite")
    if shape is None:
        if x.ndim != 2 or not x.size:
            raise SpecError(
                f"vbmf: shape {x.shape} is no matrix; write a matrix, or its singular values and "
                "shape=(m, n)"
            )
        unit = float(np.abs(x).max()) or 1.0
        shape, x = x.shape, np.linalg.svd(x / unit, compute_uv=False) * unit
    if x.shape != (min(shape),) or np.any(np.diff(x) > 0):
        raise SpecError(
            f"vbmf: {x.shape} singular values of a {shape[0]} x {shape[1]} matrix; write all "
            f"{min(shape)} of them, descending"
        )
    return x, (min(shape), max(shape))


@functools.lru_cache(maxsize=256)
def threshold(alpha: float) -> tuple[float, float]:
    """The tau of `vbmf` for a ratio of sides in (0, 1], and `(1 + tau) (1 + alpha / tau)`.

    Examples:
      >>> round(threshold(1.0)[0], 4)
      2.5129
    """
    from scipy.optimize import brentq  # takes a while to import

    phi = lambda z: math.log1p(z) / z - 0.5
    # phi falls, is 0 at 2.5129, and tau lies between that for both of its arguments.
    both = lambda tau: phi(tau) + phi(tau / alpha)
    tau = brentq(both, 2.5 * alpha, 2.6, xtol=1e-15, rtol=1e-14)
    return tau, (1 + tau) * (1 + alpha / tau)


def free_energy(x: np.ndarray, alpha: float, edge: float) -> np.ndarray:
    """The free energy of scaled singular values `g**2 / (M sigma**2)`, summed over the last axis.

        psi(x) = x - log x + [x > edge] (log(t + 1) + alpha log(t / alpha + 1) - t)

    with `t = (x - (1 + alpha) + sqrt((x - (1 + alpha))**2 - 4 alpha)) / 2`. Up to a constant it is
    `2 / M` times the free energy of the model at the best of all other parameters.

    Examples:
      >>> float(free_energy(np.array([1.0, 1.0]), 1.0, threshold(1.0)[1]))
      2.0
    """
    low = np.maximum(x, 1e-300)
    beyond = np.maximum(x, edge) - (1 + alpha)
    t = (beyond + np.sqrt(np.maximum(beyond**2 - 4 * alpha, 0.0))) / 2
    gain = np.log1p(t) + alpha * np.log1p(t / alpha) - t
    return np.sum(x - np.log(low) + np.where(x > edge, gain, 0.0), axis=-1)


def _least_free_energy(squares: np.ndarray, alpha: float, edge: float) -> float:
    """The noise of the least free energy; `squares` are `g**2 / M`, descending."""
    from scipy.optimize import minimize_scalar

    small = len(squares)
    least = min(math.ceil(small / (1 + alpha)) - 1, small - 1)
    low = max(squares[least] / edge, float(np.mean(squares[least:])))
    high = float(np.mean(squares))
    low = max(low, 1e-18 * high)  # of a matrix without noise
    if low >= high:
        return high
    energy = lambda logs: free_energy(squares / np.exp(logs)[..., None], alpha, edge)
    # Smooth but where a value crosses the edge: looked for on a grid, then between its points.
    kinks = np.log(np.maximum(squares / edge, 1e-300))
    grid = np.linspace(math.log(low), math.log(high), 512)
    grid = np.unique(np.concatenate([grid, kinks[(kinks > grid[0]) & (kinks < grid[-1])]]))
    best = int(np.argmin(energy(grid)))
    ends = grid[max(0, best - 1)], grid[min(len(grid) - 1, best + 1)]
    found = minimize_scalar(
        lambda x: float(energy(np.asarray(x))), bounds=ends, method="bounded",
        options={"xatol": 1e-10},
    )  # fmt: skip
    inside = found.fun <= float(energy(grid[best]))
    return math.exp(float(found.x) if inside else float(grid[best]))
