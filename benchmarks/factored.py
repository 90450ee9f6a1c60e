"""ResNet-8 on Fashion-MNIST at half the multiplications: accuracy and forward time.

    python benchmarks/factored.py [--quick] [--untrained]

First single layers of its shapes, then the network, its 3x3 kernels as filters of 3x1 and 1x3 that
are trained on (see `examples/factorize.py`). Operations are what the compiler counts for the whole
forward pass. The network that is trained is twice as wide as usual: kernels of 8 channels, half of
the usual 16, take XLA:CPU as long as those of 16, since its products fill vectors of 16 floats.
Times do not depend on the values: `--untrained` gives them for both widths without the training.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

import jaxcompress as jc

from common import Row, interleaved, on_images, row, show  # isort: skip

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import factorize
from _mnist import load
from _resnet8 import ResNet8
from assets import AssetError, fetch

BATCHES = (1, 32)
USUAL, WIDE = (16, 32, 64), (32, 64, 128)
LAYERS = ((28, 16), (14, 32), (7, 64))  # pixels to a side, channels


def layers(quick: bool) -> list[Row]:
    """A 3x3 convolution at half the channels by Tucker-2, against the dense one and by hand."""

    def conv(x: jax.Array, w: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)

    dense, factored = jax.jit(conv), jax.jit(jc.compressed(conv))
    by_hand = jax.jit(lambda x, core, a, b: conv(x @ a, core) @ b.T)
    found = []
    for side, channels in LAYERS:
        x = jax.random.normal(jax.random.key(0), (100, side, side, channels))
        w = jax.random.normal(jax.random.key(1), (3, 3, channels, channels))
        leaf = jc.Tucker(channels // 2)(w)
        t = interleaved(
            {
                "dense": lambda x=x, w=w: dense(x, w),
                "factored": lambda x=x, leaf=leaf: factored(x, leaf),
                "by hand": lambda x=x, leaf=leaf: by_hand(x, *leaf.factors),
            },
            rounds=9 if quick else 41,
        )
        what = f"3x3 convolution of {channels} channels, {side} x {side}, half the channels"
        found.append(row(what, t["factored"], "dense", t["dense"]))
        found.append(row(what, t["factored"], "the same by hand", t["by hand"]))
    return found


def forward(what: str, model: ResNet8, dense: Any, small: Any, quick: bool) -> list[Row]:
    """Times of forward passes."""
    found, run = [], factorize.forward(model)
    for batch in BATCHES:
        runs = {"dense": lambda x: run(dense, x), "factored": lambda x: run(small, x)}
        t = on_images(runs, batch, quick)
        what_now = f"{what}: forward, batch {batch}"
        at_least = 1.5 if model.widths == WIDE else None
        found.append(row(what_now, t["factored"], "dense", t["dense"], at_least=at_least))
    return found


def network(quick: bool) -> list[Row]:
    """Accuracy, operations and time of the network that is trained."""
    model, data = ResNet8(WIDE), load(fetch("fashion-mnist"))
    epochs, tuned = (1, 1) if quick else (5, 3)
    with tempfile.TemporaryDirectory() as folder:
        rows, *_ = factorize.compare(
            model, data, Path(folder), epochs=epochs, tuned=tuned, form="separable"
        )
    before, after = rows[0], rows[-1]
    what = "ResNet-8 of 32 to 128 channels, separable"
    return [
        row(
            f"{what}: operations", after["flops"] / 1e6, "dense", before["flops"] / 1e6,
            at_most=0.5, unit="M",
        ),
        row(
            f"{what}: test error, Fashion-MNIST", 100 - after["accuracy"], "dense + 0.5 points",
            100 - before["accuracy"] + 0.5, at_most=1, unit="%",
        ),
    ]  # fmt: skip


def untrained(quick: bool) -> list[Row]:
    """Times of both widths."""
    found = []
    for widths, form in ((USUAL, "tucker"), (USUAL, "separable"), (WIDE, "separable")):
        model = ResNet8(widths)
        dense = model.init(jax.random.key(0), jax.numpy.zeros((1, 784)))
        small = jc.compress(dense, factorize.rules(model, form, factorize.SHARE))
        what = f"ResNet-8 of {widths[0]} to {widths[-1]} channels, {form}"
        found += forward(what, model, dense, small, quick)
    return found


def run(quick: bool = False) -> list[Row]:
    """Rows of layers and of networks; of the trained one where its images are."""
    found = layers(quick) + untrained(quick)
    try:
        found += network(quick)
    except AssetError as error:
        print(f"the trained network is left out: {error}")
    return found


def main() -> None:
    only = untrained if "--untrained" in sys.argv else run
    show("factored convolutions", only("--quick" in sys.argv))


if __name__ == "__main__":
    main()
