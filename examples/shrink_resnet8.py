"""Removes channels from a trained ResNet-8: it is smaller and faster, and trained on.

    python examples/shrink_resnet8.py
    python examples/shrink_resnet8.py --keep 0.3 --score magnitude --no-teacher
    python examples/shrink_resnet8.py --quick

A ResNet-8 of 32, 64 and 128 channels is trained on Fashion-MNIST. Its channels are scored by a
gradient, and those of least score are removed until a given share of the multiplications is left:
in all kernels, norms and batch statistics that hold them, and in the moments of the optimizer. The
loop that trained the model goes on with what is left; the model as it was is the teacher. Channels
are kept in multiples of 16, for XLA:CPU's convolutions take as long for 8 channels as for 16.

References:
  Molchanov et al., *Importance Estimation for Neural Network Pruning*, 2019 (the score); Hinton,
  Vinyals and Dean, *Distilling the Knowledge in a Neural Network*, 2015 (the teacher).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import _resnet8_training as training
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _mnist import Digits
from _resnet8 import ResNet8
from rich.console import Console

import jaxcompress as jc
from jaxcompress import pruning

WIDTHS, KEEP, ROUND_TO = (32, 64, 128), 0.4, 16
RATE, TUNING_RATE = 4e-3, 2e-3
SCORED = 20  # batches that the score sees


class Thin(NamedTuple):
    """A model with fewer channels.

    Attributes:
      plan: which channels stay.
      variables: what stays of the params and the batch statistics.
      state: what stays of the optimizer's state.
    """

    plan: pruning.Plan
    variables: Any
    state: Any


def optimizer(data: Digits, epochs: int, tuned: int) -> optax.GradientTransformation:
    """One Adam for both trainings; its rate rises again when channels were removed."""
    parts = [training.cosine(data, epochs, RATE), training.cosine(data, tuned, TUNING_RATE)]
    steps = epochs * (len(data.train_labels) // training.BATCH)
    return optax.adam(optax.join_schedules(parts, [steps]))


def in_training(model: ResNet8) -> Callable[..., Any]:
    """The model as it is trained: logits and new batch statistics."""
    return functools.partial(model.apply, train=True, mutable=["batch_stats"])


def scores(model: ResNet8, variables: Any, data: Digits, score: str) -> Any:
    """Of the params; batch statistics have none."""
    if score == "magnitude":
        return {"params": pruning.scores.magnitude(variables["params"])}
    stats = variables["batch_stats"]

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = model.apply({"params": params, "batch_stats": stats}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    parts = np.arange(SCORED * training.BATCH).reshape(SCORED, -1) % len(data.train_labels)
    batches = [(data.train_images[i], data.train_labels[i]) for i in parts]
    return {"params": pruning.scores.taylor(loss, variables["params"], batches)}


def remove(
    model: ResNet8,
    variables: Any,
    state: Any,
    data: Digits,
    keep: float,
    score: str = "taylor",
    round_to: int = ROUND_TO,
) -> Thin:
    """Removes channels until a share of the multiplications is left."""
    groups = pruning.groups(model.apply, variables, data.train_images[:1])
    plan = pruning.plan(
        groups,
        scores(model, variables, data, score),
        keep,
        budget="multiplications",
        round_to=round_to,
    )
    return Thin(
        plan,
        pruning.shrink_params(variables, plan),
        pruning.shrink_state(state, variables["params"], plan.under("params")),
    )


def multiplications(model: ResNet8, variables: Any, plan: pruning.Plan | None = None) -> int:
    """How many one image takes."""
    apply = model.apply if plan is None else pruning.shrunk(model.apply, plan)
    return pruning.groups(apply, variables, jnp.zeros((1, 784))).multiplications()


def seconds(runs: dict[str, Callable[[], Any]], rounds: int = 21) -> dict[str, float]:
    """Median times, all in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())  # compiles
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(each)) for name, each in times.items()}


