"""A pre-trained transformer in three and four bits: to nearest, GPTQ, AWQ, and both.

    python benchmarks/calibrated.py [--quick]

All kernels and tables of MiniLM (see `examples/minilm.py`) are quantized; the positions and token
types, under one percent, have int8. The tables are only looked up, where rounding to nearest is the
best there is; with the calibrated kernels, their ranges are those of least squared error. The
inputs are those of some of the Lee background documents; the mean cosine of the embeddings to those
of the dense model is over the 50 Lee documents, which are others.

To be left is at most a third of what rounding to nearest loses, 1 - cosine, by the best of them;
and less than what torchao's rounding in the same format leaves, and gguf's Q4_0, which like int4 in
groups of 32 takes 4.5 bits for a weight.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
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
    "int4/32": {"format": "int4", "group_size": 32, "convention": "no_clip"},
    "int4/64": {"format": "int4", "group_size": 64, "convention": "full"},
    "uint4/32 affine": {"format": "uint4", "group_size": 32, "symmetric": False},
    "uint3/32 affine": {"format": "uint3", "group_size": 32, "symmetric": False},
}
SEARCH = {"act_order": True, "tries": 20}


def by_torchao(w: np.ndarray, fields: dict[str, Any]) -> np.ndarray:
    """A matrix `[outputs, inputs]` rounded by torchao, scales in bfloat16 as ours are."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import quant_primitives as ao

    bits, (size, kind) = int(fields["format"][-1]), (fields["group_size"], ao.MappingType)
    mapping = {"full": kind.SYMMETRIC, "no_clip": kind.SYMMETRIC_NO_CLIPPING_ERR}.get(
        fields.get("convention", ""), kind.ASYMMETRIC
    )
    bounds = (torch.int8, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    x, block = torch.tensor(w), (1, size)
    scale, zero = ao.choose_qparams_affine(
        x, mapping, block, *bounds, scale_dtype=torch.bfloat16, zero_point_dtype=torch.int32
    )
    scale = scale.to(torch.float32)
    codes = ao.quantize_affine(x, block, scale, zero, *bounds)
    values = ao.dequantize_affine(codes, block, scale, zero, *bounds, output_dtype=torch.float32)
    return values.numpy()


def by_gguf(w: np.ndarray) -> np.ndarray:
    """A matrix `[outputs, inputs]` rounded to blocks of Q4_0."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q4_0
    return gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(w), kind), kind)


def rounded_by(peer: Callable[[np.ndarray], np.ndarray], params: Any) -> Any:
    """The kernels and the word table rounded by a peer, what is left in int8 as in all rows."""
    params = jc.decompress(jc.compress(params, POSITIONS))
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = []
    for path, x in paths:
        names = [key.key for key in path]
        if names[-1] == "kernel":
            x = peer(np.ascontiguousarray(x.T)).T
        elif "word" in names:
            x = peer(np.asarray(x))
        leaves.append(x)
    return jax.tree.unflatten(structure, leaves)


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

    def loss(small: Any) -> float:
        return 1 - float(np.sum(embeddings(small) * dense, axis=-1).mean())

    def lost(kernels: jc.Spec, tables: jc.Spec) -> float:
        rules = {**POSITIONS, KERNELS: kernels, "**/embedding": tables}
        return loss(jc.decompress(jc.compress(params, rules, stats=stats)))

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
        for method, left in found.items():
            what = f"MiniLM {name}, {method}: 1 - mean cosine"
            rows.append(row(what, left, "to nearest", nearest, unit=""))
        best = min(found.values())
        what = f"MiniLM {name}, best: 1 - mean cosine"
        rows.append(row(what, best, "a third of to nearest", nearest / 3, at_most=1, unit=""))
        peers = {"torchao": functools.partial(by_torchao, fields=fields)}
        if name == "int4/32":
            peers["gguf Q4_0"] = by_gguf
        for peer, fn in peers.items():
            rows.append(row(what, best, peer, loss(rounded_by(fn, params)), at_most=1, unit=""))
    return rows


def main() -> None:
    show("calibrated quantization", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
