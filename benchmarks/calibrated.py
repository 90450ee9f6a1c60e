"""A pre-trained transformer in three and four bits: to nearest, GPTQ, AWQ, and both.

    python benchmarks/calibrated.py [--quick]

All kernels and tables of MiniLM (see `examples/minilm.py`) are quantized; the positions and token
types, under one percent, have int8. The tables are only looked up, where rounding to nearest is the
best there is; with the calibrated kernels, their ranges are those of least squared error. The
inputs are those of some of the Lee background documents; the mean cosine of the embeddings to those
of the dense model is over the 50 Lee documents, which are others.

To be left is at most a third of what rounding to nearest loses, 1 - cosine, by the best of them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxcompress as jc
from jaxcompress.quantization.solvers import AWQ, GPTQ

from common import Row, row, show  # isort: skip

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _minilm_model import MiniLM, load_params, load_tokenizer, tokenize
from assets import fetch
from minilm import POSITIONS, Benchmarks
from one_shot import calibration

KERNELS, BATCH = "encoder/**/kernel", 10
FORMATS: dict[str, dict[str, Any]] = {
    "int4/64": {"format": "int4", "group_size": 64, "convention": "full"},
    "uint4/32 affine": {"format": "uint4", "group_size": 32, "symmetric": False},
    "uint3/32 affine": {"format": "uint3", "group_size": 32, "symmetric": False},
}
SEARCH = {"act_order": True, "tries": 20}


def run(quick: bool = False) -> list[Row]:
    """The rows."""
    folder = fetch("similarity")
    background = (folder / "lee_background.cor").read_text("latin-1").splitlines()
    params, tokenizer = load_params(fetch("minilm")), load_tokenizer(fetch("minilm"))
    apply = lambda params, tokens, mask: MiniLM().apply({"params": params}, tokens, mask)
    embed, documents = jax.jit(apply), Benchmarks().documents
    batches = [documents[i : i + BATCH] for i in range(0, len(documents), BATCH)]

    def embeddings(params: Any) -> np.ndarray:
        return np.concatenate([embed(params, *tokenize(tokenizer, texts)) for texts in batches])

    dense = embeddings(params)
    inputs = calibration(background, 16 if quick else 240)
    stats = jc.observe(apply, params, inputs, ("gram", "abs_mean"), leaves=(KERNELS,))

    def lost(kernels: jc.Spec, tables: jc.Spec) -> float:
        rules = {**POSITIONS, KERNELS: kernels, "**/embedding": tables}
        small = jc.decompress(jc.compress(params, rules, stats=stats))
        return 1 - float(np.sum(embeddings(small) * dense, axis=-1).mean())

    rows = []
    for name, fields in FORMATS.items():
        plain = jc.Quantize(**fields)
        fitted = jc.Quantize(**fields, estimator="mse")
        nearest = lost(plain, plain)
        found = {
            "AWQ": lost(AWQ(**fields), fitted),
            "GPTQ": lost(GPTQ(**fields, **SEARCH), fitted),
            "AWQ + GPTQ": lost(AWQ(**fields, compensated=True, **SEARCH), fitted),
        }
        for method, loss in found.items():
            what = f"MiniLM {name}, {method}: 1 - mean cosine"
            rows.append(row(what, loss, "to nearest", nearest, unit=""))
        best = min(found.values())
        what = f"MiniLM {name}, best: 1 - mean cosine"
        rows.append(row(what, best, "a third of to nearest", nearest / 3, at_most=1, unit=""))
    return rows


def main() -> None:
    show("calibrated quantization", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
