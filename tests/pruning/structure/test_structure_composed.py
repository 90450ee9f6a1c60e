"""Smaller and then something else: compressed, observed, tapped, distilled, pruned further."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from structure_models import array, mlp, scanned

import jaxcompress as jc
from jaxcompress import CompressError
from jaxcompress.distillation import tap
from jaxcompress.pruning.structure import groups, mask_channels, plan, shrink, shrink_params, shrunk

RULES = {
    "quantized": jc.Quantize("int8"),
    "factored": jc.LowRank(1),
    "sparse": jc.Prune(0.5),
    "trained": jc.FakeQuantize("int8"),
    "chain": jc.chain(jc.LowRank(1), jc.Quantize("int8")),
}


def half(make=mlp, round_to=2):
    (fn, params, args), _ = make()
    found = plan(groups(fn, params, *args), params, 0.6, round_to=round_to)
    return fn, params, args, found, *shrink(fn, params, found)


def near(a, b):
    """Sums of some ten products in float32, in another order."""
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, float(jnp.abs(b).max())))


@pytest.mark.parametrize("form", RULES)
def test_smaller_leaves_are_compressed(form):
    _, _, (x,), _, small, fewer = half()
    stored = jc.compress(fewer, {"[acd]": RULES[form]})
    near(jc.compressed(small)(stored, x), small(jc.decompress(stored), x))


@pytest.mark.slow
def test_a_stack_of_layers_is_smaller_and_stays_compressed_in_its_loop():
    _, _, (x,), _, small, fewer = half(scanned)
    stored = jc.compress(fewer, {"layers/up": jc.Quantize("int8")})
    loss = lambda p: jnp.sum(jc.compressed(small)(p, x) ** 2)
    trained, rest = jc.partition(stored)
    grads = jax.grad(lambda t: loss(jc.combine(t, rest)))(trained)
    dense = jax.grad(lambda p: jnp.sum(small(p, x) ** 2))(jc.decompress(stored))
    near(grads["layers"]["down"], dense["layers"]["down"])


def test_a_walk_for_compressed_leaves_inside_is_told_how_to_be_outside():
    fn, _, (x,), found, _, fewer = half()
    stored = jc.compress(fewer, {"a": jc.Quantize("int8")})
    with pytest.raises(CompressError, match=r"jc.compressed\(shrunk\(fn, plan\)\) runs that"):
        shrunk(jc.compressed(fn), found)(stored, x)


@pytest.mark.slow
def test_what_the_weights_meet_is_observed():
    """Statistics for a solver, of the smaller layers; the axes of their inputs too."""
    _, _, (x,), found, small, fewer = half()
    stats = jc.observe(small, fewer, [x])
    hidden = jax.nn.relu(x @ fewer["a"] + fewer["b"])
    near(stats["c"][-2,].gram, hidden.T @ hidden)
    assert jc.kernel_axes(small, fewer, x)["c"] == jc.KernelAxes((-2,), (-1,))
    assert jc.compress(fewer, {"c": jc.GPTQ("int4")}, stats=stats)["c"].shape == found.shapes["c"]


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8, name="hidden")(x))
        return nn.Dense(2, name="head")(x)


def student_of(x):
    params = Net().init(jax.random.key(0), x)
    found = plan(groups(Net().apply, params, x), params, 0.5, round_to=2)
    return params, found, *shrink(Net().apply, params, found)


def test_layers_are_tapped_by_their_names():
    """What they return is that of the masked model at the channels that stay."""
    x = array(0, 4, 3)
    params, found, student, fewer = student_of(x)
    masked = mask_channels(params, found)
    wanted, inner = tap(Net().apply, "hidden")(masked, x)
    got, smaller = jax.jit(tap(student, "hidden"))(fewer, x)
    near(got, wanted)
    kept = {leaf.path: leaf.kept for leaf in found.leaves}["params/hidden/kernel"][1]
    near(smaller["hidden"], inner["hidden"][:, jnp.array(kept)])


@pytest.mark.slow
def test_a_smaller_student_is_taught_by_the_whole_model():
    """And pruned further while it learns; compressed, its layers are tapped in either order."""
    x = array(0, 4, 3)
    params, _, student, fewer = student_of(x)
    stored = jc.compress(fewer, {"**/kernel": jc.FakeQuantize("int8")})
    both = tap(jc.compressed(student), "hidden")(stored, x)[1]["hidden"]
    near(both, jc.compressed(tap(student, "hidden"))(stored, x)[1]["hidden"])

    optimizer = jc.sparsify(
        optax.adam(0.05),
        jc.pruning.magnitude(),
        jc.pruning.one_shot(0.25),
        {"**/kernel": "unstructured"},
    )
    teacher = Net().apply(params, x)

    @jax.jit
    def step(p, state):
        distance = lambda p: jnp.mean((student(p, x) - teacher) ** 2)
        loss, grads = jax.value_and_grad(distance)(p)
        updates, state = optimizer.update(grads, state, p)
        return optax.apply_updates(p, updates), state, loss

    state, losses = optimizer.init(fewer), []
    for _ in range(20):
        fewer, state, loss = step(fewer, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert float((fewer["params"]["hidden"]["kernel"] == 0).mean()) == 0.25


def test_shapes_alone_are_made_smaller():
    _, params, _, found, _, fewer = half()
    shapes = shrink_params(jax.eval_shape(lambda: params), found)
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, fewer)
