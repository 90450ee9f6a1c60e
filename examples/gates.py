"""Trains LeNet-300-100 behind gates that learn which weights are not needed, and stores the rest.

    python examples/gates.py
    python examples/gates.py --mnist .assets/mnist-full --epochs 60

Four models on the network of `lenet.py`, each finalized, saved, loaded again and tested from its
file: sparse variational dropout and hard concrete gates on single weights, a group horseshoe on
whole neurons, and learned soft thresholds. One training step serves them all: `sample` draws the
noise of a step from a key, and `gate_penalty` is the price.

References:
  Molchanov, Ashukha and Vetrov, *Variational Dropout Sparsifies Deep Neural Networks*, 2017;
  Louizos, Welling and Kingma, *Learning Sparse Neural Networks through L0 Regularization*, 2018;
  Louizos, Ullrich and Welling, *Bayesian Compression for Deep Learning*, 2017; Kusupati et al.,
  *Soft Threshold Weight Reparameterization for Learnable Sparsity*, 2020.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _mnist import Digits, load
from assets import AssetError
from lenet import BATCH, accuracy, init, network
from rich.console import Console
from rich.table import Table

import jaxcompress as jc
from jaxcompress.pruning import gates


class Method(NamedTuple):
    """A gate, the factor of its price beside a summed loss, and its learning rate and decay."""

    spec: jc.Spec
    price: float
    rate: float
    decay: float = 0.0


# A divergence has the factor 1 in the evidence bound. With few images that costs accuracy, and
# factors below 1 (a tempered posterior) trade some of the sparsity for it.
METHODS = {
    "variational dropout": Method(gates.VariationalDropout(-8.0), 0.5, 1e-2),
    "hard concrete": Method(gates.L0HardConcrete(keep=0.7), 0.1, 2e-2),
    "group horseshoe": Method(gates.Horseshoe("channel"), 0.1, 4e-2),
    "soft threshold": Method(gates.SoftThreshold(1e-3), 0.0, 8e-3, 0.6),
}


def optimizer(method: Method, trained: Any, steps: int) -> optax.GradientTransformation:
    """AdamW, with a rate of their own for gates: they move further than weights do."""

    def label(path: Any, _: Any) -> str:
        return "weight" if getattr(path[-1], "name", "weight") == "weight" else "gate"

    rates = {"weight": 2e-3, "gate": method.rate}
    return optax.multi_transform(
        {
            name: optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=method.decay)
            for name, rate in rates.items()
        },
        jax.tree_util.tree_map_with_path(label, trained),
    )


def train(method: Method, digits: Digits, epochs: int, seed: int) -> Any:
    """Trains with noise drawn anew at each step; the price grows over the first half."""
    params = jc.compress(init(seed), {"*/kernel": method.spec})
    trained, fixed = jc.partition(params)
    apply = jc.compressed(network)
    images, labels = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels)
    count, steps = len(labels), len(labels) // BATCH
    tx = optimizer(method, trained, epochs * steps)

    def loss(trained: Any, key: jax.Array, where: jax.Array, warm: jax.Array) -> jax.Array:
        params = jc.combine(trained, fixed)
        logits = apply(gates.sample(params, key), images[where])
        fit = optax.softmax_cross_entropy_with_integer_labels(logits, labels[where]).mean()
        return fit + warm * method.price / count * gates.gate_penalty(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def epoch(trained: Any, state: Any, order: jax.Array, key: jax.Array, warm: jax.Array) -> Any:
        def step(carry: Any, now: Any) -> Any:
            trained, state = carry
            where, key = now
            grads = jax.grad(loss)(trained, key, where, warm)
            updates, state = tx.update(grads, state, trained)
            return (optax.apply_updates(trained, updates), state), None

        return jax.lax.scan(step, (trained, state), (order, jax.random.split(key, steps)))[0]

    trained = jax.tree.map(jnp.copy, trained)  # the first epoch takes its buffers
    state, rng = tx.init(trained), np.random.default_rng(seed)
    for n in range(epochs):
        order = rng.permutation(count)[: steps * BATCH].reshape(steps, BATCH)
        warm = jnp.float32(min(1.0, 2 * n / epochs))
        key = jax.random.key(seed * 1_000_003 + n)
        trained, state = epoch(trained, state, jnp.asarray(order), key, warm)
    return jc.combine(trained, fixed)


def stage(name: str, params: Any, digits: Digits, folder: Path) -> dict[str, Any]:
    """What `finalize` changes, and what is left once it is saved and loaded again."""
    report = gates.gate_report(params)
    file = folder / f"{name.replace(' ', '-')}.safetensors"
    jc.save(file, jc.finalize(params))
    return {
        "gates": name,
        "before": accuracy(params, digits),
        "after": accuracy(jc.load(file), digits),
        "gap": max(row["relative"] for row in report.rows),
        "kept": report.kept,
        "size": report.size,
        "bytes": file.stat().st_size,
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The table, gate by gate."""
    table = Table(title="LeNet-300-100 behind gates")
    for name in ("gates", "trained", "finalized", "gap", "kept", "on disk"):
        table.add_column(name, justify="left" if name == "gates" else "right")
    for row in rows:
        table.add_row(
            row["gates"],
            f"{row['before']:.2f}%",
            f"{row['after']:.2f}%",
            f"{row['gap']:.1e}",
            f"{row['kept']:,} ({100 * row['kept'] / row['size']:.1f}%)",
            f"{row['bytes']:,}",
        )
    console.print(table)


def main() -> None:
    """Trains and stores all, or one, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="the IDX files of MNIST")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--only", choices=METHODS, help="one of the gates")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/gates"))
    args = parser.parse_args()
    try:
        digits = load(args.mnist)
    except AssetError as error:
        raise SystemExit(str(error)) from None
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in [args.only] if args.only else METHODS:
        params = train(METHODS[name], digits, args.epochs, args.seed)
        rows.append(stage(name, params, digits, args.out))
    show(rows, Console())
    Console().print(f"models in {args.out}")


if __name__ == "__main__":
    main()
