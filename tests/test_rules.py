"""Paths, globs, precedence, and the errors of a rule that does not fit."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict
from hypothesis import given
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.rules import default_axes, flatten, glob, map_with_path, match

INT8 = jc.Quantize("int8")


def paths(tree):
    return [path for path, _ in flatten(tree)[0]]


@pytest.mark.parametrize(
    ("pattern", "path", "hit"),
    [
        ("kernel", "kernel", True),
        ("kernel", "a/kernel", False),
        ("*/kernel", "a/kernel", True),
        ("*/kernel", "kernel", False),
        ("*/kernel", "a/b/kernel", False),
        ("**/kernel", "kernel", True),
        ("**/kernel", "a/kernel", True),
        ("**/kernel", "a/b/c/kernel", True),
        ("**/kernel", "a/b/xkernel", False),
        ("**/*kernel", "a/b/xkernel", True),
        ("a/**/kernel", "a/kernel", True),
        ("a/**/kernel", "a/b/c/kernel", True),
        ("a/**/kernel", "b/kernel", False),
        ("a/**", "a/b/c", True),
        ("a/**", "ab/c", False),
        ("**", "a/b/c", True),
        ("**/**", "a/b/c", True),
        ("a/**/**", "a/b", True),
        ("layers_?/w", "layers_1/w", True),
        ("layers_?/w", "layers_12/w", False),
        ("a?w", "a/w", False),
        ("layers_[0-3]/w", "layers_2/w", True),
        ("layers_[0-3]/w", "layers_4/w", False),
        ("layers_[!0-3]/w", "layers_4/w", True),
        ("layers_[!0-3]/w", "layers_3/w", False),
        ("a[!x]w", "a/w", False),
        ("a[]]w", "a]w", True),
        ("a[[]w", "a[w", True),
        ("a[^]w", "a^w", True),
        ("a[b", "a[b", True),
        ("a.b", "axb", False),
        ("a.b(c)+$", "a.b(c)+$", True),
        (r"a[\]b", r"a\b", True),
        ("a\nb/**", "a\nb/c\nd", True),
    ],
)
def test_glob(pattern, path, hit):
    assert bool(glob(pattern).fullmatch(path)) is hit


@given(st.text("ab*?[]!^-/\\&|~.(", max_size=8), st.text("ab[]/.", max_size=6))
def test_any_pattern_is_understood_or_refused_without_a_warning(pattern, path):
    try:
        expression = glob(pattern)
    except jc.RuleError:
        return
    expression.fullmatch(path)


def test_a_set_that_is_none_is_refused():
    with pytest.raises(jc.RuleError, match=r"'\[z-a\]' is no pattern"):
        glob("[z-a]")


def test_the_first_matching_rule_wins_and_none_counts():
    rules = {"a/kernel": None, "a/*": 1, "**/kernel": 2}
    hits = match(rules, ["a/kernel", "a/bias", "b/kernel", "b/bias"])
    assert hits == [("a/kernel", None), ("a/*", 1), ("**/kernel", 2), None]


def test_a_rule_may_match_only_what_an_earlier_one_took():
    assert match({"**": 1, "a": 2}, ["a"]) == [("**", 1)]


def test_a_rule_that_matches_nothing_names_the_nearest_paths():
    tree = {"encoder": {"kernel": jnp.ones((2, 2))}, "zzz": {"qqqqq": jnp.ones(2)}}
    with pytest.raises(jc.RuleError, match=r"'encoder/kernal' matches no leaf.*'encoder/kernel'"):
        jc.compress(tree, {"encoder/kernel": INT8, "encoder/kernal": INT8})
    with pytest.raises(jc.RuleError, match="the tree has no leaves"):
        jc.compress({}, {"**": INT8})


@pytest.mark.parametrize("rules", [INT8, ["**"], {"w": "int8"}, {"w": 8}])
def test_rules_that_are_none_are_refused(rules):
    with pytest.raises(jc.RuleError):
        jc.compress({"w": jnp.ones((2, 2))}, rules)


@pytest.mark.parametrize(
    ("leaf", "error", "text"),
    [
        (jnp.arange(4), jc.RuleError, "bad/leaf.*int32"),
        (jnp.ones(3, bool), jc.RuleError, "bad/leaf.*bool"),
        (jnp.ones(3, jnp.complex64), jc.RuleError, "bad/leaf.*complex64"),
        (jax.random.key(0), jc.RuleError, "bad/leaf.*key<"),
        (1.5, jc.RuleError, "bad/leaf.*float"),
        ("text", jc.RuleError, "bad/leaf.*str"),
        (jnp.ones((0, 3)), jc.SpecError, "bad/leaf.*no values"),
        (jnp.array([1.0, jnp.nan]), jc.SpecError, "bad/leaf: 1 of 2 values"),
        (jnp.array([jnp.inf, -jnp.inf, 0.0]), jc.SpecError, "bad/leaf: 2 of 3 values"),
        (np.array([np.nan]), jc.SpecError, "bad/leaf: 1 of 1 values"),
        (jnp.array([1.0, jnp.nan], jnp.bfloat16), jc.SpecError, "bad/leaf: 1 of 2 values"),
        (jnp.float32(1.0), jc.SpecError, "bad/leaf: a scalar"),
    ],
)
def test_a_leaf_that_cannot_be_compressed_is_named(leaf, error, text):
    tree = {"bad": {"leaf": leaf}, "good": jnp.ones((4, 4))}
    with pytest.raises(error, match=text):
        jc.compress(tree, {"**": INT8})
    out = jc.compress(tree, {"bad/**": None, "**": INT8})
    assert out["bad"]["leaf"] is leaf
    assert jc.is_compressed(out["good"])


def test_static_errors_come_before_any_leaf_is_donated():
    tree = {"a": jnp.ones((4, 4)), "b": jnp.arange(3)}
    with pytest.raises(jc.RuleError, match="'b'"):
        jc.compress(tree, {"**": INT8}, donate=True)
    assert not tree["a"].is_deleted()


def test_paths_of_lists_tuples_named_tuples_and_dataclasses():
    class Pair(NamedTuple):
        first: Any
        second: Any

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Block:
        kernel: Any

    tree = {"layers": [{"w": 1.0}, (2.0, Pair(3.0, Block(4.0)))], 7: FrozenDict(b=5.0)}
    assert paths(tree["layers"]) == ["0/w", "1/0", "1/1/first", "1/1/second/kernel"]
    assert paths({7: tree[7]}) == ["7/b"]
    assert paths(1.0) == [""]


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 8, rngs=rngs)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.ones_init(), (None, "model"))
        return nn.Dense(8, name="dense", kernel_init=init)(x)


def test_one_rule_matches_linen_boxes_and_nnx_state():
    boxed = LinenBlock().init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    state = nnx.state(NNXBlock(nnx.Rngs(0)))
    for tree in (boxed, state):
        assert paths(tree) == ["dense/bias", "dense/kernel"]
        small = jc.compress(tree, {"**/kernel": INT8})
        assert jax.tree.structure(tree) == jax.tree.structure(
            jax.tree.map(lambda x: 0, small, is_leaf=jc.is_compressed)
        )
        forms = [jc.is_compressed(leaf) for _, leaf in flatten(small)[0]]
        assert forms == [False, True]


def test_a_field_named_value_beside_others_is_part_of_the_path():
    class Attention(NamedTuple):
        query: Any
        key: Any
        value: Any

    tree = {"attention": Attention(1.0, 2.0, nn.Partitioned(3.0, (None,)))}
    assert paths(tree) == ["attention/query", "attention/key", "attention/value"]
    assert paths({"value": {"raw_value": 1.0}}) == ["value/raw_value"]


def test_compressed_leaves_are_whole():
    leaf = INT8(jnp.ones((4, 4)))
    assert flatten({"a": leaf})[0] == [("a", leaf)]
    assert map_with_path(lambda path, x: (path, x is leaf), {"a": leaf}) == {"a": ("a", True)}


@pytest.mark.parametrize(
    ("path", "ndim", "inputs", "outputs"),
    [
        ("kernel", 0, (), ()),
        ("bias", 1, (-1,), ()),
        ("dense/kernel", 2, (-2,), (-1,)),
        ("layers/kernel", 3, (-2,), (-1,)),
        ("conv/kernel", 4, (-4, -3, -2), (-1,)),
        ("convs/kernel", 5, (-4, -3, -2), (-1,)),
        ("attention/query/kernel", 3, (-3,), (-2, -1)),
        ("attention/key/kernel", 4, (-3,), (-2, -1)),
        ("attention/out/kernel", 3, (-3, -2), (-1,)),
        ("attention/out/kernel", 4, (-3, -2), (-1,)),
        ("out/kernel", 2, (-2,), (-1,)),
        ("word/embedding", 2, (-1,), (-2,)),
    ],
)
def test_default_axes(path, ndim, inputs, outputs):
    axes = default_axes(path, ndim)
    assert axes == (inputs, outputs)
    assert axes.batch_ndim(ndim) == ndim - len(inputs) - len(outputs)


def test_given_axes_win_and_must_name_a_leaf():
    tree = {"w": jnp.ones((4, 6))}
    swapped = {"w": jc.KernelAxes((-1,), (-2,))}
    assert jc.compress(tree, {"w": INT8}, axes=swapped)["w"].scale.shape == (4, 1)
    assert jc.compress(tree, {"w": INT8})["w"].scale.shape == (1, 6)
    with pytest.raises(jc.RuleError, match="'v', which is no leaf"):
        jc.compress(tree, {"w": INT8}, axes={"v": jc.KernelAxes((-1,), (-2,))})
