"""Teaches three layers of four bits to embed sentences as the six of MiniLM do.

    python examples/distil_minilm.py
    python examples/distil_minilm.py --steps 600 --out out/short

The student begins as the first and the last two layers of all-MiniLM-L6-v2, with the word table in
int4 from the start. It reads news, the Brown corpus and Wikipedia, without labels: what its last
layer gives for each token is pulled towards what the teacher's gives, and its sentence vectors
towards the teacher's. For the last steps its kernels are fake-quantized, so that what is stored is
what was trained. Every hundred steps the run is kept; begun again after a kill, it goes on from
there to the same end.

References:
  Sanh et al., *DistilBERT, a distilled version of BERT*, 2019 (the start); Jiao et al.,
  *TinyBERT: Distilling BERT for Natural Language Understanding*, 2020 (layers to layers).
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _minilm_model import MiniLM, load_params, load_tokenizer, tokenize
from _texts import Text, brown, news, wikipedia
from assets import AssetError, fetch
from rich.console import Console
from self_distillation import Test, features

import jaxcompress as jc

STUDENT = MiniLM(layers=3)
# Layers of the teacher that the student begins with: of all triples, the one whose vectors are
# nearest to the teacher's before any training (`benchmarks/distilled_minilm.py` tries them all).
LAYERS = (0, 4, 5)
SOURCES = {news: 6, brown: 5, wikipedia: 5}  # how much of each is in a batch
LENGTH, KEEP = 64, 100
STORED = {"group_size": 64, "convention": "full", "estimator": "mse"}
TABLES = {
    "embeddings/word/embedding": jc.Quantize("int4", **STORED),
    "embeddings/position/embedding": jc.Quantize("int8"),
}
KERNELS = {"encoder/**/kernel": jc.FakeQuantize("int4", range="static", **STORED)}


def student_of(params: Any, layers: tuple[int, ...] = LAYERS) -> Any:
    """Some layers of the teacher, and its tables in few bits."""
    some = jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(STUDENT.init, jax.random.key(0), some, some)["params"]
    student = jc.distillation.init_from_layers(params, shapes, layers, pattern="encoder/layer_{}")
    return jc.compress(student, TABLES)


def run_of(
    tokenizer: Any, sources: list[tuple[Text, int]], seed: int, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """The runs of words of one step: the same for the same step, whenever it is made."""
    rng = np.random.default_rng((seed, step))
    some = [texts[i] for texts, n in sources for i in rng.integers(len(texts), size=n)]
    starts = [rng.integers(max(1, len(words) - LENGTH // 2)) for words in some]
    return tokenize(tokenizer, [" ".join(w[a : a + LENGTH]) for w, a in zip(some, starts)])


def distance(student: Any, teacher: Any, mask: jax.Array) -> jax.Array:
    """Mean squared distance of real tokens in the last layer, of unit variance, and 3 (1 - cos)."""
    real = mask[..., None]
    (*_, given), (*_, wanted) = student[0], teacher[0]
    tokens = jnp.sum(real * (given - wanted) ** 2) / jnp.sum(real * wanted**2)
    cosine = jnp.sum(student[1] * teacher[1], axis=-1)
    return tokens + 3 * jnp.mean(1 - cosine)


def make_step(teacher: Any, rest: Any, tx: optax.GradientTransformation) -> Any:
    """A jitted step of the leaves that are trained."""
    run = jc.compressed(functools.partial(features, model=STUDENT))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained: Any, state: Any, tokens: Any, mask: Any) -> Any:
        target = features(teacher, tokens, mask)

        def loss(trained: Any) -> jax.Array:
            return distance(run(jc.combine(trained, rest), tokens, mask), target, mask)

        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    return step


def keep(file: Path, step: int, student: Any, state: Any) -> None:
    """Writes where the run is, beside and then in the place of what was there."""
    leaves = {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(state))}
    jc.save(file, {"step": jnp.asarray(step), "student": student, "state": leaves})


def train(params: Any, folder: Path, steps: int, rate: float, quantized: float, seed: int) -> Any:
    """Trains the student; yields the step, the loss and the student, and begins where it stopped.

    The first steps are with dense kernels, the last, a share of `quantized`, with rounded ones.
    """
    sources = [(read(), n) for read, n in SOURCES.items()]
    tokenizer = load_tokenizer(fetch("minilm"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps)
    switch, file = round(steps * (1 - quantized)), folder / "run.safetensors"
    done, student, kept = 0, student_of(params), None
    if file.exists():
        kept = jc.load(file)
        done, student = int(kept["step"]), kept["student"]

    def begin(student: Any, first: int) -> tuple[Any, ...]:
        trained, rest = jc.partition(student)
        trained = jax.tree.map(jnp.copy, trained)  # steps take over what they are given
        tx = optax.adam(lambda n: schedule(first + n), b2=0.99)
        return trained, rest, tx.init(trained), make_step(params, rest, tx)

    trained, rest, state, step = begin(student, 0 if done < switch else switch)
    if kept is not None:
        leaves = [kept["state"][str(i)] for i in range(len(kept["state"]))]
        state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    for i in range(done, steps):
        if i == switch:
            student = jc.compress(jc.combine(trained, rest), KERNELS)
            trained, rest, state, step = begin(student, switch)
        trained, state, value = step(trained, state, *run_of(tokenizer, sources, seed, i))
        if (i + 1) % KEEP == 0 or i + 1 == steps:
            student = jc.combine(trained, rest)
            keep(file, i + 1, student, state)
            yield i + 1, float(value), student


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--quantized", type=float, default=0.3, help="share of the steps")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the text")
    parser.add_argument("--out", type=Path, default=Path("out/distil-minilm"), metavar="FOLDER")
    args = parser.parse_args()
    console, start = Console(), time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)

    params = load_params(fetch("minilm"))
    test = Test(params, STUDENT)
    student = student_of(params)
    console.print(f"three layers as they are: mean cosine {test.cosine(student):.4f}")
    try:
        run = train(params, args.out, args.steps, args.rate, args.quantized, args.seed)
        for step, loss, student in run:
            console.print(
                f"step {step}: loss {loss:.4f}, cosine {test.cosine(student):.4f}, "
                f"{time.perf_counter() - start:.0f} s"
            )
    except AssetError as error:
        raise SystemExit(str(error)) from None
    file = args.out / "student.safetensors"
    jc.save(file, jc.finalize(student), coded=True)
    loaded = jc.load(file)
    same = np.array_equal(test.vectors(student), test.vectors(loaded))
    console.print(
        f"trained: mean cosine {test.cosine(loaded):.4f}, {file.stat().st_size / 1e6:.2f} MB; "
        f"the stored model gives {'the very vectors' if same else 'OTHER vectors than those'} "
        "that were trained"
    )


if __name__ == "__main__":
    main()
