"""The word table of a pre-trained transformer in four bits: product quantization against int4.

    python benchmarks/product.py [--quick]

The table of MiniLM, 30,522 rows of 384 (see `examples/minilm.py`), is compressed and all else
left in float32. What is compared takes equally many bytes, codebooks and scales included: 8 bits
for each two weights and a codebook of bfloat16 for each pair of columns, against int4 with a scale
for 64 weights, to nearest and with ranges of least squared error. The mean cosine is that of the
embeddings of the 50 Lee documents to those of the dense model.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from jaxcompress.sharing.product import ProductQuantize, ResidualQuantize

from common import Row, row, show  # isort: skip

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _minilm_model import MiniLM, load_params, load_tokenizer, tokenize
from assets import fetch
from minilm import Benchmarks

TABLE, BATCH = "**/word/embedding", 10


def run(quick: bool = False) -> list[Row]:
    """The rows."""
    params, tokenizer = load_params(fetch("minilm")), load_tokenizer(fetch("minilm"))
    apply = lambda params, tokens, mask: MiniLM().apply({"params": params}, tokens, mask)
    embed, documents = jax.jit(apply), Benchmarks().documents
    batches = [documents[i : i + BATCH] for i in range(0, len(documents), BATCH)]

    def embeddings(params: Any) -> np.ndarray:
        return np.concatenate([embed(params, *tokenize(tokenizer, texts)) for texts in batches])

    dense = embeddings(params)
    paths = {path for path, _ in jc.rules.flatten(params)[0]}
    path = next(p for p in paths if p.endswith("word/embedding"))

    def measured(spec: jc.Spec) -> tuple[float, float, int]:
        small = jc.compress(params, {TABLE: spec})
        leaf = dict(jc.rules.flatten(small)[0])[path]
        w = dict(jc.rules.flatten(params)[0])[path]
        plain = jc.decompress(small)
        error = float(jnp.sum((leaf.materialize() - w) ** 2) / jnp.sum(w**2))
        cosine = float(np.sum(embeddings(plain) * dense, axis=-1).mean())
        return 1 - cosine, error, leaf.nbytes

    turns = {"iterations": 3 if quick else 15, "codebook_dtype": "bfloat16"}
    pairs = ProductQuantize(block=2, codebooks=None, **turns)
    product = measured(pairs)
    peers = {
        "int4/64 to nearest": jc.Quantize("int4", group_size=64),
        "int4/64 least squares": jc.Quantize("int4", group_size=64, estimator="mse"),
    }
    rows = []
    what = "MiniLM word table, 8 bits for 2"
    for name, spec in peers.items():
        scalar = measured(spec)
        for i, figure in enumerate(("1 - mean cosine", "relative squared error", "bytes")):
            ours, theirs = float(product[i]), float(scalar[i])
            rows.append(row(f"{what}: {figure}", ours, name, theirs, at_most=1, unit=""))
    if not quick:
        two = measured(ResidualQuantize(2, block=4, codebooks=24, **turns))
        what = "MiniLM word table, 2 x 8 bits for 4"
        for i, figure in enumerate(("1 - mean cosine", "relative squared error", "bytes")):
            rows.append(row(f"{what}: {figure}", float(two[i]), "8 bits for 2", float(product[i])))
    return rows


def main() -> None:
    show("product quantization", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
