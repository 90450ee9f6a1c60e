"""ResNet-8 on Fashion-MNIST at half the multiplications: accuracy and forward time.

    python benchmarks/factored.py [--quick]

First single layers of its shapes, then the network, its 3x3 kernels as Tucker-2 decompositions that
are trained on (see `examples/factorize.py`). Operations are what the compiler counts for the whole
forward pass.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import jax

import jaxcompress as jc

from common import Row, interleaved, row, show  # isort: skip

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import factorize
from _mnist import load
from assets import AssetError, fetch

BATCHES = (1, 100)
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


def run(quick: bool = False) -> list[Row]:
    """Rows of layers, and of the network's accuracy, operations and time where its images are."""
    found = layers(quick)
    try:
        data = load(fetch("fashion-mnist"))
    except AssetError as error:
        print(f"the network is left out: {error}")
        return found
    epochs, tuned = (2, 1) if quick else (6, 3)
    with tempfile.TemporaryDirectory() as folder:
        rows, dense, small = factorize.compare(
            data, Path(folder), epochs=epochs, tuned=tuned, share=factorize.SHARE
        )
    before, after = rows[0], rows[-1]
    what = "ResNet-8, Fashion-MNIST, Tucker-2"
    found += [
        row(
            f"{what}: operations", after["flops"] / 1e6, "dense", before["flops"] / 1e6,
            at_most=0.5, unit="M",
        ),
        row(
            f"{what}: test error", 100 - after["accuracy"], "dense + 0.5 points",
            100 - before["accuracy"] + 0.5, at_most=1, unit="%",
        ),
    ]  # fmt: skip
    for batch in BATCHES:
        images = jax.numpy.asarray(data.test_images[:batch])
        t = interleaved(
            {
                "dense": lambda images=images: factorize.forward(dense, images),
                "factored": lambda images=images: factorize.forward(small, images),
            },
            rounds=9 if quick else 41,
            calls=10 if batch == 1 else 1,
        )
        found.append(
            row(f"{what}: forward, batch {batch}", t["factored"], "dense", t["dense"], at_least=1.5)
        )
    return found


def main() -> None:
    show("factored convolutions", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
