"""The schemes on real digits: students that learn from one another, from before, and from no data."""

import functools
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import _digits

import jaxcompress as jc
from jaxcompress.distillation import soft_targets
from jaxcompress.distillation.batch_norms import batch_norm_loss, stored_moments, with_norm_moments
from jaxcompress.distillation.distilled_data import dataset_distillation, train_on_distilled
from jaxcompress.distillation.ema import ema_teacher, mean_teacher
from jaxcompress.distillation.inversion import invert
from jaxcompress.distillation.mutual import mutual_learning
from jaxcompress.distillation.teachers import teacher_ensemble
from jaxcompress.drivers.chain import distil_chain
from jaxcompress.pruning import gates

pytestmark = pytest.mark.slow

FEW = 60  # labels, so that there is something to gain
hard = optax.softmax_cross_entropy_with_integer_labels


@functools.cache
def digits():
    return tuple(map(jnp.asarray, _digits.load()))


def init(seed, width=32):
    a, b = jax.random.split(jax.random.key(seed))
    he = lambda key, n, m: jax.random.normal(key, (n, m)) * (2 / n) ** 0.5
    return {
        "a": {"kernel": he(a, 64, width), "bias": jnp.zeros(width)},
        "b": {"kernel": he(b, width, 10), "bias": jnp.zeros(10)},
    }


def network(params, x):
    hidden = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
    return hidden @ params["b"]["kernel"] + params["b"]["bias"]


def accuracy(logits):
    return float(jnp.mean(jnp.argmax(logits, -1) == digits()[3]))


def fit(params, loss, steps=400, tx=None):
    """Full batches; `loss(params, key)`."""
    tx = optax.adam(1e-2) if tx is None else tx

    @jax.jit
    def run(params, state):
        def step(carry, key):
            params, state = carry
            grads = jax.grad(loss)(params, key)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), jax.random.split(jax.random.key(7), steps))[0]

    return run(params, tx.init(params))


def test_students_that_teach_one_another_do_better_than_alone():
    x, y, test, _ = digits()
    students = jax.tree.map(lambda *xs: jnp.stack(xs), *[init(seed) for seed in range(4)])
    all_logits = jax.vmap(network, (0, None))
    labels = lambda z: jax.vmap(hard, (0, None))(z[:, :FEW], y[:FEW]).mean(1).sum()
    alone, _ = fit(students, lambda p, key: labels(all_logits(p, x)))

    def together(params, key):  # on all images; the labels of a few
        z = all_logits(params, x)
        return labels(z) + mutual_learning(z).mean(1).sum()

    found, _ = fit(students, together)
    mean = lambda params: np.mean([accuracy(z) for z in all_logits(params, test)])
    assert mean(alone) > 0.8
    assert mean(found) > mean(alone) + 0.005


def test_a_born_again_chain_goes_on_after_a_failure_and_hands_on_what_it_knows(tmp_path):
    x, y, test, _ = digits()
    calls = []

    def train(params, teachers, round):
        calls.append(round.number)
        if calls == [0, 1, 2]:
            raise RuntimeError("out of power")

        def loss(params, key):
            z = network(params, x)
            if not teachers:
                return hard(z[:FEW], y[:FEW]).mean()
            # No labels: all that a later generation knows is of those before it.
            return soft_targets(z, network(teachers[-1], x), temperature=2.0).mean()

        return fit(params, loss)[0]

    run = lambda: [*distil_chain(train, [init(seed) for seed in range(3)], folder=tmp_path)]
    with pytest.raises(RuntimeError, match="out of power"):
        run()
    done = run()
    assert calls == [0, 1, 2, 2]
    logits = [network(d.params, test) for d in done]
    first, *_, last = logits
    assert accuracy(first) > 0.8
    # 397 test images: 0.02 is a difference of 8.
    assert accuracy(last) > accuracy(first) - 0.02
    assert float(jnp.mean(jnp.argmax(last, -1) == jnp.argmax(first, -1))) > 0.9
    assert accuracy(teacher_ensemble(logits)) > accuracy(first) - 0.02


def test_a_mean_teacher_of_noisy_steps_does_better_than_its_student():
    x, y, test, _ = digits()

    def loss(params, key):
        rows = jax.random.randint(key, (8,), 0, len(x))
        return hard(network(params, x[rows]), y[rows]).mean()

    tx = optax.chain(optax.sgd(0.4), ema_teacher(0.98))
    student, state = fit(init(0), loss, tx=tx)
    teacher = mean_teacher(state, student)
    assert accuracy(network(teacher, test)) > accuracy(network(student, test))
    assert accuracy(network(teacher, test)) > 0.9


