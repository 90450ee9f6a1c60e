"""Recipes: YAML there and back, presets on real layouts, and errors with line and key."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.recipes import PRESETS

PARAMS = {
    "attention": {"query": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}},
    "norm": {"scale": jnp.ones(64)},
    "embed": {"embedding": jnp.ones((100, 64))},
    "steps": jnp.arange(3),
    "empty": jnp.ones((0, 4)),
}

SPECS = st.one_of(
    st.builds(
        jc.Quantize, st.sampled_from(["int8", "int3"]),
        group_size=st.sampled_from([None, 16, 64]), axis=st.sampled_from([None, -1, (-2, -1)]),
        convention=st.sampled_from(["absmax", "full"]),
    ),
    st.builds(jc.FakeQuantize, st.just("uint4"), symmetric=st.just(False),
              range=st.sampled_from(["dynamic", "static"])),
    st.builds(jc.Prune, st.sampled_from([None, 0.5, 0.9])),
    st.builds(jc.LowRank, st.integers(1, 9)), st.builds(jc.LowRank, energy=st.just(0.95)),
    st.builds(jc.Codebook, st.integers(1, 8), iterations=st.integers(0, 9)),
)  # fmt: skip
RULES = st.builds(
    jc.Rule,
    st.lists(st.text(min_size=1), min_size=1, max_size=3).map(tuple),
    st.one_of(st.none(), SPECS, st.lists(SPECS, min_size=2, max_size=3).map(lambda s: jc.chain(*s))),
    st.integers(0, 4), st.integers(0, 10**12), st.booleans(),
)  # fmt: skip


@settings(max_examples=100, derandomize=True, database=None)
@given(
    st.builds(
        jc.Recipe,
        st.lists(RULES, max_size=4).map(tuple),
        st.text(),
        st.none() | st.integers(0, 2**32 - 1),
    )
)
def test_yaml_is_the_recipe(recipe):
    try:
        text = recipe.to_yaml()
        for rule in recipe.rules:
            for pattern in rule.match:
                jc.rules.glob(pattern)
    except jc.RuleError:  # a pattern such as [z-a]
        return
    assert jc.Recipe.from_yaml(text) == recipe
    assert yaml.safe_load(text)["rules"] is not None  # and any other reader takes it


def test_a_recipe_gives_the_rules_it_says():
    recipe = jc.Recipe.from_yaml(
        """
        name: mixed
        rules:
          - match: "norm/**"
            dense: true
          - match: ["**/kernel", "**/weight"]
            min_ndim: 2
            chain:
              - prune: {sparsity: 0.5, pattern: "2:4"}
              - quantize: {format: int8, group_size: 32}
          - {match: "**", min_size: 6400, codebook: 4}
        """
    )
    small = jc.compress(PARAMS, recipe)
    direct = jc.compress(
        PARAMS,
        {
            "**/kernel": jc.chain(jc.Prune(0.5, pattern="2:4"), jc.Quantize("int8", group_size=32)),
            "**/embedding": jc.Codebook(4),
        },
    )
    assert jax.tree.structure(small) == jax.tree.structure(direct)
    for ours, theirs in zip(jax.tree.leaves(small), jax.tree.leaves(direct), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_seed_draws_the_same_each_time():
    recipe = jc.Recipe.from_yaml(
        "{seed: 3, rules: [{match: '**/kernel', codebook: {bits: 2, init: random, iterations: 0}}]}"
    )
    params = {"a": {"kernel": jax.random.normal(jax.random.key(0), (16, 16))}}
    first, second = (jc.compress(params, recipe)["a"]["kernel"].centroids for _ in range(2))
    np.testing.assert_array_equal(first, second)
    other = jc.compress(params, dataclasses.replace(recipe, seed=4))["a"]["kernel"].centroids
    assert not np.array_equal(first, other)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.MultiHeadDotProductAttention(4, name="attention")(nn.LayerNorm(name="ln_1")(x))
        return x + nn.Dense(64, name="mlp")(nn.LayerNorm()(y)), None


class Net(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(100, 64)(tokens)
        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "lossless"])
def test_presets_compress_kernels_and_tables_and_nothing_else(name):
    """Also those of scanned layers, whose norms and biases have two axes as well."""
    params = jax.eval_shape(Net().init, jax.random.key(0), jnp.zeros((1, 8), int))["params"]
    leaves = jc.rules.flatten(params)[0]
    recipe = jc.Recipe.preset(name)
    small = 0
    for (path, leaf), hit in zip(leaves, recipe.match(leaves), strict=True):
        is_weight = path.endswith(("kernel", "embedding"))
        spec = None if hit is None else hit[1]
        assert (spec is not None) == is_weight, path
        compress = (lambda x, s=spec: s(x)) if is_weight else (lambda x: x)
        small += jc.nbytes(jax.eval_shape(compress, leaf))
    assert small < 0.5 * jc.nbytes(params)


def test_lossless_changes_nothing():
    small = jc.compress(PARAMS, jc.Recipe.preset("lossless"))
    assert small["embed"]["embedding"] is PARAMS["embed"]["embedding"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe: empty"),
        ("rules:\n- match: '**'\n  quantise: int8",
         "recipe, line 3, key 'quantise': unknown; did you mean 'quantize'"),
        ("rules:\n- match: '**'\n  quantize:\n    format: int8\n    group: 3",
         "line 5, key 'group': unknown; did you mean 'group_size'"),
        ("rules:\n- match: '**'\n  quantize:\n    format: int8\n    group_size: -3",
         "line 5, key 'group_size': group_size=-3: write a whole number"),
        ("rules:\n- match: '**'\n  quantize: int99", "line 3, key 'quantize': .*int99"),
        ("rules:\n- match: '**'\n  quantize: {group_size: 3}", "key 'quantize': Quantize needs the key 'format'"),
        ("rules:\n- match: '**'", "line 2: a rule does one thing, this one nothing"),
        ("rules:\n- {match: '**', quantize: int8, prune: 0.5}", "this one quantize, prune"),
        ("rules:\n- {quantize: int8}", "line 2: a rule needs the key 'match'"),
        ("rules:\n- {match: [], quantize: int8}", "key 'match': an empty list"),
        ("rules:\n- {match: '[z-a]', quantize: int8}", r"key 'match': rule '\[z-a\]' is no pattern"),
        ("rules:\n- {match: 3, quantize: int8}", "key 'match': write a text, not 3"),
        ("rules:\n- {match: '**', dense: false}", "key 'dense': write dense: true"),
        ("rules:\n- {match: '**', dense: 1}", "key 'dense': write true or false"),
        ("rules:\n- {match: '**', min_ndim: two, dense: true}", "key 'min_ndim': write a whole number"),
        ("rules:\n- {match: '**', chain: []}", "key 'chain': a chain has two specs or more"),
        ("rules:\n- {match: '**', chain: [{prune: 0.5}]}", "key 'chain': a chain has two"),
        ("rules:\n- {match: '**', chain: [{prune: 0.5, quantize: int8}, {prune: 0.1}]}", "is one spec"),
        ("rules:\n- match: '**'\n  chain:\n  - prune: 0.5\n  - chain: []", "line 5, key 'chain': unknown"),
        ("rules:\n- {match: '**', prune: {sparsity: {a: 1}}}", "key 'sparsity': write a plain value"),
        ("rules:\n- {match: '**', match: 'x', dense: true}", "key 'match': comes twice"),
        ("rules: 3", "key 'rules': write a list of rules"),
        ("- 3", "a recipe is a mapping"),
        ("rules:\n- 3", "line 2, key 'rules': a rule is a mapping"),
        ("rule: []", "key 'rule': unknown; did you mean 'rules'"),
        ("name: x", "write the key 'rules'"),
        ("version: 2\nrules: []", "line 1, key 'version': a recipe of a newer version"),
        ("seed: -1\nrules: []", "key 'seed': write a whole number of at least 0"),
        ("seed: 99999999999999999999\nrules: []", "key 'seed': write a whole number of at most"),
        ("rules:\n- {match: '**', prune: {sparsity: 0.5, pattern: 2:4}}", "key 'pattern': .*in quotes"),
        ("rules: [", "recipe, line 1: no YAML"),
        ("a: b: c", "line 1: no YAML"),
        ("rules: []\n---\nrules: []", "no YAML: but found another document"),
        ("{? [1] : 2}", "a key is a plain word"),
        ("[" * 5000, "no YAML"),
        ("rules: &a [*a]", "a rule is a mapping"),
        ("rules:\n- {match: '**', prune: 2010-13-45}", "key 'prune'"),
    ],
)  # fmt: skip
def test_errors_name_line_and_key(text, message):
    with pytest.raises(jc.RecipeError, match=message) as caught:
        jc.Recipe.from_yaml(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "rules: !!python/object/apply:os.system ['touch {0}']",
        "rules:\n- match: !!python/object/apply:os.system ['touch {0}']\n  dense: true",
        "rules:\n- match: '**'\n  quantize: !!python/object/new:os.system ['touch {0}']",
        "rules:\n- match: '**'\n  prune: !!python/name:os.system ''",
        "!!python/object:dict {{}}",
        "rules: !mine []",
        "rules:\n- match: !!binary aGVsbG8=\n  dense: true",
        "rules:\n- match: '**'\n  prune: !!timestamp 2020-01-01",
    ],
)
def test_yaml_that_builds_objects_is_refused(text, tmp_path):
    with pytest.raises(jc.RecipeError, match="would make an object; write"):
        jc.Recipe.from_yaml(text.format(tmp_path / "made"))
    assert not list(tmp_path.iterdir())


def test_aliases_are_expanded_where_they_make_sense():
    text = "rules: [{match: a, quantize: &q {format: int8}}, {match: b, quantize: *q}]"
    first, second = jc.Recipe.from_yaml(text).rules
    assert first.spec == second.spec == jc.Quantize("int8")
    # A bomb of aliases is never expanded: its lists are no rules.
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
    )
    with pytest.raises(jc.RecipeError, match="key 'a': unknown"):
        jc.Recipe.from_yaml(bomb)


def test_a_rule_for_nothing_is_told():
    match = lambda text: jc.compress(PARAMS, jc.Recipe.from_yaml(text))
    with pytest.raises(jc.RuleError, match=r"'\*\*/kernal' matches no leaf; the nearest"):
        match("rules: [{match: '**/kernal', quantize: int8}]")
    with pytest.raises(jc.RecipeError, match="matches only leaves that it is not for"):
        match("rules: [{match: '**/kernel', min_size: 100000, quantize: int8}]")
    with pytest.raises(jc.RecipeError, match="empty or of integers"):
        match("rules: [{match: [steps, empty], quantize: int8}]")
    match("rules: [{match: '**/kernal', optional: true, quantize: int8}]")


def test_the_recipe_is_in_the_file_it_made(tmp_path):
    recipe = jc.Recipe.preset("int4-g64")
    jc.save(tmp_path / "x.safetensors", jc.compress(PARAMS, recipe), recipe=recipe)
    assert jc.Recipe.of_file(tmp_path / "x.safetensors") == recipe
    assert jc.Recipe.read(tmp_path / "x.safetensors") == recipe
    jc.save(tmp_path / "y.safetensors", PARAMS)
    with pytest.raises(jc.RecipeError, match="no recipe was saved in it"):
        jc.Recipe.of_file(tmp_path / "y.safetensors")


def test_where_recipes_are_read_from(tmp_path):
    assert jc.Recipe.read("int8").name == "int8"
    (tmp_path / "r.yaml").write_text("rules: []")
    assert jc.Recipe.read(tmp_path / "r.yaml") == jc.Recipe(())
    with pytest.raises(jc.RecipeError, match="neither a file nor a preset"):
        jc.Recipe.read("int9")
    with pytest.raises(jc.RecipeError, match="no preset 'int9'"):
        jc.Recipe.preset("int9")
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(jc.RecipeError, match="no text and so no YAML"):
        jc.Recipe.read(tmp_path / "r.yaml")


def test_a_chain_of_one_is_its_spec():
    from jaxcompress.specs import Chain

    text = jc.Recipe.of({"**": Chain((jc.Quantize("int8"),))}).to_yaml()
    assert jc.Recipe.from_yaml(text).rules[0].spec == jc.Quantize("int8")


@pytest.mark.parametrize(
    "path", ["layers/attn_norm", "layers/ln1/weight", "bn/mean", "norm", "a/scale"]
)
def test_presets_leave_norms_dense_whatever_holds_them(path):
    (hit,) = jc.Recipe.preset("int4-g64").match(
        [(path, jnp.ones((24, 128))), ("w", jnp.ones((64, 64)))]
    )[:1]
    assert hit[1] is None


@pytest.mark.parametrize(
    "path", ["embeddings/position_embeddings", "posembed/pos_embedding", "wpe/weight"]
)
def test_presets_keep_positions_at_eight_bits(path):
    hit, _ = jc.Recipe.preset("int4-g64").match(
        [(path, jnp.ones((24, 128))), ("w", jnp.ones((64, 64)))]
    )
    assert hit[1].format == "int8"


def test_a_spec_without_a_name_cannot_be_written():
    class Mine(jc.Quantize):
        pass

    with pytest.raises(jc.RecipeError, match=r"register it with jc\.register_spec"):
        jc.Recipe.of({"**": Mine("int8")}).to_yaml()
    with pytest.raises(jc.CompressError, match="'quantize' is already registered by Quantize"):
        jc.register_spec("quantize")(Mine)
