"""Pictures of what is in a file (extra `plots`)."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxcompress.arrays.base import materialize
from jaxcompress.checkpoint.sources import open_params
from jaxcompress.errors import CompressError
from jaxcompress.lazy import LazyArray
from jaxcompress.report.contents import Contents
from jaxcompress.rules import flatten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST = 40  # leaves that a page has room for
_BINS = np.linspace(-4, 4, 162)


def draw_contents(found: Contents, out: str | os.PathLike[str]) -> None:
    """Draws where the bytes are, and how the weights of each leaf are distributed.

    Left, the bytes of the largest leaves, by codes, scales, masks and so on; right, for each of
    them, the histogram of its weights in units of their root mean square, on a logarithmic scale:
    a grid shows as lines, a pruned leaf as a line at zero.

    Args:
      found: what `contents` found.
      out: the picture; its suffix says the kind.

    Raises:
      CompressError: when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CompressError("pictures need matplotlib: pip install 'jaxcompress[plots]'") from error

    rows = sorted(found.rows, key=lambda row: -row["bytes"])
    shown, rest = rows[:_MOST], rows[_MOST:]
    figure = Figure(figsize=(14, 2.2 + 0.24 * (len(shown) + bool(rest))), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_bytes(left, shown, rest)
    image = _draw_distributions(right, shown, dict(flatten(open_params(found.path))[0]))
    figure.colorbar(image, ax=right, label="log10 of the share of weights")
    figure.suptitle(f"{os.path.basename(found.path)}: {found.total / 1e6:.2f} MB")
    try:
        figure.savefig(out, dpi=120)
    except ValueError as error:  # matplotlib lists the suffixes that it knows
        raise CompressError(f"{os.fspath(out)}: {error}") from error


def _draw_bytes(axes: Axes, shown: list[dict[str, Any]], rest: list[dict[str, Any]]) -> None:
    names = [row["path"] for row in shown]
    parts = [row["parts"] for row in shown]
    if rest:
        names.append(f"{len(rest)} more")
        parts.append(
            {
                kind: sum(row["parts"].get(kind, 0) for row in rest)
                for kind in {kind for row in rest for kind in row["parts"]}
            }
        )
    start = np.zeros(len(names))
    for kind in sorted({kind for part in parts for kind in part}):
        width = np.array([part.get(kind, 0) for part in parts]) / 1e6
        axes.barh(range(len(names)), width, left=start, label=kind)
        start += width
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(max(1, len(names)) - 0.5, -0.5)
    axes.set_xlabel("MB in the file")
    if names:
        axes.legend(fontsize=8, loc="lower right")


def _draw_distributions(axes: Axes, shown: list[dict[str, Any]], leaves: dict[str, Any]) -> Any:
    image = np.full((max(1, len(shown)), len(_BINS) - 1), np.nan)
    for i, row in enumerate(shown):
        leaf = leaves[row["path"]]
        loaded = leaf.load() if isinstance(leaf, LazyArray) else leaf
        image[i] = _histogram(np.asarray(materialize(loaded)))
        axes.text(4.1, i, row["form"], fontsize=7, va="center")
    axes.set_xlabel("weight / root mean square")
    place = (-4, 4, len(image) - 0.5, -0.5)
    return axes.imshow(image, aspect="auto", interpolation="nearest", extent=place)


def _histogram(dense: np.ndarray) -> np.ndarray:
    """The logarithm of the share of weights in each bin; NaN where there are none."""
    values = np.abs(dense) if dense.dtype.kind == "c" else dense
    values = values.reshape(-1).astype(np.float32)
    values = values[np.isfinite(values)]
    scale = float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if values.size else 0.0
    counts = np.histogram(np.clip(values / scale, -4, 4) if scale else values, _BINS)[0]
    shares = counts / max(1, values.size)
    return np.log10(shares, where=shares > 0, out=np.full(shares.shape, np.nan))
