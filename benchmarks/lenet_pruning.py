"""LeNet-300-100 on the full MNIST at 90, 95 and 98% sparsity: every way to train or to prune it.

    python benchmarks/lenet_pruning.py [--quick] [--only rigl snip ...] [--json PATH]

Three seeds each; test accuracy in percent, mean and spread. `train`: sparse while it trains, from
scratch, with `sparsify`. `init`: masks by a score of the untrained network, then training with
them. `prune`: masks by a score of the trained network, then half as many epochs with them. All with
AdamW, a warm-up and a cosine, and the same rates for all methods of a kind.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import jaxcompress as jc
from jaxcompress import pruning

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import lenet
from _mnist import Digits, load
from assets import AssetError, fetch

from common import Row, row  # isort: skip

SPARSITIES, SEEDS, EPOCHS = (0.9, 0.95, 0.98), (0, 1, 2), 20
RULES = lenet.KERNELS
scores = pruning.scores


# Learning rate and weight decay of each kind, of a few that were tried.
RATES = {"dense": (4e-3, 0.1), "train": (8e-3, 0.2), "init": (6e-3, 0.05), "prune": (2e-3, 0.1)}


def adamw(steps: int, kind: str) -> optax.GradientTransformation:
    """AdamW; sparse networks need the warm-up and the short memory of squared gradients."""
    rate, decay = RATES[kind]
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
    return optax.adamw(schedule, b2=0.99, weight_decay=decay)


def loss(params: Any, images: jax.Array, labels: jax.Array, temperature: float = 1.0) -> jax.Array:
    """Mean cross-entropy, for the scores."""
    logits = lenet.network(params, images) / temperature
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def gradual(s: float, steps: int) -> pruning.Schedule:
    return pruning.cubic_schedule(s, begin=steps // 20, end=2 * steps // 3, every=steps // 100)


def steady(s: float, steps: int) -> pruning.Schedule:
    return pruning.periodic(s, every=100, end=3 * steps // 4)


def cyclic(s: float, steps: int) -> pruning.Schedule:
    return pruning.cyclic_schedule(
        s, sparse=steps // 16, dense=steps // 16, begin=steps // 8, end=5 * steps // 8
    )


Training = tuple[Callable[[int], pruning.Algorithm], Callable[[float, int], pruning.Schedule]]
TRAINING: dict[str, Training] = {
    "gradual magnitude": (lambda n: pruning.magnitude(allocation="erk"), gradual),
    "gradual magnitude, global": (lambda n: pruning.magnitude(scope="global"), gradual),
    "gradual magnitude, LAMP": (lambda n: pruning.magnitude(allocation="lamp"), gradual),
    "AC/DC": (lambda n: pruning.magnitude(scope="global"), cyclic),
    "movement": (lambda n: pruning.movement(allocation="erk"), gradual),
    "taylor": (lambda n: pruning.taylor(scope="global"), gradual),
    "straight-through": (lambda n: pruning.straight_through(scope="global"), gradual),
    "Top-KAST": (
        lambda n: pruning.top_kast(backward=0.8, l2=1e-4, allocation="erk"),
        steady,
    ),
    "SET": (lambda n: pruning.set_(end=3 * n // 4), steady),
    "RigL": (lambda n: pruning.rigl(end=3 * n // 4), steady),
    "GSE": (lambda n: pruning.gse(end=3 * n // 4), steady),
    "SNFS": (lambda n: pruning.snfs(end=3 * n // 4, allocation="erk"), steady),
    "DSR": (lambda n: pruning.dsr(end=3 * n // 4, allocation="erk", threshold=1e-2), steady),
    "DeepR": (
        lambda n: pruning.deep_r(1e-3, l1=1e-3),
        lambda s, n: pruning.periodic(s, every=25, end=3 * n // 4),
    ),
}


def _synflow(params: Any, s: float, batches: Any, key: Any) -> Any:
    found = scores.synflow(
        lenet.network, params, jnp.ones((1, 784)), sparsity=s, rules=RULES, rounds=100
    )
    return found.masks


def _force(params: Any, s: float, batches: Any, key: Any) -> Any:
    return scores.force(loss, params, batches, sparsity=s, rules=RULES, rounds=20).masks


def _by(score: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """Masks by a score of params, batches and a key."""

    def masks(params: Any, s: float, batches: Any, key: Any) -> Any:
        return pruning.make_masks(score(params, batches, key), s, RULES, **how)

    return masks


WIDE = {"scope": "global"}
AT_INIT: dict[str, Callable[..., Any]] = {
    "SNIP": _by(lambda p, b, k: scores.snip(loss, p, b), **WIDE),
    "GraSP": _by(lambda p, b, k: scores.grasp(loss, p, b, temperature=200.0), **WIDE),
    "SynFlow": _synflow,
    "FORCE": _force,
    "magnitude": _by(lambda p, b, k: scores.magnitude(p), allocation="erk"),
    "random": _by(lambda p, b, k: scores.random(p, k), allocation="erk"),
}
TRAINED: dict[str, Callable[..., Any]] = {
    "magnitude": _by(lambda p, b, k: scores.magnitude(p), **WIDE),
    "LAMP": _by(lambda p, b, k: scores.magnitude(p), allocation="lamp"),
    "random": _by(lambda p, b, k: scores.random(p, k), allocation="erk"),
    "Taylor": _by(lambda p, b, k: scores.taylor(loss, p, b), **WIDE),
    "Fisher": _by(lambda p, b, k: scores.fisher(loss, p, b[:4]), **WIDE),
    "OBD": _by(lambda p, b, k: scores.obd(loss, p, b, key=k), **WIDE),
    "Wanda": _by(
        lambda p, b, k: scores.wanda(lenet.network, p, [x for x, _ in b]), allocation="erk"
    ),
}


class Bench:
    """Runs and remembers."""

    def __init__(self, digits: Digits, epochs: int):
        self.digits, self.epochs = digits, epochs
        self.steps = epochs * (len(digits.train_labels) // lenet.BATCH)
        self.trained: dict[int, Any] = {}

    def run(self, params: Any, tx: Any, epochs: int, seed: int) -> Any:
        """The end of a training."""
        return [*lenet.train(params, tx, self.digits, epochs, seed)][-1]

    def dense(self, seed: int) -> float:
        """Accuracy without pruning."""
        if seed not in self.trained:
            tx = adamw(self.steps, "dense")
            self.trained[seed] = self.run(lenet.init(seed), tx, self.epochs, seed)
        return self.trained[seed].accuracy

    def training(self, name: str, s: float, seed: int) -> float:
        """Accuracy of a network that is sparse while it trains."""
        algorithm, schedule = TRAINING[name]
        inner = adamw(self.steps, "train")
        n = self.steps
        tx = jc.sparsify(inner, algorithm(n), schedule(s, n), RULES)
        return self.checked(self.run(lenet.init(seed), tx, self.epochs, seed), s)

    def masked(self, masks: Any, params: Any, s: float, epochs: int, kind: str, seed: int) -> float:
        """Accuracy after training with masks."""
        steps = epochs * (len(self.digits.train_labels) // lenet.BATCH)
        inner = adamw(steps, kind)
        tx = jc.sparsify(inner, pruning.static(masks), pruning.one_shot(s), RULES)
        return self.checked(self.run(pruning.apply_masks(params, masks), tx, epochs, seed), s)

    def batches(self, seed: int, n: int = 10) -> list[Any]:
        """Some labelled images, 128 at a time."""
        order = np.random.default_rng(seed).permutation(len(self.digits.train_labels))
        parts = order[: n * 128].reshape(n, 128)
        return [(self.digits.train_images[i], self.digits.train_labels[i]) for i in parts]

    def at_init(self, name: str, s: float, seed: int) -> float:
        """Accuracy of a network that was pruned before it was trained."""
        params = lenet.init(seed)
        masks = AT_INIT[name](params, s, self.batches(seed), jax.random.key(seed))
        return self.masked(masks, params, s, self.epochs, "init", seed)

    def after(self, name: str, s: float, seed: int) -> float:
        """Accuracy of a trained network that was pruned, and trained again."""
        self.dense(seed)
        params = self.trained[seed].params
        masks = TRAINED[name](params, s, self.batches(seed), jax.random.key(seed))
        return self.masked(masks, params, s, max(1, self.epochs // 2), "prune", seed)

    @staticmethod
    def checked(end: Any, s: float) -> float:
        """The accuracy, once the sparsity is what it should be: 266,200 weights, 3 leaves."""
        kernels = {name: layer["kernel"] for name, layer in end.params.items()}
        kept = pruning.sparsity_report(kernels).kept
        assert abs(kept - 266_200 * (1 - s)) <= 300, kept
        return end.accuracy


KINDS = {"train": TRAINING, "init": AT_INIT, "prune": TRAINED}


def measure(
    bench: Bench, seeds: Any, sparsities: Any, only: Any, console: Console, out: Path | None
) -> list[Any]:
    """A dict for each kind, method and sparsity."""
    functions = {"train": bench.training, "init": bench.at_init, "prune": bench.after}
    rows = [{"kind": "dense", "name": "dense", "sparsity": 0.0, "runs": [*map(bench.dense, seeds)]}]
    for kind, names in KINDS.items():
        for name in names:
            if only and f"{kind} {name}" not in only and name not in only:
                continue
            for s in sparsities:
                runs = [functions[kind](name, s, seed) for seed in seeds]
                rows.append({"kind": kind, "name": name, "sparsity": s, "runs": runs})
                console.print(f"{kind} {name} {s:.0%}: {mean(runs):.2f}")
                if out is not None:  # it takes long: what is done is kept
                    out.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def table(rows: list[Any]) -> Table:
    """Mean and spread."""
    out = Table(title="LeNet-300-100, test accuracy in %")
    for name in ("", "method", *(f"{s:.0%}" for s in SPARSITIES)):
        out.add_column(name)
    cells: dict[Any, dict[float, str]] = {}
    for r in rows:
        spread = f" ± {stdev(r['runs']):.2f}" if len(r["runs"]) > 1 else ""
        cells.setdefault((r["kind"], r["name"]), {})[r["sparsity"]] = (
            f"{mean(r['runs']):.2f}{spread}"
        )
    for (kind, name), by in cells.items():
        out.add_row(kind, name, *(by.get(s, by.get(0.0, "")) for s in SPARSITIES))
    return out


def run(quick: bool = False) -> list[Row]:
    """The rows with a target: errors in percent against that of the dense network."""
    try:
        digits = load(fetch("mnist-full"))
    except AssetError as error:
        print(f"lenet_pruning is left out: {error}")
        return []
    bench = Bench(digits, 2 if quick else EPOCHS)
    seeds = SEEDS[:1] if quick else SEEDS
    dense = 100 - mean(map(bench.dense, seeds))
    out = []
    for name, fn, s, allowed in (
        ("RigL", bench.training, 0.9, 0.3),
        ("gradual magnitude", bench.training, 0.9, 0.3),
        ("SNIP", bench.at_init, 0.95, 0.5),
    ):
        error = 100 - mean(fn(name, s, seed) for seed in seeds)
        what, peer = f"test error, {name} at {s:.0%}", f"dense + {allowed} points"
        out.append(row(what, error, peer, dense + allowed, at_most=1, unit="%"))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs")
    parser.add_argument("--only", nargs="*", help="names of methods")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = Console()
    # Seeds share their programs.
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
    bench = Bench(load(fetch("mnist-full")), 2 if args.quick else EPOCHS)
    seeds = SEEDS[:1] if args.quick else SEEDS
    console.print(table(measure(bench, seeds, SPARSITIES, args.only, console, args.json)))


if __name__ == "__main__":
    main()
