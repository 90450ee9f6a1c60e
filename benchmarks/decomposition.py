"""Decompositions against tensorly's numpy backend, on the same cores.

    python benchmarks/decomposition.py [--quick]

A kernel 3 x 3 x 256 x 256 of normal values: Tucker of its last two axes at ranks 64 and 64, and CP
at rank 32, of 20 iterations each from an SVD, in float32 on both sides. A matrix 2048 x 2048 at
ranks 64 and 256 against `jnp.linalg.svd` of all of it. Compilation is apart.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tensorly import cp_to_tensor
from tensorly.decomposition import parafac, partial_tucker
from tensorly.tenalg import multi_mode_dot

from jaxcompress.decomposition.cp import cp
from jaxcompress.decomposition.randomized import svd
from jaxcompress.decomposition.tucker import tucker2

from common import Row, interleaved, row, show  # isort: skip

ITERATIONS = 20


def error(x: np.ndarray, y: Any) -> float:
    """The relative error, in float64."""
    x = x.astype(np.float64)
    return float(np.linalg.norm(x - np.asarray(y, np.float64)) / np.linalg.norm(x))


def compile_seconds(solve: Callable, x: jax.Array) -> float:
    lowered = jax.jit(solve).lower(x)
    start = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - start


def tucker_rows(x: np.ndarray, rank: int, rounds: int) -> list[Row]:
    a = jnp.asarray(x)

    def ours(a: jax.Array) -> Any:
        return tucker2(a, (rank, rank), iterations=ITERATIONS, tolerance=0.0)

    def theirs() -> Any:
        options = {"n_iter_max": ITERATIONS, "tol": 0, "init": "svd"}
        return partial_tucker(x, (rank, rank), modes=[2, 3], **options)[0]

    core, (left, right) = ours(a)
    mine = error(x, jnp.einsum("abij,ki,lj->abkl", core, left, right))
    core, factors = theirs()
    other = error(x, multi_mode_dot(core, factors, [2, 3]))
    return rows_of(f"Tucker-2 {rank}/{rank} of {x.shape}", ours, a, theirs, mine, other, rounds)


def cp_rows(x: np.ndarray, rank: int, rounds: int) -> list[Row]:
    a = jnp.asarray(x)

    def ours(a: jax.Array) -> Any:
        return cp(a, rank, iterations=ITERATIONS, tolerance=0.0)

    def theirs() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of axes shorter than the rank
            return parafac(x, rank, n_iter_max=ITERATIONS, tol=0, init="svd", random_state=0)

    mine = error(x, jnp.einsum("ar,br,cr,dr->abcd", *ours(a)))
    other = error(x, cp_to_tensor(theirs()))
    return rows_of(f"CP {rank} of {x.shape}", ours, a, theirs, mine, other, rounds)


def rows_of(
    name: str, ours: Callable, a: Any, theirs: Any, mine: float, other: float, rounds: int
) -> list[Row]:
    seconds = interleaved({"ours": lambda: ours(a), "theirs": theirs}, rounds=rounds, warmup=1)
    return [
        row(name, seconds["ours"], "tensorly", seconds["theirs"], at_least=4),
        row(f"{name}: error", mine, "tensorly", other, unit="", at_most=1),
        row(f"{name}: compile", compile_seconds(ours, a), "a run", seconds["ours"]),
    ]


def svd_rows(size: int, ranks: tuple[int, ...], rounds: int) -> list[Row]:
    w = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    a, rows = jnp.asarray(w), []
    s = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    whole = jax.jit(lambda a: jnp.linalg.svd(a, full_matrices=False))
    for rank in ranks:
        u, values, vt = (np.asarray(x, np.float64) for x in svd(a, rank))
        least = float(np.sqrt(np.sum(s[rank:] ** 2) / np.sum(s**2)))
        mine = error(w, (u * values) @ vt)
        candidates = {"ours": lambda r=rank: svd(a, r), "theirs": lambda: whole(a)}
        seconds = interleaved(candidates, rounds=rounds, warmup=1)
        name = f"svd {rank} of {size} x {size}"
        rows += [
            row(name, seconds["ours"], "jnp.linalg.svd", seconds["theirs"], at_least=5),
            row(f"{name}: error", mine, "least", least, unit="", at_most=1 + 1e-5),
        ]
    return rows


def run(quick: bool = False) -> list[Row]:
    """The rows."""
    wide, rounds = (64, 2) if quick else (256, 3)
    x = np.random.default_rng(0).normal(size=(3, 3, wide, wide)).astype(np.float32)
    matrices = svd_rows(512, (32,), 2) if quick else svd_rows(2048, (64, 256), 1)
    return [*tucker_rows(x, wide // 4, rounds), *cp_rows(x, wide // 8, rounds), *matrices]


def main() -> None:
    show("Decompositions", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
