"""Quantizing and materializing one 4096 x 4096 float32 weight, against qwix and one plain pass.

    python benchmarks/quantize.py [--quick]

Each side is one compiled program from the weight to what is stored. The plain pass is `2 * x`: it
reads the 64 MB and writes 64 MB (on Linux most of its time is the page faults of a fresh output of
that size). The stricter yardstick is `-x` in place, which waits for no pages. Quantizing reads the
weight twice (range, codes) and writes 8 or 16 MB into fresh pages.
qwix has no asymmetric uint8, so its int8 with the same range stands for it, and its int4 are left
unpacked, a byte each. Materializing writes the 64 MB of float32 back.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from qwix._src.core import qarray

from jaxcompress.arrays.affine import affine_params, dequantize, quantize
from jaxcompress.arrays.bits import pack_bits, unpack_bits

from common import Row, interleaved, row, show  # isort: skip

N = 4096
AXIS = -2  # a kernel is [in, out]: scales run along the inputs

CASES: dict[str, dict[str, Any]] = {
    "int8 per channel": {"format": "int8", "peer": {"qtype": jnp.int8}},
    "int4 groups of 128, packed": {
        "format": "int4",
        "group_size": 128,
        "peer": {"qtype": jnp.int4, "tiled_axes": {0: 128}},
    },
    "uint8 affine per channel": {
        "format": "uint8",
        "symmetric": False,
        "peer": {"qtype": jnp.int8, "calibration_method": "minmax"},
    },
}


def ours(
    format: str, group_size: int | None = None, symmetric: bool = True, peer: Any = None
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The two programs: from the weight to stored arrays, and back."""
    packed = format == "int4"

    def store(w):
        scale, zero = affine_params(
            w, format, axes=AXIS, group_size=group_size, symmetric=symmetric
        )
        codes = quantize(w, scale, zero, format, axes=AXIS, group_size=group_size)
        if packed:
            codes = pack_bits(codes.astype(jnp.uint8) + np.uint8(8), 4, axis=AXIS)
        return codes, scale, zero

    def load(codes, scale, zero):
        if packed:
            words = unpack_bits(codes, 4, N, axis=AXIS) - np.uint8(8)
            codes = jax.lax.bitcast_convert_type(words, jnp.int8)
        return dequantize(codes, scale, zero, axes=AXIS, group_size=group_size)

    return jax.jit(store), jax.jit(load)


def theirs(peer: dict[str, Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """qwix's two programs, with a scale for each output channel."""
    how = qarray.HowToQuantize(channelwise_axes=(1,), **peer)
    return jax.jit(lambda w: qarray.quantize(w, how)), jax.jit(qarray.dequantize)


def compile_seconds(fn: Callable[..., Any], *args: Any) -> float:
    """Tracing and compiling, without running."""
    start = time.perf_counter()
    fn.lower(*args).compile()
    return time.perf_counter() - start


def run(quick: bool = False) -> list[Row]:
    """All rows."""
    rounds = 9 if quick else 45
    w = jax.random.normal(jax.random.key(0), (N, N))
    double = jax.jit(lambda x: x * 2)
    negate = jax.jit(jnp.negative, donate_argnums=0)
    spare = [w + 0]

    def in_place():
        spare[0] = negate(spare[0])
        return spare[0]

    rows = []
    for name, case in CASES.items():
        store, load = ours(**case)
        peer_store, peer_load = theirs(case["peer"])
        compiling = compile_seconds(store, w), compile_seconds(peer_store, w)
        small, peer_small = store(w), peer_store(w)
        times = interleaved(
            {
                "ours": lambda f=store: f(w),
                "qwix": lambda f=peer_store: f(w),
                "pass": lambda: double(w),
                "in place": in_place,
            },
            rounds=rounds,
        )
        back = interleaved(
            {
                "ours": lambda f=load, s=small: f(*s),
                "qwix": lambda f=peer_load, s=peer_small: f(s),
                "pass": lambda: double(w),
            },
            rounds=rounds,
        )
        rows += [
            row(f"quantize, {name}", times["ours"], "qwix", times["qwix"], at_least=1),
            row(f"quantize, {name}", times["ours"], "2 * x", times["pass"], at_most=2),
            row(f"quantize, {name}", times["ours"], "-x in place", times["in place"]),
            row(f"compile, {name}", compiling[0], "qwix", compiling[1]),
            row(f"materialize, {name}", back["ours"], "qwix", back["qwix"]),
            row(f"materialize, {name}", back["ours"], "2 * x", back["pass"], at_most=2),
        ]
    return rows


def main() -> None:
    show("quantize", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
