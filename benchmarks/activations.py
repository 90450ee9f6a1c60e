"""Eight bits for weights and activations of a pre-trained transformer, no training after.

    python benchmarks/activations.py [--quick]

All 36 encoder kernels of MiniLM (see `examples/minilm.py`) in int8 with one scale for each output,
and their inputs in int8: with a scale for each token, found at run time, or one for all, from the
largest input or the least squared error over some of the Lee background documents. The cosine to
the embeddings of the dense model is over the 50 Lee documents, which are others; the correlations
are those with human judgement on them and on WordSim-353. The time is that of a batch of ten.
The alpha of SmoothQuant per token is the best one on 30 more of the background documents.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxcompress as jc
from jaxcompress.quantization.activations import QuantizeInput
from jaxcompress.quantization.transforms import Rotate, SmoothQuant

from common import Row, interleaved, row, show  # isort: skip

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _minilm_model import MiniLM, load_params, load_tokenizer, tokenize
from assets import fetch
from minilm import BATCH, Benchmarks

KERNELS = "encoder/**/kernel"
LENGTH, CALIBRATED = 128, 8
INT8 = jc.Quantize("int8")
TOKEN = QuantizeInput("int8")
STATIC = QuantizeInput("int8", per="tensor", range="static")
MSE = QuantizeInput("int8", per="tensor", range="static", estimator="mse")

# What is done to the kernels, and the mean cosine that it must reach, if any.
WAYS: dict[str, tuple[jc.Spec, float | None]] = {
    "W8A32": (INT8, 0.999),
    "W8A8 per token": (jc.chain(INT8, TOKEN), None),
    "W8A8 per token, SmoothQuant": (jc.chain(SmoothQuant(0.65), INT8, TOKEN), 0.999),
    "W8A8 static": (jc.chain(INT8, STATIC), None),
    "W8A8 static, SmoothQuant": (jc.chain(SmoothQuant(0.8), INT8, STATIC), None),
    "W8A8 static, least squares": (jc.chain(INT8, MSE), None),
    "W8A4 per token": (jc.chain(INT8, QuantizeInput("int4")), None),
    "W8A4 per token, rotated": (jc.chain(Rotate(), INT8, QuantizeInput("int4")), None),
}
QUICK = ("W8A8 per token", "W8A8 per token, SmoothQuant", "W8A8 static")


def calibration(documents: list[str], count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of documents cut to one length, with the separator at their end: no padding.

    The separator meets some of the largest activations; a static range must have seen it.
    """
    tokenizer = load_tokenizer(fetch("minilm"))
    tokenizer.enable_truncation(LENGTH)
    tokens, mask = tokenize(tokenizer, documents)
    whole = np.flatnonzero(mask.all(axis=1))[:count]
    for i in range(0, len(whole) // CALIBRATED * CALIBRATED, CALIBRATED):
        chosen = whole[i : i + CALIBRATED]
        yield tokens[chosen], mask[chosen]


class Quality:
    """The embeddings of a model against those of the dense one."""

    def __init__(self, params: Any) -> None:
        self._benchmarks = Benchmarks()
        tokenizer = load_tokenizer(fetch("minilm"))
        tokens, mask = tokenize(tokenizer, self._benchmarks.documents)
        self.batches = [
            (tokens[i : i + BATCH], mask[i : i + BATCH]) for i in range(0, len(tokens), BATCH)
        ]
        self._words = tokenize(tokenizer, self._benchmarks.words)
        self.run = jax.jit(jc.compressed(MiniLM().apply))
        self.dense = self.embed(params)

    def embed(self, params: Any) -> np.ndarray:
        """The unit vectors of the Lee documents."""
        runs = [self.run({"params": params}, *batch) for batch in self.batches]
        return np.concatenate([np.asarray(x) for x in runs])

    def of(self, params: Any) -> dict[str, float]:
        """Mean and least cosine, and the two correlations."""
        embedded = self.embed(params)
        cosine = np.sum(embedded * self.dense, axis=-1)
        words = np.asarray(self.run({"params": params}, *self._words))
        return {
            "mean cosine": float(cosine.mean()),
            "least cosine": float(cosine.min()),
            "Lee": self._benchmarks.lee(embedded),
            "WordSim-353": self._benchmarks.wordsim(words),
        }


def run(quick: bool = False) -> list[Row]:
    """The rows."""
    documents = (fetch("similarity") / "lee_background.cor").read_text("latin-1").splitlines()
    params = load_params(fetch("minilm"))
    quality = Quality(params)
    apply = lambda params, tokens, mask: MiniLM().apply({"params": params}, tokens, mask)
    batches = calibration(documents, 16 if quick else 64)
    stats = jc.observe(apply, params, batches, ("abs_max", "histogram"), leaves=(KERNELS,))
    dense = quality.of(params)
    rows, models = [], {}
    for name, (spec, least) in WAYS.items():
        if quick and name not in QUICK:
            continue
        rules, key = {KERNELS: spec}, jax.random.key(0)
        models[name] = jc.compress(params, rules, stats=stats, key=key)
        found = quality.of(models[name])
        for what, value in found.items():
            bound = least if what == "mean cosine" else None
            unit = "" if "cosine" in what else "r"
            rows.append(row(f"MiniLM {name}: {what}", value, "dense", dense[what], unit=unit))
            if bound is not None:
                rows[-1] |= {"target": f">= {bound:g}", "ok": value >= bound}
    rows += _times(quality, params, models)
    return rows


def _times(quality: Quality, params: Any, models: dict[str, Any]) -> list[Row]:
    """The time of one batch in int8 against float32."""
    timed = [name for name in ("W8A32", "W8A8 per token", "W8A8 static") if name in models]
    one = lambda params: lambda: quality.run({"params": params}, *quality.batches[0])
    seconds = interleaved({"dense": one(params), **{name: one(models[name]) for name in timed}})
    return [
        row(f"MiniLM {name}: a batch of {BATCH}", seconds[name], "dense", seconds["dense"])
        for name in timed
    ]


def main() -> None:
    show("quantized activations", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
