"""A small student of a larger teacher on MNIST and Fashion-MNIST, by each family of losses.

    python benchmarks/student_losses.py [--quick] [--data NAME ...] [--only LOSS ...] [--json PATH]

Three seeds each; test accuracy in percent, mean and spread. Each loss is added to the cross entropy
with one weight for both data sets; parts that learn (regressors, estimators, embeddings) are
trained with the student. The memory of CRD, the paraphraser of factor transfer and the triples of
the RKD angle take longer than all others together. The teacher is trained once, with batch norm,
dropout and pictures that are moved (and those of clothes mirrored), and kept in a folder; it runs
once over the training images as they are, which is what all students see, and its outputs are
looked up. Then the student with a hundredth of the labels: alone, and with soft targets for the
same images or for all images.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import jaxcompress as jc
from jaxcompress import distillation as d

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _mnist import Digits, load
from assets import AssetError, fetch

from common import Row, row  # isort: skip

EPOCHS = {"fashion-mnist": 10, "mnist-full": 4}
SEEDS, BATCH, TEACHER_EPOCHS, FEW = (0, 1, 2), 200, 8, 600
STUDENT, TEACHER = (16, 32), (32, 64)
KEPT = Path("out/student-losses")  # the teachers
LAYERS = ("before0", "before1")  # what is tapped: the last of each size, before its rectifier


class Student(nn.Module):
    """Convolutions at 14 and 7 pixels, and two dense layers."""

    widths: tuple[int, ...] = STUDENT

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images.reshape(-1, 28, 28, 1)
        for n, width in enumerate(self.widths):
            init = nn.initializers.he_normal()
            conv = nn.Conv(width, (3, 3), strides=2, kernel_init=init, name=f"before{n}")
            x = nn.relu(conv(x))
        x = nn.relu(nn.Dense(128, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(10, name="head")(x)


class Teacher(nn.Module):
    """Two convolutions of each size with batch norm, and two dense layers."""

    widths: tuple[int, ...] = TEACHER

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = images.reshape(-1, 28, 28, 1)
        init = nn.initializers.he_normal()
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), use_bias=False, kernel_init=init)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        for n, width in enumerate(self.widths):
            x = nn.relu(norm()(conv(width)(x)))
            x = nn.relu(norm(name=f"before{n}")(conv(width, strides=2)(x)))
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        return nn.Dense(10)(nn.Dropout(0.3, deterministic=not train)(x))


class Seen(NamedTuple):
    """What a loss has to look at, of a student or a teacher.

    Attributes:
      logits: `[batch, 10]`.
      before: features at 14 and at 7 pixels, before their rectifiers.
    """

    logits: jax.Array
    before: tuple[jax.Array, ...]

    @property
    def maps(self) -> tuple[jax.Array, ...]:
        """Behind the rectifiers."""
        return tuple(map(nn.relu, self.before))

    @property
    def pooled(self) -> jax.Array:
        """One vector for each image."""
        return self.maps[1].mean(axis=(1, 2))


def see(model: nn.Module, params: Any, images: jax.Array) -> Seen:
    """Logits and features, tapped."""
    logits, found = d.tap(model.apply, LAYERS)(params, images)
    return Seen(logits, tuple(found[name] for name in LAYERS))


class Given(NamedTuple):
    """What else a loss may need: the labels and the places of the images in the data."""

    labels: jax.Array
    where: jax.Array
    key: jax.Array
    margin: jax.Array


# A loss: `init(key)` of what it learns and what it remembers, and
# `loss(learned, memory, student, teacher, given) -> values, memory`.
class Family(NamedTuple):
    weight: float
    loss: Callable[..., Any]
    init: Callable[[jax.Array], tuple[Any, Any]] = lambda key: ((), ())
    features: bool = True  # whether the teacher's are looked at


def on(part: str | Callable[[Seen], Any], weight: float, fn: Callable[..., jax.Array]) -> Family:
    """A loss without anything to learn, on one part of what is seen."""
    get = part if callable(part) else lambda seen: getattr(seen, part)

    def loss(learned: Any, memory: Any, student: Seen, teacher: Seen, given: Given) -> Any:
        return fn(get(student), get(teacher)), memory

    return Family(weight, loss, features=part != "logits")


def regressed(weight: float, fn: Callable[..., jax.Array], more: Any = None) -> Family:
    """A loss on the last features, the student's by a regressor."""

    def init(key: jax.Array) -> tuple[Any, Any]:
        learned = {"regressor": d.regressor_init(key, STUDENT[1], TEACHER[1])}
        return (learned | ({"more": more()} if more else {})), ()

    def loss(learned: Any, memory: Any, student: Seen, teacher: Seen, given: Given) -> Any:
        found = d.regressor(learned["regressor"], student.before[1])
        return fn(learned.get("more"), found, teacher, given), memory

    return Family(weight, loss, init)


