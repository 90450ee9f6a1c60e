"""Convolutions that are factored and trained on; weights that gather around a few values."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import _digits
import _mnist
import factorize
import soft_sharing

import jaxcompress as jc
from jaxcompress.sharing import merge, share_by_mixture, sharing_gap


@pytest.fixture(scope="module")
def digits():
    """The 8 x 8 digits on 28 x 28 pixels."""
    images, labels, test_images, test_labels = _digits.load_large()
    count = len(test_images) // 10 * 10
    return _mnist.Digits(images, labels, test_images[:count], test_labels[:count])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["tucker", "separable"])
def test_factors_are_trained_and_stored(form, digits, tmp_path):
    rows, _, small = factorize.compare(
        factorize.ResNet8(), digits, tmp_path, epochs=8, tuned=4, form=form
    )
    before, factored, after = rows
    assert after["flops"] == factored["flops"] < before["flops"] / 2
    assert after["file_bytes"] < before["file_bytes"]
    assert before["accuracy"] > 90
    # A point of 390 images is four of them.
    assert after["accuracy"] > max(before["accuracy"] - 3, factored["accuracy"] - 1)
    stored = jc.load(tmp_path / "factored-and-trained.safetensors")
    for a, b in zip(jax.tree.leaves(stored), jax.tree.leaves(small), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_weights_gather_and_are_stored_as_what_they_gather_at(digits, tmp_path):
    before = soft_sharing.dense(digits, 10, 0)[-1].params
    mixture, after = soft_sharing.share(before, digits, 30, 0.03, 0.95)
    merged = merge(mixture, 1.0)
    small = share_by_mixture(after, merged, soft_sharing.KERNELS)
    assert len(merged.means) < len(mixture.means)
    kept = jc.pruning.sparsity_report({k: v["kernel"] for k, v in small.items()})
    assert kept.sparsity > 0.5
    assert all(np.isfinite(gap["rms"]) for gap in sharing_gap(after, small).values())
    *_, tuned = soft_sharing.train(small, soft_sharing.optax.adam(1e-3), digits, 5, 0)
    assert tuned.accuracy > soft_sharing.accuracy(before, digits) - 15
    assert jc.nbytes(small) < jc.nbytes(before) / 8
