"""Learned maps from the student's channels to the teacher's, and maps of one size to another."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.distillation.geometry import product
from jaxcompress.errors import CompressError

Params = dict[str, jax.Array]


def regressor_init(
    key: jax.Array,
    student_channels: int,
    teacher_channels: int,
    kernel: int | Sequence[int] = 1,
) -> Params:
    """The weights of a `regressor`: normal of variance `1 / inputs`, and biases of zero.

    They are trained with the student, and left behind with the teacher.

    Args:
      key: a random key.
      student_channels: channels that go in.
      teacher_channels: channels that come out.
      kernel: 1 is a matrix for features with any number of positions' axes; another number is a
        square kernel for images, and a tuple has a number for each axis of positions, such as
        `(3,)` for tokens.

    Returns:
      A `kernel`, `[*sizes, student_channels, teacher_channels]`, and a `bias`, in float32.

    Raises:
      CompressError: for sizes or channels that are not positive.

    References:
      Romero et al., *FitNets: Hints for Thin Deep Nets*, 2015.

    Examples:
      >>> import jax
      >>> params = regressor_init(jax.random.key(0), 8, 16, kernel=3)
      >>> params["kernel"].shape
      (3, 3, 8, 16)
    """
    if kernel == 1:
        sizes: tuple[int, ...] = ()
    else:
        sizes = (kernel, kernel) if isinstance(kernel, int) else tuple(kernel)
    shape = (*sizes, student_channels, teacher_channels)
    if min(shape) < 1 or len(sizes) > 3:
        raise CompressError(
            f"kernel={kernel} from {student_channels} to {teacher_channels} channels: write "
            "positive sizes, for at most three axes"
        )
    weights = jax.random.normal(key, shape, jnp.float32) / math.sqrt(math.prod(shape[:-1]))
    return {"kernel": weights, "bias": jnp.zeros(teacher_channels, jnp.float32)}


def regressor(params: Params, x: jax.Array) -> jax.Array:
    """A linear layer on channels: of each position alone, or a convolution that keeps the size.

    Args:
      params: from `regressor_init`.
      x: features, `[batch, ..., student_channels]`, brought to the dtype of the kernel.

    Returns:
      `[batch, ..., teacher_channels]`.

    Raises:
      CompressError: for features that do not fit the kernel.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = regressor_init(jax.random.key(0), 8, 16)
      >>> regressor(params, jnp.ones((2, 5, 5, 8))).shape
      (2, 5, 5, 16)
    """
    kernel, bias = params["kernel"], params["bias"]
    axes = kernel.ndim - 2
    if x.ndim < 2 or x.shape[-1] != kernel.shape[-2] or (axes and x.ndim != axes + 2):
        raise CompressError(
            f"features {x.shape} do not fit a regressor of kernel {kernel.shape}, which asks for "
            f"{kernel.shape[-2]} channels last"
            + (f" and {axes} axes of positions before them" if axes else "")
        )
    x = x.astype(kernel.dtype)
    if not axes:
        return x @ kernel + bias
    names = "DHW"[3 - axes :]
    numbers = jax.lax.conv_dimension_numbers(
        x.shape, kernel.shape, (f"N{names}C", f"{names}IO", f"N{names}C")
    )
    same = jax.lax.conv_general_dilated(x, kernel, (1,) * axes, "SAME", dimension_numbers=numbers)
    return same + bias


def resize(x: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """Features at another number of positions: by averages to fewer, by lines to more.

    Along an axis that shrinks from n to m, each new position is the average of the `n / m` old
    ones that it covers, parts of them included: average pooling where m divides n. Along an axis
    that grows, values are interpolated linearly between the centres of the old positions.

    Args:
      x: `[batch, positions..., channels]`, such as images or tokens.
      sizes: the new number of positions along each axis.

    Returns:
      `[batch, *sizes, channels]` in the dtype of x.

    Raises:
      CompressError: for another number of axes, or sizes that are not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> x = jnp.arange(4.0).reshape(1, 4, 1)
      >>> resize(x, (2,)).ravel().tolist()
      [0.5, 2.5]
      >>> resize(x, (8,)).ravel().tolist()
      [0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]
    """
    sizes = tuple(sizes)
    if len(sizes) != x.ndim - 2 or 0 in x.shape[1:-1] or min(sizes, default=1) < 1:
        raise CompressError(
            f"features {x.shape} to the sizes {sizes}: write a positive size for each axis "
            "between the batch and the channels"
        )
    out = x.astype(jnp.float32)
    for axis, size in enumerate(sizes, 1):
        if size != x.shape[axis]:
            moved = jnp.moveaxis(out, axis, -1)
            out = product("...n,nm->...m", moved, jnp.asarray(_weights(x.shape[axis], size)))
            out = jnp.moveaxis(out, -1, axis)
    return out.astype(x.dtype)


def _weights(n: int, m: int) -> np.ndarray:
    """What each of n positions adds to each of m, float32 `[n, m]`."""
    old, new = np.arange(n)[:, None], np.arange(m)
    if m < n:
        # The part of an old position that a new one covers, over all that it covers.
        ends = np.minimum(old + 1, (new + 1) * n / m)
        part = np.maximum(ends - np.maximum(old, new * n / m), 0) * m / n
    else:
        centre = np.clip((new + 0.5) * n / m - 0.5, 0, n - 1)
        part = np.maximum(1 - np.abs(old - centre), 0)
    return part.astype(np.float32)
