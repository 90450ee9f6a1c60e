"""Convolutions with their axes in the usual order, against those of jax as they come."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxcompress as jc
from jaxcompress.arrays.convolution import with_ordered_convolutions

# Small whole numbers: sums are exact in float32, so that any order of them gives the same bits.
RNG = np.random.default_rng(0)


def integers(*shape):
    return jnp.asarray(RNG.integers(-4, 5, shape).astype(np.float32))


CASES = {
    "usual": (("NHWC", "HWIO", "NHWC"), (2, 6, 5, 4), (3, 2, 4, 3), {}),
    "torch": (("NCHW", "OIHW", "NCHW"), (2, 4, 6, 5), (3, 4, 3, 2), {"window_strides": (2, 1)}),
    "mixed": (("HCWN", "IOHW", "WNHC"), (6, 4, 5, 2), (4, 3, 3, 2), {"lhs_dilation": (2, 1)}),
    "dilated": (("CNHW", "WIHO", "CWHN"), (4, 2, 6, 5), (2, 4, 3, 3), {"rhs_dilation": (1, 2)}),
    "groups": (("NCHW", "OIHW", "NHCW"), (2, 4, 6, 5), (6, 2, 3, 2), {"feature_group_count": 2}),
    "depthwise": (("NCHW", "OIHW", "NHWC"), (2, 4, 6, 5), (4, 1, 3, 2), {"feature_group_count": 4}),
    "batches": (("NCHW", "OIHW", "NHWC"), (4, 3, 6, 5), (6, 3, 3, 2), {"batch_group_count": 2}),
    "a line": (("NCW", "OIW", "CWN"), (2, 4, 6), (3, 4, 2), {}),
    "a volume": (("NCDHW", "OIDHW", "DNHCW"), (2, 3, 4, 5, 6), (4, 3, 2, 1, 3), {}),
    "no space": (("NC", "OI", "CN"), (2, 4), (3, 4), {}),
    "nothing": (("NCHW", "OIHW", "NCHW"), (0, 4, 6, 5), (3, 4, 3, 2), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_axes_are_those_of_jax(case):
    numbers, left, right, more = CASES[case]
    x, kernel = integers(*left), integers(*right)
    space = len(left) - 2
    arguments = {"window_strides": (1,) * space, "padding": [(1, 0)] * space, **more}
    plain = lambda x, kernel: lax.conv_general_dilated(
        x, kernel, dimension_numbers=numbers, **arguments
    )
    closed = jax.make_jaxpr(plain)(x, kernel)
    run = with_ordered_convolutions(closed)
    np.testing.assert_array_equal(run(x, kernel)[0], plain(x, kernel))
    eqns = jax.make_jaxpr(run)(x, kernel).eqns
    (eqn,) = [eqn for eqn in eqns if eqn.primitive is lax.conv_general_dilated_p]
    found = eqn.params["dimension_numbers"]
    if case != "batches":
        last = space + 1
        assert found.lhs_spec == found.out_spec == (0, last, *range(1, last))
        assert found.rhs_spec == (last, last - 1, *range(space))


def test_gradients_in_a_branch_are_those_outside_of_it():
    x, kernel = integers(4, 6, 6, 3), integers(3, 3, 3, 5)
    leaf = jc.FakeQuantize("int8")(kernel)

    def loss(kernel, x):
        layout = ("NHWC", "HWIO", "NHWC")
        out = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
        return jnp.sum(out**2)

    dense = jax.jit(jax.grad(loss, (0, 1)))(leaf.materialize(), x)
    found = jax.jit(jax.grad(jc.compressed(loss), (0, 1)))(leaf, x)
    # Up to 144 products of float32 in another order: relative to the largest, 144 * 2**-24.
    for ours, theirs in zip((found[0].weight, found[1]), dense):
        bound = 144 * 2**-24 * float(jnp.max(jnp.abs(theirs)))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound)


def test_every_convolution_in_a_branch_is_in_order():
    x, kernel = integers(4, 6, 6, 3), integers(3, 3, 3, 5)
    small = jc.FakeQuantize("int8")(kernel)

    def loss(kernel, x):
        layout = ("NHWC", "HWIO", "NHWC")
        out = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)
        return jnp.sum(out**2)

    text = jax.jit(jax.grad(jc.compressed(loss), (0, 1))).lower(small, x).as_text()
    numbers = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert len(numbers) == 3  # the product and its two gradients
    assert all("[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in line for line in numbers)
