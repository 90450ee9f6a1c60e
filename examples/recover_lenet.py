"""Recovers a LeNet-5 of a tenth of its weights in four bits from its dense parent, without labels.

    python examples/recover_lenet.py
    python examples/recover_lenet.py --mnist .assets/mnist-full --epochs 4 --tuned 4

The parent is trained on labels and then closed. Its copy loses nine of ten weights by
magnitude, the others are fake-quantized to int4, and its logits are pulled towards the
parent's on the training images, whose labels nobody looks at. A pruned weight stays zero and what
is stored is what was trained: the file's logits are those of the trained copy, bit for bit.

The data are 5,000 images of MNIST (4,000 for training), or with `--mnist FOLDER` the full set.

References:
  Hinton, Vinyals and Dean, *Distilling the Knowledge in a Neural Network*, 2015; Polino, Pascanu
  and Alistarh, *Model compression via distillation and quantization*, 2018.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import quantize_lenet
from _lenet5 import init, network
from _mnist import Digits, load
from assets import AssetError
from quantize_lenet import BATCH, show
from rich.console import Console

import jaxcompress as jc

TEMPERATURE = 4.0
INT4 = jc.FakeQuantize("int4", group_size=64)
# The first kernel has 500 of the 430,500 weights and keeps half; 9.9% of all are kept.
RULES = {
    "first/kernel": jc.chain(jc.Prune(0.5), INT4),
    "**/kernel": jc.chain(jc.Prune(0.901), INT4),
}


def recover(parent: Any, images: np.ndarray, epochs: int, rate: float, seed: int) -> Any:
    """Prunes and rounds the parent, and teaches the result to be the parent."""
    apply = jc.compressed(network)
    trained, fixed = jc.partition(jc.compress(parent, RULES))
    steps = len(images) // BATCH
    tx = optax.adam(optax.cosine_decay_schedule(rate, epochs * steps))

    def loss(trained: Any, images: jax.Array) -> jax.Array:
        logits = apply(jc.combine(trained, fixed), images)
        target = network(parent, images)
        return jc.distillation.soft_targets(logits, target, temperature=TEMPERATURE).mean()

    @jax.jit
    def step(trained: Any, state: Any, images: jax.Array) -> Any:
        updates, state = tx.update(jax.grad(loss)(trained, images), state, trained)
        return optax.apply_updates(trained, updates), state

    state, rng = tx.init(trained), np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for where in order[: steps * BATCH].reshape(steps, BATCH):
            trained, state = step(trained, state, images[where])
    return jc.combine(trained, fixed)


def compare(
    digits: Digits, folder: Path, *, epochs: int, tuned: int, seed: int
) -> list[dict[str, Any]]:
    """Trains, shrinks and recovers; a row for each model, from its file."""
    folder.mkdir(parents=True, exist_ok=True)
    parent = quantize_lenet.train(init(seed), digits, epochs, 1e-3, seed)
    shrunk = jc.compress(parent, RULES)
    found = recover(parent, digits.train_images, tuned, 1e-3, seed)
    models = {"float32": parent, "10% in int4": shrunk, "10% in int4, recovered": found}
    return [quantize_lenet.stage(name, model, digits, folder) for name, model in models.items()]


def main() -> None:
    """Trains, recovers and stores, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="the IDX files of MNIST")
    parser.add_argument("--epochs", type=int, default=8, help="of the parent")
    parser.add_argument("--tuned", type=int, default=8, help="epochs of the copy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/recover_lenet"))
    args = parser.parse_args()
    try:
        digits = load(args.mnist)
    except AssetError as error:
        raise SystemExit(str(error)) from None
    rows = compare(digits, args.out, epochs=args.epochs, tuned=args.tuned, seed=args.seed)
    show(rows, Console())


if __name__ == "__main__":
    main()
