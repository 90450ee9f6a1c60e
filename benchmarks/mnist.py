"""LeNet-300-100 trained 95% sparse from scratch on the full MNIST, against dense; three seeds.

python benchmarks/mnist.py [--quick]
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import lenet
from _mnist import load
from assets import AssetError, fetch

from common import Row, row, show  # isort: skip

SPARSITY, EPOCHS, SEEDS = 0.95, 20, (0, 1, 2)


def run(quick: bool = False) -> list[Row]:
    """A row for each seed and one for the mean; none where the images cannot be fetched."""
    try:
        digits = load(fetch("mnist-full"))
    except AssetError as error:
        print(f"mnist is left out: {error}")
        return []
    rows, pairs = [], []
    for seed in SEEDS[:1] if quick else SEEDS:
        dense = lenet.dense(digits, EPOCHS, seed)[-1].accuracy
        sparse = lenet.sparse(digits, EPOCHS, seed, SPARSITY)[-1].accuracy
        pairs.append((dense, sparse))
        rows.append(_row(f"seed {seed}", dense, sparse))
    if len(pairs) > 1:
        rows.append(_row("mean", *map(mean, zip(*pairs))))
    return rows


def _row(which: str, dense: float, sparse: float) -> Row:
    # Errors in percent; 0.2 points are allowed.
    return row(
        f"test error of LeNet-300-100, 95% sparse, {which}",
        100 - sparse,
        "dense + 0.2 points",
        100 - dense + 0.2,
        at_most=1,
        unit="%",
    )


def main() -> None:
    show("MNIST", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
