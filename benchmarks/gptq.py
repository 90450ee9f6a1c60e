"""GPTQ of one layer against the published loop in torch, on the same cores.

    python benchmarks/gptq.py [--quick]

A weight of 2048 inputs and 2048 outputs, int4 in groups of 128, its Gram matrix given to both. The
loop is the blocked one of the paper, line by line, with scales by groups; neither orders inputs.
Compilation is apart, and its time for 512 and 2048 inputs is compared.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jaxcompress as jc
from jaxcompress.quantization.solvers import gptq

from common import Row, interleaved, row, show  # isort: skip

SPEC = jc.Quantize("int4", group_size=128)
BLOCK, DAMPING = 128, 0.01
COMPILE_SECONDS = 5.0


def problem(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight `[size, size]` and the Gram matrix of inputs that are correlated."""
    rng = np.random.default_rng(0)
    mix = np.eye(size) + rng.normal(size=(size, size)) / np.sqrt(size)
    x = (rng.normal(size=(2 * size, size)) @ mix).astype(np.float32)
    return rng.normal(size=(size, size)).astype(np.float32), x.T @ x


@torch.no_grad()
def published(w: torch.Tensor, h: torch.Tensor, group: int = 128) -> torch.Tensor:
    """The values of the published loop, `[outputs, inputs]`."""
    w, h = w.clone(), h.clone()
    size = w.shape[1]
    diagonal = torch.arange(size)
    h[diagonal, diagonal] += DAMPING * torch.mean(torch.diag(h))
    h = torch.linalg.cholesky(h)
    h = torch.cholesky_inverse(h)
    inverse = torch.linalg.cholesky(h, upper=True)
    out = torch.zeros_like(w)
    for i1 in range(0, size, BLOCK):
        i2 = min(i1 + BLOCK, size)
        w1, inverse1 = w[:, i1:i2].clone(), inverse[i1:i2, i1:i2]
        q1, err1 = torch.zeros_like(w1), torch.zeros_like(w1)
        for i in range(i2 - i1):
            column, d = w1[:, i], inverse1[i, i]
            if (i1 + i) % group == 0:
                scale = w[:, i1 + i : i1 + i + group].abs().amax(dim=1) / 7
                scale = scale.bfloat16().float()
            q = torch.clamp(torch.round(column / scale), -7, 7) * scale
            q1[:, i] = q
            err = (column - q) / d
            w1[:, i:] -= err.unsqueeze(1).matmul(inverse1[i, i:].unsqueeze(0))
            err1[:, i] = err
        out[:, i1:i2] = q1
        w[:, i2:] -= err1.matmul(inverse[i1:i2, i2:])
    return out


def compile_seconds(size: int) -> float:
    """Seconds to compile for one shape."""
    shape = jax.ShapeDtypeStruct((size, size), jnp.float32)
    lowered = jax.jit(lambda w, gram: gptq(w, gram, SPEC, damping=DAMPING)).lower(shape, shape)
    start = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - start


def run(quick: bool = False) -> list[Row]:
    """The rows."""
    size = 512 if quick else 2048
    w, gram = problem(size)
    ours = (jnp.asarray(w), jnp.asarray(gram))
    theirs = (torch.from_numpy(w.T.copy()), torch.from_numpy(gram))
    # The loop has no error to report, so none is asked for.
    solve = jax.jit(lambda w, gram: gptq(w, gram, SPEC, block_size=BLOCK, damping=DAMPING).weight)
    same = np.mean(np.asarray(solve(*ours)) == published(*theirs).numpy().T)

    candidates: dict[str, Any] = {
        "ours": lambda: solve(*ours),
        "torch": lambda: published(*theirs),
    }
    seconds = interleaved(candidates, rounds=3 if quick else 7, warmup=1)
    name = f"GPTQ int4/128, {size} x {size}"
    wide, narrow = compile_seconds(2048), compile_seconds(512)
    return [
        row(name, seconds["ours"], "torch", seconds["torch"], at_least=1),
        row(f"{name}: equal values", float(same), "of all", 1.0, unit=""),
        row("GPTQ: compile for 2048 inputs", wide, "for 512 inputs", narrow),
        row("GPTQ: compile for 2048 inputs", wide, "allowed", COMPILE_SECONDS, at_most=1),
    ]


def main() -> None:
    show("GPTQ", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
