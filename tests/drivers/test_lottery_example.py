"""The lottery example on small images: counts, and a second run that reads the first."""

import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import _digits
import _mnist
import lottery

from jaxcompress.pruning import kept_count


@pytest.mark.slow
def test_tickets_are_found_once(tmp_path):
    wide = lambda images: np.pad(images, ((0, 0), (0, 784 - 64)))
    images, labels, test_images, test_labels = _digits.load()
    digits = _mnist.Digits(wide(images), labels, wide(test_images), test_labels)
    run = lambda: lottery.compare(
        digits, tmp_path, sparsity=0.95, rounds=2, epochs=4, rate=2e-3, seed=0
    )
    rows = run()
    assert [row["left"] for row in rows] == [
        kept_count(266_200, s) for s in (0, 1 - 0.05**0.5, 0.95)
    ]
    assert all(row["winner"] > 80 for row in rows)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("round-*")}
    assert len(files) == 3
    assert run() == rows
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("round-*")} == files
    console = Console(record=True, width=100)
    lottery.show(rows, console)
    assert f"{rows[-1]['left']:,}" in console.export_text()
