"""LeNet-5, in the widths that papers on compression use: two convolutions and two dense layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

SHAPES = {"first": (5, 5, 1, 20), "second": (5, 5, 20, 50), "third": (800, 500), "head": (500, 10)}


def init(seed: int) -> Any:
    """430,500 weights and 580 biases, with He's initialization."""
    params = {}
    for key, (name, shape) in zip(jax.random.split(jax.random.key(seed), 4), SHAPES.items()):
        inputs = shape[-2] * (25 if len(shape) == 4 else 1)
        kernel = jax.random.normal(key, shape) * (2 / inputs) ** 0.5
        params[name] = {"kernel": kernel, "bias": jnp.zeros(shape[-1])}
    return params


def network(params: Any, images: jax.Array) -> jax.Array:
    """Logits of images `[n, 784]`; it knows nothing of compression."""
    x = images.reshape(-1, 28, 28, 1)
    for name in ("first", "second"):
        x = _half(_convolve(x, params[name]["kernel"]) + params[name]["bias"])
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(x @ params["third"]["kernel"] + params["third"]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout)


def _half(x: jax.Array) -> jax.Array:
    """ReLU and the largest of each 2 x 2."""
    n, height, width, channels = x.shape
    blocks = x.reshape(n, height // 2, 2, width // 2, 2, channels)
    return jax.nn.relu(jnp.max(blocks, axis=(2, 4)))
