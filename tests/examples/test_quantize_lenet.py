"""LeNet-5 in two bits: what is trained is what the file holds."""

import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import _digits
import _lenet5
import _mnist
import quantize_lenet

import jaxcompress as jc


@pytest.fixture
def digits():
    """Small images three times as large, in the middle of a canvas."""

    def wide(images):
        large = np.kron(images.reshape(-1, 8, 8), np.ones((1, 3, 3), np.float32))
        return np.pad(large, ((0, 0), (2, 2), (2, 2))).reshape(-1, 784)

    images, labels, test_images, test_labels = _digits.load()
    count = len(test_images) // 10 * 10
    return _mnist.Digits(wide(images), labels, wide(test_images[:count]), test_labels[:count])


@pytest.mark.slow
def test_two_bits_trained_stored_and_tested_from_the_file(digits, tmp_path):
    rows = quantize_lenet.compare(digits, tmp_path, epochs=4, tuned=3, seed=0)
    assert [row["model"] for row in rows] == ["float32", "2 bits", "2 bits, inputs too"]
    assert all(row["largest_difference"] == 0 for row in rows)
    assert all(row["accuracy"] > 90 for row in rows)
    small = jc.load(tmp_path / "2-bits.safetensors")
    for name, shape in _lenet5.SHAPES.items():
        kernel = small[name]["kernel"]
        assert isinstance(kernel, jc.QuantizedArray)
        assert kernel.format == "int2"
        assert kernel.shape == shape
    # Two bits to each of 430,500 weights, 580 scales in bfloat16, and 580 biases in float32.
    payload = 430_500 / 4 + 580 * 2 + 580 * 4
    # The first kernel has one input: its codes are packed along five columns, in whole bytes.
    assert payload <= jc.nbytes(small) <= payload * 1.01
    assert rows[1]["file_bytes"] < rows[0]["file_bytes"] / 14
    console = Console(record=True, width=120)
    quantize_lenet.show(rows, console)
    assert "2 bits, inputs too" in console.export_text()
