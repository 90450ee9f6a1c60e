"""Removal as the stage before the rules of a recipe, in Python and on the command line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from structure_models import mlp

import jaxcompress as jc
from jaxcompress import CompressError, RecipeError, SpecError
from jaxcompress.checkpoint.file import read_plan
from jaxcompress.cli.main import main
from jaxcompress.pruning.structure import groups, plan, shrink_params
from jaxcompress.pruning.structure.stage import Shrink, smaller_leaves
from jaxcompress.rules import flatten

RULES = {"[ac]": jc.Quantize("int8")}
YAML = """
shrink: {keep: 0.5, budget: multiplications, round_to: 2}
rules:
  - {match: ["a", "c"], quantize: int8}
"""


def small_mlp():
    (fn, params, args), _ = mlp()
    return params, groups(fn, params, *args)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_rules_see_what_is_left():
    params, found = small_mlp()
    recipe = jc.Recipe.from_yaml(YAML)
    chosen = recipe.shrink.plan(found, params)
    assert chosen == plan(
        found,
        jax.tree.map(lambda x: x if x.ndim > 1 else jnp.zeros_like(x), params),
        0.5,
        budget="multiplications",
        round_to=2,
    )
    small = jc.compress(params, recipe, plan=chosen)
    same(small, jc.compress(shrink_params(params, chosen), RULES))
    same(small, jc.compress(params, RULES, plan=chosen, donate=False))
    traced = jax.eval_shape(lambda p: jc.compress(p, RULES, plan=chosen), params)
    assert traced["a"].shape == small["a"].shape == (3, 4)


def test_scores_by_name():
    """Of channels (3, 0) and (2, 2) the second has the larger sum, the first the larger squares."""
    params = {"up": jnp.array([[3.0, 2.0], [0.0, 2.0]]), "down": jnp.zeros((2, 1))}
    found = groups(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, jnp.ones((1, 2)))
    kept = lambda score: Shrink(0.5, round_to=1, score=score).plan(found, params).leaves[1].kept
    assert kept("magnitude") == (None, (1,))
    assert kept("squares") == (None, (0,))


def test_the_stage_is_never_left_out_silently():
    params, found = small_mlp()
    recipe = jc.Recipe.from_yaml(YAML)
    with pytest.raises(SpecError, match=r"plan = recipe.shrink.plan\(jc.pruning.groups"):
        jc.compress(params, recipe)
    chosen = recipe.shrink.plan(found, params)
    with pytest.raises(CompressError, match="the plan is for a of shape"):
        jc.compress(shrink_params(params, chosen), recipe, plan=chosen)
    stored = jc.compress(params, RULES)
    with pytest.raises(CompressError, match="remove channels from the dense params first"):
        jc.compress(stored, RULES, plan=chosen)
    with pytest.raises(CompressError, match="plan with the dense params"):
        recipe.shrink.plan(found, stored)


def test_other_scores_choose_other_channels():
    params, found = small_mlp()
    kept = lambda chosen: kept_of(chosen, "b")[0]
    scores = jax.tree.map(jnp.zeros_like, params) | {"b": jnp.arange(6.0)}
    assert kept(Shrink(0.5, round_to=1).plan(found, params, scores)) == (3, 4, 5)
    squares = jax.tree.map(lambda x: np.square(x) * (x.ndim > 1), params)
    one = Shrink({"a": 0.5}, round_to=1, score="squares")
    assert one.plan(found, params) == plan(found, squares, {"a": 0.5}, round_to=1)


def test_dense_arrays_are_given_up_and_ties_stay():
    """A donated array is gone when what stays is there; one that is there twice stays, as one."""
    (fn, params, args), _ = mlp()
    chosen = plan(groups(fn, params, *args), params, 0.5, round_to=2)
    own = jax.tree.map(jnp.copy, params)
    small = jc.compress(own, RULES, plan=chosen, donate=True)
    assert own["a"].is_deleted()
    assert own["d"].is_deleted()
    same(small, jc.compress(params, RULES, plan=chosen))
    both = lambda p, x: fn(p["one"], x) + fn(p["two"], x)
    tied = {"one": params, "two": {**params, "a": params["a"] + 1}}
    chosen = plan(groups(both, tied, *args), tied, 0.5, round_to=2)
    smaller = dict(smaller_leaves(flatten(tied)[0], chosen, donate=True))
    assert (smaller["one/d"] is smaller["two/d"]) == (
        kept_of(chosen, "one/d") == kept_of(chosen, "two/d")
    )
    want = jc.compress(shrink_params(tied, chosen), {"**/d": jc.Quantize("int8")})
    same(jc.compress(tied, {"**/d": jc.Quantize("int8")}, plan=chosen, donate=True), want)
    assert tied["one"]["a"].is_deleted()
    assert not tied["one"]["d"].is_deleted()


def kept_of(chosen, path):
    return next(leaf.kept for leaf in chosen.leaves if leaf.path == path)


@pytest.mark.parametrize(
    "shrink",
    [
        Shrink(),
        Shrink(0.25, "bytes", "global", 4, "squares"),
        Shrink({"a": 0.5, "**/c": 0.25}),
        Shrink({"a": 0.5}, round_to=1),
    ],
)
def test_the_stage_is_written_as_it_is_read(shrink):
    recipe = jc.Recipe((), "half", shrink=shrink)
    assert jc.Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert hash(jc.Recipe.from_yaml(recipe.to_yaml())) == hash(recipe)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("shrink: 2\nrules: []", "line 1, key 'shrink': keep=2"),
        ("rules: []\nshrink: {kep: 0.5}", "line 2, key 'kep': unknown; did you mean 'keep'"),
        ("shrink:\n  budget: flops\nrules: []", "line 2, key 'budget': budget='flops': write one"),
        ("shrink: {keep: {'[z-a]': 0.5}}\nrules: []", r"line 1, key '\[z-a\]'"),
        ("shrink: {keep: {a: 3}}\nrules: []", "line 1, key 'keep': keep"),
        ("shrink: {round_to: 0}\nrules: []", "round_to=0: write a whole number"),
        ("shrink: {score: best}\nrules: []", "score='best': write one of magnitude, squares"),
    ],
)
def test_a_wrong_stage_has_a_place(text, told):
    with pytest.raises(RecipeError, match=told):
        jc.Recipe.from_yaml(text)


def test_the_command_line_takes_a_plan(tmp_path, capsys):
    """The file has the plan, a dry run says the new shapes, and what is compressed again adds up."""
    params, found = small_mlp()
    chosen = jc.Recipe.from_yaml(YAML).shrink.plan(found, params)
    dense, out, recipe, text = (
        str(tmp_path / name) for name in ("in.npz", "out.safetensors", "half.yaml", "plan.json")
    )
    np.savez(dense, **params)
    (tmp_path / "half.yaml").write_text(YAML)
    (tmp_path / "plan.json").write_text(chosen.to_json())
    assert main(["compress", dense, out, "-r", recipe]) == 1
    assert "the recipe removes channels before its rules" in capsys.readouterr().err
    assert main(["compress", dense, out, "-r", recipe, "--plan", text, "--dry-run"]) == 0
    assert "3x4" in capsys.readouterr().out
    assert main(["compress", dense, out, "-r", recipe, "--plan", text, "-q"]) == 0
    assert read_plan(out) == chosen
    same(jc.load(out), jax.tree.map(np.asarray, jc.compress(params, RULES, plan=chosen)))

    whole = str(tmp_path / "whole.safetensors")
    jc.save(whole, shrink_params(params, chosen), plan=chosen)
    (tmp_path / "rules.yaml").write_text("rules: [{match: a, quantize: int8}]")
    assert main(["compress", whole, out, "-r", str(tmp_path / "rules.yaml"), "-q"]) == 0
    assert read_plan(out) == chosen
    (tmp_path / "plan.json").write_text("[1]")
    assert main(["compress", dense, out, "-r", recipe, "--plan", text]) == 1
    assert "plan.json: this is no plan" in capsys.readouterr().err
