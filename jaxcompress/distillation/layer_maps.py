"""Which layer of the teacher each layer of a student follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.errors import CompressError

_STRATEGIES = ("uniform", "spread", "first", "last")


def layer_map(
    student_layers: int, teacher_layers: int, strategy: str = "uniform"
) -> tuple[int, ...]:
    """The teacher's layer for each of the student's, counted from 0.

    With M layers of the student and N of the teacher, for layer m = 1..M counted from 1:

    - `uniform`: `m N / M`, so that the last follows the last: every third for 4 of 12, as in
      TinyBERT. PKD-Skip is this without the last, `[:-1]`, which the logits train;
    - `last`: `N - M + m`, the top ones. PKD-Last is this without the last;
    - `first`: `m`;
    - `spread`: from the first to the last, `1 + (m - 1) (N - 1) / (M - 1)`, as DistilBERT's
      published weights were initialized.

    Where the division leaves a rest, the nearest layer, the upper of two.

    Args:
      student_layers: M, at least 1.
      teacher_layers: N, at least M.
      strategy: one of the above.

    Returns:
      M increasing integers below N.

    Raises:
      CompressError: for a strategy of another name, or more layers than the teacher has.

    References:
      Sun et al., *Patient Knowledge Distillation for BERT Model Compression*, 2019; Jiao et al.,
      *TinyBERT: Distilling BERT for Natural Language Understanding*, 2020; Sanh et al.,
      *DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter*, 2019.

    Examples:
      >>> layer_map(4, 12), layer_map(6, 12, "last")[:-1], layer_map(6, 12, "spread")
      ((2, 5, 8, 11), (6, 7, 8, 9, 10), (0, 2, 4, 7, 9, 11))
    """
    m, n = student_layers, teacher_layers
    if not 1 <= m <= n:
        raise CompressError(
            f"a student of {m} layers cannot be mapped to a teacher of {n}: write at least 1 and "
            f"at most {n}"
        )
    match strategy:
        case "uniform":
            return tuple(_nearest((i + 1) * n, m) - 1 for i in range(m))
        case "last":
            return tuple(range(n - m, n))
        case "first":
            return tuple(range(m))
        case "spread":
            return tuple(_nearest(i * (n - 1), max(m - 1, 1)) for i in range(m))
    raise CompressError(f"strategy={strategy!r}: write one of {', '.join(_STRATEGIES)}")


def _nearest(over: int, under: int) -> int:
    """The integer nearest to a fraction, the upper of two."""
    return (2 * over + under) // (2 * under)


def over_layers(
    loss: Callable[..., jax.Array],
    student: Any,
    teacher: Any,
    layers: Sequence[int],
    **options: Any,
) -> jax.Array:
    """The sum of a loss over layers of the student, each with its layer of the teacher.

    Args:
      loss: `loss(student, teacher, **options)` of one layer, such as `hidden_states`.
      student: what the student's layers give, in order: a sequence, or one array (or tree of
        arrays) of layers stacked along the first axis, as a `tap` in a `scan` gives it.
      teacher: the teacher's, likewise.
      layers: the teacher's layer for each of the student's, from `layer_map`; fewer leave the
        student's last ones out.
      **options: passed on.

    Returns:
      What the loss gives, summed.

    Raises:
      CompressError: for a layer that one of the two does not have.

    References:
      Sun et al., *Patient Knowledge Distillation for BERT Model Compression*, 2019 (a sum over
      pairs of layers).

    Examples:
      >>> import jax.numpy as jnp
      >>> square = lambda s, t: jnp.mean((s - t) ** 2, axis=-1)
      >>> teacher = jnp.arange(4.0)[:, None, None] * jnp.ones((4, 2, 3))
      >>> student = [jnp.zeros((2, 3)), jnp.zeros((2, 3))]
      >>> over_layers(square, student, teacher, layer_map(2, 4)).tolist()
      [10.0, 10.0]
    """
    mine, theirs = _each(student), _each(teacher)
    layers = tuple(layers)
    if not layers or len(layers) > len(mine):
        raise CompressError(
            f"layers={layers} are {len(layers)}, and the student gives {len(mine)}: write 1 to "
            f"{len(mine)}"
        )
    wrong = [n for n in layers if not 0 <= n < len(theirs)]
    if wrong:
        raise CompressError(
            f"layers={layers}: the teacher gives {len(theirs)} layers and has none of number "
            f"{wrong[0]}; count from 0"
        )
    return sum((loss(mine[i], theirs[n], **options) for i, n in enumerate(layers)), jnp.zeros(()))


def _each(layers: Any) -> list[Any]:
    """A list of layers, of those stacked along the first axis as well."""
    if isinstance(layers, (list, tuple)):
        return list(layers)
    depth = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(layers)}
    if len(depth) != 1:
        raise CompressError(
            f"layers are stacked in different numbers, {sorted(depth)}; write a list of layers"
        )
    return [jax.tree.map(lambda x, i=i: x[i], layers) for i in range(depth.pop())]
