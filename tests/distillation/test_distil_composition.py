"""A compressed copy of the teacher, sparse training, taps and several losses in one jitted step."""

import collections
import functools

import eight_devices
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxcompress as jc
from jaxcompress import compat
from jaxcompress.distillation import soft_targets
from jaxcompress.distillation.relations_qkv import minilm
from jaxcompress.distillation.taps import tap
from jaxcompress.distillation.transformers import hidden_states


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=16, name="attention")
        x = nn.LayerNorm()(x + attention(x))
        return x + nn.Dense(16, name="down")(nn.relu(nn.Dense(32, name="up")(x)))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="embed")(x)
        for i in range(1):
            x = Block(name=f"layer_{i}")(x)
        return nn.Dense(5, name="head")(x[:, 0])


MODEL = Model()
NAMES = ["layer_0", "layer_0/attention/*"]
X = jax.random.normal(jax.random.key(1), (16, 6, 8))
REAL = np.arange(6) < np.array([6, 4] * 8)[:, None]
TEACHER = jax.jit(MODEL.init)(jax.random.key(0), X)
RULES = {
    "**/up/kernel": jc.FakeQuantize("int4", group_size=8),
    "**/down/kernel": jc.LowRank(4),
    "**/head/kernel": jc.FakeQuantize("int8", range="static"),
}
run_student, run_teacher = tap(jc.compressed(MODEL.apply), NAMES), tap(MODEL.apply, NAMES)


def loss(student, teacher, x):
    (logits, mine), (targets, theirs) = run_student(student, x), run_teacher(teacher, x)
    qkv = lambda found: tuple(found[f"layer_0/attention/{n}"] for n in ("query", "key", "value"))
    return jnp.mean(
        soft_targets(logits, targets, temperature=2.0)
        + hidden_states(mine["layer_0"], theirs["layer_0"], where=REAL)
        + minilm(qkv(mine), qkv(theirs), where=REAL)
    )


@pytest.mark.slow
def test_one_step_compresses_prunes_and_distils():
    teacher = jax.tree.map(lambda x: x.astype(jnp.bfloat16), TEACHER)
    trained, fixed = jc.partition(jc.compress(TEACHER, RULES))
    rules = {"**/up/kernel": "2:4", "**/query/kernel": "unstructured"}
    schedule = jc.pruning.cubic_schedule(0.5, begin=0, end=20, every=5)
    tx = jc.sparsify(optax.adam(1e-2), jc.pruning.magnitude(), schedule, rules)
    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained, state, teacher, x):
        traces.append(None)
        value, grads = jax.value_and_grad(lambda t: loss(jc.combine(t, fixed), teacher, x))(trained)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    trained = jax.tree.map(jnp.copy, trained)
    state, losses, zeros = tx.init(trained), [], None
    weights = lambda t: [
        t["params"]["layer_0"]["up"]["kernel"].weight,
        t["params"]["layer_0"]["attention"]["query"]["kernel"],
    ]
    for n in range(80):
        trained, state, value = step(trained, state, teacher, jnp.roll(X, n % 4, 0))
        losses.append(float(value))
        if n == 25:
            zeros = [np.asarray(w) == 0 for w in weights(jc.combine(trained, fixed))]
            assert [z.mean() for z in zeros] == [0.5, 0.5]
    assert len(traces) == 1
    assert np.mean(losses[-8:]) < 0.5 * np.mean(losses[20:28])
    student = jc.combine(trained, fixed)
    for w, zero in zip(weights(student), zeros):
        assert not np.any(np.asarray(w)[zero])
    final = jc.finalize(student)
    stored = final["params"]["layer_0"]["up"]["kernel"]
    assert isinstance(stored, jc.QuantizedArray)
    assert not np.any(np.asarray(stored.materialize())[zeros[0]])
    run = jax.jit(jc.compressed(MODEL.apply))
    np.testing.assert_allclose(run(student, X), run(final, X), rtol=1e-5, atol=1e-5)


def products(jaxpr):
    """How many contractions a jaxpr has, in its bodies as well."""
    count = collections.Counter(eqn.primitive.name for eqn in jaxpr.eqns)
    return count["dot_general"] + sum(
        products(body) for eqn in jaxpr.eqns for body in compat.sub_jaxprs(eqn)
    )


def test_no_cotangent_of_the_teacher_is_computed():
    of = lambda argnums: jax.make_jaxpr(jax.grad(loss, argnums))(TEACHER, TEACHER, X)
    student, both = of(0), of((0, 1))
    # Asked for the gradient of both, the program has not one product more.
    assert products(both.jaxpr) == products(student.jaxpr)
    forward = products(jax.make_jaxpr(loss)(TEACHER, TEACHER, X).jaxpr)
    assert products(student.jaxpr) > forward
    assert products(student.jaxpr) < 2 * forward + forward // 2


SHARDED = """
import sys; sys.path[:0] = ["tests/distillation", "tests"]
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import test_distil_composition as t

import jaxcompress as jc

small = jc.compress(t.TEACHER, t.RULES)
expected = jax.jit(jax.value_and_grad(t.loss, allow_int=True))(small, t.TEACHER, t.X)
mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
last = lambda x: put(x, *[None] * (x.ndim - 1), "model") if x.shape[-1] % 4 == 0 else put(x)
teacher = jax.tree.map(last, t.TEACHER)
assert teacher["params"]["layer_0"]["up"]["kernel"].sharding.shard_shape((16, 32)) == (16, 8)
student = jax.tree.map(lambda x: put(x), small)
step = jax.jit(jax.value_and_grad(t.loss, allow_int=True))
found = step(student, teacher, put(t.X, "data"))
close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)
for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    if jnp.issubdtype(a.dtype, jnp.floating):
        close(a, b)
print(float(found[0]))
"""


@pytest.mark.slow
def test_a_teacher_in_shards():
    assert float(eight_devices.run(SHARDED)) > 0
