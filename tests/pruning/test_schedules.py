"""Schedules by their formulas, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.pruning import cubic_schedule, one_shot, periodic


def cubic(t, final, initial, begin, end):
    """Zhu and Gupta's formula, with the schedule's own limits."""
    if t < begin:
        return 0.0
    share = (min(t, end) - begin) / (end - begin)
    return final + (initial - final) * (1 - share) ** 3


@settings(max_examples=60)
@given(
    st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000), st.integers(1, 100_000),
    st.integers(1, 500), st.integers(0, 120_000),
)  # fmt: skip
def test_the_cubic_schedule(final, initial, begin, length, every, t):
    schedule = cubic_schedule(final, begin=begin, end=begin + length, every=every, initial=initial)
    expected = cubic(t, final, initial, begin, begin + length)
    # Five roundings of float32.
    assert abs(float(schedule.sparsity(t)) - expected) <= 5 * 2**-24
    due = begin <= t <= begin + length and ((t - begin) % every == 0 or t == begin + length)
    assert bool(schedule.refreshes(t)) == due


@pytest.mark.parametrize("every", [1, 7, 10, 64, 1000])
def test_the_end_is_exact_whatever_the_interval(every):
    schedule = cubic_schedule(0.9, begin=3, end=500, every=every)
    assert schedule.refreshes(500)
    for size in (10, 1_000_003, 2**31 - 1):
        last = jc.pruning.kept_count(size, 0.9)
        for step in (500, 501, 10_000):
            assert int(schedule.kept(size, last, jnp.int32(step))) == last
        assert int(schedule.kept(size, last, jnp.int32(3))) == size


@pytest.mark.parametrize("size", [2**24 + 1, 999_999_937, 2**26 + 77, 3_000_000_000, 2**32 - 3])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.9, 1.0])
def test_counts_of_very_many_weights(size, sparsity):
    schedule = cubic_schedule(sparsity, end=100)
    last = jc.pruning.kept_count(size, sparsity)
    counts = [int(schedule.kept(size, last, jnp.int32(t))) for t in (0, 1, 30, 99, 100)]
    assert counts[0] == size
    assert counts[-1] == last
    exact = [last + (1 - t / 100) ** 3 * (size - last) for t in (0, 1, 30, 99, 100)]
    # Six roundings of float32, of at most 2**32.
    np.testing.assert_allclose(counts, exact, rtol=0, atol=1 + 6 * 2.0**8)
    assert counts == sorted(counts, reverse=True)
    # And the other way, for a schedule that grows back.
    assert int(schedule.kept(last, size, jnp.int32(0))) == last


def test_counts_are_the_same_compiled_or_not_and_fall():
    schedule = cubic_schedule(0.93, begin=10, end=777, every=1, initial=0.1)
    steps = jnp.arange(900)
    counts = lambda t: schedule.kept(900_017, 70_013, t)
    compiled = jax.jit(jax.vmap(counts))(steps)
    one_by_one = [int(counts(t)) for t in steps[::25]]
    np.testing.assert_array_equal(compiled[::25], one_by_one)
    # float32 all the way, each step rounded: numpy gives the same bits.
    left = np.clip(777 - np.arange(900), 0, 767).astype(np.float32)
    share = left / np.float32(767)
    way = share * share * share * np.float32(900_017 - 70_013)
    np.testing.assert_array_equal(compiled, 70_013 + np.round(way).astype(np.int32))
    assert np.all(np.diff(np.asarray(compiled, np.int64)) <= 0)


def test_one_shot_and_periodic():
    once = one_shot(0.4, at=5)
    assert [t for t in range(20) if once.refreshes(t)] == [5]
    assert float(once.sparsity(4)) == 0
    assert float(once.sparsity(5)) == np.float32(0.4)
    again = periodic(0.4, every=3, begin=4, end=12)
    assert [t for t in range(20) if again.refreshes(t)] == [4, 7, 10, 12]
    assert bool(periodic(0.4, every=10).refreshes(2_000_000_000))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cubic_schedule(1.2, end=10), "sparsity=1.2: write the share to remove, from 0 to"),
        (lambda: cubic_schedule(0.9, end=10, initial=-1), "initial=-1: write the share"),
        (lambda: cubic_schedule("0.9", end=10), "sparsity='0.9'"),
        (lambda: cubic_schedule(0.9, begin=20, end=10), "end=10: .* at least 20"),
        (lambda: cubic_schedule(0.9, end=10, every=0), "every=0: .* at least 1"),
        (lambda: cubic_schedule(0.9, end=10.5), r"end=10\.5: write a whole number"),
        (lambda: one_shot(0.9, at=-1), "begin=-1"),
        (lambda: periodic(float("nan"), every=1), "sparsity=nan"),
    ],
)
def test_bad_schedules(make, message):
    with pytest.raises(jc.SpecError, match=message):
        make()
