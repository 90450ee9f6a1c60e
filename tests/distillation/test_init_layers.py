"""Students that begin as layers of their teacher: named, stacked, compressed, of NNX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcompress as jc
from jaxcompress.distillation.init_layers import init_from_layers
from jaxcompress.distillation.layer_maps import layer_map


class Named(nn.Module):
    layers: int
    classes: int = 2

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="embed")(x)
        for i in range(self.layers):
            x = nn.tanh(nn.Dense(4, name=f"layer_{i}")(x))
        return nn.Dense(self.classes, name="head")(x)


X = jnp.ones((1, 3))


def params(model, seed):
    return model.init(jax.random.key(seed), X)["params"]


def test_named_layers_and_what_is_outside():
    teacher, student = params(Named(6), 0), params(Named(3, classes=5), 1)
    layers = layer_map(3, 6)
    found = init_from_layers(teacher, student, layers, pattern="layer_{}")
    assert jax.tree.structure(found) == jax.tree.structure(student)
    for i, n in enumerate(layers):
        np.testing.assert_array_equal(
            found[f"layer_{i}"]["kernel"], teacher[f"layer_{n}"]["kernel"]
        )
    np.testing.assert_array_equal(found["embed"]["kernel"], teacher["embed"]["kernel"])
    np.testing.assert_array_equal(found["head"]["kernel"], student["head"]["kernel"])
    whole = init_from_layers(
        {"model": {"encoder": teacher}}, {"model": {"encoder": params(Named(6), 1)}}, range(6),
        pattern="**/layer_{}",
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, whole["model"]["encoder"], teacher)
    # A student that is the first layers of its teacher computes the same.
    cut = init_from_layers(teacher, params(Named(2), 1), (0, 1), pattern="layer_{}")
    x = nn.tanh(X @ teacher["embed"]["kernel"] @ teacher["layer_0"]["kernel"])
    expected = nn.tanh(x @ teacher["layer_1"]["kernel"]) @ teacher["head"]["kernel"]
    np.testing.assert_allclose(Named(2).apply({"params": cut}, X), expected, rtol=1e-5)


def test_a_student_that_is_donated_leaves_its_teacher():
    teacher = {"layer_0": jnp.ones(2), "codes": jc.Quantize("int8")(jnp.eye(2)), "scale": 2.0}
    student = {"layer_0": jnp.zeros(2), "codes": jnp.zeros((2, 2)), "scale": 1.0}
    found = init_from_layers(teacher, student, (0,), pattern="layer_{}")
    assert found["scale"] == 2.0
    jax.jit(lambda x: jax.tree.map(lambda x: x + 1, x), donate_argnums=0)(found)
    arrays = [x for x in jax.tree.leaves(teacher) if isinstance(x, jax.Array)]
    assert len(arrays) == 3
    assert not any(x.is_deleted() for x in arrays)


def test_stacked_layers_dtypes_and_compressed_leaves():
    teacher = {"blocks": {"kernel": jax.random.normal(jax.random.key(0), (6, 4, 8))}}
    student = {"blocks": {"kernel": jnp.zeros((3, 4, 8), jnp.bfloat16)}}
    found = init_from_layers(teacher, student, (1, 3, 5), pattern="blocks")
    kernel = found["blocks"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    expected = teacher["blocks"]["kernel"][1::2]
    np.testing.assert_array_equal(kernel, expected.astype(jnp.bfloat16))
    shapes = jax.eval_shape(lambda: {"blocks": {"kernel": jnp.zeros((3, 4, 8))}})
    small = jc.compress(teacher, {"**/kernel": jc.Quantize("int8")})
    taken = init_from_layers(small, shapes, (1, 3, 5), pattern="blocks")["blocks"]["kernel"]
    assert jc.is_compressed(taken)
    np.testing.assert_array_equal(
        taken.materialize(), small["blocks"]["kernel"].materialize()[1::2]
    )


def test_layers_of_nnx():
    class Model(nnx.Module):
        def __init__(self, layers, rngs):
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(layers)])

    teacher = nnx.state(Model(4, nnx.Rngs(0)))
    graph, student = nnx.split(Model(2, nnx.Rngs(1)))
    found = nnx.merge(graph, init_from_layers(teacher, student, (0, 3), pattern="layers/{}"))
    for layer, n in zip(found.layers, (0, 3)):
        np.testing.assert_array_equal(layer.kernel[...], teacher["layers"][n]["kernel"][...])


def test_what_does_not_fit():
    teacher, student = params(Named(4), 0), params(Named(2), 1)
    for layers, pattern, message in [
        ((0, 1), "block_{}", "matches no leaf of layer 0"),
        ((0, 1, 2), "layer_{}", "matches no leaf of layer 2"),
        ((0,), "layer_{}", "layer_1/bias is of layer 1, and layers="),
        ((0, 4), "layer_{}", "the teacher has no leaf 'layer_4/bias'"),
        ((), "layer_{}", "is of layer 0"),
    ]:
        with pytest.raises(jc.RuleError, match=message):
            init_from_layers(teacher, student, layers, pattern=pattern)
    narrow = {"layer_0": {"kernel": jnp.zeros((4, 3))}}
    with pytest.raises(jc.RuleError, match="both must be of one width"):
        init_from_layers(teacher, narrow, (0,), pattern="layer_{}")
    with pytest.raises(jc.RuleError, match="the teacher has 4 layers"):
        init_from_layers(
            {"a": jnp.zeros((4, 2))}, {"a": jnp.zeros((1, 2))}, (4,), pattern="a"
        )  # fmt: skip
    shapes = jax.eval_shape(lambda: student | {"extra": jnp.zeros(2)})
    with pytest.raises(jc.RuleError, match="extra: has only a shape"):
        init_from_layers(teacher, shapes, (0, 1), pattern="layer_{}")
