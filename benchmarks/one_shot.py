"""Pruning a pre-trained transformer in one shot: magnitude, Wanda and SparseGPT, no training after.

    python benchmarks/one_shot.py [--quick]

All 36 encoder kernels of MiniLM (see `examples/minilm.py`) lose half of their weights, anywhere or
2:4. The inputs are those of some of the Lee background documents; the cosine of the embeddings to
those of the dense model is over others, the Spearman correlation with human judgement is that of
WordSim-353. Magnitude compares the weights of a kernel, Wanda those of an output, as in its paper.
The time of SparseGPT is that of the whole model, statistics apart, from a cold start.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from jaxcompress.pruning.solvers import sparsegpt

from common import Row, row, show  # isort: skip

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _minilm_model import MiniLM, load_params, load_tokenizer, tokenize
from assets import fetch
from minilm import Benchmarks

KERNELS = "encoder/**/kernel"
PATTERNS = {"50%": None, "2:4": "2:4"}
LENGTH, BATCH, EVALUATED = 128, 8, 48
SECONDS = 180.0


def calibration(documents: list[str], count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of the first tokens of documents that have enough: no padding is seen as input."""
    tokens, mask = tokenize(load_tokenizer(fetch("minilm")), documents)
    tokens, mask = tokens[:, :LENGTH], mask[:, :LENGTH]
    whole = np.flatnonzero(mask.all(axis=1))[:count]
    for i in range(0, len(whole) // BATCH * BATCH, BATCH):
        yield tokens[whole[i : i + BATCH]], mask[whole[i : i + BATCH]]


class Quality:
    """How a model does against the dense one."""

    def __init__(self, params: Any, documents: list[str]) -> None:
        self._tokenizer, self._benchmarks = load_tokenizer(fetch("minilm")), Benchmarks()
        self._run = jax.jit(MiniLM().apply)
        self._documents = [documents[i : i + BATCH] for i in range(0, len(documents), BATCH)]
        self._dense = self._embed(params)
        self.dense_spearman = self.of(params)[1]

    def _embed(self, params: Any) -> np.ndarray:
        run = lambda texts: self._run({"params": params}, *tokenize(self._tokenizer, texts))
        return np.concatenate([run(texts) for texts in self._documents])

    def of(self, params: Any) -> tuple[float, float]:
        """The mean cosine to the dense embeddings, and the Spearman correlation on WordSim."""
        cosine = np.sum(self._embed(params) * self._dense, axis=-1).mean()
        words = self._run({"params": params}, *tokenize(self._tokenizer, self._benchmarks.words))
        return float(cosine), self._benchmarks.wordsim(np.asarray(words))


def compile_seconds(inputs: int, outputs: int) -> float:
    """Seconds to compile the solver for one shape."""
    gram = jax.ShapeDtypeStruct((inputs, inputs), jnp.float32)
    w = jax.ShapeDtypeStruct((inputs, outputs), jnp.float32)
    program = jax.jit(lambda w, gram: sparsegpt(w, gram, sparsity=0.5)).lower(w, gram)
    start = time.perf_counter()
    program.compile()
    return time.perf_counter() - start


def run(quick: bool = False) -> list[Row]:
    """The rows."""
    documents = (fetch("similarity") / "lee_background.cor").read_text("latin-1").splitlines()
    params = load_params(fetch("minilm"))
    quality = Quality(params, documents[:EVALUATED])
    apply = lambda params, tokens, mask: MiniLM().apply({"params": params}, tokens, mask)
    batches = calibration(documents[EVALUATED:], 16 if quick else 128)
    stats = jc.observe(apply, params, batches, ("gram",), leaves=(KERNELS,))

    rows = []
    for name, pattern in PATTERNS.items():
        pruned = lambda spec: jc.compress(params, {KERNELS: spec}, stats=stats)
        start = time.perf_counter()
        small = jax.block_until_ready(pruned(jc.SparseGPT(0.5, pattern=pattern)))
        seconds = time.perf_counter() - start
        solved = quality.of(jc.decompress(small))
        weak = quality.of(jc.decompress(pruned(jc.Prune(0.5, pattern=pattern))))
        wanda = jc.Prune(0.5, pattern=pattern, score="wanda")
        middle = quality.of(jc.decompress(pruned(wanda)))
        for peer, theirs, ours, by in (
            ("magnitude", weak, middle, "Wanda"),
            ("Wanda", middle, solved, "SparseGPT"),
        ):
            rows.append(
                row(
                    f"MiniLM {name}, {by}: 1 - mean cosine",
                    1 - ours[0],
                    peer,
                    1 - theirs[0],
                    at_most=1,
                    unit="",
                )
            )
            # A rank correlation moves by chance by a few hundredths: the order alone is not asked.
            rows.append(
                row(f"MiniLM {name}, {by}: WordSim-353", ours[1], peer, theirs[1], unit="rho")
            )
        rows.append(
            row(
                f"MiniLM {name}, SparseGPT: WordSim-353",
                solved[1],
                "dense",
                quality.dense_spearman,
                unit="rho",
            )
        )
        rows.append(row(f"MiniLM {name}, SparseGPT", seconds, "allowed", SECONDS, at_most=1))
    rows.append(
        row(
            "SparseGPT: compile for 1536 inputs",
            compile_seconds(1536, 384),
            "for 384 inputs",
            compile_seconds(384, 384),
        )
    )
    return rows


def main() -> None:
    show("one-shot pruning", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
