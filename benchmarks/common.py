"""What all benchmarks share: interleaved timing, models, and one kind of row."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def interleaved(
    candidates: dict[str, Callable[[], Any]], *, rounds: int = 15, warmup: int = 2, calls: int = 1
) -> dict[str, float]:
    """The median seconds of each candidate, run in turn so that drift meets all alike.

    The order rotates from round to round, for each candidate finds in the caches, and in the pages
    just freed, what the one before it left.

    A turn is `calls` calls, for candidates of a millisecond or so: as in a loop, each finds in the
    caches what its own last call left there.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates.items())
    gc.collect()
    for n in range(rounds + warmup):
        order = order[1:] + order[:1]
        for name, run in order:
            start = time.perf_counter()
            for _ in range(calls):
                jax.block_until_ready(run())
            if n >= warmup:
                times[name].append((time.perf_counter() - start) / calls)
    return {name: float(np.median(t)) for name, t in times.items()}


def on_images(
    runs: dict[str, Callable[[jax.Array], Any]], batch: int, quick: bool = False
) -> dict[str, float]:
    """The median seconds of forward passes of a batch of images in the size of MNIST."""
    images = jax.random.uniform(jax.random.key(0), (batch, 784))
    return interleaved(
        {name: functools.partial(run, images) for name, run in runs.items()},
        rounds=9 if quick else 41,
        calls=10 if batch == 1 else 2,
    )


def row(
    what: str,
    ours: float,
    peer: str,
    theirs: float,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    unit: str = "s",
) -> Row:
    """A comparison. `at_least` bounds peer / ours (a speed-up), `at_most` ours / peer (a cost)."""
    if at_least is not None:
        ratio, target, ok = theirs / ours, f">= {at_least:g}x", theirs / ours >= at_least
    elif at_most is not None:
        ratio, target, ok = ours / theirs, f"<= {at_most:g}x", ours / theirs <= at_most
    else:
        ratio, target, ok = ours / theirs, "reported", True
    return {
        "what": what,
        "ours_s": ours,
        "peer": peer,
        "peer_s": theirs,
        "ratio": ratio,
        "target": target,
        "ok": bool(ok),
        "unit": unit,
    }


def _figure(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:.4g} {unit}"
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def show(title: str, rows: list[Row]) -> None:
    """Prints rows as one table."""
    table = Table("what", "ours", "against", "theirs", "ratio", "target", "", title=title)
    for r in rows:
        unit = r.get("unit", "s")
        table.add_row(
            r["what"],
            _figure(r["ours_s"], unit),
            r["peer"],
            _figure(r["peer_s"], unit),
            f"{r['ratio']:.2f}x",
            r["target"],
            "ok" if r["ok"] else "MISSED",
        )
    console = Console()
    console.width = max(console.width, 130)  # one line a row, also into a pipe
    console.print(table)
