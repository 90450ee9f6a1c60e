"""Compresses a published checkpoint by a recipe, without its code, and runs it in Flax.

    python examples/published.py

The file is all-MiniLM-L6-v2 as it was published, with PyTorch's names and layouts. It is compressed
leaf by leaf into one entropy-coded file, listed, compared with the original, and loaded into a Flax
model: the renaming and transposing happen inside of the function that `jc.compressed` runs, so that
the weights stay small. On the command line the same is

    jaxcompress compress .assets/minilm small.safetensors --recipe recipe.yaml
    jaxcompress inspect small.safetensors
    jaxcompress diff .assets/minilm small.safetensors
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
from _minilm_model import MiniLM, convert, load_tokenizer, tokenize
from assets import AssetError, fetch
from flax.traverse_util import flatten_dict

import jaxcompress as jc

RECIPE = """
name: int8 and 4 bits
rules:
  - match: ["**/LayerNorm/**", "**/bias", "**/*position*/**", "**/*token_type*/**"]
    optional: true
    dense: true
  - match: "**/word_embeddings/weight"
    quantize: {format: uint4, group_size: 32, symmetric: false}
  - match: "**/weight"
    min_ndim: 2
    quantize: {format: int8, group_size: 64}
"""

TEXTS = [
    "A cat sat on the mat.",
    "A kitten was lying on a rug.",
    "Interest rates rose again in spring.",
]


def shrink(source: Path, target: Path) -> None:
    """From file to file; no two leaves are in memory at once."""
    recipe = jc.Recipe.from_yaml(RECIPE)
    jc.save(
        target, jc.compress(jc.open_params(source), recipe, lazy=True), coded=True, recipe=recipe
    )


def embed(weights: dict, folder: Path) -> np.ndarray:
    """Embeds `TEXTS` with weights that have PyTorch's names and layouts, small or not."""
    tokens, mask = tokenize(load_tokenizer(folder), TEXTS)

    def apply(weights, tokens, mask):
        return MiniLM().apply({"params": convert(flatten_dict(weights, sep="."))}, tokens, mask)

    return np.asarray(jax.jit(jc.compressed(apply))(weights, tokens, mask))


def main(out: Path = Path("out/published")) -> np.ndarray:
    """Shrinks, shows and runs it; returns the cosines of the embeddings before and after."""
    try:
        folder = fetch("minilm")
    except AssetError as error:
        raise SystemExit(str(error)) from None
    out.mkdir(parents=True, exist_ok=True)
    small = out / "small.safetensors"
    shrink(folder, small)
    print(jc.contents(small))
    print(jc.diff(jc.open_params(folder), jc.load(small, lazy=True)))
    before = embed(jc.decompress(jc.open_params(folder)), folder)
    after = embed(jc.load(small), folder)
    cosines = np.sum(before * after, axis=-1)
    sizes = [path.stat().st_size / 1e6 for path in (folder / "model.safetensors", small)]
    print(f"{sizes[0]:.2f} MB -> {sizes[1]:.2f} MB; cosines of the embeddings {cosines.round(4)}")
    alike, other = after[0] @ after[1], after[0] @ after[2]
    print(f"the first two texts are alike: {alike:.2f}, the third is not: {other:.2f}")
    return cosines


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
