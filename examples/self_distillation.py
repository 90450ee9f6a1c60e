"""Teaches a sentence encoder of four bits to be the encoder it was made of: no labels needed.

    python examples/self_distillation.py
    python examples/self_distillation.py --steps 400 --news-only --out out/minilm-int4.safetensors

The student is all-MiniLM-L6-v2 with every kernel and the word table fake-quantized to symmetric
int4 in groups of 64, on grids of least squared error that stay as they are (see `minilm.py` for
what rounding alone gives); the teacher is the float32 model. Both read text that is not the test
text, half of it news and half from the Brown corpus, which npm fetches; the student's blocks and
sentence vectors are pulled towards the teacher's. What is stored afterwards are the codes that were
trained, and they give the same vectors.

References:
  Sun et al., *Patient Knowledge Distillation for BERT Model Compression*, 2019 (blocks); Zafrir et
  al., *Q8BERT*, 2019; Tao et al., *Compression of Generative Pre-trained Language Models via
  Quantization*, 2022 (a quantized student of itself).
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _minilm_model import MiniLM, load_params, load_tokenizer, tokenize
from _texts import brown, news
from assets import AssetError, fetch
from minilm import Benchmarks
from rich.console import Console

import jaxcompress as jc

FORMAT = jc.FakeQuantize("int4", group_size=64, convention="full", estimator="mse", range="static")
RULES = {"encoder/**/kernel": FORMAT, "embeddings/word/embedding": FORMAT}
LENGTH, BATCH = 64, 16
TEACHER = MiniLM()


def features(
    params: Any, tokens: jax.Array, mask: jax.Array, model: MiniLM = TEACHER
) -> tuple[list[jax.Array], jax.Array]:
    """The output of each block, and the sentence vectors."""
    run = jc.distillation.tap(model.apply, "encoder/layer_*")
    vectors, seen = run({"params": params}, tokens, mask)
    return [seen[f"encoder/layer_{i}"] for i in range(model.layers)], vectors


def distance(student: Any, teacher: Any, mask: jax.Array) -> jax.Array:
    """Mean squared distance of real tokens in each block, of unit variance, and 1 - cosine."""
    real = mask[..., None]
    blocks = [
        jnp.sum(real * (a - b) ** 2) / jnp.sum(real * b**2)
        for a, b in zip(student[0], teacher[0], strict=True)
    ]
    cosine = jnp.sum(student[1] * teacher[1], axis=-1)
    return sum(blocks) / len(blocks) + jnp.mean(1 - cosine)


def batches(
    sources: list[list[list[str]]], steps: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Runs of words from each source alike, begun anywhere, so that no two are the same."""
    tokenizer, rng = load_tokenizer(fetch("minilm")), np.random.default_rng(seed)
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    each = BATCH // len(sources)
    for _ in range(steps):
        some = [texts[i] for texts in sources for i in rng.integers(len(texts), size=each)]
        starts = [rng.integers(max(1, len(words) - LENGTH // 2)) for words in some]
        runs = [" ".join(words[a : a + LENGTH]) for words, a in zip(some, starts)]
        yield tokenize(tokenizer, runs)


def train(
    params: Any, sources: list[list[list[str]]], steps: int, rate: float, seed: int = 0
) -> Iterator[tuple[int, float, Any]]:
    """Trains the student; yields the step, the loss and the student."""
    teacher = params
    trainable, rest = jc.partition(jc.compress(params, RULES))
    tx = optax.adam(optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps), b2=0.99)
    state = tx.init(trainable)
    run = jc.compressed(features)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trainable: Any, state: Any, tokens: Any, mask: Any) -> Any:
        target = features(teacher, tokens, mask)

        def loss(trainable: Any) -> jax.Array:
            return distance(run(jc.combine(trainable, rest), tokens, mask), target, mask)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    for i, batch in enumerate(batches(sources, steps, seed)):
        trainable, state, value = step(trainable, state, *batch)
        if (i + 1) % 25 == 0 or i + 1 == steps:
            yield i + 1, float(value), jc.combine(trainable, rest)


class Test:
    """The cosine to the float32 vectors of the Lee documents, which no training sees."""

    def __init__(self, params: Any, model: MiniLM = TEACHER):
        self.data = tokenize(load_tokenizer(fetch("minilm")), Benchmarks().documents)
        self.target = jax.jit(TEACHER.apply)({"params": params}, *self.data)
        self.run = jax.jit(jc.compressed(model.apply))

    def vectors(self, params: Any) -> np.ndarray:
        """Of the documents."""
        return np.asarray(self.run({"params": params}, *self.data))

    def cosine(self, params: Any) -> float:
        """Mean."""
        return float(np.mean(np.sum(self.vectors(params) * self.target, axis=-1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--news-only", action="store_true", help="without the Brown corpus")
    parser.add_argument("--out", type=Path, default=Path("out/minilm-int4.safetensors"))
    args = parser.parse_args()
    console, start = Console(), time.perf_counter()

    params = load_params(fetch("minilm"))
    test = Test(params)
    rounded = test.cosine(jc.finalize(jc.compress(params, RULES)))
    console.print(f"rounded to nearest: mean cosine {rounded:.4f}")
    try:
        sources = [news()] if args.news_only else [news(), brown()]
    except AssetError as error:
        raise SystemExit(f"{error}; or run with --news-only") from None
    for reached in train(params, sources, args.steps, args.rate):
        step, loss, student = reached
        seconds = time.perf_counter() - start
        console.print(f"step {step}: loss {loss:.4f}, {seconds:.0f} s")
    stored = jc.finalize(student)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    jc.save(args.out, stored, coded=True)
    loaded = jc.load(args.out)
    same = np.array_equal(test.vectors(student), test.vectors(loaded))
    console.print(
        f"trained: mean cosine {test.cosine(loaded):.4f}, {args.out.stat().st_size / 1e6:.2f} MB; "
        f"the stored model gives {'the very vectors' if same else 'OTHER vectors than those'} "
        "that were trained"
    )


if __name__ == "__main__":
    main()
