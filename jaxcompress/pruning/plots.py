"""Pictures of sparsity: by leaf, and along a schedule (extra `plots`)."""

from __future__ import annotations

import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcompress.errors import CompressError
from jaxcompress.pruning.report import SparsityReport
from jaxcompress.pruning.schedules import Schedule


def draw_sparsity(
    report: SparsityReport,
    out: str | os.PathLike[str],
    *,
    schedule: Schedule | None = None,
    step: int | None = None,
) -> None:
    """Draws how sparse each leaf is and, next to it, the schedule.

    Args:
      report: what `sparsity_report` found.
      out: the picture; its suffix says the kind.
      schedule: drawn with a mark at each choice of masks.
      step: the present update, marked on the schedule.

    Raises:
      CompressError: when matplotlib is not installed, or does not know the suffix.

    Examples:
      >>> import jax.numpy as jnp, tempfile, pathlib, jaxcompress as jc
      >>> report = jc.pruning.sparsity_report({"kernel": jnp.eye(4)})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     picture = pathlib.Path(folder, "sparsity.png")
      ...     draw_sparsity(report, picture, schedule=jc.pruning.cubic_schedule(0.75, end=100))
      ...     picture.read_bytes()[1:4]
      b'PNG'
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CompressError("pictures need matplotlib: pip install 'jaxcompress[plots]'") from error

    rows = report.rows
    wide = schedule is not None
    figure = Figure(figsize=(13 if wide else 8, 1.8 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 2 if wide else 1, squeeze=False)[0]
    _draw_leaves(axes[0], rows, report.sparsity)
    if schedule is not None:
        _draw_schedule(axes[1], schedule, step)
    try:
        figure.savefig(out, dpi=120)
    except ValueError as error:  # matplotlib lists the suffixes that it knows
        raise CompressError(f"{os.fspath(out)}: {error}") from error


def _draw_leaves(axes: Any, rows: list[dict[str, Any]], total: float) -> None:
    places = np.arange(len(rows))[::-1]
    axes.barh(places, [100 * row["sparsity"] for row in rows], color="C0")
    for place, row in zip(places, rows):
        axes.text(1, place, f"{row['kept']:,} of {row['size']:,}", va="center", fontsize="x-small")
    axes.set_yticks(places, [row["path"] for row in rows], fontsize="small")
    axes.axvline(100 * total, color="C3", linestyle="--", label=f"all: {100 * total:.2f}%")
    axes.set(xlim=(0, 100), xlabel="sparsity in %", title="by leaf")
    axes.legend(fontsize="small")


def _draw_schedule(axes: Any, schedule: Schedule, step: int | None) -> None:
    last = schedule.end if schedule.end < 2**30 else schedule.begin + 20 * schedule.every
    last = max(last, step or 0, schedule.begin + 1)
    steps = jnp.asarray(np.unique(np.linspace(0, 1.1 * last, 2000).astype(np.int32)))
    axes.plot(steps, 100 * np.asarray(schedule.sparsity(steps)), color="C0")
    every = np.arange(schedule.begin, min(schedule.end, last) + 1, dtype=np.int32)
    due = jnp.asarray(every[np.asarray(schedule.refreshes(jnp.asarray(every)))])
    axes.plot(due, 100 * np.asarray(schedule.sparsity(due)), "|", color="C1", label="masks chosen")
    if step is not None:
        axes.axvline(step, color="C3", linestyle="--", label=f"now, update {step:,}")
    axes.set(ylim=(-2, 102), xlabel="update", ylabel="sparsity in %", title="schedule")
    axes.legend(fontsize="small")
