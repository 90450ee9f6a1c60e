"""Pruning, fake quantization and a teacher in one jitted step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxcompress as jc


def network(params, x):
    for name in ("first", "second"):
        x = jax.nn.relu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["head"]["kernel"]


def init(key):
    keys = jax.random.split(key, 3)
    sizes = {"first": (12, 32), "second": (32, 32), "head": (32, 5)}
    return {
        name: {"kernel": jax.random.normal(k, s) / s[0] ** 0.5, "bias": jnp.zeros(s[1])}
        for k, (name, s) in zip(keys, sizes.items())
    }


def test_sparsify_fake_quantization_and_a_teacher_in_one_step():
    teacher = init(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (256, 12))
    student = jc.compress(
        init(jax.random.key(2)),
        {
            "head/kernel": jc.FakeQuantize("int8", range="static"),
            "**/kernel": jc.FakeQuantize("int4", group_size=8),
        },
    )
    trained, fixed = jc.partition(student)
    schedule = jc.pruning.cubic_schedule(0.75, begin=5, end=150, every=10)
    tx = jc.sparsify(
        optax.adam(3e-3), jc.pruning.magnitude(), schedule,
        {"second/kernel": "2:4", "**/kernel": "unstructured"},
    )  # fmt: skip
    apply = jc.compressed(network)

    def loss(trained, batch):
        logits = apply(jc.combine(trained, fixed), batch)
        targets = network(teacher, batch)
        return jnp.mean(jc.distillation.soft_targets(logits, targets, temperature=2.0))

    traces = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained, state, batch):
        traces.append(None)
        value, grads = jax.value_and_grad(loss)(trained, batch)
        updates, state = tx.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value

    state, losses = tx.init(trained), []
    for n in range(300):
        start = n * 64 % 256
        trained, state, value = step(trained, state, x[start : start + 64])
        losses.append(float(value))
    assert len(traces) == 1
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])

    student = jc.combine(trained, fixed)
    final = jc.finalize(student)
    # What was trained is what is stored: the same logits, bit for bit.
    run = jax.jit(apply)
    np.testing.assert_array_equal(run(student, x), run(final, x))
    kept = {"first": 12 * 32 // 4, "second": 32 * 32 // 2, "head": 32 * 5 // 4}
    for name, count in kept.items():
        weight, stored = student[name]["kernel"].weight, final[name]["kernel"]
        assert isinstance(stored, jc.QuantizedArray)
        assert int(jnp.sum(weight != 0)) == count
        # A pruned zero stays zero; a kept weight may round to zero.
        assert not np.any(np.asarray(stored.materialize())[np.asarray(weight) == 0])
    groups = np.asarray(student["second"]["kernel"].weight != 0).reshape(8, 4, 32)
    assert np.all(groups.sum(axis=1) == 2)
    masks = {row["path"]: row["kept"] for row in jc.pruning.sparsity_report(state).rows}
    assert masks == {f"{name}/kernel": count for name, count in kept.items()}
