"""Leaves that act on their inputs, on eight devices."""

from __future__ import annotations

import eight_devices
import pytest

SHARDED = """
import sys, jax, jax.numpy as jnp, numpy as np, jaxcompress as jc
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxcompress.quantization.activations import PACT, QuantizeInput
from jaxcompress.quantization.transforms import Rotate, SmoothQuant
kind = getattr(AxisType, sys.argv[1])
mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
x = jax.random.normal(jax.random.key(1), (8, 64))
dense = {"kernel": jax.random.normal(jax.random.key(0), (64, 32)),
         "columns": jax.random.normal(jax.random.key(2), (64, 32))}
places = {"kernel": P("a", "b"), "columns": P(None, "b")}
there = {n: jax.device_put(v, NamedSharding(mesh, places[n])) for n, v in dense.items()}
apply = lambda p, x: x @ p["columns"] + x @ p["kernel"]
stats = jc.observe(apply, dense, [x], ("abs_max",))
static = QuantizeInput("int8", per="tensor", range="static")
int8 = jc.Quantize("int8")
specs = [
    jc.chain(SmoothQuant(), int8, QuantizeInput("int8")),
    jc.chain(Rotate(), int8, QuantizeInput("int8", per="tensor")),
    jc.chain(int8, static),
    jc.chain(jc.Quantize("int4"), PACT("uint8")),
    jc.chain(jc.FakeQuantize("int8"), PACT("uint8")),
]
for range in ("dynamic", "static"):  # also where the weight is split along its inputs
    spec = jc.FakeQuantize("int4", group_size=8, range=range)
    loss = lambda leaf: jnp.sum(leaf.materialize() ** 2)
    for name in dense:
        here, small = (jc.compress(t, {"*": spec})[name] for t in (dense, there))
        with jax.set_mesh(mesh):
            found, grad = jax.jit(jax.value_and_grad(loss))(small)
        value, expected = jax.value_and_grad(loss)(here)
        np.testing.assert_allclose(found, value, rtol=1e-5)
        np.testing.assert_array_equal(grad.weight, expected.weight)
for spec in specs:
    here, small = (jc.compress(t, {"*": spec}, stats=stats) for t in (dense, there))
    for leaf in jax.tree.leaves(small):
        assert leaf.sharding.mesh == mesh, leaf.sharding
    # A contraction over an axis that is split has no type on an Explicit mesh, dense or not.
    names = ("columns",) if kind == AxisType.Explicit else ("columns", "kernel")
    for name in names:
        fn = lambda p, x: x @ p[name]
        with jax.set_mesh(mesh):
            y = jax.jit(jc.compressed(fn))(small, x)
        # Integers are summed exactly; sums of floats before them may move a code by one.
        expected = jax.jit(jc.compressed(fn))(here, x)
        np.testing.assert_allclose(y, expected, rtol=0, atol=0.1 if "Rotate" in repr(spec) else 1e-4)
"""


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_leaves_on_a_mesh(axes):
    eight_devices.run(SHARDED, axes)