class NormNet(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train=False):
        for n in range(2):
            x = nn.Dense(self.width, name=f"dense{n}")(x)
            x = nn.relu(
                nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"norm{n}")(x)
            )
        return nn.Dense(10, name="head")(x)


def test_a_student_of_images_from_batch_norms_knows_real_ones():
    x, y, test, _ = digits()
    teacher = NormNet(64)
    variables = teacher.init(jax.random.key(0), x[:1])

    def loss(params, key):
        z, _ = teacher.apply(
            {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
        )
        return hard(z, y).mean()

    params, _ = fit(variables["params"], loss, steps=200)
    # Statistics of all images at once, as the norms of the trained teacher see them.
    whole = {**variables, "params": params}
    for _ in range(100):
        _, new = teacher.apply(whole, x, train=True, mutable=["batch_stats"])
        whole = {**whole, **new}
    assert accuracy(teacher.apply(whole, test)) > 0.95

    run, stored = with_norm_moments(teacher.apply), stored_moments(whole["batch_stats"])
    labels = jnp.arange(200) % 10

    def prior(images, key):
        z, seen = run(whole, images)
        return hard(z, labels).mean() + batch_norm_loss(seen, stored)

    one = lambda key: invert(key, prior, (200, 64), optax.adam(0.05), 300, low=0.0, high=1.0)
    found = jax.jit(lambda keys: jax.lax.map(one, keys))(jax.random.split(jax.random.key(1), 4))
    assert np.all(found.losses[:, -1] < found.losses[:, 0] / 5)
    images = found.inputs.reshape(-1, 64)
    targets = teacher.apply(whole, images)
    taught = lambda data, z: accuracy(
        network(
            fit(init(1), lambda p, key: soft_targets(network(p, data), z, temperature=3.0).mean())[
                0
            ],
            test,
        )
    )
    noise = jax.random.uniform(jax.random.key(2), images.shape)
    student, of_noise = taught(images, targets), taught(noise, teacher.apply(whole, noise))
    # Chance is 0.1.
    assert student > 0.75
    assert student > of_noise + 0.1


def test_ten_synthetic_images_teach_a_fixed_start():
    x, y, test, _ = digits()
    start = init(0)
    labels = jax.nn.one_hot(jnp.arange(10), 10)[None]

    def loss(params, batch):
        return optax.softmax_cross_entropy(network(params, batch[0]), batch[1]).mean()

    def meta(trained, key):
        images, log_rate = trained
        real = (x, jax.nn.one_hot(y, 10))
        return dataset_distillation(
            loss, start, (images, labels), jnp.exp(log_rate), real, epochs=3
        )

    one_each = jnp.stack([x[jnp.argmax(y == n)] for n in range(10)])[None]
    begin = (one_each, jnp.log(0.1))
    (images, log_rate), _ = fit(begin, meta, steps=300)
    taught = lambda images, rate: accuracy(
        network(train_on_distilled(loss, start, (images, labels), rate, epochs=3), test)
    )
    real = max(taught(one_each, rate) for rate in (0.1, 0.5, 1.0, 2.0))
    assert taught(images, jnp.exp(log_rate)) > real + 0.2


def test_a_variational_student_is_sparse_and_knows_what_its_teacher_knows():
    """Hegde et al., Variational Student, 2020: the gates are leaves, and the loss is any loss."""
    x, y, test, _ = digits()
    teacher, _ = fit(init(0, 64), lambda p, key: hard(network(p, x), y).mean())
    params = jc.compress(init(1), {"*/kernel": gates.VariationalDropout(-8.0)})
    trained, rest = jc.partition(params)
    taught, run = network(teacher, x), jc.compressed(network)

    def loss(trained, key):
        params = jc.combine(trained, rest)
        z = run(gates.sample(params, key), x)
        soft = soft_targets(z, taught, temperature=2.0).mean()
        return hard(z, y).mean() + soft + gates.gate_penalty(params) / len(x)

    trained, _ = fit(trained, loss, steps=1500)
    params = jc.combine(trained, rest)
    stored = jc.finalize(params)
    report = gates.gate_report(params)
    assert report.kept < report.size / 2
    assert accuracy(run(stored, test)) > 0.9
