"""A pre-trained transformer with kernels of low rank: plain, and in the metric of data.

    python benchmarks/low_rank.py [--quick]

All kernels of MiniLM (see `examples/minilm.py`) become two factors, in 75, 60, 50 and 40 percent of
the bytes that they take dense; everything else stays as it is. The ranks are the same share of the
largest for all kernels, or chosen under one budget over all of them. The inputs and gradients are
those of some of the Lee background documents; the mean cosine of the embeddings to those of the
dense model is over the 50 Lee documents, which are others.

The loss behind the Fisher is `v' y`, y the embedding and v random signs for each document, so that
the Fisher is that of a Gaussian around the embedding.

Low rank in the metric of the inputs is to lose less than plain SVD, 1 - cosine, at every budget.
What ranks under one budget lose is reported: their program sums the relative errors of layers,
which is not the error of the embedding.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from jaxcompress.decomposition.budget import allocated, rank_errors
from jaxcompress.decomposition.data_aware import ASVD, ActivationSVD, FisherSVD, fisher_stats

from common import Row, row, show  # isort: skip

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from _minilm_model import MiniLM, load_params, load_tokenizer, tokenize
from assets import fetch
from minilm import Benchmarks
from one_shot import calibration

KERNELS, BATCH = "encoder/**/kernel", 10
BUDGETS = (0.75, 0.6, 0.5, 0.4)
METHODS = {"ASVD": ASVD, "FisherSVD": FisherSVD, "ActivationSVD": ActivationSVD}


def by_shape(share: float, params: Any, make: Any) -> dict[str, jc.Spec]:
    """For each kernel the rank whose factors take at most a share of it."""
    rules = {}
    for path, w in jc.rules.flatten(params)[0]:
        if jc.rules.glob(KERNELS).fullmatch(path):
            rows, columns = w.shape
            rules[path] = make(int(share * rows * columns) // (rows + columns))
    return rules


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
    inputs = list(calibration(background, 20 if quick else 160))
    stats = jc.observe(apply, params, inputs, ("gram", "abs_mean"), leaves=(KERNELS,))

    def loss_fn(params: Any, tokens: Any, mask: Any, signs: Any) -> jax.Array:
        return jnp.mean(jnp.sum(apply(params, tokens, mask) * signs, axis=-1))

    key = jax.random.key(0)
    signed = [
        (*b, jax.random.rademacher(jax.random.fold_in(key, i), (len(b[0]), dense.shape[1])) * 1.0)
        for i, b in enumerate(inputs[: 2 if quick else 4])
    ]
    fisher = fisher_stats(loss_fn, params, signed, leaves=(KERNELS,))

    def lost(rules: Any, stats: Any = None) -> float:
        small = jc.decompress(jc.compress(params, rules, stats=stats))
        return 1 - float(np.sum(embeddings(small) * dense, axis=-1).mean())

    # Few candidates: a rank is compiled for.
    table = rank_errors(apply, params, candidates=16, leaves=(KERNELS,), stats=stats)
    rows = []
    for share in BUDGETS[-2:] if quick else BUDGETS:
        plain = lost(by_shape(share, params, jc.LowRank))
        found = {
            name: lost(by_shape(share, params, make), fisher if make is FisherSVD else stats)
            for name, make in METHODS.items()
        }
        uniform = found["ActivationSVD"]
        for name, left in found.items():
            what = f"MiniLM kernels in {share:.0%}, {name}: 1 - mean cosine"
            most = 1 if name == "ActivationSVD" else None
            rows.append(row(what, left, "plain SVD", plain, at_most=most, unit=""))
        budgeted = lost(allocated(table, share).rules, stats)
        what = f"MiniLM kernels in {share:.0%}, ranks under one budget: 1 - mean cosine"
        rows.append(row(what, budgeted, "ActivationSVD, uniform", uniform, unit=""))
    return rows


def main() -> None:
    show("kernels of low rank", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