def save(file: Path, thin: Thin) -> None:
    """Writes the smaller leaves, with the plan beside them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    jc.save(file, thin.variables, plan=thin.plan)


def restore(file: Path, model: ResNet8) -> tuple[Callable[..., Any], Any, pruning.Plan]:
    """The forward pass of a file, from the model's code, which knows of no removal."""
    plan = jc.read_plan(file)
    return jax.jit(pruning.shrunk(model.apply, plan)), jc.load(file), plan


def row(
    name: str, forward: Callable[..., Any], variables: Any, data: Digits, count: int, file: Path
) -> dict[str, Any]:
    """What is reported of a model."""
    found = {"model": name, "accuracy": training.accuracy(forward, variables, data)}
    return found | {"multiplications": count, "file_bytes": file.stat().st_size}


def compare(
    model: ResNet8,
    data: Digits,
    folder: Path,
    *,
    epochs: int,
    tuned: int,
    keep: float = KEEP,
    score: str = "taylor",
    round_to: int = ROUND_TO,
    taught: bool = True,
    seeds: tuple[int, ...] = (0,),
) -> tuple[list[dict[str, Any]], Any]:
    """A row each for the dense model, for what is removed, and for it trained with each seed.

    Returns:
      The rows, and the dense variables.
    """
    tx, forward = optimizer(data, epochs, tuned), jax.jit(model.apply)
    start = model.init(jax.random.key(0), jnp.zeros((1, 784)))
    dense, state = training.train(in_training(model), start, tx, None, data, epochs)
    files = [folder / f"{name}.safetensors" for name in ("dense", "removed", "tuned")]
    folder.mkdir(parents=True, exist_ok=True)
    jc.save(files[0], dense)
    rows = [row("dense", forward, dense, data, multiplications(model, dense), files[0])]

    thin = remove(model, dense, state, data, keep, score, round_to)
    save(files[1], thin)
    small, variables, _ = restore(files[1], model)
    count = multiplications(model, variables, thin.plan)
    rows.append(row("channels removed", small, variables, data, count, files[1]))

    teacher = training.predict(forward, dense, data.train_images) if taught else None
    apply = pruning.shrunk(in_training(model), thin.plan)
    for seed in seeds:
        variables, state = training.train(
            apply, thin.variables, tx, thin.state, data, tuned, teacher=teacher, seed=seed + 1
        )
        save(files[2], Thin(thin.plan, variables, state))
        _, back, _ = restore(files[2], model)
        rows.append(row("removed and trained", small, back, data, count, files[2]))
    return rows, dense


def main() -> None:
    """Trains, removes, trains what is left, loads it, and prints what it costs."""
    parser = training.parser(__doc__, WIDTHS, 3, "out/shrink_resnet8")
    parser.add_argument("--keep", type=float, default=KEEP, help="share of the multiplications")
    parser.add_argument("--round-to", type=int, default=ROUND_TO, help="multiples of channels")
    parser.add_argument("--score", choices=("taylor", "magnitude"), default="taylor")
    parser.add_argument("--no-teacher", action="store_true", help="learn from the labels alone")
    parser.add_argument("--quick", action="store_true", help="one epoch each, of 5,000 images")
    args = parser.parse_args()
    data = training.pictures(args)
    model, console = ResNet8(tuple(args.widths)), Console()
    names = ("epochs", "tuned", "keep", "score", "round_to")
    given = {name: getattr(args, name) for name in names}
    if args.quick:
        data = data._replace(
            train_images=data.train_images[:5000], train_labels=data.train_labels[:5000]
        )
        given |= {"epochs": 1, "tuned": 1}
    rows, dense = compare(model, data, args.out, taught=not args.no_teacher, **given)
    training.show(rows, "multiplications", "multiplications", console)

    small, variables, plan = restore(args.out / "tuned.safetensors", model)
    forward, images = jax.jit(model.apply), data.test_images[:32]
    found = seconds(
        {"dense": lambda: forward(dense, images), "small": lambda: small(variables, images)}
    )
    console.print(
        f"{plan!r}; a forward pass of 32 images takes {1e3 * found['dense']:.1f} ms dense and "
        f"{1e3 * found['small']:.1f} ms as loaded, {found['dense'] / found['small']:.2f} times "
        "faster"
    )


if __name__ == "__main__":
    main()
