"""The table of what became of a tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxcompress as jc

PARAMS = {
    "block": {"kernel": jnp.ones((64, 32)), "bias": jnp.ones(32)},
    "embedding": jnp.ones((100, 16), jnp.bfloat16),
    "step": jnp.zeros((), jnp.int32),
}
SMALL = jc.compress(
    PARAMS, {"**/kernel": jc.Quantize("int4", group_size=32), "embedding": jc.LowRank(2)}
)


def test_rows_count_everything():
    rows = {row["path"]: row for row in jc.summary(PARAMS, SMALL).rows}
    assert list(rows) == ["block/bias", "block/kernel", "embedding", "step"]
    kernel = rows["block/kernel"]
    assert kernel == {
        "path": "block/kernel", "shape": (64, 32), "dtype": "float32", "form": "int4/32",
        "before": 8192, "after": 1024 + 128, "bits": 4.5, "ratio": 8192 / 1152,
    }  # fmt: skip
    assert rows["embedding"]["after"] == 2 * 2 * (100 + 16)
    assert rows["embedding"]["dtype"] == "bfloat16"
    assert rows["block/bias"]["form"] == "dense"
    assert (rows["step"]["shape"], rows["step"]["bits"]) == ((), 32.0)


def test_totals_are_those_of_nbytes():
    table = jc.summary(PARAMS, SMALL)
    assert (table.before, table.after) == (jc.nbytes(PARAMS), jc.nbytes(SMALL))
    assert table.ratio == table.before / table.after
    assert repr(table) == "Summary(4 leaves, 11.52 kB -> 1.75 kB, 6.59x)"


def test_text_has_a_line_a_leaf_and_a_total():
    lines = str(jc.summary(PARAMS, SMALL)).splitlines()
    (kernel,) = (line for line in lines if "block/kernel" in line)
    for cell in ("64x32", "int4/32", "8.19 kB", "1.15 kB", "4.50", "7.11x"):
        assert cell in kernel
    assert any("total" in line and "6.59x" in line for line in lines)
    assert any("step" in line and "scalar" in line for line in lines)
    assert all(len(line) <= 100 for line in lines)


def test_paths_are_no_markup():
    tree = {"[bold]": {"[/x]": jnp.ones(3)}}
    assert "[bold]/[/x]" in str(jc.summary(tree, tree))


def test_html_is_a_table_and_is_shown_once(monkeypatch):
    import rich.console
    import rich.jupyter

    shown = []
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    monkeypatch.setattr(rich.jupyter, "display", lambda *args: shown.append(args))
    html = jc.summary(PARAMS, SMALL)._repr_html_()
    assert html.startswith("<pre>")
    assert "block/kernel" in html
    assert not shown


def test_shapes_empty_leaves_and_numbers():
    tree = {"w": jnp.ones((8, 8)), "none": jnp.ones((0, 4)), "lr": 0.5}
    small = jc.compress(tree, {"w": jc.Quantize("int8")})
    shapes = jax.eval_shape(lambda: {**tree, "lr": 0.5})
    assert jc.summary(shapes | {"lr": 0.5}, small).before == jc.nbytes(tree)
    rows = {row["path"]: row for row in jc.summary(tree, small).rows}
    assert (rows["none"]["bits"], rows["none"]["after"]) == (0.0, 0)
    assert np.isnan(rows["none"]["ratio"])
    assert rows["lr"]["dtype"] == "float"
    assert np.isnan(jc.summary({}, {}).ratio)


def test_lazy_leaves_count_what_they_take(tmp_path):
    jc.save(tmp_path / "f", SMALL)
    lazy = jc.load(tmp_path / "f", lazy=True)
    assert jc.summary(PARAMS, lazy).after == jc.nbytes(lazy) == jc.nbytes(SMALL)


def test_nnx_state():
    state = nnx.state(nnx.Linear(16, 8, rngs=nnx.Rngs(0)))
    table = jc.summary(state, jc.compress(state, {"kernel": jc.Prune(0.5)}))
    assert [row["path"] for row in table.rows] == ["bias", "kernel"]


def test_different_trees_are_refused():
    with pytest.raises(jc.CompressError, match=r"differ at .*'extra'"):
        jc.summary(PARAMS, {**SMALL, "extra": jnp.ones(2)})
