"""Exact powers of two, and roundings that no compiler may skip."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.numerics import rounded, unit_scale


@given(st.floats(0, 3.4028234663852886e38, width=32))
def test_the_unit_scale_is_an_exact_power_of_two_with_a_normal_inverse(largest):
    scale, inverse = (float(x) for x in unit_scale(jnp.float32(largest)))
    assert np.frexp(scale)[0] == np.frexp(inverse)[0] == 0.5
    assert scale * inverse == 1.0
    assert min(scale, inverse) >= 2.0**-126
    assert largest * inverse < 8.0
    assert largest < 2.0**-126 or largest * inverse >= 1.0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_that_of_ml_dtypes_and_numpy(dtype):
    x = np.random.default_rng(0).normal(size=4096).astype(np.float32)
    expected = x.astype(getattr(ml_dtypes, dtype, dtype))
    np.testing.assert_array_equal(jax.jit(rounded, static_argnums=1)(x, dtype), expected)
    np.testing.assert_array_equal(rounded(jnp.asarray(x), "float32"), x)


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [(jc.Quantize("int8"), "float32"), (jc.Quantize("uint4", symmetric=False), "float32"),
     (jc.Codebook(3), "bfloat16")],
    ids=repr,
)  # fmt: skip
def test_what_codes_are_computed_from_is_rounded_explicitly(spec, dtype):
    """A plain cast may be dropped by a compiler that is allowed excess precision."""
    jaxpr = str(jax.make_jaxpr(spec)(jnp.ones((8, 4), dtype)))
    assert "reduce_precision" in jaxpr
