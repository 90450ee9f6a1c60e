"""Coupled channels: what finding them costs, against tracing alone and against Torch-Pruning.

python benchmarks/structure.py [--quick]
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.pruning.structure import groups

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import _minilm_model  # isort: skip
import _resnet8  # isort: skip
import _smollm2_model as smollm2  # isort: skip
from common import Row, interleaved, row, show  # isort: skip

ALLOWED = 10.0  # seconds for 30 layers


def shaped(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def linen(module: Any, *args: Any) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """The function, its params and arguments, as shapes."""
    return module.apply, jax.eval_shape(module.init, jax.random.key(0), *args), args


def minilm(layers: int) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32)
    return linen(_minilm_model.MiniLM(layers=layers), tokens, tokens)


def llama() -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """SmolLM2-135M: 30 layers of width 576."""
    kernel = lambda *shape: {"kernel": shaped(*shape)}
    heads, keys = (n * smollm2.DEPTH for n in (smollm2.HEADS, smollm2.KV_HEADS))
    attention = {
        "query": kernel(576, heads),
        "key": kernel(576, keys),
        "value": kernel(576, keys),
        "out": kernel(heads, 576),
    }
    mlp = {"gate": kernel(576, 1536), "up": kernel(576, 1536), "down": kernel(1536, 576)}
    norms = {name: {"scale": shaped(576)} for name in ("attention_norm", "mlp_norm")}
    layer = {"attention": attention, "mlp": mlp, **norms}
    params = {
        "token": {"embedding": shaped(49152, 576)},
        "decoder": {f"layer_{i}": layer for i in range(smollm2.LAYERS)},
        "norm": {"scale": shaped(576)},
    }
    return smollm2.network, params, (jax.ShapeDtypeStruct((2, 64), jnp.int32),)


def trace(fn: Callable[..., Any], params: Any, args: tuple[Any, ...]) -> None:
    """Traces another function each time, or jax would remember what it traced."""
    jax.make_jaxpr(lambda *x: fn(*x))(params, *args)


def find(fn: Callable[..., Any], params: Any, args: tuple[Any, ...]) -> None:
    groups(fn, params, *args)


def against_tracing(quick: bool) -> list[Row]:
    """The whole of `groups`, tracing included, over tracing alone."""
    models = {
        "ResNet-8": linen(_resnet8.ResNet8(), shaped(1, 784)),
        "MiniLM": minilm(6),
        "SmolLM2-135M": llama(),
    }
    rows = []
    for name, (fn, params, args) in models.items():
        candidates = {
            "trace": functools.partial(trace, fn, params, args),
            "groups": functools.partial(find, fn, params, args),
        }
        t = interleaved(candidates, rounds=3 if quick else 11)
        rows.append(row(f"groups of {name}", t["groups"], "tracing", t["trace"], at_most=3))
        if name == "SmolLM2-135M":
            what = "groups of SmolLM2-135M, 30 layers"
            rows.append(row(what, t["groups"], "allowed", ALLOWED, at_most=1))
    t = interleaved({"groups": functools.partial(find, *minilm(30))}, rounds=3, warmup=1)
    what = "groups of a MiniLM of 30 layers"
    return [*rows, row(what, t["groups"], "allowed", ALLOWED, at_most=1)]


def against_torch_pruning(quick: bool) -> list[Row]:
    """ResNet-8 in torch, with all groups of Torch-Pruning; no rows where it is not installed."""
    try:
        import torch
        import torch_pruning as tp
    except ModuleNotFoundError as error:
        print(f"Torch-Pruning is left out: {error}")
        return []
    model, images = torch_resnet8(torch), torch.zeros(1, 1, 28, 28)

    def theirs() -> None:
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=images)
        list(graph.get_all_groups())

    ours = functools.partial(find, *linen(_resnet8.ResNet8(), shaped(1, 784)))
    t = interleaved({"ours": ours, "theirs": theirs}, rounds=5 if quick else 21)
    peer = "Torch-Pruning, its graph and groups"
    return [row("groups of ResNet-8", t["ours"], peer, t["theirs"])]


def torch_resnet8(torch: Any) -> Any:
    """The same network in torch."""
    nn = torch.nn

    def conv(inputs: int, outputs: int, stride: int = 1) -> Any:
        return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int):
            super().__init__()
            self.conv1, self.norm1 = conv(inputs, outputs, stride), nn.BatchNorm2d(outputs)
            self.conv2, self.norm2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
            same = inputs == outputs
            self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

        def forward(self, x: Any) -> Any:
            y = torch.relu(self.norm1(self.conv1(x)))
            return torch.relu(self.shortcut(x) + self.norm2(self.conv2(y)))

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(64, 10)

        def forward(self, x: Any) -> Any:
            return self.dense(x.mean((2, 3)))

    first = [conv(1, 16), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(
        *first, Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2), Head()
    ).eval()


def run(quick: bool = False) -> list[Row]:
    """All rows."""
    return [*against_tracing(quick), *against_torch_pruning(quick)]


def main() -> None:
    show("structured removal", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
