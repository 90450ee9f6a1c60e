"""The character models of the example, taught for a few steps."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import assets
import sequence_distillation


@pytest.mark.slow
@pytest.mark.skipif(not assets.present("kjv"), reason="run `python examples/assets.py kjv`")
def test_students_of_a_character_model():
    found = sequence_distillation.main(steps=60, teacher_steps=60)
    assert list(found) == ["teacher", "alone", "word level", "on-policy"]
    sizes = {name: size for name, (size, _, _) in found.items()}
    words, width = 73, 48
    assert sizes["alone"] == words * 3 * width + 3 * width**2 + width * words + words
    # A uniform guess takes log2 73 = 6.2 bits, the frequencies of characters alone about 4.3.
    text, _, _ = sequence_distillation.load()
    p = np.bincount(text) / len(text)
    frequencies = -np.sum(p[p > 0] * np.log2(p[p > 0]))
    assert all(bits < frequencies for _, bits, _ in found.values())
    assert found["teacher"][1] < min(
        bits for name, (_, bits, _) in found.items() if name != "teacher"
    )
    assert all(np.isfinite(odd) for _, _, odd in found.values())
