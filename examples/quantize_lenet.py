"""Trains LeNet-5 in two bits a weight, with the step of each grid trained as well.

    python examples/quantize_lenet.py
    python examples/quantize_lenet.py --mnist .assets/mnist-full --epochs 4 --tuned 3

A float32 network is trained, its kernels, first and last ones too, are put into `LSQ` leaves, and
the same loop goes on: a leaf is dense for the optimizer and of two bits for the loss. Then
`finalize` stores the codes. The model is saved, loaded, and tested from its file, where its logits
are those of the trained one, bit for bit. A second model has inputs of two bits too, but the
images, which keep eight.

The data are 5,000 images of MNIST (4,000 for training), or with `--mnist FOLDER` the full set.

References:
  Esser et al., *Learned Step Size Quantization*, 2020.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from _lenet5 import init, network
from _mnist import Digits, load
from assets import AssetError
from rich.console import Console
from rich.table import Table

import jaxcompress as jc
from jaxcompress.quantization import LSQ, LSQInput

BATCH = 100
WEIGHTS: dict[str, Any] = {"**/kernel": LSQ("int2")}
INPUTS: dict[str, Any] = {
    "first/kernel": jc.chain(LSQ("int2"), LSQInput("uint8")),
    "**/kernel": jc.chain(LSQ("int2"), LSQInput("uint2")),
}


def train(params: Any, digits: Digits, epochs: int, rate: float, seed: int) -> Any:
    """Trains dense or compressed params with Adam and a cosine schedule."""
    apply = jc.compressed(network)
    trained, fixed = jc.partition(params)
    steps = len(digits.train_labels) // BATCH
    tx = optax.adam(optax.cosine_decay_schedule(rate, epochs * steps))

    def loss(trained: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = apply(jc.combine(trained, fixed), images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(trained: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        grads = jax.grad(loss)(trained, images, labels)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state

    state, rng = tx.init(trained), np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(digits.train_labels))
        for where in order[: steps * BATCH].reshape(steps, BATCH):
            batch = digits.train_images[where], digits.train_labels[where]
            trained, state = step(trained, state, *batch)
    return jc.combine(trained, fixed)


def quantized(params: Any, rules: Any, digits: Digits) -> Any:
    """Params in trainable leaves; the steps of inputs start from those of some images."""
    stats = jc.observe(network, params, [(digits.train_images[:500],)], ("abs_mean",))
    return jc.compress(params, rules, stats=stats)


_run = jax.jit(jc.compressed(network))


def logits(params: Any, digits: Digits) -> np.ndarray:
    """Those of the test images."""
    parts = np.split(digits.test_images, 10)
    return np.concatenate([np.asarray(_run(params, images)) for images in parts])


def stage(name: str, params: Any, digits: Digits, folder: Path) -> dict[str, Any]:
    """Stores a model, loads it, and compares it with what was trained."""
    file = folder / f"{name.replace(' ', '-')}.safetensors"
    jc.save(file, jc.finalize(params))
    stored = logits(jc.load(file), digits)
    return {
        "model": name,
        "accuracy": 100 * float(np.mean(np.argmax(stored, axis=-1) == digits.test_labels)),
        "largest_difference": float(np.max(np.abs(stored - logits(params, digits)))),
        "file_bytes": file.stat().st_size,
    }


def compare(
    digits: Digits, folder: Path, *, epochs: int, tuned: int, seed: int
) -> list[dict[str, Any]]:
    """Trains and stores the models; a row for each."""
    folder.mkdir(parents=True, exist_ok=True)
    params = train(init(seed), digits, epochs, 1e-3, seed)
    rows = [stage("float32", params, digits, folder)]
    for name, rules in {"2 bits": WEIGHTS, "2 bits, inputs too": INPUTS}.items():
        small = train(quantized(params, rules, digits), digits, tuned, 5e-4, seed)
        rows.append(stage(name, small, digits, folder))
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The table."""
    table = Table(title="LeNet-5")
    for name in ("model", "accuracy", "stored - trained", "on disk", "ratio"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['accuracy']:.2f}%",
            f"{row['largest_difference']:.1e}",
            f"{row['file_bytes']:,}",
            f"{rows[0]['file_bytes'] / row['file_bytes']:.1f}x",
        )
    console.print(table)


def main() -> None:
    """Trains and stores, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="the IDX files of MNIST")
    parser.add_argument("--epochs", type=int, default=8, help="in float32")
    parser.add_argument("--tuned", type=int, default=5, help="epochs in two bits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/quantize_lenet"))
    args = parser.parse_args()
    try:
        digits = load(args.mnist)
    except AssetError as error:
        raise SystemExit(str(error)) from None
    rows = compare(digits, args.out, epochs=args.epochs, tuned=args.tuned, seed=args.seed)
    show(rows, Console())
    Console().print(f"models in {args.out}")


if __name__ == "__main__":
    main()
