"""A teacher's logits in few bytes: the largest of them, and what the rest sum to.

All of them in fewer bits need nothing of their own: losses take a teacher in bfloat16 as it is, and
`jaxcompress.Quantize("int8", axis=-1)` gives one scale per example, which the losses take through
`jaxcompress.compressed(loss)(student, stored)`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxcompress.distillation.arguments import fixed, log_p, log_sum, positive
from jaxcompress.distillation.divergences import kl_of_logs
from jaxcompress.errors import CompressError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopLogits:
    """The largest of a teacher's predictions; a pytree whose arrays have the examples in front.

    Attributes:
      values: the k largest logarithms of probabilities at the temperature, `[..., k]`, falling.
      indices: their classes, `[..., k]`, in the smallest unsigned integers that hold them.
      rest: the logarithm of the sum of all other probabilities, `[...]`.
      temperature: at which they were softened.
      classes: how many there are.
    """

    values: jax.Array
    indices: jax.Array
    rest: jax.Array
    temperature: float = dataclasses.field(metadata={"static": True})
    classes: int = dataclasses.field(metadata={"static": True})


def top_k_logits(
    logits: jax.Array, k: int, *, temperature: float = 1.0, dtype: jax.typing.DTypeLike = "float32"
) -> TopLogits:
    """Keeps the k largest of a teacher's predictions and the sum of the others.

    What the others sum to depends on the temperature, which is therefore chosen here. For 16 of
    50,000 classes with values in float16, 66 bytes are kept of 200,000.

    Args:
      logits: of the teacher, `[..., classes]`.
      k: how many are kept, from 1 to all.
      temperature: T, positive; a number that is known when the program is compiled.
      dtype: of the stored logarithms. A probability above 0.1 is known to a tenth of a percent in
        float16, and to eight times that in bfloat16.

    Raises:
      CompressError: for a k out of range, a scalar, or a temperature that is traced or not
        positive.

    References:
      Tan et al., *Multilingual Neural Machine Translation with Knowledge Distillation*, 2019.

    Examples:
      >>> import jax.numpy as jnp
      >>> top = top_k_logits(jnp.log(jnp.array([0.125, 0.5, 0.25, 0.125])), 2)
      >>> top.indices.tolist(), jnp.exp(top.values).tolist(), float(jnp.exp(top.rest))
      ([1, 2], [0.5, 0.25], 0.25)
    """
    if logits.ndim == 0 or not 1 <= k <= logits.shape[-1]:
        raise CompressError(f"k={k} of logits {logits.shape}: write from 1 to the classes")
    if isinstance(temperature, jax.core.Tracer):
        raise CompressError("temperature is traced: it is stored, so write a number")
    logs = log_p(fixed(logits), positive("temperature", temperature, 2.0))
    values, indices = jax.lax.top_k(logs, k)
    rest = log_sum(logs, -1, ~_chosen(indices, logs.shape))
    bits = next(b for b in (8, 16, 32) if logits.shape[-1] <= 2**b)
    indices = indices.astype(f"uint{bits}")
    return TopLogits(
        values.astype(dtype), indices, rest.astype(dtype), float(temperature), logits.shape[-1]
    )


def _chosen(indices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """True at the indices along the last axis."""
    none = jnp.zeros(shape, bool)
    return jnp.put_along_axis(none, indices.astype(jnp.int32), True, axis=-1, inplace=False)


def top_k_soft_targets(student: jax.Array, teacher: TopLogits) -> jax.Array:
    """`soft_targets` of k classes and one more that stands for the rest.

    `T**2 (sum_i p_i log(p_i / q_i) + p_rest log(p_rest / q_rest))` with i over the k classes: at
    most `soft_targets` of all classes, and equal if the student shares out the rest as the teacher
    does.

    Args:
      student: logits, `[..., classes]`.
      teacher: from `top_k_logits`, of the same examples; its temperature is taken. No gradient
        passes to it.

    Returns:
      One float32 value per example, `[...]`.

    Raises:
      CompressError: if the examples are not as many, or the classes fewer than the teacher's. More
        of them, as in a padded vocabulary, belong to the rest.

    Examples:
      >>> import jax.numpy as jnp
      >>> logits = jnp.array([[3.0, 1.0, 0.0, -1.0]])
      >>> bool(top_k_soft_targets(logits, top_k_logits(logits, 2, temperature=2.0))[0] < 1e-6)
      True
    """
    if student.ndim == 0 or student.shape[:-1] != teacher.rest.shape:
        raise CompressError(
            f"student logits {student.shape} and {teacher.rest.shape} stored examples of a teacher "
            "differ in shape"
        )
    if student.shape[-1] < teacher.classes:
        raise CompressError(
            f"the student has {student.shape[-1]} classes and the stored teacher "
            f"{teacher.classes}: store the logits of the student's classes alone"
        )
    q = log_p(student, positive("temperature", teacher.temperature, 2.0))
    indices = teacher.indices.astype(jnp.int32)
    rest = log_sum(q, -1, ~_chosen(indices, q.shape), keepdims=True)
    q = jnp.concatenate([jnp.take_along_axis(q, indices, axis=-1), rest], axis=-1)
    p = jnp.concatenate([fixed(teacher.values), fixed(teacher.rest)[..., None]], axis=-1)
    # What is stored may be rounded, so that it no longer sums to 1.
    return teacher.temperature**2 * kl_of_logs(jax.nn.log_softmax(p), q)
