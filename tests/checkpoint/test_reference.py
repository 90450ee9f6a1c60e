"""The page on the file format is right: a reader written from it alone reads what `save` writes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_reader

import jaxcompress as jc

SCALES = jnp.exp(0.5 * jax.random.normal(jax.random.key(1), (700,)))
W = jax.random.normal(jax.random.key(0), (480, 700)) * SCALES
SMALL = W[:47, :53]


@pytest.fixture(scope="module")
def tree():
    return {
        "int8": jc.Quantize("int8", group_size=64)(W),
        "int3": jc.Quantize("int3", group_size=24)(W),
        "uint6": jc.Quantize("uint6", symmetric=False, group_size=33)(SMALL),
        "half": jc.Prune(0.5)(W),
        "tenth": jc.Prune(0.9)(W),
        "percent": jc.Prune(0.99)(W),
        "odd": jc.Prune(0.9)(SMALL),
        "2:4": jc.Prune(0.5, pattern="2:4")(W),
        "stack": jc.Prune(0.9)(jnp.stack([SMALL, SMALL * 2])),
        "codebook": jc.Codebook(3, iterations=2)(SMALL),
        "dense": [W, W.astype(jnp.bfloat16), SMALL.astype(jnp.float16), jnp.arange(5)],
        "zeros": jnp.zeros((700, 700), jnp.int8),
        "float8": jnp.zeros((50, 50), jnp.float8_e4m3fn),
    }


def kinds(path):
    """How the tensors of a file are coded."""
    nodes, found = [described(path)], set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            if "coded" in node:
                found.add(node["coded"]["as"])
            nodes += node.values()
        elif isinstance(node, list):
            nodes += node
    return found


def described(path):
    with open(path, "rb") as file:
        text = file.read(int.from_bytes(file.read(8), "little"))
    return json.loads(json.loads(text)["__metadata__"]["jaxcompress"])["tree"]


def test_a_reader_written_from_the_page_reads_every_tensor(tree, tmp_path):
    jc.save(tmp_path / "coded", tree, coded=True)
    jc.save(tmp_path / "plain", tree)
    assert kinds(tmp_path / "coded") == {"planes", "fields", "columns", "densities"}
    coded, plain = (reference_reader.read(tmp_path / name) for name in ("coded", "plain"))
    assert set(coded) == set(plain)
    for name, array in plain.items():
        assert (coded[name].shape, coded[name].dtype) == (array.shape, array.dtype), name
        assert coded[name].tobytes() == array.tobytes(), name
    leaves = {path: leaf for path, leaf in jc.rules.flatten(tree)[0] if not jc.is_compressed(leaf)}
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(coded[path], np.asarray(leaf), path)


def test_coded_and_plain_files_give_the_same_leaves(tree, tmp_path):
    jc.save(tmp_path / "coded", tree, coded=True)
    back = jc.load(tmp_path / "coded")
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
        assert ours.dtype == theirs.dtype
