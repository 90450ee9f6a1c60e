"""Erdos-Renyi-Kernel counts against its definition, solved by bisection."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.pruning import erk, kept_count, uniform

shapes = st.lists(
    st.lists(st.integers(1, 64), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6
)


def densities(shapes, sparsity):
    """`min(1, eps sum(d) / prod(d))` with the eps that keeps the budget."""
    sizes = np.array([math.prod(s) for s in shapes], float)
    raw = np.array([sum(s) for s in shapes], float) / sizes
    low, high = 0.0, 1 / raw.min() + 1
    for _ in range(200):
        eps = (low + high) / 2
        total = np.sum(sizes * np.minimum(1, eps * raw))
        low, high = (eps, high) if total < (1 - sparsity) * sizes.sum() else (low, eps)
    return np.minimum(1, high * raw)


@settings(max_examples=200)
@given(shapes, st.floats(0, 1))
def test_erk_is_its_definition_to_one_weight_and_its_total_is_exact(shapes, sparsity):
    counts = erk(shapes, sparsity)
    sizes = [math.prod(s) for s in shapes]
    assert sum(counts) == kept_count(sum(sizes), sparsity)
    assert all(0 <= c <= n for c, n in zip(counts, sizes))
    # One for the rounding of each leaf, one for that of the budget.
    wanted = densities(shapes, sparsity) * sizes
    assert np.all(np.abs(np.array(counts) - wanted) <= 2 + 1e-6 * np.array(sizes))


def test_erk_of_resnet_kernels_by_hand():
    # sums 8+9=... : densities proportional to 134/36864 and 2058/1048576... of 3x3x64x64 and
    # 1024x1034, at 90%: eps = 0.1 N / (sum of sums), as neither is dense.
    found = erk([(3, 3, 64, 64), (1024, 1034)], 0.9)
    total = 36_864 + 1_058_816
    eps = 0.1 * total / (134 + 2058)
    assert found == [round(134 * eps), round(2058 * eps)]


def test_uniform():
    assert uniform([(10, 10), (3,)], 0.5) == [50, 2]
    with pytest.raises(jc.SpecError, match="allocation='layers': write one of uniform, erk"):
        jc.pruning.magnitude(allocation="layers")
    with pytest.raises(jc.SpecError, match="scope='layer': write one of local, global"):
        jc.pruning.magnitude(scope="layer")
    with pytest.raises(jc.SpecError, match="leave one of them out"):
        jc.pruning.magnitude(scope="global", allocation="erk")