def _factor() -> Family:
    def init(key: jax.Array) -> tuple[Any, Any]:
        keys = jax.random.split(key)
        paraphraser = d.paraphraser_init(keys[0], TEACHER[1], 32)
        return {
            "paraphraser": paraphraser, "translator": d.translator_init(keys[1], STUDENT[1], 32)
        }, ()  # fmt: skip

    def loss(learned: Any, memory: Any, student: Seen, teacher: Seen, given: Given) -> Any:
        # The paraphraser learns from its own loss alone: the factor has no gradient to it.
        factor = d.paraphrase(learned["paraphraser"], teacher.maps[1])
        own = d.paraphraser_loss(learned["paraphraser"], teacher.maps[1])
        found = d.translate(learned["translator"], student.maps[1])
        return d.factor_transfer(found, factor) + own, memory

    return Family(1.0, loss, init)


def _fsp() -> Family:
    def init(key: jax.Array) -> tuple[Any, Any]:
        pairs = zip(jax.random.split(key), STUDENT, TEACHER, strict=True)
        return [d.regressor_init(k, a, b) for k, a, b in pairs], ()

    def loss(learned: Any, memory: Any, student: Seen, teacher: Seen, given: Given) -> Any:
        # Of one size, as the matrices need: the first features to the positions of the second.
        small = lambda maps: (d.resize(maps[0], maps[1].shape[1:3]), maps[1])
        wide = tuple(d.regressor(p, x) for p, x in zip(learned, student.maps, strict=True))
        return d.fsp(small(wide), small(teacher.maps)), memory

    return Family(0.1, loss, init)


def _crd(negatives: int = 1024) -> Family:
    def init(key: jax.Array) -> tuple[Any, Any]:
        return d.crd_init(key, STUDENT[1], TEACHER[1], examples=60_000, dim=64)

    def loss(learned: Any, memory: Any, student: Seen, teacher: Seen, given: Given) -> Any:
        drawn = d.crd_negatives(given.key, given.where, negatives, 60_000)
        return d.crd(learned, memory, student.pooled, teacher.pooled, given.where, drawn)

    return Family(0.1, loss, init)


