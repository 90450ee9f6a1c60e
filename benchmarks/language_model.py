"""The perplexity of SmolLM2-135M in eight, four and three bits a weight, no training after.

    python benchmarks/language_model.py [--quick]

The kernels of all 30 blocks are quantized in groups of 64; the table, which is input and output,
has int8 in each row below. Two texts, eight times 512 tokens of each: the Lee background documents,
and Genesis in the King James version. The inputs that the solvers see are from elsewhere: later
documents, and the Bible from its middle on.

The reference is not the model as it was trained: its weights are read from a file that has four
bits to a weight, affine in groups of 32, and what those stand for is what float32 means here.
Groups of another size do not fall on that grid; still, what four bits lose here says less than what
three bits do. At three bits GPTQ has to close half of the gap between rounding to nearest and none.
"""

from __future__ import annotations

import json
import re
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxcompress as jc
from jaxcompress.quantization import AWQ, GPTQ

from common import Row, row, show  # isort: skip

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import _smollm2_model as model
from assets import AssetError, fetch

KERNELS, LENGTH, CALIBRATED = "decoder/**/kernel", 512, 48
TABLE: dict[str, Any] = {"token/embedding": jc.Quantize("int8", group_size=64)}
INT4: dict[str, Any] = {"format": "int4", "group_size": 64, "convention": "full"}
SEARCH: dict[str, Any] = {"act_order": True, "tries": 20}


def affine(bits: int) -> dict[str, Any]:
    """The fields of a format with a zero point."""
    return {"format": f"uint{bits}", "group_size": 64, "symmetric": False}


WAYS: dict[str, jc.Spec | None] = {
    "table alone in int8": None,
    "int8": jc.Quantize("int8", group_size=64),
    "3 bits": jc.Quantize(**affine(3)),
    "3 bits, GPTQ": GPTQ(**affine(3), **SEARCH),
    "3 bits, AWQ + GPTQ": AWQ(**affine(3), compensated=True, **SEARCH),
    "int4": jc.Quantize(**INT4),
    "int4, GPTQ": GPTQ(**INT4, **SEARCH),
    "4 bits": jc.Quantize(**affine(4)),
    "4 bits, AWQ": AWQ(**affine(4)),
    "4 bits, GPTQ": GPTQ(**affine(4), **SEARCH),
}
CHOICES = {KERNELS: [GPTQ(**affine(bits), **SEARCH) for bits in (3, 4, 5)]}
QUICK = ("table alone in int8", "3 bits", "3 bits, GPTQ")


class Texts:
    """Tokens `[count, 512]` of both texts, for the test and, from elsewhere, for calibration."""

    def __init__(self, test: int) -> None:
        tokenizer = model.load_tokenizer(fetch("smollm2"))
        path = fetch("similarity") / "lee_background.cor"
        lee = path.read_text("latin-1").splitlines(keepends=True)
        with sqlite3.connect(fetch("kjv") / "Bible.db") as base:
            found = base.execute("select Passage1 from Bible order by rowid").fetchall()
        verses = [re.sub(r"^\d+:\d+ ", "", text) + " " for (text,) in found]
        cut = lambda parts, count: _cut(tokenizer.encode("".join(parts)).ids, count)
        middle = len(verses) // 2
        self.test = {"Lee": cut(lee[:100], test), "Genesis": cut(verses[:400], test)}
        self._others = [cut(lee[100:], 24), cut(verses[middle : middle + 1500], 24)]

    def calibration(self, count: int) -> Iterator[tuple[np.ndarray]]:
        """Batches of one, from both in turn."""
        for i in range(count):
            yield (self._others[i % 2][i // 2][None],)


def _cut(tokens: list[int], count: int) -> np.ndarray:
    return np.array(tokens[: count * LENGTH], np.int32).reshape(count, LENGTH)


def measure(quick: bool = False, log: Path | None = None) -> dict[str, dict[str, float]]:
    """The perplexity on each text, and the bytes, of each way; written to a log one by one."""
    texts, params = Texts(2 if quick else 8), model.load_params(fetch("smollm2"))
    run, found = jax.jit(model.losses), {}

    def note(name: str, small: Any) -> None:
        dense = jc.decompress(small)
        found[name] = {"MB": jc.nbytes(small) / 1e6}
        for text, tokens in texts.test.items():
            losses = [np.asarray(run(dense, one[None]), np.float64) for one in tokens]
            found[name][text] = float(np.exp(np.mean(losses)))
        if log is not None:
            log.write_text(json.dumps(found, indent=1) + "\n")

    note("float32", params)
    batches = texts.calibration(8 if quick else CALIBRATED)
    names = ("gram", "abs_mean")
    stats = jc.observe(model.network, params, batches, names, leaves=(KERNELS,))
    for name, spec in WAYS.items():
        if not quick or name in QUICK:
            rules = TABLE if spec is None else {KERNELS: spec, **TABLE}
            note(name, jc.compress(params, rules, stats=stats))
    if not quick:
        mixed = jc.quantization.allocate(
            None, params, choices=CHOICES, budget={"code_bits": 4.0}, stats=stats
        )
        note("4 bits, GPTQ, mixed", jc.compress(params, {**mixed.rules, **TABLE}, stats=stats))
    return found


def rows_of(found: dict[str, dict[str, float]]) -> list[Row]:
    """The rows."""
    rows, float32 = [], found["float32"]
    for name, one in found.items():
        for text in ("Lee", "Genesis"):
            what = f"SmolLM2-135M {name}: perplexity, {text}"
            rows.append(row(what, one[text], "float32", float32[text], unit=""))
        rows.append(row(f"SmolLM2-135M {name}", one["MB"], "float32", float32["MB"], unit="MB"))
    for text in ("Lee", "Genesis"):
        none, near, ours = (
            found[x][text] for x in ("table alone in int8", "3 bits", "3 bits, GPTQ")
        )
        what, peer = f"3 bits, GPTQ: perplexity above none, {text}", "half of to nearest"
        rows.append(row(what, ours - none, peer, (near - none) / 2, at_most=1, unit=""))
    return rows


def run(quick: bool = False) -> list[Row]:
    """The rows; none where the files cannot be fetched."""
    try:
        return rows_of(measure(quick))
    except AssetError as error:
        print(f"language_model is left out: {error}")
        return []


def main() -> None:
    show("a language model", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
