"""EfficientNet-Lite0 in plain JAX: an ImageNet classifier of 4.7 million weights.

Sixteen inverted residual blocks with ReLU6 and batch norms, without squeeze-and-excitation (Tan and
Le, *EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks*, 2019).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BLOCKS, EPSILON, SIZE = 16, 1e-3, 224
HALVING = (1, 3, 5, 11)  # the blocks with stride 2
FILE = "efficientnet-lite0-57934424.pth"
_CONVOLUTIONS = {
    "_expand_conv": "expand",
    "_depthwise_conv": "depthwise",
    "_project_conv": "project",
}


def norms() -> dict[str, str]:
    """For each convolution the batch norm that reads it, as `fold_batch_norms` takes them."""
    names = ["stem", "head"]
    names += [f"block_{i}/expand" for i in range(1, BLOCKS)]
    names += [f"block_{i}/{name}" for i in range(BLOCKS) for name in ("depthwise", "project")]
    return {name: f"{name}_norm" for name in names}


def load_variables(folder: Path) -> dict[str, Any]:
    """The published float32 weights, as Flax's collections `params` and `batch_stats`."""
    import torch

    read = torch.load(folder / FILE, map_location="cpu", weights_only=True)
    tensors = {name: x.numpy() for name, x in read.items()}
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}

    def put(path: str, convolution: str, norm: str) -> None:
        kernel = tensors[f"{convolution}.weight"].transpose(2, 3, 1, 0)
        _set(variables["params"], path, {"kernel": kernel})
        scale, bias = tensors[f"{norm}.weight"], tensors[f"{norm}.bias"]
        _set(variables["params"], f"{path}_norm", {"scale": scale, "bias": bias})
        stats = {"mean": tensors[f"{norm}.running_mean"], "var": tensors[f"{norm}.running_var"]}
        _set(variables["batch_stats"], f"{path}_norm", stats)

    put("stem", "_conv_stem", "_bn0")
    put("head", "_conv_head", "_bn1")
    for i in range(BLOCKS):
        for n, (name, ours) in enumerate(_CONVOLUTIONS.items()):
            if i or n:
                put(f"block_{i}/{ours}", f"_blocks.{i}.{name}", f"_blocks.{i}._bn{n}")
    kernel = tensors["_fc.weight"].T
    variables["params"]["classes"] = {"kernel": kernel, "bias": tensors["_fc.bias"]}
    return jax.tree.map(jnp.asarray, variables)


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    *folders, last = path.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[last] = value


def network(variables: Any, images: jax.Array) -> jax.Array:
    """`[batch, 224, 224, 3]` images from 0 to 255 to logits `[batch, 1000]`."""
    params, stats = variables["params"], variables["batch_stats"]

    def layer(x: jax.Array, inside: Any, means: Any, name: str, stride: int = 1) -> jax.Array:
        x = _convolve(x, inside[name]["kernel"], stride)
        norm, seen = inside[f"{name}_norm"], means[f"{name}_norm"]
        return (x - seen["mean"]) * norm["scale"] * jax.lax.rsqrt(seen["var"] + EPSILON) + norm[
            "bias"
        ]

    x = jax.nn.relu6(layer((images - 127) / 128, params, stats, "stem", 2))
    for i in range(BLOCKS):
        inside, means, y = params[f"block_{i}"], stats[f"block_{i}"], x
        if "expand" in inside:
            y = jax.nn.relu6(layer(y, inside, means, "expand"))
        y = jax.nn.relu6(layer(y, inside, means, "depthwise", 2 if i in HALVING else 1))
        y = layer(y, inside, means, "project")
        x = x + y if x.shape == y.shape else y
    x = jnp.mean(jax.nn.relu6(layer(x, params, stats, "head")), axis=(1, 2))
    return x @ params["classes"]["kernel"] + params["classes"]["bias"]


def _convolve(x: jax.Array, kernel: Any, stride: int) -> jax.Array:
    groups = x.shape[-1] // kernel.shape[-2]
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip


def crops(files: list[Path], count: int, seed: int = 0) -> np.ndarray:
    """Random squares of half to all of the shorter side, `[count, 224, 224, 3]` uint8."""
    from PIL import Image

    rng, out = np.random.default_rng(seed), []
    pictures = [Image.open(file).convert("RGB") for file in files]
    for i in range(count):
        picture = pictures[i % len(pictures)]
        side = int(min(picture.size) * rng.uniform(0.5, 1))
        left, top = (int(rng.integers(0, length - side + 1)) for length in picture.size)
        square = picture.crop((left, top, left + side, top + side))
        out.append(np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC)))
    return np.stack(out)
