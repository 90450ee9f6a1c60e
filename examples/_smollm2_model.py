"""SmolLM2-135M in plain JAX: a decoder of the llama family, read from a GGUF file.

30 blocks of width 576: grouped-query attention with rotary positions, SwiGLU, RMS norms before
each, and one table for both ends (Touvron et al., *LLaMA*, 2023; Ainslie et al., *GQA*, 2023; Su et
al., *RoFormer*, 2021; Allal et al., *SmolLM2*, 2025). The file has four bits to a weight in groups
of 32; what is read here are the values that those stand for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LAYERS, HEADS, KV_HEADS, DEPTH, BASE, EPSILON = 30, 9, 3, 64, 100_000.0, 1e-5
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# The names in the file, and what they are called here.
_KERNELS = {
    "attn_q": "attention/query", "attn_k": "attention/key", "attn_v": "attention/value",
    "attn_output": "attention/out", "ffn_gate": "mlp/gate", "ffn_up": "mlp/up",
    "ffn_down": "mlp/down",
}  # fmt: skip


def load_params(folder: Path) -> Any:
    """The values of the file in float32; kernels are `[in, out]`."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(folder / FILE)
    read = {t.name: np.asarray(dequantize(t.data, t.tensor_type)) for t in reader.tensors}
    layers = {}
    for i in range(LAYERS):
        layer: dict[str, Any] = {"attention": {}, "mlp": {}}
        for name, path in _KERNELS.items():
            block, module = path.split("/")
            kernel = read[f"blk.{i}.{name}.weight"].T
            layer[block][module] = {"kernel": jnp.asarray(kernel, jnp.float32)}
        for name, module in (("attn_norm", "attention_norm"), ("ffn_norm", "mlp_norm")):
            layer[module] = {"scale": jnp.asarray(read[f"blk.{i}.{name}.weight"], jnp.float32)}
        layers[f"layer_{i}"] = layer
    return {
        "token": {"embedding": jnp.asarray(read["token_embd.weight"], jnp.float32)},
        "decoder": layers,
        "norm": {"scale": jnp.asarray(read["output_norm.weight"], jnp.float32)},
    }


def load_tokenizer(folder: Path) -> Tokenizer:
    """Byte-level BPE from the merges in the file, with digits one by one."""
    from gguf import GGUFReader

    fields = GGUFReader(folder / FILE).fields
    tokens, merges = (fields[f"tokenizer.ggml.{n}"].contents() for n in ("tokens", "merges"))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def network(params: Any, tokens: jax.Array) -> jax.Array:
    """`[batch, length]` tokens to the logits of the next ones, `[batch, length, 49152]`."""
    table = params["token"]["embedding"]
    x = table[tokens]
    cosine, sine = _rotations(tokens.shape[-1])
    for i in range(LAYERS):
        layer = params["decoder"][f"layer_{i}"]
        x = x + _attention(layer["attention"], _norm(layer["attention_norm"], x), cosine, sine)
        x = x + _mlp(layer["mlp"], _norm(layer["mlp_norm"], x))
    return _norm(params["norm"], x) @ table.T


def losses(params: Any, tokens: jax.Array) -> jax.Array:
    """The negative log likelihood of each token but the first, in nats."""
    logits = network(params, tokens)[:, :-1]
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _norm(params: Any, x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + EPSILON) * params["scale"]


def _rotations(length: int) -> tuple[np.ndarray, np.ndarray]:
    angles = np.arange(length)[:, None, None] * BASE ** (-np.arange(0, DEPTH, 2) / DEPTH)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _rotate(x: jax.Array, cosine: Any, sine: Any) -> jax.Array:
    """Rotates neighbours, which is the order that GGUF files have."""
    even, odd = x[..., ::2], x[..., 1::2]
    pairs = jnp.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1)
    return pairs.reshape(x.shape)


def _attention(params: Any, x: jax.Array, cosine: Any, sine: Any) -> jax.Array:
    heads = lambda name, n: (x @ params[name]["kernel"]).reshape(*x.shape[:-1], n, DEPTH)
    query = _rotate(heads("query", HEADS), cosine, sine)
    key = _rotate(heads("key", KV_HEADS), cosine, sine)
    out = jax.nn.dot_product_attention(query, key, heads("value", KV_HEADS), is_causal=True)
    return out.reshape(x.shape) @ params["out"]["kernel"]


def _mlp(params: Any, x: jax.Array) -> jax.Array:
    gated = jax.nn.silu(x @ params["gate"]["kernel"]) * (x @ params["up"]["kernel"])
    return gated @ params["down"]["kernel"]
