"""Finds winning tickets of LeNet-300-100 and trains them against tickets with other weights.

    python examples/lottery.py
    python examples/lottery.py --mnist .assets/mnist-full --rounds 12 --sparsity 0.99

Iterative magnitude pruning with weights rewound: each round trains, removes the same share of the
weights that are left, and puts the others back to where they began. The masks that come out are
trained twice: with the weights that they were found with (the winning ticket), and with weights
that are drawn anew. The sparser they are, the more the first ones are ahead: they learn faster and
reach a higher accuracy.

Each round is kept in `out/lottery`: a run that was stopped goes on where it was.

References:
  Frankle and Carbin, *The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks*,
  2019.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _mnist import Digits, load
from assets import AssetError
from lenet import BATCH, accuracy, init, network
from rich.console import Console
from rich.table import Table

from jaxcompress.drivers import PrunedRound, lottery_ticket
from jaxcompress.pruning.masks import apply_masks, count_kept

KERNELS = {"*/kernel": "unstructured"}
Training = Callable[[Any, Any, int], tuple[Any, list[float]]]


def trainer(digits: Digits, epochs: int, rate: float) -> Training:
    """A function of params, masks and a seed: trained params, and the accuracy after each epoch.

    One compiled epoch serves every training, since masks are arguments.
    """
    images, labels = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels)
    tx = optax.adam(rate)

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = network(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def epoch(params: Any, state: Any, masks: Any, order: jax.Array) -> Any:
        def step(carry: Any, where: jax.Array) -> Any:
            params, state = carry
            grads = jax.grad(loss)(params, images[where], labels[where])
            updates, state = tx.update(grads, state, params)
            return (apply_masks(optax.apply_updates(params, updates), masks), state), None

        return jax.lax.scan(step, (params, state), order)[0]

    def train(params: Any, masks: Any, seed: int) -> tuple[Any, list[float]]:
        params = apply_masks(jax.tree.map(jnp.copy, params), masks)
        state, rng, found = tx.init(params), np.random.default_rng(seed), []
        steps = len(labels) // BATCH
        for _ in range(epochs):
            order = rng.permutation(len(labels))[: steps * BATCH].reshape(steps, BATCH)
            params, state = epoch(params, state, masks, jnp.asarray(order))
            found.append(accuracy(params, digits))
        return params, found

    return train


def measure(found: PrunedRound, train: Training, seed: int) -> dict[str, Any]:
    """A round's ticket, with its own weights and with others."""
    _, winner = train(found.start, found.masks, seed)
    _, random = train(init(seed + 1000), found.masks, seed)
    return {
        "round": found.number,
        "left": count_kept(found.masks),
        "sparsity": found.sparsity,
        "winner": winner[-1],
        "winner_first_epoch": winner[0],
        "random": random[-1],
        "random_first_epoch": random[0],
    }


def compare(
    digits: Digits, folder: Path, *, sparsity: float, rounds: int, epochs: int, rate: float,
    seed: int, progress: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Finds the tickets, or reads them, and trains each twice; returns the rows of the table."""
    train = trainer(digits, epochs, rate)
    found = lottery_ticket(
        lambda params, masks, round: train(params, masks, seed)[0],
        init(seed), sparsity=sparsity, rounds=rounds, rules=KERNELS, allocation="erk",
        folder=folder / f"{epochs}-epochs-{rounds}-rounds-{sparsity:g}-seed-{seed}",
        progress=progress,
    )  # fmt: skip
    return [measure(ticket, train, seed) for ticket in found]


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The table, round by round."""
    table = Table(title="Accuracy of tickets of LeNet-300-100: after training (after one epoch)")
    for name in ("weights left", "its own weights", "drawn anew"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row['left']:,} ({100 * (1 - row['sparsity']):.1f}%)",
            f"{row['winner']:.2f}% ({row['winner_first_epoch']:.1f}%)",
            f"{row['random']:.2f}% ({row['random_first_epoch']:.1f}%)",
        )
    console.print(table)


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="the IDX files of MNIST")
    parser.add_argument("--sparsity", type=float, default=0.98)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=8, help="of each training")
    parser.add_argument("--rate", type=float, default=1.2e-3, help="Adam's, as in the paper")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/lottery"))
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there as well")
    args = parser.parse_args()
    try:
        digits = load(args.mnist)
    except AssetError as error:
        raise SystemExit(str(error)) from None
    console = Console()
    start = time.perf_counter()
    rows = compare(
        digits, args.out / ("mnist" if args.mnist else "mnist-5k"), sparsity=args.sparsity,
        rounds=args.rounds, epochs=args.epochs, rate=args.rate, seed=args.seed, progress=True,
    )  # fmt: skip
    show(rows, console)
    console.print(f"{time.perf_counter() - start:.0f} s; rounds in {args.out}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
