"""What is in a file, and how two trees differ."""

import math
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import sklearn.metrics.pairwise
from rich.console import Console

import jaxcompress as jc

W = jax.random.normal(jax.random.key(0), (64, 96))
TREE = {
    "a": {"kernel": W, "bias": jnp.ones(96)},
    "b": {"kernel": W * 2, "mask": jnp.zeros((64, 96))},
    "tied": None,
}
RULES = {
    "a/kernel": jc.Quantize("int4", group_size=32),
    "b/kernel": jc.chain(jc.Prune(0.9), jc.Quantize("int8")),
}


def text_of(renderable):
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        console.print(renderable)
        return console.export_text()


@pytest.mark.parametrize("coded", [False, True])
def test_contents_count_every_byte_of_the_file(tmp_path, coded):
    path = tmp_path / "x.safetensors"
    small = jc.compress(TREE, RULES)
    small["tied"] = small["a"]["kernel"]
    jc.save(path, small, coded=coded, recipe=jc.Recipe.of(RULES, "mine"))
    found = jc.contents(path)
    (head,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert found.total == path.stat().st_size == 8 + head + sum(r["bytes"] for r in found.rows)
    rows = {row["path"]: row for row in found.rows}
    assert rows["a/kernel"]["form"] == "int4/32"
    assert rows["b/kernel"]["form"] == small["b"]["kernel"].describe()
    for name, row in rows.items():
        top, _, leaf = name.partition("/")
        value = small[top][leaf] if leaf else small[top]
        assert row["memory"] == jc.nbytes(value)
        assert row["shape"] == value.shape
        assert row["bits"] == 8 * row["bytes"] / value.size
        assert sum(row["parts"].values()) == row["bytes"]
        if not coded and name != "tied":
            assert row["bytes"] == row["memory"]
    assert rows["tied"]["bytes"] == 0  # it is stored where it came first
    assert math.isclose(sum(row["share"] for row in rows.values()), 1)
    assert set(rows["b/kernel"]["parts"]) == {"values", "index"}
    if coded:
        assert rows["b/mask"]["bytes"] < 200
    assert found.recipe == "mine"
    assert "mine" in text_of(found)
    assert "a/kernel" in text_of(found)


def test_contents_read_no_weights(tmp_path, monkeypatch):
    from jaxcompress.checkpoint import container

    jc.save(tmp_path / "x", jc.compress(TREE, RULES), coded=True)
    monkeypatch.setattr(container.Container, "read", None)
    assert len(jc.contents(tmp_path / "x").rows) == 4


def test_contents_of_other_files(tmp_path):
    safetensors.numpy.save_file(
        {"a.w": np.ones((3, 4)), "a.b": np.ones(4)}, tmp_path / "x.safetensors"
    )
    found = jc.contents(tmp_path / "x.safetensors")
    assert found.kind == "safetensors"
    assert [(r["path"], r["bytes"], r["form"]) for r in found.rows] == [
        ("a/b", 32, "dense"), ("a/w", 96, "dense")]  # fmt: skip
    assert jc.contents(tmp_path).total == (tmp_path / "x.safetensors").stat().st_size


def test_a_recipe_of_specs_from_elsewhere_does_not_hide_the_leaves(tmp_path, monkeypatch):
    recipe = jc.Recipe.of({"w": jc.Quantize("int8")}, "mine")
    text = recipe.to_yaml().replace("quantize", "elsewhere.quantize")
    monkeypatch.setattr(jc.Recipe, "to_yaml", lambda self: text)
    jc.save(tmp_path / "x", {"w": W}, recipe=recipe)
    found = jc.contents(tmp_path / "x")
    assert [row["path"] for row in found.rows] == ["w"]
    assert found.recipe == "of specs that are not registered here"


def test_the_tree_sums_up_its_branches(tmp_path):
    jc.save(tmp_path / "x", {"a[b]": {"c": np.ones(100, np.float32), "d": np.ones(25, np.float32)}})
    text = text_of(jc.contents(tmp_path / "x").tree())
    assert "a[b]  500 B" in text
    assert "c  100 dense  32.00 bits  400 B  80.0%" in text


def test_empty_trees_have_contents(tmp_path):
    jc.save(tmp_path / "x", {})
    found = jc.contents(tmp_path / "x")
    assert found.rows == []
    assert found.values == 0
    text_of(found)


def test_the_picture_shows_every_leaf(tmp_path):
    from jaxcompress.report.plots import draw_contents

    many = {f"l{i:02}": W for i in range(50)}
    many |= {
        "const": jnp.zeros((4, 4)),
        "ints": jnp.arange(400),
        "nan": jnp.full((20, 20), jnp.nan),
    }
    many["none"] = jnp.ones((0, 3))
    jc.save(tmp_path / "x", jc.compress(many, {"l*": jc.Quantize("int4")}))
    draw_contents(jc.contents(tmp_path / "x"), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    jc.save(tmp_path / "y", {})
    draw_contents(jc.contents(tmp_path / "y"), tmp_path / "y.svg")


def test_differences_are_those_of_the_definitions():
    other = {"a": {"kernel": W + 0.1 * jnp.sin(W), "bias": TREE["a"]["bias"]}, "b": TREE["b"]}
    found = jc.diff(TREE, other)
    row = next(r for r in found.rows if r["path"] == "a/kernel")
    a, b = (np.asarray(x, np.float64).reshape(1, -1) for x in (W, other["a"]["kernel"]))
    cosine = sklearn.metrics.pairwise.cosine_similarity(a, b)[0, 0]
    np.testing.assert_allclose(
        row["relative"], np.linalg.norm(a - b) / np.linalg.norm(a), rtol=1e-12
    )
    np.testing.assert_allclose(row["cosine"], cosine, rtol=1e-12)
    assert row["max"] == np.max(np.abs(a - b))
    assert found.relative == row["relative"]
    text_of(found)


def test_differences_of_odd_leaves():
    zero, one, nan = jnp.zeros(3), jnp.ones(3), jnp.array([1.0, jnp.nan, 1.0])
    rows = lambda a, b: {
        k: v for k, v in jc.diff({"x": a}, {"x": b}).rows[0].items() if k != "path"
    }
    assert rows(zero, zero) == {"shape": (3,), "relative": 0.0, "cosine": 1.0, "max": 0.0}
    assert rows(zero, one) == {"shape": (3,), "relative": math.inf, "cosine": 0.0, "max": 1.0}
    assert rows(one, zero)["relative"] == 1.0
    assert rows(jnp.ones((0, 3)), jnp.ones((0, 3)))["relative"] == 0.0
    assert math.isnan(rows(one, nan)["max"])
    assert math.isnan(jc.diff({"x": one, "y": one}, {"x": nan, "y": one}).relative)
    assert rows(jnp.arange(3), jnp.arange(3) + 1)["max"] == 1.0
    assert rows(one * 1j, one)["max"] == np.sqrt(2)
    big = jnp.full(4, 3e38)
    assert rows(big, -big)["relative"] == 2.0
    with pytest.raises(jc.CompressError, match=r"x: shape \(3,\) in the first, \(4,\)"):
        jc.diff({"x": one}, {"x": big})


def test_differences_at_the_edges_of_float64():
    one = lambda a, b: jc.diff({"x": np.array(a)}, {"x": np.array(b)}).rows[0]
    for scale in (1e200, 1e-200, 5e-324):
        assert one([scale], [2 * scale])["relative"] == 1.0
        assert one([scale], [-scale])["cosine"] == -1.0
    assert one([2**63 - 1], [2**63 - 2])["max"] == 1.0
    assert one([-(2**63)], [2**63 - 1])["max"] == 2.0**64
    assert one([1.0], [np.inf])["max"] == np.inf


def test_differences_of_plain_values_and_of_paths_that_read_alike():
    values = {"n": 1.0, "on": True, "name": "x"}
    assert jc.diff(values, dict(values)).relative == 0
    rows = {
        r["path"]: r["relative"] for r in jc.diff(values, {"n": 2.0, "on": False, "name": "y"}).rows
    }
    assert rows == {"n": 1.0, "on": 1.0, "name": math.inf}
    twice = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}
    with pytest.raises(jc.CompressError, match="have one path"):
        jc.diff(twice, twice)


def test_differences_of_compressed_and_lazy_and_missing_leaves(tmp_path):
    jc.save(tmp_path / "x", jc.compress(TREE, RULES), coded=True)
    found = jc.diff(TREE, jc.load(tmp_path / "x", lazy=True))
    by_path = {row["path"]: row for row in found.rows}
    assert by_path["a/bias"]["relative"] == 0
    assert 0 < by_path["a/kernel"]["relative"] < 0.2
    missing = jc.diff({"a": W, "b": W}, {"b": W, "c": W})
    assert (missing.only_first, missing.only_second) == (["a"], ["c"])
    assert missing.relative == math.inf
    assert "only in the second" in text_of(missing)


def test_sums_go_over_pieces(monkeypatch):
    from jaxcompress.report import difference

    whole = jc.diff({"x": W}, {"x": W * 1.5}).rows
    monkeypatch.setattr(difference, "_PIECE", 1000)
    pieces = jc.diff({"x": W}, {"x": W * 1.5}).rows
    np.testing.assert_allclose(pieces[0]["relative"], whole[0]["relative"], rtol=1e-12)
