"""Shares the weights of LeNet-300-100 softly: a mixture of Gaussians is trained with them.

    python examples/soft_sharing.py
    python examples/soft_sharing.py --mnist .assets/mnist-full --strength 0.005

The dense model is trained first. Then the loss gets a term, the negative log-likelihood of all
weights of the kernels under a mixture of 16 Gaussians and one pinned at zero, and both are trained
together; weights gather around the means, and nearly all of them around zero. Components that have
become alike are merged, each weight becomes the mean of its component, and the few values that are
left are trained. The file holds where weights are not zero, and which of these values they have.

The data are 5,000 images of MNIST, or with `--mnist FOLDER` the full set from its IDX files.

References:
  Nowlan and Hinton, *Simplifying Neural Networks by Soft Weight-Sharing*, 1992; Ullrich, Meeds and
  Welling, *Soft Weight-Sharing for Neural Network Compression*, 2017.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _mnist import Digits, load
from lenet import BATCH, accuracy, dense, network, show, stage, train
from rich.console import Console

import jaxcompress as jc
from jaxcompress.sharing.mixture import Mixture, init_mixture, merge
from jaxcompress.sharing.soft import share_by_mixture, sharing_gap, soft_sharing

KERNELS = ("*/kernel",)
# Gamma priors of the precisions: both pull to a standard deviation of 0.02, that of zero harder.
ZERO, OTHERS = (5e3, 2.0), (2.5e2, 0.1)


def optimizer() -> optax.GradientTransformation:
    """Adam with a rate for the weights, one for the means, and one for shares and scales."""
    rates = {"weights": 1e-3, "means": 1e-3, "slow": 3e-3}

    def labels(both: Any) -> Any:
        weights = jax.tree.map(lambda _: "weights", both[1])
        return Mixture("slow", "means", "slow", both[0].pi_zero), weights

    return optax.multi_transform({n: optax.adam(r) for n, r in rates.items()}, labels)


def share(params: Any, digits: Digits, epochs: int, strength: float, pi_zero: float) -> Any:
    """Weights and mixture, trained together."""
    images, labels = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels)
    mixture = init_mixture([layer["kernel"] for layer in params.values()], 16, pi_zero=pi_zero)

    def loss(both: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = network(both[1], images)
        task = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        cost = soft_sharing(*both, KERNELS, zero=ZERO, others=OTHERS)
        return task + strength * cost / len(digits.train_labels)

    tx = optimizer()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def epoch(both: Any, state: Any, order: jax.Array) -> Any:
        def step(carry: Any, where: jax.Array) -> Any:
            both, state = carry
            grads = jax.grad(loss)(both, images[where], labels[where])
            updates, state = tx.update(grads, state, both)
            return (optax.apply_updates(both, updates), state), None

        return jax.lax.scan(step, (both, state), order)[0]

    both = jax.tree.map(jnp.copy, (mixture, params))
    state, rng, steps = tx.init(both), np.random.default_rng(0), len(labels) // BATCH
    for _ in range(epochs):
        order = rng.permutation(len(labels))[: steps * BATCH].reshape(steps, BATCH)
        both, state = epoch(both, state, jnp.asarray(order))
    return both


def main() -> None:
    """Trains, shares, stores and tells."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mnist", type=Path, help="a folder with the four IDX files")
    parser.add_argument("--dense-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--tuned-epochs", type=int, default=5)
    parser.add_argument("--strength", type=float, default=0.03, help="of the complexity loss")
    parser.add_argument("--pi-zero", type=float, default=0.98, help="the share of zeros")
    parser.add_argument("--threshold", type=float, default=1.0, help="a divergence to merge at")
    parser.add_argument("--out", type=Path, default=Path("out/soft_sharing"))
    args = parser.parse_args()
    console, digits = Console(), load(args.mnist)
    args.out.mkdir(parents=True, exist_ok=True)

    before = dense(digits, args.dense_epochs, 0)[-1].params
    mixture, after = share(before, digits, args.epochs, args.strength, args.pi_zero)
    merged = merge(mixture, args.threshold)
    small = share_by_mixture(after, merged, KERNELS)
    tuned = list(train(small, optax.adam(1e-3), digits, args.tuned_epochs, 0))[-1].params
    stages = {"dense": before, "soft": after, "shared": small, "tuned": tuned}
    rows = [stage(name, tree, digits, args.out) for name, tree in stages.items()]
    file = args.out / "coded.safetensors"
    jc.save(file, tuned, coded=True)
    rows.append({**rows[-1], "stage": "coded", "file_bytes": file.stat().st_size})
    rows[-1]["accuracy"] = accuracy(jc.load(file), digits)
    show(rows, console)
    console.print(f"{mixture} -> {merged}: {np.round(np.asarray(merged.means), 3).tolist()}")
    for path, gap in sharing_gap(after, small).items():
        console.print(f"{path}: stored values are {gap['rms']:.4f} from the trained ones (rms)")


if __name__ == "__main__":
    main()