T = 4.0
FAMILIES: dict[str, Family] = {
    "alone": on("logits", 0.0, lambda s, t: jnp.zeros(len(s))),
    "soft targets": on("logits", 1.0, functools.partial(d.soft_targets, temperature=T)),
    "logit regression": on("logits", 0.2, functools.partial(d.logit_regression, centered=True)),
    "reverse KL": on("logits", T**2, functools.partial(d.reverse_kl, temperature=T)),
    "Jensen-Shannon": on("logits", 4 * T**2, functools.partial(d.jensen_shannon, temperature=T)),
    "skewed KL": on("logits", T**2, functools.partial(d.skewed_kl, temperature=T)),
    "DKD": Family(
        1.0,
        lambda learned, memory, s, t, given: (
            d.dkd(s.logits, t.logits, given.labels, temperature=T, beta=4.0), memory,
        ),
    ),
    "DIST": on("logits", 2.0, functools.partial(d.dist, temperature=T)),
    "hint (FitNets)": regressed(
        0.1, lambda more, found, t, given: d.hint(nn.relu(found), t.maps[1])
    ),
    "attention transfer": on(
        "maps", 100.0,
        lambda s, t: sum(d.attention_transfer(a, b, squared=True) for a, b in zip(s, t)),
    ),
    "FSP": _fsp(),
    "factor transfer": _factor(),
    "VID": regressed(
        0.1,
        lambda more, found, t, given: d.vid(more, nn.relu(found), t.maps[1]),
        lambda: d.vid_init(TEACHER[1]),
    ),
    "activation boundaries": regressed(
        0.1, lambda more, found, t, given: d.activation_boundaries(found, t.before[1])
    ),
    "overhaul": regressed(
        0.1, lambda more, found, t, given: d.overhaul(found, t.before[1], given.margin)
    ),
    "similarity preserving": on("pooled", 100.0, d.similarity_preserving),
    "RKD distance": on("pooled", 1.0, d.rkd_distance),
    "RKD angle": on("pooled", 2.0, d.rkd_angle),
    "correlation congruence": on("pooled", 1.0, d.correlation_congruence),
    "PKT": on("pooled", 10.0, d.pkt),
    "CRD": _crd(),
}  # fmt: skip


class Data(NamedTuple):
    """Images, labels, and what the teacher gives for the training images."""

    digits: Digits
    teacher: Seen
    margin: jax.Array
    teacher_accuracy: float


def schedule(rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps))


def accuracy(model: nn.Module, params: Any, digits: Digits) -> float:
    """Of the test images, in percent."""
    run = _applied(model)
    found = [np.argmax(run(params, x), -1) for x in np.split(digits.test_images, 10)]
    return 100 * float(np.mean(np.concatenate(found) == digits.test_labels))


@functools.cache
def _applied(model: nn.Module) -> Any:
    return jax.jit(model.apply)


def moved(images: np.ndarray, rng: np.random.Generator, mirrored: bool) -> np.ndarray:
    """Pictures moved by up to two pixels, half of them mirrored if they may be."""
    wide = np.pad(images.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    corners = rng.integers(0, 5, (len(images), 2))
    out = np.stack([x[a : a + 28, b : b + 28] for x, (a, b) in zip(wide, corners, strict=True)])
    if mirrored:
        turned = rng.random(len(out)) < 0.5
        out[turned] = out[turned, :, ::-1]
    return out.reshape(-1, 784)


def trained_teacher(digits: Digits, epochs: int, mirrored: bool) -> Any:
    """The variables of a teacher that has seen all labels."""
    model, key = Teacher(), jax.random.key(100)
    variables = model.init(key, jnp.zeros((1, 784)))
    steps = len(digits.train_labels) // BATCH
    tx = schedule(2e-3, epochs * steps)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables: Any, state: Any, images: jax.Array, labels: jax.Array, key: Any) -> Any:
        stats = variables["batch_stats"]

        def loss(params: Any) -> Any:
            logits, new = model.apply(
                {"params": params, "batch_stats": stats}, images, train=True,
                mutable=["batch_stats"], rngs={"dropout": key},
            )  # fmt: skip
            entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return entropy.mean(), new

        params = variables["params"]
        grads, new = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return {"params": optax.apply_updates(params, updates), **new}, state

    state, rng = tx.init(variables["params"]), np.random.default_rng(100)
    for i in range(epochs):
        for j, where in enumerate(rng.permutation(steps * BATCH).reshape(steps, BATCH)):
            own = jax.random.fold_in(key, i * steps + j)
            images = moved(digits.train_images[where], rng, mirrored)
            variables, state = step(variables, state, images, digits.train_labels[where], own)
    return variables


