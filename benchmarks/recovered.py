"""LeNet-5 of a tenth of its weights in four bits, recovered from its dense parent without labels.

    python benchmarks/recovered.py [--quick]

Full MNIST, three seeds; see `examples/recover_lenet.py`. Test errors in percent, from the files.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import recover_lenet
from _mnist import load
from assets import AssetError, fetch

from common import Row, row, show  # isort: skip

SEEDS = (0, 1, 2)


def run(quick: bool = False) -> list[Row]:
    """The recovered model and the one before, against the parent."""
    try:
        digits = load(fetch("mnist-full"))
    except AssetError as error:
        print(f"recovered is left out: {error}")
        return []
    epochs, seeds = (1, SEEDS[:1]) if quick else (4, SEEDS)
    runs = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            runs.append(
                recover_lenet.compare(digits, Path(folder), epochs=epochs, tuned=epochs, seed=seed)
            )
    errors = [[100 - model["accuracy"] for model in models] for models in zip(*runs)]
    for models, values in zip(zip(*runs), errors):
        spread = f" +- {stdev(values):.2f}" if len(values) > 1 else ""
        print(f"{models[0]['model']}: {100 - mean(values):.2f}{spread}%", file=sys.stderr)
    parent, before, after = map(mean, errors)
    size = [mean(run[i]["file_bytes"] for run in runs) / 1e3 for i in (0, 2)]
    what = "LeNet-5, 10% of the weights in int4"
    return [
        row(f"{what}: test error, recovered", after, "parent + 0.3 points", parent + 0.3,
            at_most=1, unit="%"),
        row(f"{what}: test error, as it is", before, "parent", parent, unit="%"),
        row(f"{what}: file", size[1], "parent", size[0], unit="kB"),
    ]  # fmt: skip


def main() -> None:
    show("recovered without labels", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
