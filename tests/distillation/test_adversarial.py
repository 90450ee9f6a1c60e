"""Discriminators and generators, KDGAN and compressed generators: torch and the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.distillation import soft_targets
from jaxcompress.distillation.adversarial import discriminator_loss, generator_loss
from jaxcompress.distillation.generators import generator_distillation
from jaxcompress.distillation.kdgan import gumbel_softmax, kdgan_discriminator, kdgan_generator

KINDS = ("logistic", "hinge", "least_squares", "wasserstein")


def normal(seed, shape, size=3.0):
    return jax.random.normal(jax.random.key(seed), shape) * size


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_by_their_definitions(kind):
    real, fake = normal(0, (4, 3, 3, 1)), normal(1, (4, 3, 3, 1))
    r, f = (np.asarray(x, np.float64) for x in (real, fake))
    s = lambda x: 1 / (1 + np.exp(-x))
    of_real, of_fake, of_generator = {
        "logistic": (-np.log(s(r)), -np.log(1 - s(f)), -np.log(s(f))),
        "hinge": (np.maximum(0, 1 - r), np.maximum(0, 1 + f), -f),
        "least_squares": ((r - 1) ** 2 / 2, f**2 / 2, (f - 1) ** 2 / 2),
        "wasserstein": (-r, f, -f),
    }[kind]
    mean = lambda x: x.reshape(4, -1).mean(1)
    np.testing.assert_allclose(
        discriminator_loss(real, fake, kind=kind),
        mean(of_real) + mean(of_fake),
        rtol=1e-5,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        generator_loss(fake, kind=kind), mean(of_generator), rtol=1e-5, atol=1e-6
    )
    assert discriminator_loss(real.astype(jnp.bfloat16), fake, kind=kind).dtype == jnp.float32
    # Descent makes what is made look more real.
    assert np.all(jax.grad(lambda f: generator_loss(f, kind=kind).sum())(-jnp.ones(3)) < 0)


def test_the_logistic_kind_against_torch_even_when_sure():
    torch = pytest.importorskip("torch")
    judged = jnp.array([-200.0, -3.0, 0.0, 3.0, 200.0])
    t, ones = torch.tensor(np.asarray(judged)), torch.ones(5)
    bce = lambda y: torch.nn.functional.binary_cross_entropy_with_logits(t, y, reduction="none")
    np.testing.assert_allclose(
        discriminator_loss(judged, judged, kind="logistic"), bce(ones) + bce(0 * ones), rtol=1e-5
    )
    np.testing.assert_allclose(generator_loss(judged, kind="logistic"), bce(ones), rtol=1e-5)


@pytest.mark.parametrize("t", [0.1, 1.0, 5.0])
def test_the_largest_of_a_relaxed_sample_has_the_probability_of_its_class(t):
    logits, n = jnp.array([0.0, 1.0, -1.0, 0.5]), 8000
    draw = jax.jit(jax.vmap(lambda key: gumbel_softmax(key, logits, temperature=t)))
    samples = draw(jax.random.split(jax.random.key(0), n))
    np.testing.assert_allclose(samples.sum(-1), 1, rtol=1e-5)
    share = np.bincount(np.argmax(samples, -1), minlength=4) / n
    # Four standard deviations of a share: 4 sqrt(1/4 / 8000) = 0.0224.
    np.testing.assert_allclose(share, jax.nn.softmax(logits), atol=0.0224)


def test_a_relaxed_sample_against_its_formula_and_a_hard_one():
    logits, key, weights = normal(2, (5, 4)), jax.random.key(1), normal(3, (5, 4))
    noise = np.asarray(jax.random.gumbel(key, logits.shape), np.float64)
    z = np.exp((np.asarray(logits, np.float64) + noise) / 0.7)
    soft = z / z.sum(-1, keepdims=True)
    np.testing.assert_allclose(
        gumbel_softmax(key, logits, temperature=0.7), soft, rtol=1e-4, atol=1e-7
    )
    hard = gumbel_softmax(key, logits, temperature=0.7, hard=True)
    np.testing.assert_array_equal(hard, np.eye(4)[soft.argmax(-1)])
    slope = lambda hard: jax.grad(
        lambda z: jnp.sum(weights * gumbel_softmax(key, z, temperature=0.7, hard=hard))
    )(logits)
    np.testing.assert_array_equal(slope(True), slope(False))
    assert np.any(slope(True))


def test_kdgan_is_its_game():
    """Discriminator and generators have the value function of the paper between them."""
    real, own, other = normal(4, (6,)), normal(5, (6,)), normal(6, (6,))
    c, t = normal(7, (6, 5)), normal(8, (6, 5))
    log_d = lambda x: -np.log1p(np.exp(-np.asarray(x, np.float64)))
    log_not_d = lambda x: -np.log1p(np.exp(np.asarray(x, np.float64)))
    alpha, beta, gamma = 0.3, 2.0, 0.5
    value = log_d(real) + alpha * log_not_d(own) + (1 - alpha) * log_not_d(other)
    np.testing.assert_allclose(
        kdgan_discriminator(real, own, other, alpha=alpha), -value, rtol=1e-5
    )
    classifier = kdgan_generator(own, c, t, alpha=alpha, weight=beta, temperature=2.0)
    teacher = kdgan_generator(other, t, c, alpha=1 - alpha, weight=gamma, temperature=2.0)
    game = value - log_d(real) + beta * soft_targets(c, t, temperature=2.0)
    game += gamma * soft_targets(t, c, temperature=2.0)
    np.testing.assert_allclose(classifier + teacher, game, rtol=1e-5, atol=1e-6)


def test_a_classifier_learns_from_the_discriminator_alone():
    """Labels are drawn and judged; the classifier comes to draw what the discriminator likes."""
    likes = jnp.array([-2.0, 3.0, 0.0])

    @jax.jit
    def step(logits, key):
        def loss(logits):
            y = gumbel_softmax(key, logits, temperature=0.5)
            return kdgan_generator(y @ likes, logits, logits, alpha=1.0, weight=0.0).mean()

        return logits - 0.5 * jax.grad(loss)(logits)

    logits = jnp.zeros((32, 3))
    for n in range(100):
        logits = step(logits, jax.random.key(n))
    assert float(jnp.mean(jnp.argmax(logits, -1) == 1)) > 0.9


def test_a_small_generator_against_torch():
    torch = pytest.importorskip("torch")
    images, target, judged = (
        normal(9, (3, 4, 4, 2)),
        normal(10, (3, 4, 4, 2)),
        normal(11, (3, 2, 2, 1)),
    )
    own, teachers = normal(12, (3, 2, 2, 8)), normal(13, (3, 2, 2, 8))

    def loss(images, own, judged, target):
        return generator_distillation(
            images, target, judged, features=[(own, teachers)], reconstruction=10.0, matching=2.0,
            adversarial=0.5, kind="least_squares",
        )  # fmt: skip

    value, pull = jax.vjp(jax.jit(loss), images, own, judged, target)
    grads = pull(jnp.ones(3))
    i, o, j = (torch.tensor(np.asarray(x), requires_grad=True) for x in (images, own, judged))
    f = torch.nn.functional
    each = lambda x: x.reshape(3, -1).mean(1)
    wanted = (
        10 * each(f.l1_loss(i, torch.tensor(np.asarray(target)), reduction="none"))
        + 2 * each(f.mse_loss(o, torch.tensor(np.asarray(teachers)), reduction="none"))
        + 0.5 * each((j - 1) ** 2 / 2)
    )
    wanted.sum().backward()
    np.testing.assert_allclose(value, wanted.detach().numpy(), rtol=1e-5)
    for found, x in zip(grads, (i, o, j)):
        np.testing.assert_allclose(found, x.grad.numpy(), rtol=1e-4, atol=1e-7)
    assert not np.any(grads[3])
    zero = jax.grad(lambda x: generator_distillation(x, images, 0 * judged).sum())(images)
    assert not np.any(zero)  # equal images have nothing to learn, though |x| has no slope at 0


def test_bad_input():
    one = jnp.ones(3)
    with pytest.raises(jc.CompressError, match="kind='relativistic': write one of logistic"):
        generator_loss(one, kind="relativistic")
    with pytest.raises(jc.CompressError, match=r"real \(3,\) and of fake \(2,\)"):
        discriminator_loss(one, one[:2])
    with pytest.raises(jc.CompressError, match="judgements are scalars"):
        generator_loss(jnp.ones(()))
    with pytest.raises(jc.CompressError, match="axis of classes"):
        gumbel_softmax(jax.random.key(0), jnp.ones(()))
    with pytest.raises(jc.CompressError, match="write a positive number"):
        gumbel_softmax(jax.random.key(0), one, temperature=0.0)
    with pytest.raises(jc.CompressError, match="differ in shape"):
        kdgan_discriminator(one, one, one[:2])
    with pytest.raises(jc.CompressError, match=r"alpha=1\.5: write a number from 0 to 1"):
        kdgan_discriminator(one, one, one, alpha=1.5)
    with pytest.raises(jc.CompressError, match=r"judgements \(2,\) of logits \(3, 4\)"):
        kdgan_generator(one[:2], jnp.ones((3, 4)), jnp.ones((3, 4)))
    images = jnp.ones((3, 4, 4, 1))
    with pytest.raises(jc.CompressError, match=r"judgements \(2,\) of images"):
        generator_distillation(images, images, one[:2])
    with pytest.raises(jc.CompressError, match=r"student features \(3, 2\) and teacher features"):
        generator_distillation(images, images, one, features=[(jnp.ones((3, 2)), jnp.ones((3, 4)))])
    with pytest.raises(jc.CompressError, match=r"features \(2, 2\) of images"):
        generator_distillation(images, images, one, features=[(jnp.ones((2, 2)),) * 2])
