"""The forward pass on compressed leaves: tracing, running, and the memory it takes.

python benchmarks/forward.py [--quick]
"""

from __future__ import annotations

import sys
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc
from jaxcompress import interpret
from jaxcompress.arrays import deferred

from common import Row, interleaved, row, show  # isort: skip

WIDTH, LAYERS = 1024, 12


class Block(nn.Module):
    """A pre-norm transformer block."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(y, y)
        y = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
        return x + nn.Dense(self.width)(nn.gelu(y))


class Transformer(nn.Module):
    """An encoder with a vocabulary of 1,000."""

    width: int = 256
    heads: int = 8
    layers: int = 6

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(1000, self.width)(ids)
        for _ in range(self.layers):
            x = Block(self.width, self.heads)(x)
        return nn.Dense(1000)(nn.LayerNorm()(x))


def trace_time(rounds: int) -> list[Row]:
    """Tracing a transformer of 6 layers, all of whose kernels are compressed."""
    model, ids = Transformer(), jnp.zeros((4, 64), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), ids)
    forms = {
        "int8": {"**/kernel": jc.Quantize("int8"), "**/embedding": jc.Quantize("int8")},
        "rank 32": {"**/kernel": jc.LowRank(rank=32)},
    }
    rows = []
    for name, rules in forms.items():
        small = jc.compress(params, rules)
        dense_times, small_times = [], []
        for _ in range(rounds):
            # New functions and an empty cache each time, so that nothing finds an older trace.
            deferred._traced.cache_clear()
            interpret._materialized_type.cache_clear()
            start = time.perf_counter()
            jax.jit(lambda p, x: model.apply(p, x)).trace(params, ids)
            dense_times.append(time.perf_counter() - start)
            start = time.perf_counter()
            jax.jit(jc.compressed(lambda p, x: model.apply(p, x))).trace(small, ids)
            small_times.append(time.perf_counter() - start)
        rows.append(
            row(
                f"trace of a 6-layer transformer, {name}",
                float(np.median(small_times)),
                "dense trace",
                float(np.median(dense_times)),
                at_most=1.3,
            )
        )
    return rows


def low_rank_forward(rounds: int) -> list[Row]:
    """A 2048-wide layer at a quarter of the multiplications."""
    w = jax.random.normal(jax.random.key(0), (2048, 2048))
    x = jax.random.normal(jax.random.key(1), (64, 2048))
    small = jc.LowRank(rank=256)(w)  # 2 * 2048 * 256 = 2048 * 2048 / 4

    def apply(w, x):
        return x @ w

    dense, factored = jax.jit(apply), jax.jit(jc.compressed(apply))
    times = interleaved(
        {"dense": lambda: dense(w, x), "ours": lambda: factored(small, x)}, rounds=rounds, calls=5
    )
    return [
        row(
            "rank-256 forward, 2048 wide, batch 64",
            times["ours"],
            "dense forward",
            times["dense"],
            at_least=3,
        )
    ]


def unrolled(ws, x):
    """One layer after the other."""
    for w in ws:
        x = nn.relu(x @ w)
    return x


def scanned(stack, x):
    """The same layers as one scan over a stack."""
    return jax.lax.scan(lambda x, w: (nn.relu(x @ w), None), x, stack)[0]


def decode(ws, x):
    """16 steps, each through all layers."""
    return jax.lax.fori_loop(0, 16, lambda _, x: unrolled(ws, x), x)


def quantized_forward(rounds: int) -> list[Row]:
    """12 quantized layers: temporaries, and time against dense."""
    keys = jax.random.split(jax.random.key(0), LAYERS)
    ws = [jax.random.normal(k, (WIDTH, WIDTH)) / WIDTH**0.5 for k in keys]
    stack = jnp.stack(ws)
    leaf = WIDTH * WIDTH * 4
    rows = []
    specs = {"int8": jc.Quantize("int8"), "int4/128": jc.Quantize("int4", group_size=128)}
    for form, spec in specs.items():
        small = {
            "unrolled": (unrolled, ws, [spec(w) for w in ws]),
            "scanned": (scanned, stack, spec(stack)),
            "16-step decode": (decode, ws, [spec(w) for w in ws]),
        }
        for name, (fn, dense_params, small_params) in small.items():
            for batch in (1, 64):
                x = jax.random.normal(jax.random.key(1), (batch, WIDTH))
                dense = jax.jit(fn).lower(dense_params, x).compile()
                ours = jax.jit(jc.compressed(fn)).lower(small_params, x).compile()
                temporary = ours.memory_analysis().temp_size_in_bytes
                bound = 4 * leaf + 2 * x.nbytes
                rows.append(
                    row(
                        f"temporaries, {form} {name}, batch {batch}",
                        temporary / 1e6,
                        "4 dense leaves + activations",
                        bound / 1e6,
                        at_most=1,
                        unit="MB",
                    )
                )
                times = interleaved(
                    {
                        "dense": lambda f=dense, p=dense_params, x=x: f(p, x),
                        "ours": lambda f=ours, p=small_params, x=x: f(p, x),
                    },
                    rounds=rounds,
                )
                rows.append(
                    row(
                        f"time, {form} {name}, batch {batch}",
                        times["ours"],
                        "dense",
                        times["dense"],
                    )
                )
    return rows


def run(quick: bool = False) -> list[Row]:
    """All rows."""
    rounds = 5 if quick else 15
    return [*trace_time(rounds), *low_rank_forward(3 * rounds), *quantized_forward(rounds)]


def main() -> None:
    show("forward", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
