"""Trains LeNet-300-100 sparsely from scratch, shares its weights, and stores it small.

    python examples/lenet.py
    python examples/lenet.py --mnist .assets/mnist-full --sparsity 0.97

Three models, each saved, loaded again and tested from its file:

- dense, trained with AdamW;
- sparse, trained from scratch with `jc.sparsify` around AdamW: the masks tighten along a cubic
  schedule inside one jitted step;
- the sparse one with a codebook for the values of each kernel, whose centroids are then trained.

The data are 5,000 images of MNIST (4,000 for training), or with `--mnist FOLDER` the full set from
its IDX files (`make data` fetches them). The models and a figure go to `out/lenet`.

References:
  LeCun et al., *Gradient-Based Learning Applied to Document Recognition*, 1998; Zhu and Gupta, *To
  Prune, or Not to Prune*, 2017; Han, Mao and Dally, *Deep Compression*, 2016.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _mnist import Digits, load
from assets import AssetError
from rich.console import Console
from rich.table import Table

import jaxcompress as jc

KERNELS = {"*/kernel": "unstructured"}
BATCH = 100


def init(seed: int) -> Any:
    """784-300-100-10, with He's initialization."""
    sizes = {"first": (784, 300), "second": (300, 100), "head": (100, 10)}
    keys = jax.random.split(jax.random.key(seed), len(sizes))
    return {
        name: {
            "kernel": jax.random.normal(key, size) * (2 / size[0]) ** 0.5,
            "bias": jnp.zeros(size[1]),
        }
        for key, (name, size) in zip(keys, sizes.items())
    }


