"""The k-th largest of ten million magnitudes, and the mask of the k largest, against sorting.

python benchmarks/selection.py [--quick]
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.pruning import kth_largest, top_mask

from common import Row, interleaved, row, show  # isort: skip


def inputs(quick: bool) -> dict[str, jax.Array]:
    """Vectors and a matrix, smooth and full of ties."""
    n = 1_000_000 if quick else 10_000_000
    x = jax.random.normal(jax.random.key(0), (n,))
    return {
        f"{n / 1e6:.0f} million normal floats": x,
        "the same as a matrix": x.reshape(-1, 1000),
        "the same rounded to 0.01, full of ties": jnp.round(x, 2),
    }


def run(quick: bool = False) -> list[Row]:
    """All rows; every outcome is checked against numpy."""
    rows = []
    for name, x in inputs(quick).items():
        k = x.size // 20
        largest, mask = (jax.jit(f, static_argnums=1) for f in (kth_largest, top_mask))
        by_sort = jax.jit(lambda x, k=k: jnp.sort(jnp.abs(x.reshape(-1)))[x.size - k])
        expected = np.partition(np.abs(np.asarray(x)).reshape(-1), -k)[-k]
        assert largest(x, k) == expected == by_sort(x)
        chosen = np.asarray(mask(x, k))
        assert chosen.sum() == k
        assert np.abs(np.asarray(x))[chosen].min() == expected
        candidates = {
            "ours": lambda x=x, k=k, f=largest: f(x, k),
            "mask": lambda x=x, k=k, f=mask: f(x, k),
            "sort": lambda x=x, f=by_sort: f(x),
        }
        t = interleaved(candidates, rounds=5, warmup=1)
        rows.append(row(f"k-th largest of {name}", t["ours"], "jnp.sort", t["sort"], at_least=20))
        rows.append(row(f"mask of the k largest of {name}", t["mask"], "jnp.sort", t["sort"]))
    return rows


def main() -> None:
    show("selection", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
