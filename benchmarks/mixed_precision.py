"""Mixed precision of a pre-trained transformer: four bits to a weight, where they matter.

    python benchmarks/mixed_precision.py [--quick]

All kernels of MiniLM (see `examples/minilm.py`) get 3 to 6 bits, embeddings 2 to 5, affine in
groups of 64: kernels by a solver on the Gram matrices of their inputs, embeddings rounded to
nearest. Sensitivities are end to end, on eight of the Lee background documents, the Gram matrices
of 128 of them. The cosine to the dense embeddings is over the 50 Lee documents, which are others.

A budget is an average over all weights that have a choice: with scales and zero points (`bits`), or
of the codes alone (`code_bits`).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxcompress as jc
from jaxcompress.quantization.mixed import sensitivities

from common import Row, row, show  # isort: skip
from one_shot import calibration

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _minilm_model import MiniLM, load_params, load_tokenizer, tokenize
from assets import fetch
from minilm import Benchmarks

KERNELS = "encoder/**/kernel"
COSINE = 0.985
BATCH = 10


def affine(bits: int) -> jc.Quantize:
    """What all choices store."""
    return jc.Quantize(f"uint{bits}", group_size=64, symmetric=False)


CHOICES: dict[str, list[jc.Spec | None]] = {
    KERNELS: [jc.SparseGPT(0.0, quantize=affine(bits)) for bits in (3, 4, 5, 6)],
    "**/embedding": [affine(bits) for bits in (2, 3, 4, 5)],
}


def run(quick: bool = False) -> list[Row]:
    """The rows."""
    documents = (fetch("similarity") / "lee_background.cor").read_text("latin-1").splitlines()
    params, tokenizer = load_params(fetch("minilm")), load_tokenizer(fetch("minilm"))
    texts, model = Benchmarks().documents, jax.jit(MiniLM().apply)

    def embed(params: Any) -> np.ndarray:
        parts = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
        return np.concatenate([model({"params": params}, *tokenize(tokenizer, p)) for p in parts])

    dense = embed(params)

    def cosine(rules: Any) -> float:
        small = jc.decompress(jc.compress(params, rules, stats=stats))
        return float(np.sum(embed(small) * dense, axis=-1).mean())

    apply = lambda params, tokens, mask: MiniLM().apply({"params": params}, tokens, mask)
    batches = calibration(documents, 16 if quick else 128)
    stats = jc.observe(apply, params, batches, ("gram",), leaves=(KERNELS,))
    start = time.perf_counter()
    table = sensitivities(
        apply,
        params,
        calibration(documents[200:], 8),
        choices=CHOICES,
        sensitivity="end_to_end",
        stats=stats,
    )
    measuring = time.perf_counter() - start
    start = time.perf_counter()
    found = {name: table.allocate({name: 4.0}) for name in ("bits", "code_bits")}
    solving = (time.perf_counter() - start) / len(found)

    tokens = {"**/token_type/embedding": None}  # too small to have a choice
    even = cosine({**tokens, KERNELS: CHOICES[KERNELS][1], "**/embedding": affine(4)})
    rows = []
    for name, one in found.items():
        error = 1 - cosine(one.rules)
        what = f"MiniLM, 4.0 {'bits' if name == 'bits' else 'bits of codes'}: 1 - mean cosine"
        rows.append(row(what, error, f"1 - {COSINE}", 1 - COSINE, at_most=1, unit=""))
        rows.append(row(what, error, "4 bits everywhere", 1 - even, at_most=1, unit=""))
        rows.append(
            row(
                f"MiniLM, 4.0 {name}: bits to a weight, scales included",
                one.bits,
                "4 bits everywhere",
                4 + 20 / 64,  # a bfloat16 scale and a zero point of four bits to a group
                unit="",
            )
        )
    rows.append(row("an allocation", solving, "measuring its table", measuring))
    return rows


def main() -> None:
    show("mixed precision", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
