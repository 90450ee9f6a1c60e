"""Trains a student without any image: its data are made from the teacher's batch norms.

    python examples/data_free.py
    python examples/data_free.py --mnist .assets/fashion-mnist

A small convolutional teacher is trained on digits, or on Fashion-MNIST. Then the images are put
away. DeepInversion descends from noise to images that the teacher classifies as it is told, and of
which its batch norms see the means and variances that they have stored. A student with a quarter of
the weights learns from the teacher on these images alone, and is tested on real ones; beside it,
the same student with noise in the place of the images.

References:
  Yin et al., *Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion*, 2020.
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _mnist import Digits, load
from assets import AssetError
from rich.console import Console

from jaxcompress.distillation import (
    batch_norm_loss,
    inversion,
    jitter,
    soft_targets,
    stored_moments,
    total_variation,
    with_norm_moments,
)

BATCH = 100


class Net(nn.Module):
    """Three convolutions with batch norms; it knows nothing of distillation."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = images.reshape(-1, 28, 28, 1)
        for n, width in enumerate(self.widths):
            x = nn.Conv(width, (3, 3), strides=2, use_bias=False, name=f"conv{n}")(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"norm{n}")(x)
            x = nn.relu(x)
        return nn.Dense(10, name="head")(x.reshape(len(x), -1))


TEACHER, STUDENT = Net((16, 32, 64)), Net((8, 16, 32))


def fit(model: Net, images: Any, targets: Any, loss: Any, steps: int, seed: int) -> Any:
    """Adam on batches of images, moved by up to two pixels, and targets."""
    images = jnp.asarray(images).reshape(-1, 28, 28, 1)
    targets = jnp.asarray(targets)
    variables = model.init(jax.random.key(seed), images[:1])
    tx = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    @jax.jit
    def step(params: Any, stats: Any, state: Any, key: jax.Array) -> Any:
        rows = jax.random.randint(key, (BATCH,), 0, len(images))

        def of(params: Any) -> Any:
            tree, some = {"params": params, "batch_stats": stats}, jitter(key, images[rows], 2)
            logits, new = model.apply(tree, some, train=True, mutable=["batch_stats"])
            return loss(logits, targets[rows]).mean(), new["batch_stats"]

        grads, new = jax.grad(of, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), new, state

    params, stats = variables["params"], variables["batch_stats"]
    state = tx.init(params)
    # A loop of Python's: XLA:CPU takes gradients of convolutions ten times slower in a scan.
    for key in jax.random.split(jax.random.key(seed + 1), steps):
        params, stats, state = step(params, stats, state, key)
    return {"params": params, "batch_stats": stats}


def dream(teacher: Any, count: int, steps: int, seed: int) -> jax.Array:
    """Images of all classes alike, from the teacher's weights and batch norms."""
    stored, run = stored_moments(teacher["batch_stats"]), with_norm_moments(TEACHER.apply)
    labels = jnp.arange(BATCH) % 10

    def loss(images: jax.Array, key: jax.Array) -> jax.Array:
        logits, seen = run(teacher, jitter(key, images, 2))
        told = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        prior = 1e-3 * total_variation(images, power=2).mean() + 1e-3 * jnp.mean(images**2)
        return told + batch_norm_loss(seen, stored) + prior

    descent = inversion(loss, optax.adam(0.05), low=0.0, high=1.0)
    step, found = jax.jit(descent.step), []
    for key in jax.random.split(jax.random.key(seed), -(-count // BATCH)):
        begin, *keys = jax.random.split(key, steps + 1)
        state = descent.init(jax.random.normal(begin, (BATCH, 28, 28, 1)))
        for key in keys:
            state, _ = step(state, key)
        found.append(state.inputs)
    return jax.block_until_ready(jnp.concatenate(found))


def accuracy(model: Net, variables: Any, digits: Digits) -> float:
    """On the test images, in percent."""
    found = jnp.argmax(jax.jit(model.apply)(variables, digits.test_images), -1)
    return 100 * float(np.mean(np.asarray(found) == digits.test_labels))


def compare(
    digits: Digits, console: Console, count: int, steps: int, seed: int
) -> dict[str, float]:
    """Teacher, data-free student, and the student of noise; their accuracies."""
    start = time.perf_counter()
    say = lambda text: console.print(f"{time.perf_counter() - start:5.0f} s  {text}")
    hard = optax.softmax_cross_entropy_with_integer_labels
    soft = functools.partial(soft_targets, temperature=4.0)
    teacher = fit(TEACHER, digits.train_images, digits.train_labels.astype(int), hard, 1500, seed)
    found = {"teacher": accuracy(TEACHER, teacher, digits)}
    say(f"teacher, on real images: {found['teacher']:.2f}%")
    images = dream(teacher, count, steps, seed)
    say(f"{len(images)} images from the teacher's batch norms")
    noise = jax.random.uniform(jax.random.key(seed), images.shape)
    for name, data in (("data-free", images), ("noise", noise)):
        targets = jax.jit(TEACHER.apply)(teacher, data)
        found[name] = accuracy(STUDENT, fit(STUDENT, data, targets, soft, 2000, seed), digits)
        say(f"student, {name}: {found[name]:.2f}%")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="IDX files of (Fashion-)MNIST")
    parser.add_argument("--images", type=int, default=1000, help="how many are made")
    parser.add_argument("--steps", type=int, default=400, help="of the descent to each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        digits = load(args.mnist)
    except AssetError as error:
        raise SystemExit(str(error)) from None
    compare(digits, Console(), args.images, args.steps, args.seed)


if __name__ == "__main__":
    main()
