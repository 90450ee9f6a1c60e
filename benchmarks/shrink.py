"""Channels and heads removed from real models: what is lost, and how much faster they are.

    python benchmarks/shrink.py [--quick] [resnet8] [minilm]

ResNet-8 (see `examples/shrink_resnet8.py`) is trained on Fashion-MNIST, loses half or more of its
multiplications, and is trained on, by three seeds. all-MiniLM-L6-v2 loses shares of its heads and
of the channels of its MLPs and is not trained at all; what is left of it is the mean cosine to the
vectors of the whole model on documents that the scores do not see.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxcompress import pruning

from common import Row, interleaved, on_images, row, show  # isort: skip

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import self_distillation
import shrink_resnet8
from _minilm_model import MiniLM, load_params
from _mnist import load
from _resnet8 import ResNet8
from _texts import news
from assets import AssetError, fetch

SEEDS = (0, 1, 2)
HEADS, HIDDEN = 12, 1536
# Kernels that read what is removed: what they make of it is what is lost with it.
READERS = {"**/attention/out/kernel": "block:32x384", "**/mlp/down/kernel": "channel"}
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
BATCH, EACH = 10, 8  # documents of a timed batch, texts of a scored one


def resnet8(quick: bool) -> list[Row]:
    """Accuracy, multiplications, file and times."""
    model, data = ResNet8(shrink_resnet8.WIDTHS), load(fetch("fashion-mnist"))
    seeds, epochs, tuned = (SEEDS[:1], 1, 1) if quick else (SEEDS, 4, 3)
    with tempfile.TemporaryDirectory() as folder:
        (before, _, *after), dense = shrink_resnet8.compare(
            model, data, Path(folder), epochs=epochs, tuned=tuned, seeds=seeds
        )
        small, variables, _ = shrink_resnet8.restore(Path(folder) / "tuned.safetensors", model)
    what, last = "ResNet-8 of 32 to 128 channels, channels removed", after[-1]
    error = 100 - float(np.mean([each["accuracy"] for each in after]))
    found = [
        row(
            f"{what}: multiplications", last["multiplications"] / 1e6, "dense",
            before["multiplications"] / 1e6, at_most=0.5, unit="M",
        ),
        row(
            f"{what}: test error, Fashion-MNIST, {len(after)} seeds", error, "dense + 0.5 points",
            100 - before["accuracy"] + 0.5, at_most=1, unit="%",
        ),
        row(
            f"{what}: file", last["file_bytes"] / 1e3, "dense", before["file_bytes"] / 1e3,
            at_most=0.5, unit="kB",
        ),
    ]  # fmt: skip
    forward = jax.jit(model.apply)
    # Of one channel each: what a forward pass takes that no removal can take away.
    least = ResNet8((1, 1, 1))
    thin = least.init(jax.random.key(0), data.test_images[:1])
    floor = jax.jit(least.apply)
    runs = {
        "dense": lambda x: forward(dense, x),
        "small": lambda x: small(variables, x),
        "floor": lambda x: floor(thin, x),
    }
    for batch, target in ((1, None), (32, 1.6)):
        t, of = on_images(runs, batch, quick), f"{what}: forward, batch {batch}"
        found += [
            row(of, t["small"], "dense", t["dense"], at_least=target),
            row(of, t["small"], "one channel", t["floor"]),
        ]
    return found


def encode(params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Unit vectors of texts."""
    return MiniLM().apply({"params": params}, tokens, mask)


def read_news(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of news that is not that of the test."""
    for tokens, mask in self_distillation.batches([news()], count, seed=0):
        yield tokens[:EACH], mask[:EACH]


def readers(tree: Any) -> Any:
    """The part of a tree that is of `READERS`."""
    ends = tuple(pattern.removeprefix("**/") for pattern in READERS)
    return unflatten_dict(
        {path: x for path, x in flatten_dict(tree, sep="/").items() if path.endswith(ends)},
        sep="/",
    )


def taylor(params: Any, count: int) -> Any:
    """How much the vectors turn when a head or a channel goes, to second order.

    Of `1 - cosine` to the model itself the gradient is zero, so its first-order score is. The
    second-order one is the mean square of `sum w g`, where g is the gradient of the vectors along
    random directions.
    """
    flat = flatten_dict(params, sep="/")

    def along(some: Any, tokens: jax.Array, mask: jax.Array, direction: jax.Array) -> jax.Array:
        whole = unflatten_dict(flat | flatten_dict(some, sep="/"), sep="/")
        return jnp.sum(direction * encode(whole, tokens, mask))

    width = params["embeddings"]["word"]["embedding"].shape[1]
    rng = np.random.default_rng(0)
    drawn = (
        (tokens, mask, rng.normal(size=(len(tokens), width)).astype(np.float32))
        for tokens, mask in read_news(count)
    )
    return pruning.scores.fisher(along, readers(params), drawn, units=READERS)


def wanda(params: Any, count: int) -> Any:
    """Magnitudes times the norms of what they meet, squared: the energy that a channel hands on."""
    return jax.tree.map(jnp.square, readers(pruning.scores.wanda(encode, params, read_news(count))))


def minilm(quick: bool) -> list[Row]:
    """Cosines over what is removed, and times for a third."""
    params = load_params(fetch("minilm"))
    test = self_distillation.Test(params)
    some = tuple(x[:BATCH] for x in test.data)
    groups = pruning.groups(encode, params, *some)
    wanted = lambda group: group.size in (HEADS, HIDDEN)
    count = 2 if quick else 32
    scored = {"Taylor": taylor(params, count), "Wanda": wanda(params, count)}
    what, found = "all-MiniLM-L6-v2, heads and MLP channels removed", []
    plans = lambda score, share: pruning.plan(groups, score, 1 - share, only=wanted)
    for share in SHARES[:2] if quick else SHARES:
        for name, score in scored.items():
            # The masked model, which is the smaller one to rounding, and is compiled once.
            cosine = test.cosine(pruning.mask_channels(params, plans(score, share)))
            found.append(row(f"{what}: {share:.0%}, {name}", cosine, "dense", 1.0, unit="cosine"))
    small, fewer = pruning.shrink(encode, params, plans(scored["Wanda"], 1 / 3))
    small = jax.jit(small)
    cosine = float(np.mean(np.sum(small(fewer, *test.data) * test.target, axis=-1)))
    found.append(row(f"{what}: a third, Wanda", cosine, "dense", 1.0, unit="cosine"))
    dense = jax.jit(encode)
    t = interleaved(
        {"dense": lambda: dense(params, *some), "small": lambda: small(fewer, *some)},
        rounds=5 if quick else 21,
    )
    found.append(row(f"{what}: a third, forward", t["small"], "dense", t["dense"], at_least=1.3))
    return found


PARTS = {"resnet8": resnet8, "minilm": minilm}


def run(quick: bool = False, only: tuple[str, ...] = tuple(PARTS)) -> list[Row]:
    """Rows of both models, as far as their data are there."""
    found = []
    for name in only:
        try:
            found += PARTS[name](quick)
        except AssetError as error:
            print(f"{name} is left out: {error}")
    return found


def main() -> None:
    only = tuple(name for name in PARTS if name in sys.argv) or tuple(PARTS)
    show("structured removal", run("--quick" in sys.argv, only))


if __name__ == "__main__":
    main()
