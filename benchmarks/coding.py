"""Entropy-coded files: size against the entropy, and the speed of the coder.

    python benchmarks/coding.py [--quick]

The entropy is that of the codes themselves, counted by numpy: no model that codes one symbol at a
time can take less on symbols that do not depend on each other. `zlib`, which every Python has, is
timed on the same bytes.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import Row, interleaved, row, show

import jaxcompress as jc
from jaxcompress.checkpoint.entropy import decode_bytes, encode_bytes
from jaxcompress.checkpoint.streams import encode_array

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
MB = 1e6


def _entropy(symbols: np.ndarray) -> float:
    counts = np.bincount(symbols)
    shares = counts[counts > 0] / symbols.size
    return float(-np.sum(shares * np.log2(shares))) * symbols.size / 8


def _codes(leaf: Any) -> np.ndarray:
    codes = leaf.codes.words if isinstance(leaf.codes, jc.PackedArray) else leaf.codes
    return np.asarray(codes).reshape(-1).view(np.uint8)


def _streams(params: Any, quick: bool) -> list[Row]:
    """The codes of the word table of a real model, as one stream."""
    table = params["embeddings"]["word"]["embedding"]
    if quick:
        table = table[:4000]
    rows = []
    for name, spec in (
        ("int8 group 64", jc.Quantize("int8", group_size=64)),
        ("int4 group 64", jc.Quantize("int4", group_size=64, convention="full")),
    ):
        symbols = _codes(spec(table))
        coded = encode_bytes(symbols)
        assert np.array_equal(decode_bytes(coded, symbols.size), symbols)
        bound = (1.01 * _entropy(symbols) + 64) / MB
        what = f"{name} codes, {symbols.size / MB:.1f} MB"
        rows.append(row(f"{what}: coded", len(coded) / MB, "1.01 entropy + 64 B", bound, at_most=1,
                        unit="MB"))  # fmt: skip
        deflated = zlib.compress(symbols, 6)
        rows.append(row(f"{what}: coded", len(coded) / MB, "zlib, level 6", len(deflated) / MB,
                        unit="MB"))  # fmt: skip
        seconds = interleaved(
            {
                "encode": lambda symbols=symbols: encode_bytes(symbols),
                "decode": lambda coded=coded, n=symbols.size: decode_bytes(coded, n),
                "deflate": lambda symbols=symbols: zlib.compress(symbols, 6),
                "inflate": lambda deflated=deflated: zlib.decompress(deflated),
            },
            rounds=3 if quick else 7,
            warmup=1,
        )
        for ours, least, theirs in (("decode", 40, "inflate"), ("encode", 20, "deflate")):
            speed = symbols.size / MB / seconds[ours]
            peer = symbols.size / MB / seconds[theirs]
            # As the time a target speed would take, so that a ratio above one is too slow.
            rows.append(row(f"{what}: {ours}, {speed:.0f} MB/s", seconds[ours],
                            f"{least} MB/s", symbols.size / MB / least, at_most=1))  # fmt: skip
            rows.append(row(f"{what}: {ours}", seconds[ours], f"zlib, {peer:.0f} MB/s",
                            seconds[theirs]))  # fmt: skip
    return rows


def _arrays(params: Any) -> list[Row]:
    """Other parts of leaves, of one layer: what order-0 codes of plain bytes leave on the table."""
    w = params["encoder"]["layer_0"]["mlp"]["up"]["kernel"]
    pruned, pattern = jc.Prune(0.95)(w), jc.Prune(0.5, pattern="2:4")(w)
    three = jc.Quantize("int3", group_size=64)(w)
    parts = {
        "mask of 95% pruned weights": (pruned.index.words, pruned.layouts()["index"]),
        "mask of 2:4": (pattern.index.words, pattern.layouts()["index"]),
        "codes of 3 bits": (three.codes.words, three.codes.layouts()["words"]),
        "bfloat16 scales": (three.scale, None),
        "float32 weights": (w, None),
    }
    rows = []
    for name, (array, layout) in parts.items():
        array = np.asarray(array)
        found = encode_array(array, layout)
        assert found is not None
        deflated = zlib.compress(np.ascontiguousarray(array).tobytes(), 6)
        rows.append(row(f"{name}, {array.nbytes / 1e3:.0f} kB: coded", len(found[1]) / MB,
                        "zlib, level 6", len(deflated) / MB, unit="MB"))  # fmt: skip
    return rows


def _files(params: Any) -> list[Row]:
    """The whole model."""
    from minilm import RULES

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "small.safetensors")
        for name, most in (("int8-g64", 22.5), ("int4-g64", 11.0)):
            small = jc.compress(params, RULES[name])
            jc.save(path, small, coded=True)
            size = os.path.getsize(path)
            rows.append(row(f"MiniLM {name}: coded file", size / MB, "allowed", most, at_most=1,
                            unit="MB"))  # fmt: skip
            jc.save(path + ".raw", small)
            raw = os.path.getsize(path + ".raw")
            rows.append(row(f"MiniLM {name}: coded file", size / MB, "not coded", raw / MB,
                            unit="MB"))  # fmt: skip
            seconds = interleaved(
                {"coded": _loads(path), "raw": _loads(path + ".raw")}, rounds=5, warmup=0
            )
            limit = {"at_most": 1} if name == "int8-g64" else {}
            rows.append(row(f"MiniLM {name}: load coded", seconds["coded"], "1.5 s", 1.5, **limit))
            rows.append(row(f"MiniLM {name}: load coded", seconds["coded"], "not coded",
                            seconds["raw"]))  # fmt: skip
        start = time.perf_counter()
        jc.save(path, params, coded=True)
        size, dense = os.path.getsize(path) / MB, jc.nbytes(params) / MB
        what = f"MiniLM float32, lossless, in {time.perf_counter() - start:.1f} s"
        rows.append(row(what, size, "dense", dense, unit="MB"))
    return rows


def _loads(path: str) -> Callable[[], Any]:
    return lambda: jax.block_until_ready(jc.load(path))


def run(quick: bool = False) -> list[Row]:
    """The rows."""
    from minilm import fetch, load_params

    params = load_params(fetch("minilm"))
    return _streams(params, quick) + _arrays(params) + ([] if quick else _files(params))


def main() -> None:
    show("coding", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
