"""all-MiniLM-L6-v2 in Flax Linen: a BERT encoder whose mean-pooled output embeds sentences.

Six post-norm transformer blocks of width 384 (Devlin et al., *BERT*, 2019; Wang et al., *MiniLM*,
2020; Reimers and Gurevych, *Sentence-BERT*, 2019).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file
from tokenizers import Tokenizer

LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-12)


class Embeddings(nn.Module):
    vocabulary: int
    positions: int
    width: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(self.vocabulary, self.width, name="word")(tokens)
        x += nn.Embed(self.positions, self.width, name="position")(jnp.arange(tokens.shape[-1]))
        # Every token of a single sentence is of type 0.
        x += nn.Embed(2, self.width, name="token_type")(jnp.zeros_like(tokens))
        return LayerNorm(name="norm")(x)


class Attention(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        width = x.shape[-1]

        def project(name: str) -> jax.Array:
            return nn.Dense(width, name=name)(x).reshape(*x.shape[:-1], self.heads, -1)

        y = nn.dot_product_attention(
            project("query"), project("key"), project("value"), mask=mask[:, None, None, :] > 0
        )
        return nn.Dense(width, name="out")(y.reshape(x.shape))


class MLP(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.gelu(nn.Dense(self.hidden, name="up")(x), approximate=False)
        return nn.Dense(x.shape[-1], name="down")(y)


class Block(nn.Module):
    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        x = LayerNorm(name="attention_norm")(x + Attention(self.heads, name="attention")(x, mask))
        return LayerNorm(name="mlp_norm")(x + MLP(self.hidden, name="mlp")(x))


class Encoder(nn.Module):
    layers: int
    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = Block(self.heads, self.hidden, name=f"layer_{i}")(x, mask)
        return x


class MiniLM(nn.Module):
    """`[batch, length]` tokens and their 0/1 mask to `[batch, width]` unit vectors."""

    vocabulary: int = 30522
    positions: int = 512
    width: int = 384
    layers: int = 6
    heads: int = 12
    hidden: int = 1536

    @nn.compact
    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        x = Embeddings(self.vocabulary, self.positions, self.width, name="embeddings")(tokens)
        x = Encoder(self.layers, self.heads, self.hidden, name="encoder")(x, mask)
        # The mean over real tokens; its scale does not matter, for the length becomes 1.
        x = jnp.sum(x * mask[..., None], axis=1)
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


# The published names of modules, and what they are called here.
_MODULES = [
    (r"embeddings\.(word|position|token_type)_embeddings", r"embeddings/\1"),
    (r"embeddings\.LayerNorm", "embeddings/norm"),
    (
        r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)",
        r"encoder/layer_\1/attention/\2",
    ),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense", r"encoder/layer_\1/attention/out"),
    (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm", r"encoder/layer_\1/attention_norm"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense", r"encoder/layer_\1/mlp/up"),
    (r"encoder\.layer\.(\d+)\.output\.dense", r"encoder/layer_\1/mlp/down"),
    (r"encoder\.layer\.(\d+)\.output\.LayerNorm", r"encoder/layer_\1/mlp_norm"),
]
# Of BERT's next-sentence head, which a mean-pooled embedding never meets, and a constant.
_UNUSED = ("pooler.", "embeddings.position_ids")


def convert(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """The published tensors as the parameter tree of `MiniLM`.

    A Flax kernel is `[in, out]`, the published ones are `[out, in]`.

    Raises:
      KeyError: for a tensor that the model has no place for.
    """
    flat = {}
    for name, tensor in tensors.items():
        if name.startswith(_UNUSED):
            continue
        module, _, kind = name.rpartition(".")
        path = _path(module)
        if path is None:
            raise KeyError(f"tensor {name!r} has no place in MiniLM")
        if kind == "bias":
            flat[f"{path}/bias"] = tensor
        elif path.endswith("norm"):
            flat[f"{path}/scale"] = tensor
        elif path.startswith("embeddings/"):
            flat[f"{path}/embedding"] = tensor
        else:
            flat[f"{path}/kernel"] = tensor.T
    return unflatten_dict({path: jnp.asarray(x) for path, x in flat.items()}, sep="/")


def _path(module: str) -> str | None:
    for published, ours in _MODULES:
        if found := re.fullmatch(published, module):
            return found.expand(ours)
    return None


def load_params(folder: Path) -> dict[str, Any]:
    """The published float32 weights as a Flax parameter tree."""
    return convert(load_file(folder / "model.safetensors"))


def load_tokenizer(folder: Path) -> Tokenizer:
    """The published tokenizer, cutting at the 256 tokens that the model was made for."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    # A few lengths only, so that few programs are compiled.
    tokenizer.enable_padding(pad_to_multiple_of=8)
    return tokenizer


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, `[texts, length]` each, of texts padded to one length."""
    encoded = tokenizer.encode_batch(list(texts))
    tokens = np.array([text.ids for text in encoded], np.int32)
    return tokens, np.array([text.attention_mask for text in encoded], np.int32)
