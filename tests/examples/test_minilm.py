"""The sentence encoder of the examples: its own arithmetic, and the published figures."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
pytest.importorskip("tokenizers")
pytest.importorskip("scipy")
import _minilm_model
import assets
import minilm

needs_assets = pytest.mark.skipif(
    not (assets.present("minilm") and assets.present("similarity")),
    reason="the weights and texts are not there: run `python examples/assets.py`",
)

WIDTH, HIDDEN, LAYERS, WORDS, PLACES = 64, 128, 2, 50, 24
SMALL = _minilm_model.MiniLM(WORDS, PLACES, WIDTH, LAYERS, 4, HIDDEN)


def _batch(length: int = 8) -> tuple[jax.Array, jax.Array]:
    tokens = jax.random.randint(jax.random.key(1), (3, length), 0, WORDS)
    return tokens, (jnp.arange(length) < jnp.array([[length], [3], [5]])).astype(jnp.int32)


@pytest.fixture(scope="module")
def params():
    return SMALL.init(jax.random.key(0), *_batch())["params"]


def _published_shapes() -> dict[str, tuple[int, ...]]:
    """The names and shapes under which the weights are published, written out by hand."""
    linear = {
        "attention.self.query": (WIDTH, WIDTH),
        "attention.self.key": (WIDTH, WIDTH),
        "attention.self.value": (WIDTH, WIDTH),
        "attention.output.dense": (WIDTH, WIDTH),
        "intermediate.dense": (HIDDEN, WIDTH),
        "output.dense": (WIDTH, HIDDEN),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.position_ids": (1, PLACES),
        "embeddings.word_embeddings.weight": (WORDS, WIDTH),
        "embeddings.position_embeddings.weight": (PLACES, WIDTH),
        "embeddings.token_type_embeddings.weight": (2, WIDTH),
        "pooler.dense.weight": (WIDTH, WIDTH),
        "pooler.dense.bias": (WIDTH,),
    }
    norms = ["embeddings.LayerNorm"]
    for i in range(LAYERS):
        for name, shape in linear.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
        norms += [f"encoder.layer.{i}.{n}.LayerNorm" for n in ("attention.output", "output")]
    for name in norms:
        shapes |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    return shapes


def test_convert_fills_the_model_and_transposes_kernels(params):
    rng = np.random.default_rng(0)
    tensors = {k: rng.normal(size=s).astype(np.float32) for k, s in _published_shapes().items()}
    converted = _minilm_model.convert(tensors)
    chex.assert_trees_all_equal_shapes_and_dtypes(converted, params)
    up = tensors["encoder.layer.1.intermediate.dense.weight"]
    np.testing.assert_array_equal(converted["encoder"]["layer_1"]["mlp"]["up"]["kernel"], up.T)
    # Each published tensor is in one place: all sums differ, and all are found.
    unused = [
        tensors[k].sum() for k in tensors if k.startswith(("pooler", "embeddings.position_i"))
    ]
    found = sorted([float(np.asarray(x).sum()) for x in jax.tree.leaves(converted)])
    wanted = sorted({float(x.sum()) for x in tensors.values()} - {float(x) for x in unused})
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_convert_refuses_a_tensor_it_does_not_know():
    with pytest.raises(KeyError, match=r"encoder\.layer\.0\.extra\.weight"):
        _minilm_model.convert({"encoder.layer.0.extra.weight": np.ones((2, 2), np.float32)})


def test_output_is_a_unit_vector_that_padding_does_not_move(params):
    tokens, mask = _batch()
    out = SMALL.apply({"params": params}, tokens, mask)
    np.testing.assert_allclose(jnp.linalg.norm(out, axis=-1), 1, rtol=1e-5)
    short = SMALL.apply({"params": params}, tokens[1:2, :3], mask[1:2, :3])
    np.testing.assert_allclose(out[1:2], short, atol=1e-5)
    other = SMALL.apply({"params": params}, jnp.where(mask > 0, tokens, 7), mask)
    np.testing.assert_allclose(out, other, atol=1e-5)


RULES = {
    **minilm.RULES,
    # The example's rank is for kernels of 1536 x 384.
    "low-rank": {"**/mlp/down/kernel": jc.chain(jc.LowRank(16), minilm.INT8)},
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("int4-g64", "codebook")]


@pytest.mark.parametrize("name", ["int8-g64", "uint4-g32", "low-rank", *SLOW])
def test_compressed_equals_decompressed_through_a_file(params, tmp_path, name):
    jc.save(tmp_path / "small.safetensors", jc.compress(params, RULES[name]))
    small = jc.load(tmp_path / "small.safetensors")
    assert jc.nbytes(small) < jc.nbytes(params)
    out = jax.jit(jc.compressed(SMALL.apply))({"params": small}, *_batch())
    wanted = SMALL.apply({"params": jc.decompress(small)}, *_batch())
    np.testing.assert_allclose(out, wanted, atol=1e-5)


@pytest.fixture(scope="module")
def reference():
    """The real model in float32: its parameters, the benchmarks and the embeddings."""
    folder = assets.fetch("minilm")
    benchmarks = minilm.Benchmarks()
    tokenizer = _minilm_model.load_tokenizer(folder)
    params = _minilm_model.load_params(folder)
    apply = jax.jit(_minilm_model.MiniLM().apply)
    documents, words = (
        np.asarray(apply({"params": params}, *_minilm_model.tokenize(tokenizer, texts)))
        for texts in (benchmarks.documents, benchmarks.words)
    )
    return params, benchmarks, documents, words


@needs_assets
def test_published_weights_fill_the_model(reference):
    params, *_ = reference
    tokens = jnp.zeros((1, 8), jnp.int32)
    init = jax.eval_shape(_minilm_model.MiniLM().init, jax.random.key(0), tokens, tokens)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, init["params"])


@needs_assets
def test_float32_reaches_the_published_figures(reference):
    _, benchmarks, documents, words = reference
    assert benchmarks.wordsim(words) == pytest.approx(0.729, abs=1e-3)
    assert benchmarks.lee(documents) == pytest.approx(0.656, abs=1e-3)


@needs_assets
def test_int8_keeps_the_embeddings(reference, tmp_path):
    params, benchmarks, documents, _ = reference
    file = tmp_path / "int8.safetensors"
    jc.save(file, jc.compress(params, minilm.RULES["int8-g64"]))
    out = np.asarray(minilm.embed(file, benchmarks.documents[:10]))
    cosine = np.sum(out * documents[:10], axis=-1)
    # 0.9998 to four digits; plain numpy on the same grid gives 0.99977.
    assert cosine.mean() >= 0.99975
    assert os.path.getsize(file) <= 23.7e6


def test_the_benchmark_measures_rules_of_the_example(monkeypatch):
    folder = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(folder)  # for `common`; the name of the file itself is taken
    spec = importlib.util.spec_from_file_location("benchmark_of_minilm", folder / "minilm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.TARGETS) <= set(minilm.RULES)
