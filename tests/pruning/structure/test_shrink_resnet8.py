"""The example: a trained ResNet-8 with fewer channels, trained on, stored and loaded."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))

import _digits
import _mnist
import _resnet8_training
import shrink_resnet8
from _resnet8 import ResNet8


@pytest.mark.slow
def test_half_the_multiplications_are_removed_and_the_rest_is_trained(tmp_path):
    model, data = ResNet8(), _mnist.Digits(*_digits.load_large())
    rows, dense = shrink_resnet8.compare(
        model, data, tmp_path, epochs=8, tuned=6, keep=0.5, round_to=8
    )
    before, removed, after = rows
    assert after["multiplications"] == removed["multiplications"]
    assert after["multiplications"] <= before["multiplications"] / 2
    assert after["file_bytes"] < 0.7 * before["file_bytes"]
    assert before["accuracy"] > 90
    # A point of 397 images is four of them.
    assert after["accuracy"] > max(before["accuracy"] - 4, removed["accuracy"])

    # What is loaded runs on the model's own code, in fewer channels than that has.
    small, variables, plan = shrink_resnet8.restore(tmp_path / "tuned.safetensors", model)
    shapes = {x.shape for x in jax.tree.leaves(variables["params"])}
    assert {leaf.small for leaf in plan.under("params").leaves} == shapes
    assert shapes != {x.shape for x in jax.tree.leaves(dense["params"])}
    assert _resnet8_training.accuracy(small, variables, data) == after["accuracy"]
