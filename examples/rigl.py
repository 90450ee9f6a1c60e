"""Trains LeNet-300-100 sparse from the first step to the last, and stores what is left.

    python examples/rigl.py
    python examples/rigl.py --algorithm snfs --sparsity 0.98 --mnist .assets/mnist-full

The network has never more weights than it ends with: some go and others come, by RigL or another
algorithm. The last file holds the kept weights alone.

References:
  Evci et al., *Rigging the Lottery: Making All Tickets Winners*, 2020.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from _mnist import Digits, load
from assets import AssetError
from lenet import BATCH, KERNELS, accuracy, adamw, init, train
from rich.console import Console

import jaxcompress as jc
from jaxcompress import pruning

ALGORITHMS = {
    "rigl": lambda steps: pruning.rigl(end=3 * steps // 4),
    "set": lambda steps: pruning.set_(end=3 * steps // 4),
    "gse": lambda steps: pruning.gse(end=3 * steps // 4),
    "snfs": lambda steps: pruning.snfs(end=3 * steps // 4, allocation="erk"),
    "dsr": lambda steps: pruning.dsr(end=3 * steps // 4, allocation="erk", threshold=1e-2),
}


def sparse(digits: Digits, name: str, sparsity: float, epochs: int, seed: int) -> Any:
    """The params, the state of the optimizer, and how many weights each epoch ended with."""
    steps = epochs * (len(digits.train_labels) // BATCH)
    schedule = pruning.periodic(sparsity, every=max(1, steps // 60), end=3 * steps // 4)
    tx = jc.sparsify(adamw(steps, 8e-3, 0.2), ALGORITHMS[name](steps), schedule, KERNELS)
    counts, last = [], None

    def pick(params: Any, state: Any) -> float:
        nonlocal last
        last = pruning.sparsity_report(state)
        counts.append(last.kept)
        return last.sparsity

    run = [*train(init(seed), tx, digits, epochs, seed, pick)]
    return run[-1].params, last, counts


def main() -> None:
    """Trains, stores, loads and tests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="the IDX files of MNIST")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="rigl")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/rigl"))
    args = parser.parse_args()
    try:
        digits = load(args.mnist)
    except AssetError as error:
        raise SystemExit(str(error)) from None
    params, report, _ = sparse(digits, args.algorithm, args.sparsity, args.epochs, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{args.algorithm}.safetensors"
    jc.save(file, jc.compress(params, {"*/kernel": jc.Prune()}))
    console = Console()
    console.print(report)
    console.print(
        f"{accuracy(jc.load(file), digits):.2f}% of the test images from {file}, "
        f"{file.stat().st_size:,} bytes of {jc.nbytes(params):,}"
    )


if __name__ == "__main__":
    main()
