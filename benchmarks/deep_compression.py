"""LeNet-300-100 on the full MNIST, pruned, with trained codebooks and coded: how small on disk.

    python benchmarks/deep_compression.py [--quick]

Sparse from scratch, then codebooks of the values that are left, whose centroids are trained (see
`examples/lenet.py`), saved with entropy coding. The size is that of the whole file, with masks,
indices, codebooks, biases and header, against the float32 values alone; the error is that of what
is loaded from the file. Deep Compression has 40x at 1.58% (Han, Mao and Dally, 2016).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import jaxcompress as jc

from common import Row, row, show  # isort: skip

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import lenet
from _mnist import load
from assets import AssetError, fetch

EPOCHS, TUNED, SEEDS = 20, 4, (0, 1, 2)
SPARSITY, BITS = 0.965, 4


def measure(digits: Any, epochs: int, seed: int) -> tuple[float, float, float]:
    """The bytes of the values, those of the file, and the error in percent."""
    sparse = lenet.sparse(digits, epochs, seed, SPARSITY)[-1].params
    shared = lenet.shared(sparse, digits, TUNED, seed, BITS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lenet.safetensors"
        jc.save(file, shared, coded=True)
        back = jc.load(file)
        return jc.nbytes(sparse), file.stat().st_size, 100 - lenet.accuracy(back, digits)


def run(quick: bool = False) -> list[Row]:
    """Rows of size and error; none where the images cannot be fetched."""
    try:
        digits = load(fetch("mnist-full"))
    except AssetError as error:
        print(f"deep_compression is left out: {error}")
        return []
    seeds = SEEDS[:1] if quick else SEEDS
    found = [measure(digits, EPOCHS, seed) for seed in seeds]
    dense, size, error = (mean(x) for x in zip(*found))
    what = f"LeNet-300-100, {len(seeds)} seeds" if len(seeds) > 1 else "LeNet-300-100, one seed"
    return [
        row(f"{what}: file", size, "float32", dense, at_least=40, unit="B"),
        row(f"{what}: test error", error, "1.64%", 1.64, at_most=1, unit="%"),
    ]


def main() -> None:
    show("deep compression", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
