"""ResNet-8 on Fashion-MNIST at half the multiplications: accuracy and forward time.

    python benchmarks/factored.py [--quick]

The 3x3 kernels as Tucker-2 decompositions, trained on (see `examples/factorize.py`). Operations are
what the compiler counts for the whole forward pass.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import jax

from common import Row, interleaved, row, show  # isort: skip

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import factorize
from _mnist import load
from assets import AssetError, fetch

BATCHES = (1, 100)


def run(quick: bool = False) -> list[Row]:
    """Rows of accuracy, operations and time; none where the images cannot be fetched."""
    try:
        data = load(fetch("fashion-mnist"))
    except AssetError as error:
        print(f"factored is left out: {error}")
        return []
    epochs, tuned = (2, 1) if quick else (6, 3)
    with tempfile.TemporaryDirectory() as folder:
        rows, dense, small = factorize.compare(
            data, Path(folder), epochs=epochs, tuned=tuned, share=factorize.SHARE
        )
    before, after = rows[0], rows[-1]
    what = "ResNet-8, Fashion-MNIST, Tucker-2"
    found = [
        row(
            f"{what}: operations", after["flops"] / 1e6, "dense", before["flops"] / 1e6,
            at_most=0.5, unit="M",
        ),
        row(
            f"{what}: test error", 100 - after["accuracy"], "dense + 0.5 points",
            100 - before["accuracy"] + 0.5, at_most=1, unit="%",
        ),
    ]  # fmt: skip
    for batch in BATCHES:
        images = jax.numpy.asarray(data.test_images[:batch])
        t = interleaved(
            {
                "dense": lambda images=images: factorize.forward(dense, images),
                "factored": lambda images=images: factorize.forward(small, images),
            },
            rounds=9 if quick else 41,
            calls=10 if batch == 1 else 1,
        )
        found.append(
            row(f"{what}: forward, batch {batch}", t["factored"], "dense", t["dense"], at_least=1.5)
        )
    return found


def main() -> None:
    show("factored convolutions", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
