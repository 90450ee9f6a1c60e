"""How ResNet-8 is trained, tested and shown, whatever its weights look like."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _mnist import Digits, load
from assets import AssetError, fetch
from rich.console import Console
from rich.table import Table

import jaxcompress as jc

BATCH = 100


def cosine(data: Digits, epochs: int, rate: float) -> optax.Schedule:
    """Up in a quarter of an epoch, and down to zero along a cosine."""
    steps = len(data.train_labels) // BATCH
    return optax.warmup_cosine_decay_schedule(0.0, rate, steps // 4, max(epochs, 1) * steps)


def train(
    apply: Callable[..., Any],
    variables: Any,
    tx: optax.GradientTransformation,
    state: Any,
    data: Digits,
    epochs: int,
    *,
    teacher: np.ndarray | None = None,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Trains variables, dense, factored or smaller ones.

    Args:
      apply: the model in training, of variables and images: logits and new batch statistics.
      variables: with `params` and `batch_stats`; they stay as they are.
      tx: the optimizer.
      state: of the optimizer; None: a new one.
      data: the images.
      epochs: how often it sees them.
      teacher: logits of the training images, which are learned as well.
      seed: of the order of the images.

    Returns:
      The variables and the state of the optimizer.
    """
    trained, fixed = jc.partition(variables["params"])

    def loss(trained: Any, stats: Any, images: Any, labels: Any, logits: Any) -> Any:
        now = {"params": jc.combine(trained, fixed), "batch_stats": stats}
        found, new = apply(now, images)
        value = optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()
        if logits is not None:
            value += jc.distillation.soft_targets(found, logits, temperature=4.0).mean()
        return value, new["batch_stats"]

    def step(trained: Any, stats: Any, state: Any, *batch: Any) -> Any:
        grads, stats = jax.grad(loss, has_aux=True)(trained, stats, *batch)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), stats, state

    run = jax.jit(step, donate_argnums=(0, 1, 2))
    state = tx.init(trained) if state is None else state
    now = jax.tree.map(jnp.copy, (trained, variables["batch_stats"], state))
    rng, steps = np.random.default_rng(seed), len(data.train_labels) // BATCH
    for _ in range(epochs):
        order = rng.permutation(len(data.train_labels))
        for where in order[: steps * BATCH].reshape(steps, BATCH):
            logits = None if teacher is None else teacher[where]
            now = run(*now, data.train_images[where], data.train_labels[where], logits)
    trained, stats, state = now
    return {"params": jc.combine(trained, fixed), "batch_stats": stats}, state


def predict(forward: Callable[..., Any], variables: Any, images: np.ndarray) -> np.ndarray:
    """The logits of images, by a jitted forward pass."""
    parts = np.split(images, range(1000, len(images), 1000))
    return np.concatenate([np.asarray(forward(variables, part)) for part in parts])


def accuracy(forward: Callable[..., Any], variables: Any, data: Digits) -> float:
    """The share of the test images that are told apart correctly, in percent."""
    found = np.argmax(predict(forward, variables, data.test_images), axis=-1)
    return 100 * float(np.mean(found == data.test_labels))


def parser(text: str, widths: tuple[int, ...], tuned: int, out: str) -> argparse.ArgumentParser:
    """The options that its examples share, with their defaults."""
    made = argparse.ArgumentParser(description=text.splitlines()[0])
    made.add_argument("--data", type=Path, metavar="FOLDER", help="IDX files, as those of MNIST")
    made.add_argument("--epochs", type=int, default=4, help="of the dense model")
    made.add_argument("--tuned", type=int, default=tuned, help="epochs of what it becomes")
    made.add_argument("--widths", type=int, nargs=3, default=widths, help="channels")
    made.add_argument("--out", type=Path, default=Path(out))
    return made


def pictures(args: argparse.Namespace) -> Digits:
    """Fashion-MNIST, or the files of a folder."""
    try:
        return load(args.data or fetch("fashion-mnist"))
    except AssetError as error:
        raise SystemExit(str(error)) from None


def show(rows: list[dict[str, Any]], key: str, counted: str, console: Console) -> None:
    """The table of models, with what is counted under a key; in brackets the share of the first."""
    table = Table(title="ResNet-8 on Fashion-MNIST")
    for name in ("model", "accuracy", counted, "on disk"):
        table.add_column(name, justify="left" if name == "model" else "right")
    first = rows[0]
    for row in rows:
        table.add_row(
            row["model"],
            f"{row['accuracy']:.2f}%",
            f"{row[key] / 1e6:.2f} M ({row[key] / first[key]:.2f})",
            f"{row['file_bytes']:,} ({row['file_bytes'] / first['file_bytes']:.2f})",
        )
    console.print(table)
