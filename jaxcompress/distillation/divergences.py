"""Divergences between a student's and its teacher's predictions."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import log_p, pair, positive, share

# The logarithm of about the least normal float32, below which some devices read zero.
_RARE = -87.0


def kl_of_logs(p: jax.Array, q: jax.Array, axis: int = -1) -> jax.Array:
    """`KL(p, q)` of two distributions that are given by the logarithms of their probabilities.

    A class may have the probability 0. The divergence is infinite if q is 0 where p is not.

    Args:
      p: logarithms that sum to 1 when exponentiated.
      q: the same of another distribution.
      axis: the axis of the classes.
    """
    # p (e**d - 1 - d) with d = log q - log p sums to the divergence, for both p and q sum to 1; no
    # term is negative, so that none cancels another. Where p is 0, the limit is q.
    rare = p < _RARE
    p, d = jnp.where(rare, 0.0, p), jnp.where(rare, 0.0, q) - jnp.where(rare, 0.0, p)
    return jnp.sum(jnp.where(rare, jnp.exp(q), jnp.exp(p) * (jnp.expm1(d) - d)), axis=axis)


def mixture_of_logs(p: jax.Array, q: jax.Array, weight: jax.Array) -> jax.Array:
    """`log(weight p + (1 - weight) q)` from logarithms, also where both are minus infinity."""
    p, q = p + jnp.log(weight), q + jnp.log1p(-weight)
    none = jnp.maximum(p, q) == -jnp.inf
    mixed = jnp.logaddexp(jnp.where(none, 0.0, p), jnp.where(none, 0.0, q))
    return jnp.where(none, -jnp.inf, mixed)


def _logs(
    student: jax.Array,
    teacher: jax.Array,
    temperature: float | jax.Array,
    axis: int,
    where: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """`log p` of the teacher and `log q` of the student."""
    student, teacher = pair(student, teacher, "logits")
    temperature = positive("temperature", temperature, 2.0)
    return log_p(teacher, temperature, axis, where), log_p(student, temperature, axis, where)


def forward_kl(
    student: jax.Array,
    teacher: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """`KL(p, q) = sum_c p_c log(p_c / q_c)`: the student is to do all that the teacher does.

    Here as in the other divergences, `p = softmax(teacher / T)` and `q = softmax(student / T)`.
    There is no factor `T**2`, as there is in `soft_targets`, which is otherwise the same: multiply
    by it where the divergence is added to another loss. A teacher that is certain of a class
    (logits of minus infinity for others included) gives a finite value.

    Args:
      student: logits, `[..., classes]`.
      teacher: logits of the same shape. No gradient passes to them.
      temperature: T, positive; may be traced.
      axis: the axis of the classes.
      where: which classes count, broadcastable to the logits; None: all.

    Returns:
      One float32 value per example, `[...]`.

    Raises:
      CompressError: for shapes that differ, a scalar, or a temperature that is no positive number.

    References:
      Kullback and Leibler, *On Information and Sufficiency*, 1951; Hinton, Vinyals and Dean,
      *Distilling the Knowledge in a Neural Network*, 2015.

    Examples:
      >>> import jax.numpy as jnp
      >>> round(float(forward_kl(jnp.zeros(2), jnp.array([0.0, -jnp.inf]))), 4)  # log 2
      0.6931
    """
    p, q = _logs(student, teacher, temperature, axis, where)
    return kl_of_logs(p, q, axis)


def reverse_kl(
    student: jax.Array,
    teacher: jax.Array,
    *,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """`KL(q, p) = sum_c q_c log(q_c / p_c)`: the student is to do only what the teacher does.

    `p` and `q` are as in `forward_kl`. It is infinite if the teacher's logit is minus infinity
    where the student's is not: leave such classes out with `where`, or take `jensen_shannon` or
    `skewed_reverse_kl`, which stay finite.

    Args:
      student: logits, `[..., classes]`.
      teacher: logits of the same shape. No gradient passes to them.
      temperature: T, positive; may be traced.
      axis: the axis of the classes.
      where: which classes count, broadcastable to the logits; None: all.

    Returns:
      One float32 value per example, `[...]`.

    Raises:
      CompressError: for shapes that differ, a scalar, or a temperature that is no positive number.

    References:
      Gu, Dong, Wei and Huang, *MiniLLM: Knowledge Distillation of Large Language Models*, 2024.

    Examples:
      >>> import jax.numpy as jnp
      >>> teacher = jnp.array([0.0, 0.0, -9.0])  # two ways to be right: either will do
      >>> one, both = jnp.array([9.0, 0.0, 0.0]), jnp.array([0.0, 0.0, 0.0])
      >>> bool(reverse_kl(one, teacher) < reverse_kl(both, teacher))
      True
      >>> bool(forward_kl(one, teacher) < forward_kl(both, teacher))
      False
    """
    p, q = _logs(student, teacher, temperature, axis, where)
    return kl_of_logs(q, p, axis)


def jensen_shannon(
    student: jax.Array,
    teacher: jax.Array,
    *,
    beta: float | jax.Array = 0.5,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """`beta KL(p, m) + (1 - beta) KL(q, m)` with the mixture `m = beta p + (1 - beta) q`.

    `p` and `q` are as in `forward_kl`. It is finite for all predictions, at most the entropy of a
    coin of bias beta. Divided by beta it becomes `forward_kl` as beta goes to 0, and divided by
    `1 - beta` it becomes `reverse_kl` as beta goes to 1; at 0 and 1 themselves it is zero, which
    teaches nothing.

    Args:
      student: logits, `[..., classes]`.
      teacher: logits of the same shape. No gradient passes to them.
      beta: the teacher's share of the mixture, between 0 and 1; may be traced.
      temperature: T, positive; may be traced.
      axis: the axis of the classes.
      where: which classes count, broadcastable to the logits; None: all.

    Returns:
      One float32 value per example, `[...]`.

    Raises:
      CompressError: for shapes that differ, a scalar, a beta of 0 or 1 or outside (write
        `forward_kl` or `reverse_kl` for the limits), or a temperature that is no positive number.

    References:
      Lin, *Divergence Measures Based on the Shannon Entropy*, 1991; Agarwal et al., *On-Policy
      Distillation of Language Models: Learning from Self-Generated Mistakes*, 2024 (GKD).

    Examples:
      >>> import jax.numpy as jnp
      >>> sure = jnp.array([0.0, -jnp.inf])
      >>> round(float(jensen_shannon(sure, sure[::-1])), 4)  # log 2, as no class is shared
      0.6931
    """
    beta = share("beta", beta, ends=False)
    p, q = _logs(student, teacher, temperature, axis, where)
    m = mixture_of_logs(p, q, beta)
    return beta * kl_of_logs(p, m, axis) + (1 - beta) * kl_of_logs(q, m, axis)


def skewed_kl(
    student: jax.Array,
    teacher: jax.Array,
    *,
    alpha: float | jax.Array = 0.1,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """`KL(p, alpha p + (1 - alpha) q)`: at most `-log alpha`, where `forward_kl` has no bound.

    `p` and `q` are as in `forward_kl`, which it is at `alpha=0`.

    Args:
      student: logits, `[..., classes]`.
      teacher: logits of the same shape. No gradient passes to them.
      alpha: the teacher's share of the mixture, from 0 to 1; may be traced. At 1 all is zero.
      temperature: T, positive; may be traced.
      axis: the axis of the classes.
      where: which classes count, broadcastable to the logits; None: all.

    Returns:
      One float32 value per example, `[...]`.

    Raises:
      CompressError: for shapes that differ, a scalar, an alpha outside of 0 to 1, or a temperature
        that is no positive number.

    References:
      Ko, Kim, Chen and Yun, *DistiLLM: Towards Streamlined Distillation for Large Language Models*,
      2024.

    Examples:
      >>> import jax.numpy as jnp
      >>> sure = jnp.array([0.0, -jnp.inf])
      >>> round(float(skewed_kl(sure, sure[::-1], alpha=0.1)), 4)  # log 10
      2.3026
    """
    alpha = share("alpha", alpha)
    p, q = _logs(student, teacher, temperature, axis, where)
    return kl_of_logs(p, mixture_of_logs(p, q, alpha), axis)


def skewed_reverse_kl(
    student: jax.Array,
    teacher: jax.Array,
    *,
    alpha: float | jax.Array = 0.1,
    temperature: float | jax.Array = 1.0,
    axis: int = -1,
    where: jax.Array | None = None,
) -> jax.Array:
    """`KL(q, alpha q + (1 - alpha) p)`: at most `-log alpha`, where `reverse_kl` has no bound.

    `p` and `q` are as in `forward_kl`; at `alpha=0` it is `reverse_kl`.

    Args:
      student: logits, `[..., classes]`.
      teacher: logits of the same shape. No gradient passes to them.
      alpha: the student's share of the mixture, from 0 to 1; may be traced. At 1 all is zero.
      temperature: T, positive; may be traced.
      axis: the axis of the classes.
      where: which classes count, broadcastable to the logits; None: all.

    Returns:
      One float32 value per example, `[...]`.

    Raises:
      CompressError: for shapes that differ, a scalar, an alpha outside of 0 to 1, or a temperature
        that is no positive number.

    References:
      Ko, Kim, Chen and Yun, *DistiLLM: Towards Streamlined Distillation for Large Language Models*,
      2024.

    Examples:
      >>> import jax.numpy as jnp
      >>> sure = jnp.array([0.0, -jnp.inf])
      >>> round(float(skewed_reverse_kl(sure, sure[::-1], alpha=0.1)), 4)  # log 10
      2.3026
    """
    alpha = share("alpha", alpha)
    p, q = _logs(student, teacher, temperature, axis, where)
    return kl_of_logs(q, mixture_of_logs(q, p, alpha), axis)
