"""ResNet-8 in Linen, with batch norms: three blocks of 16, 32 and 64 channels."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax


class ResNet8(nn.Module):
    """Logits of images `[n, 784]`; it knows nothing of compression.

    References:
      He et al., *Deep Residual Learning for Image Recognition*, 2016; Banbury et al., *MLPerf Tiny
      Benchmark*, 2021 (this size).
    """

    widths: tuple[int, ...] = (16, 32, 64)
    classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), use_bias=False)
        x = images.reshape(-1, 28, 28, 1)
        x = nn.relu(norm(name="first_norm")(conv(self.widths[0], name="first")(x)))
        for n, width in enumerate(self.widths):
            strides = (1, 1) if n == 0 else (2, 2)
            name = f"block{n}"
            y = conv(width, strides=strides, name=f"{name}_conv1")(x)
            y = nn.relu(norm(name=f"{name}_norm1")(y))
            y = norm(name=f"{name}_norm2")(conv(width, name=f"{name}_conv2")(y))
            if x.shape != y.shape:
                x = nn.Conv(width, (1, 1), strides=strides, name=f"{name}_shortcut")(x)
            x = nn.relu(x + y)
        return nn.Dense(self.classes, name="head")(x.mean(axis=(1, 2)))
