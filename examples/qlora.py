"""Fine-tunes a network of three bits by a low-rank change beside its codes: QLoRA.

    python examples/qlora.py
    python examples/qlora.py --format nf4 --rank 8

LeNet-5 learns upright digits and is quantized. Then the digits are turned by a quarter, on which it
fails, and only adapters of low rank are trained: the codes stay, bit for bit, so that one file of
codes serves both tasks, with a small file of adapters for the new one. `LoftQ` starts from what the
codes lost, `LoRA` from zero. At the end the change is taken into the weights and rounded again,
which shows what that loses.

The data are 5,000 images of MNIST (4,000 for training).

References:
  Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2022; Dettmers et al., *QLoRA:
  Efficient Finetuning of Quantized LLMs*, 2023; Li et al., *LoftQ*, 2024.
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
from jaxcompress.decomposition.adapters import merge, merge_gaps, partition_adapters
from jaxcompress.decomposition.lora import LoRA
from jaxcompress.decomposition.residual_spec import LoftQ

BATCH = 100
KERNELS = "**/kernel"
_run = jax.jit(jc.compressed(network))


def train(trained: Any, fixed: Any, digits: Digits, epochs: int, rate: float, seed: int) -> Any:
    """Trains one part of the params with Adam and a cosine schedule; the other stays."""
    apply = jc.compressed(network)
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


def turned(digits: Digits) -> Digits:
    """The same digits, turned by a quarter."""

    def turn(images: np.ndarray) -> np.ndarray:
        square = np.rot90(images.reshape(-1, 28, 28), axes=(1, 2))
        return np.ascontiguousarray(square).reshape(len(images), -1)

    return digits._replace(
        train_images=turn(digits.train_images), test_images=turn(digits.test_images)
    )


def accuracy(params: Any, digits: Digits) -> float:
    """Percent of the test images."""
    parts = np.split(digits.test_images, 10)
    found = np.concatenate([np.argmax(_run(params, images), axis=-1) for images in parts])
    return 100 * float(np.mean(found == digits.test_labels))


def row(name: str, params: Any, tasks: tuple[Digits, Digits], folder: Path) -> dict[str, Any]:
    """Stores a model, loads it, and tests it on both tasks."""
    file = folder / f"{name.replace(' ', '-').replace(',', '')}.safetensors"
    jc.save(file, jc.finalize(params))
    stored = jc.load(file)
    upright, turn = (accuracy(stored, digits) for digits in tasks)
    return {"model": name, "upright": upright, "turned": turn, "file_bytes": file.stat().st_size}


def compare(
    digits: Digits, folder: Path, *, quantize: jc.Quantize, rank: int, epochs: int, tuned: int
) -> list[dict[str, Any]]:
    """Trains, quantizes and adapts; a row for each model."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks, key = (digits, turned(digits)), jax.random.key(0)
    dense = train(*jc.partition(init(0)), digits, epochs, 1e-3, 0)
    small = jc.compress(dense, {KERNELS: quantize})
    rows = [row("float32", dense, tasks, folder), row("codes", small, tasks, folder)]
    starts = {
        "codes, LoRA": jc.compress(small, {KERNELS: LoRA(rank)}, key=key),
        "codes, LoftQ": jc.compress(dense, {KERNELS: LoftQ(rank, quantize)}),
    }
    for name, start in starts.items():
        adapters, fixed = partition_adapters(start)
        params = train(adapters, fixed, tasks[1], tuned, 3e-3, 0)
        rows.append(row(name, params, tasks, folder))
        rows[-1]["trained"] = sum(x.size for x in jax.tree.leaves(adapters))
        rounded = merge(params, quantize)
        rows.append(row(f"{name}, merged", rounded, tasks, folder))
        rows[-1]["lost"] = max(gap.change for gap in merge_gaps(params, rounded).values())
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The table."""
    table = Table(title="LeNet-5 on digits, and turned by a quarter")
    for name in ("model", "upright", "turned", "trained values", "lost of the change", "on disk"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['upright']:.1f}%",
            f"{row['turned']:.1f}%",
            f"{row['trained']:,}" if "trained" in row else "",
            f"{row['lost']:.0%}" if "lost" in row else "",
            f"{row['file_bytes']:,}",
        )
    console.print(table)


def main() -> None:
    """Trains and stores, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", default="int3", help="of the codes")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=3, help="in float32")
    parser.add_argument("--tuned", type=int, default=3, help="epochs of the adapters")
    parser.add_argument("--out", type=Path, default=Path("out/qlora"))
    args = parser.parse_args()
    try:
        digits = load()
    except AssetError as error:
        raise SystemExit(str(error)) from None
    rows = compare(
        digits,
        args.out,
        quantize=jc.Quantize(args.format, group_size=64),
        rank=args.rank,
        epochs=args.epochs,
        tuned=args.tuned,
    )
    show(rows, Console())
    Console().print(f"models in {args.out}")


if __name__ == "__main__":
    main()
