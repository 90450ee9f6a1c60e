"""Adapters beside codes of three bits: what is trained, stored, and lost by merging."""

import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import _digits
import _mnist
import qlora

import jaxcompress as jc


@pytest.mark.slow
def test_adapters_learn_turned_digits_beside_codes_that_stay(tmp_path):
    images, labels, test_images, test_labels = _digits.load()
    wide = lambda x: np.pad(
        np.kron(x.reshape(-1, 8, 8), np.ones((1, 3, 3), np.float32)), ((0, 0), (2, 2), (2, 2))
    ).reshape(-1, 784)
    count = len(test_images) // 10 * 10
    digits = _mnist.Digits(wide(images), labels, wide(test_images[:count]), test_labels[:count])
    codes = jc.Quantize("int3", group_size=64)
    rows = qlora.compare(digits, tmp_path, quantize=codes, rank=8, epochs=5, tuned=14)
    by_name = {row["model"]: row for row in rows}
    assert by_name["codes"]["upright"] > 85
    assert by_name["codes"]["turned"] < 50
    small = jc.load(tmp_path / "codes.safetensors")
    adapted = jc.load(tmp_path / "codes-LoRA.safetensors")
    for name, layer in small.items():
        np.testing.assert_array_equal(
            adapted[name]["kernel"].base.materialize(), layer["kernel"].materialize()
        )
    for start in ("LoRA", "LoftQ"):
        row, merged = by_name[f"codes, {start}"], by_name[f"codes, {start}, merged"]
        assert row["turned"] > by_name["codes"]["turned"] + 40
        # Rank 8, at the inputs and outputs of four kernels.
        assert row["trained"] == 8 * (25 + 20 + 500 + 50 + 800 + 500 + 500 + 10)
        assert merged["lost"] > 0.1
        assert merged["file_bytes"] < row["file_bytes"] < by_name["float32"]["file_bytes"] / 5
    console = Console(record=True, width=120)
    qlora.show(rows, console)
    assert "codes, LoftQ, merged" in console.export_text()
