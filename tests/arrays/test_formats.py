"""Formats of codes against ml_dtypes, brute force and published tables."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.arrays.formats import IntFormat, code_format, int_format
from jaxcompress.errors import SpecError

FLOATS = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}
NAMES = [
    *FLOATS, "nf4", "binary", "ternary", "pow2_2", "pow2_3", "pow2_5", "pow2_8", "int1", "int2",
    "int3", "int8", "uint1", "uint5", "uint8", "fixed8.5",
]  # fmt: skip


def encode(name, x, noise=None):
    return np.asarray(jax.jit(code_format(name).encode)(jnp.asarray(x, jnp.float32), noise))


def decode(name, codes):
    return np.asarray(jax.jit(code_format(name).decode)(jnp.asarray(codes)))


@pytest.mark.parametrize("name", FLOATS)
def test_every_code_of_a_float_is_that_of_ml_dtypes(name):
    fmt, dtype = code_format(name), FLOATS[name]
    codes = np.arange(2**fmt.bits, dtype=np.uint8)
    values = codes.view(dtype).astype(np.float32)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(decode(name, codes)[finite], values[finite])
    assert fmt.extent == float(ml_dtypes.finfo(dtype).max)
    assert len(fmt.values()) == np.sum(finite) - 1  # there are two zeros


@pytest.mark.parametrize("name", FLOATS)
def test_floats_round_as_ml_dtypes_do(name):
    fmt, dtype = code_format(name), FLOATS[name]
    rng = np.random.default_rng(0)
    values = fmt.values()
    x = rng.standard_normal(20_000) * np.exp(rng.uniform(-12, np.log(fmt.extent), 20_000))
    x = np.concatenate([x, values, (values[1:] + values[:-1]) / 2])  # ties too
    x = np.clip(x, -fmt.extent, fmt.extent).astype(np.float32)
    expected = x.astype(dtype)
    found = encode(name, x)
    np.testing.assert_array_equal(decode(name, found), expected.astype(np.float32))
    bits = np.where(expected.astype(np.float32) == 0, 0, expected.view(np.uint8))
    np.testing.assert_array_equal(found, bits)
    np.testing.assert_array_equal(
        decode(name, encode(name, np.float32([1e30, -1e30]))), [fmt.extent, -fmt.extent]
    )


def test_nf4_has_the_quantiles_it_is_named_for():
    # Dettmers et al.: quantiles of the normal distribution, 8 for the positive half and 7 for the
    # negative one, from the mean of two tails; printed from float32, hence 1e-6.
    offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
    above = scipy.stats.norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -scipy.stats.norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    table = np.sort(np.concatenate([above, [0.0], below])) / above.max()
    np.testing.assert_allclose(code_format("nf4").values(), table, atol=1e-6)


@pytest.mark.thin(8)
@pytest.mark.parametrize("name", NAMES)
def test_codes_are_those_of_the_nearest_value(name):
    fmt = code_format(name)
    values = fmt.values().astype(np.float64)
    rng = np.random.default_rng(1)
    x = rng.uniform(1.1 * values[0], 1.1 * values[-1] + 0.1, 4000).astype(np.float32)
    best = np.min(np.abs(x[:, None] - values), axis=1)
    found = decode(name, encode(name, x))
    # A difference of two float32 numbers, one of them the distance to the nearest, in float64.
    np.testing.assert_array_equal(np.abs(x.astype(np.float64) - found), best)
    np.testing.assert_array_equal(decode(name, encode(name, values)), values)
    assert fmt.has_zero == (0 in values)
    assert fmt.extent == np.max(np.abs(values))


@pytest.mark.parametrize("name", ["nf4", "int4", "fp6_e3m2"])
def test_halfway_the_even_code_is_taken(name):
    values = code_format(name).values()
    middles = (values[1:] + values[:-1]) / 2
    exact = middles.astype(np.float64) * 2 == values[1:].astype(np.float64) + values[:-1]
    found = encode(name, middles[exact])
    assert len(found) > 5
    assert not np.any(found % 2)  # of a float the sign is not the lowest bit


def test_halfway_between_powers_of_two_the_larger_is_taken():
    x = np.float32([0.75, -0.375])
    np.testing.assert_array_equal(decode("pow2_4", encode("pow2_4", x)), [1.0, -0.5])


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("int1", "uint1")])
def test_stochastic_rounding_has_the_right_mean_and_only_neighbours(name):
    fmt, n = code_format(name), 4000
    values = fmt.values().astype(np.float64)
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.uniform(values[0], values[-1], 20), values[[0, -1]]])
    x = x.astype(np.float32)
    noise = jnp.asarray((np.arange(n) + 0.5) / n, jnp.float32)[:, None]  # every quantile once
    wide = jnp.broadcast_to(jnp.asarray(x), (n, len(x)))
    found = decode(name, jax.jit(fmt.encode)(wide, jnp.broadcast_to(noise, wide.shape)))
    high = values[np.minimum(np.searchsorted(values, x), len(values) - 1)]
    low = values[np.maximum(np.searchsorted(values, x, side="right") - 1, 0)]
    assert np.all((found == low) | (found == high))
    # n equidistant quantiles round up in a share of them that is right to one of n, and to a few
    # units in the last place of x / step, float32.
    gap = high - low
    error = np.abs(found.mean(axis=0, dtype=np.float64) - x)
    assert np.all(error <= gap * (2 / n) + 1e-6 * np.abs(x) + 1e-7)


def test_zero_and_its_signs_have_one_code():
    for name in NAMES:
        if code_format(name).has_zero:
            assert not np.any(decode(name, encode(name, np.float32([0.0, -0.0]))))
            assert len(set(encode(name, np.float32([0.0, -0.0])).tolist())) == 1


@settings(max_examples=30)
@given(st.sampled_from(NAMES), st.integers(0, 2**31 - 1))
def test_values_come_back(name, seed):
    fmt = code_format(name)
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**fmt.bits, 50)
    if isinstance(fmt, IntFormat):
        codes = np.clip(codes + fmt.qmin, fmt.qmin, fmt.qmax)
    values = decode(name, codes.astype(fmt.dtype))
    values = values[np.abs(values) <= fmt.extent]
    np.testing.assert_array_equal(decode(name, encode(name, values)), values)


def test_powers_of_two():
    assert code_format("pow2_5").values().tolist() == [
        *(-(2.0**-k) for k in range(15)), 0.0, *(2.0**-k for k in range(14, -1, -1)),
    ]  # fmt: skip
    x = np.float32([1.49, 1.51, 0.74, 0.76]) / 2
    steps = decode("pow2_5", encode("pow2_5", x))
    assert [math.log2(v) for v in steps] == [-1, 0, -2 + 0, -1]


def test_names():
    assert code_format("fixed6.2").fraction == 2
    assert code_format("ternary").values().tolist() == [-1, 0, 1]
    assert int_format("int4").qmin == -8
    for name in ("fp8", "nf5", "pow2_9", "pow2_1", "fixed9.1", "int0", ""):
        with pytest.raises(SpecError, match="write one of int1 to int8"):
            code_format(name)
    with pytest.raises(SpecError, match="nf4 has no integer codes"):
        int_format("nf4")