def taught(name: str, folder: Path, epochs: int) -> Data:
    """A teacher, trained on all labels or taken from its file, and what it gives."""
    digits, model = load(folder), Teacher()
    file = KEPT / f"{name}-{epochs}.safetensors"
    if not file.is_file():
        KEPT.mkdir(parents=True, exist_ok=True)
        jc.save(file, trained_teacher(digits, epochs, mirrored=name == "fashion-mnist"))
    variables = jc.load(file)
    looked = jax.jit(functools.partial(see, model))
    parts = [looked(variables, x) for x in np.split(digits.train_images, 50)]
    # Features in half the bytes: they are targets, and 8 bits of mantissa are more than they need.
    half = lambda seen: Seen(seen.logits, tuple(x.astype(jnp.bfloat16) for x in seen.before))
    seen = jax.tree.map(lambda *x: np.concatenate(x), *map(jax.device_get, map(half, parts)))
    margin = d.measured_margin(parts[0].before[1])
    return Data(digits, seen, margin, accuracy(model, variables, digits))


@functools.cache
def _stepper(name: str, steps: int) -> tuple[Any, Any]:
    """The optimizer and the jitted step of a family; seeds and data share it."""
    family, model, tx = FAMILIES[name], Student(), schedule(4e-3, steps)

    @functools.partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(
        trained: Any, state: Any, memory: Any, images: Any, teacher: Seen, given: Given, hard: Any
    ) -> Any:
        def loss(trained: Any) -> Any:
            student = see(model, trained["student"], images)
            entropy = optax.softmax_cross_entropy_with_integer_labels(student.logits, given.labels)
            values, new = family.loss(trained["learned"], memory, student, teacher, given)
            return jnp.mean(hard * entropy + family.weight * values), new

        grads, memory_ = jax.grad(loss, has_aux=True)(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, memory_

    return tx, step


def student(
    name: str, data: Data, seed: int, epochs: int, images: Any = None, labelled: Any = None
) -> float:
    """Trains a student by one loss on some images; its test accuracy.

    Args:
      name: of the family.
      data: what is learned.
      seed: of the student, its learned parts, and the order.
      epochs: as many steps as these are over all images.
      images: which training images are used; None: all.
      labelled: which have labels; None: all.
    """
    digits, model = data.digits, Student()
    steps = epochs * (len(digits.train_labels) // BATCH)
    images = np.arange(len(digits.train_labels)) if images is None else images
    tx, step = _stepper(name, steps)
    keys = jax.random.split(jax.random.key(seed), 3)
    learned, memory = FAMILIES[name].init(keys[0])
    trained = {"student": model.init(keys[1], jnp.zeros((1, 784))), "learned": learned}
    state, rng, hard = tx.init(trained), np.random.default_rng(seed), np.ones(BATCH, np.float32)
    per_epoch = len(images) // BATCH
    for i in range(steps):
        if i % per_epoch == 0:
            order = rng.permutation(images)
        where = order[i % per_epoch * BATCH :][:BATCH]
        if labelled is not None:
            hard = np.isin(where, labelled).astype(np.float32)
        given = Given(
            digits.train_labels[where], where, jax.random.fold_in(keys[2], i), data.margin
        )
        before = data.teacher.before if FAMILIES[name].features else ()
        teacher = Seen(data.teacher.logits[where], tuple(x[where] for x in before))
        trained, state, memory = step(
            trained, state, memory, digits.train_images[where], teacher, given, hard
        )
    return accuracy(model, trained["student"], digits)


def few_labels(data: Data, seeds: Any, epochs: int) -> dict[str, list[float]]:
    """Accuracy with 600 labels: alone, soft targets for the same images, and for all images."""
    found: dict[str, list[float]] = {"alone": [], "soft, 600 images": [], "soft, all images": []}
    for seed in seeds:
        some = np.random.default_rng(1000 + seed).choice(60_000, FEW, replace=False)
        few = functools.partial(student, data=data, seed=seed, epochs=epochs, labelled=some)
        found["alone"].append(few("alone", images=some))
        found["soft, 600 images"].append(few("soft targets", images=some))
        found["soft, all images"].append(few("soft targets"))
    return found


def _cell(runs: list[float]) -> str:
    return f"{mean(runs):.2f}" + (f" ± {stdev(runs):.2f}" if len(runs) > 1 else "")


def table(found: dict[str, dict[str, list[float]]], title: str) -> Table:
    """Mean and spread for each data set."""
    out = Table(title=title)
    for name in ("loss", *found):
        out.add_column(name)
    for name in dict.fromkeys(name for by in found.values() for name in by):
        out.add_row(name, *(_cell(by[name]) if name in by else "" for by in found.values()))
    return out


def better(runs: dict[str, list[float]]) -> list[str]:
    """The losses above the student alone by more than the spread: the larger of both."""
    alone = runs["alone"]
    spread = lambda name: max(stdev(runs[name]), stdev(alone)) if len(alone) > 1 else 0.0
    return [name for name in runs if mean(runs[name]) - mean(alone) > spread(name)]


def measure(
    epochs: dict[str, int], only: Any, seeds: Any, teacher: int, console: Console, out: Any
) -> dict[str, Any]:
    """Accuracies by data set and loss; written after each, as it takes long, and not run twice."""
    found: dict[str, Any] = json.loads(out.read_text()) if out is not None and out.exists() else {}
    for name, long in epochs.items():
        data = taught(name, fetch(name), teacher)
        console.print(f"{name}: teacher {data.teacher_accuracy:.2f}")
        by = found.setdefault(name, {"teacher": data.teacher_accuracy, "all": {}})["all"]
        for loss in only or FAMILIES:
            if loss in by:
                continue
            by[loss] = [student(loss, data, seed, long) for seed in seeds]
            console.print(f"{name}: {loss} {_cell(by[loss])}")
            if out is not None:
                out.write_text(json.dumps(found, indent=1) + "\n")
        if "few" not in found[name]:
            found[name]["few"] = few_labels(data, seeds, max(1, long // 4))
        if out is not None:
            out.write_text(json.dumps(found, indent=1) + "\n")
    return found


def run(quick: bool = False) -> list[Row]:
    """The rows with a target, on Fashion-MNIST."""
    only = ("alone", "soft targets", "DKD", "DIST", "logit regression", "Jensen-Shannon")
    name = "fashion-mnist"
    seeds, epochs, teacher = (SEEDS[:1], 1, 1) if quick else (SEEDS, EPOCHS[name], TEACHER_EPOCHS)
    try:
        found = measure({name: epochs}, only, seeds, teacher, Console(stderr=True), None)[name]
    except AssetError as error:
        print(f"student_losses is left out: {error}")
        return []
    few = {name: mean(runs) for name, runs in found["few"].items()}
    count, gain = len(better(found["all"])), few["soft, all images"] - few["alone"]
    return [
        row("losses wanted above the student alone by more than the spread", 5, "found", count,
            at_least=1, unit=""),
        row("points wanted of soft targets with 1% of the labels", 2, "gained", gain, at_least=1,
            unit="points"),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch")
    parser.add_argument("--data", nargs="*", choices=list(EPOCHS), default=list(EPOCHS))
    parser.add_argument("--only", nargs="*", help="names of losses")
    parser.add_argument("--json", type=Path, help="goes on with what is there")
    args = parser.parse_args()
    console = Console()
    seeds, teacher = (SEEDS[:1], 1) if args.quick else (SEEDS, TEACHER_EPOCHS)
    epochs = {name: 1 if args.quick else EPOCHS[name] for name in args.data}
    found = measure(epochs, args.only, seeds, teacher, console, args.json)
    console.print(table({k: v["all"] for k, v in found.items()}, "all labels"))
    console.print(table({k: v["few"] for k, v in found.items()}, "with 600 labels"))


if __name__ == "__main__":
    main()