def network(params: Any, images: jax.Array) -> jax.Array:
    """Logits; an ordinary function of ordinary params, which knows nothing of compression."""
    x = images
    for name in ("first", "second"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def adamw(steps: int, rate: float, decay: float) -> optax.GradientTransformation:
    """AdamW with a cosine schedule."""
    return optax.adamw(optax.cosine_decay_schedule(rate, steps), weight_decay=decay)


class Progress(NamedTuple):
    """Where training is after an epoch."""

    step: int
    accuracy: float
    sparsity: float
    params: Any


def train(
    params: Any,
    tx: optax.GradientTransformation,
    digits: Digits,
    epochs: int,
    seed: int,
    pick: Callable[[Any, Any], float] = lambda params, state: 0.0,
) -> Iterator[Progress]:
    """Trains dense or compressed params; yields after each epoch.

    An epoch is one scan over its steps. Only what can be trained is given to the optimizer.
    """
    trained, fixed = jc.partition(params)
    apply = jc.compressed(network)
    images, labels = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels)

    def loss(trained: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = apply(jc.combine(trained, fixed), images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def epoch(trained: Any, state: Any, order: jax.Array) -> Any:
        def step(carry: Any, where: jax.Array) -> Any:
            trained, state = carry
            grads = jax.grad(loss)(trained, images[where], labels[where])
            updates, state = tx.update(grads, state, trained)
            return (optax.apply_updates(trained, updates), state), None

        return jax.lax.scan(step, (trained, state), order)[0]

    trained = jax.tree.map(jnp.copy, trained)  # the first epoch takes its buffers
    state, rng = tx.init(trained), np.random.default_rng(seed)
    steps = len(labels) // BATCH
    for n in range(epochs):
        order = rng.permutation(len(labels))[: steps * BATCH].reshape(steps, BATCH)
        trained, state = epoch(trained, state, jnp.asarray(order))
        now = jc.combine(trained, fixed)
        yield Progress((n + 1) * steps, accuracy(now, digits), pick(trained, state), now)


@jax.jit
def _correct(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(jc.compressed(network)(params, images), axis=-1) == labels)


def accuracy(params: Any, digits: Digits) -> float:
    """The share of the test images that are read correctly, in percent."""
    return 100 * float(_correct(params, digits.test_images, digits.test_labels))


def dense(digits: Digits, epochs: int, seed: int) -> list[Progress]:
    """Training without pruning."""
    steps = epochs * (len(digits.train_labels) // BATCH)
    return list(train(init(seed), adamw(steps, 4e-3, 0.1), digits, epochs, seed))


def sparse(digits: Digits, epochs: int, seed: int, sparsity: float) -> list[Progress]:
    """The same with `sparsify` around the optimizer; the last third trains what is left."""
    steps = epochs * (len(digits.train_labels) // BATCH)
    schedule = jc.pruning.cubic_schedule(
        sparsity, begin=steps // 20, end=2 * steps // 3, every=max(1, steps // 100)
    )
    # One threshold for all kernels: the small last one keeps more of its weights than the first.
    # Few weights bear, and want, a higher rate and more decay than many.
    inner = adamw(steps, 8e-3, 0.2)
    tx = jc.sparsify(inner, jc.pruning.magnitude(scope="global"), schedule, KERNELS)
    share = lambda params, state: jc.pruning.sparsity_report(state).sparsity
    return list(train(init(seed), tx, digits, epochs, seed, share))


def shared(params: Any, digits: Digits, epochs: int, seed: int, bits: int) -> Any:
    """The values that are left as codebooks, whose centroids are trained."""
    small = jc.compress(params, {"*/kernel": jc.chain(jc.Prune(), jc.Codebook(bits))})
    tx = optax.adam(1e-4)
    return [*train(small, tx, digits, epochs, seed)][-1].params


def stage(name: str, params: Any, digits: Digits, folder: Path) -> dict[str, Any]:
    """Saves a model, loads it again, and measures what came back."""
    file = folder / f"{name}.safetensors"
    jc.save(file, params)
    back = jc.load(file)
    kernels = {name: layer["kernel"] for name, layer in back.items()}
    return {
        "stage": name,
        "accuracy": accuracy(back, digits),
        "nonzeros": jc.pruning.sparsity_report(kernels).kept,
        "weights": jc.pruning.sparsity_report(kernels).size,
        "memory_bytes": jc.nbytes(back),
        "file_bytes": file.stat().st_size,
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The table, stage by stage."""
    table = Table(title="LeNet-300-100")
    for name in (
        "stage",
        "accuracy",
        "non-zeros",
        "in memory",
        "on disk",
        "ratio",
    ):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for row in rows:
        table.add_row(
            row["stage"],
            f"{row['accuracy']:.2f}%",
            f"{row['nonzeros']:,} ({100 * row['nonzeros'] / row['weights']:.1f}%)",
            f"{row['memory_bytes']:,}",
            f"{row['file_bytes']:,}",
            f"{rows[0]['file_bytes'] / row['file_bytes']:.1f}x",
        )
    console.print(table)


def draw(path: Path, runs: dict[str, list[Progress]], before: Any, after: Any, final: Any) -> None:
    """Weights before and after, and accuracy and sparsity along the steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    every = lambda tree: np.concatenate([np.ravel(layer["kernel"]) for layer in tree.values()])
    edges = np.linspace(-1, 1, 101)
    left.hist(every(before), edges, label="dense", color="0.7")
    values = every(after)
    left.hist(values[values != 0], edges, label="sparse, non-zeros", color="C0")
    shared = np.unique(every(jc.decompress(final)))
    left.plot(shared, np.ones_like(shared), "|", color="C3", label="centroids")
    left.set(title="weights of the kernels", xlabel="weight", yscale="log", ylabel="count")
    left.legend(fontsize="small")
    for name, run in runs.items():
        steps = [p.step for p in run]
        middle.plot(steps, [p.accuracy for p in run], label=name)
        right.plot(steps, [100 * p.sparsity for p in run], label=name)
    middle.set(title="accuracy", xlabel="step", ylabel="%")
    right.set(title="sparsity", xlabel="step", ylabel="%")
    middle.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def compare(
    digits: Digits, folder: Path, console: Console, *, epochs: int, sparsity: float, bits: int,
    seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Trains and stores all stages; returns the rows of the table."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    runs = {"dense": dense(digits, epochs, seed)}
    console.print(f"dense trained in {time.perf_counter() - start:.1f} s")
    start = time.perf_counter()
    runs["sparse"] = sparse(digits, epochs, seed, sparsity)
    console.print(f"sparse trained in {time.perf_counter() - start:.1f} s")
    full, pruned = (runs[name][-1].params for name in ("dense", "sparse"))
    start = time.perf_counter()
    final = shared(pruned, digits, max(1, epochs // 4), seed, bits)
    console.print(f"codebook trained in {time.perf_counter() - start:.1f} s")
    rows = [
        stage("dense", full, digits, folder),
        stage("sparse", jc.compress(pruned, {"*/kernel": jc.Prune()}), digits, folder),
        stage("codebook", final, digits, folder),
    ]
    draw(folder / "lenet.png", runs, full, pruned, final)
    return rows


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, metavar="FOLDER", help="the IDX files of MNIST")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--bits", type=int, default=5, help="of an index into a codebook")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/lenet"))
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there as well")
    args = parser.parse_args()
    try:
        digits = load(args.mnist)
    except AssetError as error:
        raise SystemExit(str(error)) from None
    console = Console()
    console.print(
        f"{len(digits.train_labels):,} images to train on, {len(digits.test_labels):,} to test"
    )
    rows = compare(
        digits, args.out, console,
        epochs=args.epochs, sparsity=args.sparsity, bits=args.bits, seed=args.seed,
    )  # fmt: skip
    show(rows, console)
    console.print(f"models and figure in {args.out}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
