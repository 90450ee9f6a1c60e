"""Wanda: norms of the inputs written out, for each way in which a kernel meets them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress import KernelAxes
from jaxcompress.pruning import scores
from jaxcompress.pruning.masks import make_masks


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(found, w, norms):
    # A sum of some ten squares and a root: 1e-6.
    expected = np.abs(w.astype(np.float64)) * norms
    np.testing.assert_allclose(found, expected, rtol=3e-6)


def test_dense_stacked_and_grouped_kernels():
    params = {
        "dense": {"kernel": normal(4, 4, seed=1), "bias": np.zeros(4, np.float32)},
        "stack": {"kernel": normal(2, 4, 4, seed=2)},
        "conv": {"kernel": normal(1, 1, 2, 6, seed=3)},
    }

    def fn(p, x):
        x = x @ p["dense"]["kernel"] + p["dense"]["bias"]
        x, seen = jax.lax.scan(lambda x, w: (x @ w, x), x, p["stack"]["kernel"])
        image = x.reshape(-1, 1, 1, 4)
        jax.lax.conv_general_dilated(
            image, p["conv"]["kernel"], (1, 1), "VALID", feature_group_count=2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return x, seen

    batches = [normal(5, 4, seed=4), normal(5, 4, seed=5)]
    found = scores.wanda(fn, params, batches)
    assert found["dense"]["bias"] is None
    x = np.concatenate(batches).astype(np.float64)
    norm = lambda x: np.linalg.norm(x, axis=0)
    close(found["dense"]["kernel"], params["dense"]["kernel"], norm(x)[:, None])
    x = x @ params["dense"]["kernel"]
    for i, w in enumerate(params["stack"]["kernel"]):
        close(found["stack"]["kernel"][i], w, norm(x)[:, None])
        x = x @ w
    # Two groups: outputs 0 to 2 see channels 0 and 1, outputs 3 to 5 the others.
    both = np.concatenate(
        [np.repeat(norm(x)[:2, None], 3, 1), np.repeat(norm(x)[2:, None], 3, 1)], 1
    )
    close(found["conv"]["kernel"][0, 0], params["conv"]["kernel"][0, 0], both)
    masks = make_masks(found, 0.5, {"dense/kernel": "unstructured", "stack/kernel": "2:4"})
    assert int(masks["dense"]["kernel"].sum()) == 8


def test_a_convolution_over_places():
    w, x = normal(2, 2, 3, 4, seed=1), normal(2, 4, 4, 3, seed=2)
    fn = lambda p, x: jax.lax.conv_general_dilated(
        x, p["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    found = scores.wanda(fn, {"kernel": w}, [x])["kernel"]
    squares = np.zeros((2, 2, 3))
    for i in range(3):
        for j in range(3):
            squares += (x[:, i : i + 2, j : j + 2].astype(np.float64) ** 2).sum(axis=0)
    close(found, w, np.sqrt(squares)[..., None])


def test_axes_choose_between_two_uses_of_a_table():
    table = normal(5, 3)
    fn = lambda p, ids: p["table"][ids] @ p["table"].T
    ids = jnp.array([0, 1, 1])
    tied = scores.wanda(fn, {"table": table}, [ids], axes={"table": KernelAxes((-1,), (-2,))})
    close(tied["table"], table, np.linalg.norm(table[[0, 1, 1]].astype(np.float64), axis=0))
    rows = scores.wanda(fn, {"table": table}, [ids], axes={"table": KernelAxes((-2,), (-1,))})
    np.testing.assert_allclose(
        rows["table"], np.abs(table) * np.sqrt([1, 2, 0, 0, 0])[:, None], rtol=1e-6
    )


def test_what_met_nothing_has_no_scores_to_prune_by():
    params = {"kernel": jnp.ones((2, 2)), "unused": {"kernel": jnp.ones((2, 2))}}
    found = scores.wanda(lambda p, x: x @ p["kernel"], params, [jnp.ones((1, 2))])
    assert found["unused"]["kernel"] is None
    with pytest.raises(jc.CompressError, match="unused/kernel"):
        make_masks(found, 0.5, {"unused/kernel": "unstructured"})
