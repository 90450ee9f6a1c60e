"""What removed channels emitted: exact where it is constant, the mean where it is not."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from structure_models import SLOW, array, linen

from jaxcompress import CompressError
from jaxcompress.pruning.structure import groups, keep_channels, mask_channels, shrink
from jaxcompress.pruning.structure.empty import zero_channels
from jaxcompress.pruning.structure.folding import fold_removed
from jaxcompress.pruning.structure.readers import consumers


def close(a, b):
    """Some tens of products of about 1 in float32, in another order: 1e-5 of the largest."""
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, float(jnp.abs(b).max())))


def set_zero(tree, path, channels):
    """The tree with zeros at some outputs of a kernel, its last axis."""
    head, *rest = path.split("/")
    if not rest:
        return {**tree, head: tree[head].at[..., jnp.array(channels)].set(0)}
    return {**tree, head: set_zero(tree[head], "/".join(rest), channels)}


def kept(plan, path, axis):
    return next(leaf for leaf in plan.leaves if leaf.path == path).kept[axis]


def mlp(act=jnp.cos):
    """Its activation makes 1 of 0, so that a removed channel is missed."""
    names = {"a": (3, 6), "ab": (6,), "b": (6, 5), "bb": (5,), "c": (5, 2), "cb": (2,)}
    params = {name: array(n, *shape) for n, (name, shape) in enumerate(names.items())}

    def fn(p, x):
        h = act(x @ p["a"] + p["ab"])
        h = act(h @ p["b"] + p["bb"])
        return h @ p["c"] + p["cb"]

    return fn, params, array(9, 7, 3)


def test_dense_layers_with_zero_filters_are_removed_exactly():
    fn, params, x = mlp()
    params = set_zero(set_zero(params, "a", [1, 4]), "b", [0])
    plan = zero_channels(fn, params, x)
    assert kept(plan, "a", 1) == (0, 2, 3, 5)
    assert kept(plan, "c", 0) == (1, 2, 3, 4)
    assert kept(plan, "a", 0) is None
    small, fewer = shrink(fn, fold_removed(fn, params, plan, [x, 2 * x], exact=True), plan)
    close(small(fewer, x), fn(params, x))
    # What the mask alone takes away is seen.
    assert float(jnp.abs(fn(mask_channels(params, plan), x) - fn(params, x)).max()) > 0.1


def test_the_mean_is_what_is_folded():
    """By hand, in float64: `b += E[h] W` over the removed channels."""
    fn, params, x = mlp()
    found = groups(fn, params, x)
    (first,) = found.of("a", 1)
    plan = keep_channels(found, {first: [0, 1, 2]})
    batches = [x[:3], (x[3:],)]
    folded = fold_removed(fn, params, plan, batches)
    a, ab, b, bb = (np.asarray(params[n], np.float64) for n in ("a", "ab", "b", "bb"))
    h = np.cos(np.asarray(x, np.float64) @ a + ab)
    np.testing.assert_allclose(folded["bb"], bb + h.mean(0)[3:] @ b[3:], atol=1e-5)
    for name in ("a", "ab", "b", "c", "cb"):
        assert (folded[name] == params[name]).all()
    with pytest.raises(CompressError, match="b reads and that are removed are not constant"):
        fold_removed(fn, params, plan, batches, exact=True)
    with pytest.raises(CompressError, match="batches is empty"):
        fold_removed(fn, params, plan, [])


class Convolutions(nn.Module):
    padding: str = "VALID"
    norm: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(5, (1, 1), use_bias=False, name="c0")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="n0")(x))
        x = nn.Conv(6, (3, 3), padding=self.padding, use_bias=not self.norm, name="c1")(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=True, name="n1")(x)
        x = nn.Conv(2, (1, 1), name="c2")(nn.softplus(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def convolutions(**options):
    fn, variables, (x,) = linen(Convolutions(**options), array(0, 4, 6, 6, 2))
    params = set_zero(set_zero(variables["params"], "c0/kernel", [1, 2]), "c1/kernel", [3])
    # Shifts of the first norm that its relu lets through.
    params["n0"]["bias"] = 1 + jnp.abs(params["n0"]["bias"]) + 2 * jnp.abs(params["n0"]["scale"])
    return fn, {**variables, "params": params}, x


def test_convolutions_with_a_norm_are_removed_exactly():
    """Of a kernel of 3 x 3 without a bias, the mean of its norm takes it; of 1 x 1 its bias."""
    fn, params, x = convolutions()
    plan = zero_channels(fn, params, x)
    assert kept(plan, "params/c0/kernel", 3) == (0, 3, 4)
    assert kept(plan, "params/c1/kernel", 3) == (0, 1, 2, 4, 5)
    found = {c.kernel: (c.into, c.sign) for c in consumers(fn, params, plan, x)}
    assert found == {
        "params/c1/kernel": ("batch_stats/n1/mean", -1),
        "params/c2/kernel": ("params/c2/bias", 1),
    }
    small, fewer = shrink(fn, fold_removed(fn, params, plan, [x], exact=True), plan)
    close(small(fewer, x), fn(params, x))
    assert float(jnp.abs(fn(mask_channels(params, plan), x) - fn(params, x)).max()) > 0.1


def test_a_border_of_zeros_is_not_constant():
    """The inside is exact with the mean of the inside; with that of all places nearer than none."""
    fn, params, x = convolutions(padding="SAME", norm=False)
    plan = zero_channels(fn, params, x)
    with pytest.raises(CompressError, match="at the border of a convolution that pads"):
        fold_removed(fn, params, plan, [x], exact=True)
    folded = fold_removed(fn, params, plan, [x])
    error = lambda p: float(jnp.abs(fn(mask_channels(p, plan), x) - fn(params, x)).max())
    assert error(folded) < 0.5 * error(params)


def test_grouped_and_depthwise_kernels():
    """The inputs of each group that lose channels, and none of a depthwise kernel."""

    def fn(p, x):
        conv = lambda x, k, n: jax.lax.conv_general_dilated(
            x, k, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=n
        )
        x = jnp.cos(conv(x, p["a"], 1) + p["ab"])
        x = jnp.cos(conv(x, p["d"], 6) + p["db"])
        x = jnp.cos(conv(x, p["g"], 2) + p["gb"])
        return x.mean((1, 2)) @ p["h"]

    shapes = {"a": (1, 1, 2, 6), "ab": (6,), "d": (1, 2, 1, 6), "db": (6,), "g": (2, 1, 3, 8)}
    shapes |= {"gb": (8,), "h": (8, 2)}
    params = {name: array(n, *shape) for n, (name, shape) in enumerate(shapes.items())}
    params = set_zero(params, "a", [1, 4])
    params = set_zero(params, "d", [1, 4])
    x = array(20, 2, 3, 3, 2)
    plan = zero_channels(fn, params, x)
    # Channels 1 and 4 are the second of either group of three.
    assert kept(plan, "a", 3) == (0, 2, 3, 5)
    assert kept(plan, "g", 2) == (0, 2)
    small, fewer = shrink(fn, fold_removed(fn, params, plan, [x], exact=True), plan)
    close(small(fewer, x), fn(params, x))


def test_layers_in_a_scan():
    """A stack of kernels, whose biases are a stack as well."""

    def fn(p, x):
        def layer(x, p):
            return x + jnp.cos(x @ p["up"] + p["ub"]) @ p["down"] + p["db"], None

        return jax.lax.scan(jax.checkpoint(layer), x, p["layers"])[0]

    layers = {"up": array(0, 3, 4, 6), "ub": array(1, 3, 6), "down": array(2, 3, 6, 4)}
    params = {"layers": {**layers, "db": array(3, 3, 4)}}
    params = set_zero(params, "layers/up", [2, 3])
    x = array(4, 5, 4)
    found = groups(fn, params, x)
    (inner,) = found.of("layers/up", 2)
    plan = keep_channels(found, {inner: [0, 1, 4, 5]})
    (reader,) = consumers(fn, params, plan, x)
    assert (reader.kernel, reader.into, reader.stack) == ("layers/down", "layers/db", 1)
    small, fewer = shrink(fn, fold_removed(fn, params, plan, [x], exact=True), plan)
    close(small(fewer, x), fn(params, x))


def test_heads_and_their_outcome():
    """Kernels of three axes, whose inputs are heads and their depth."""

    def fn(p, x):
        v = jnp.einsum("bi,ihd->bhd", x, p["v"]) + p["vb"]
        return jnp.einsum("bhd,hdo->bo", v, p["out"]) + p["ob"]

    shapes = {"v": (3, 2, 4), "vb": (2, 4), "out": (2, 4, 5), "ob": (5,)}
    params = {name: array(n, *shape) for n, (name, shape) in enumerate(shapes.items())}
    params = set_zero(params, "v", [1])
    x = array(5, 6, 3)
    plan = zero_channels(fn, params, x)
    assert kept(plan, "out", 1) == (0, 2, 3)
    small, fewer = shrink(fn, fold_removed(fn, params, plan, [x], exact=True), plan)
    close(small(fewer, x), fn(params, x))


REFUSED = {
    # What is done after `h @ down`, where `b` is a bias, and why nothing takes what is missing.
    "none": (lambda y, p: jnp.tanh(y), "nothing is added to it alone"),
    "read twice": (lambda y, p: (y + p["b"]) * y, "nothing is added to it alone"),
    "scaled": (lambda y, p: 2 * y + p["b"], "nothing is added to it alone"),
    "read elsewhere": (lambda y, p: (y + p["b"]) * p["b"], "b is read elsewhere too"),
    "taken off": (lambda y, p: p["b"] - y, "nothing is added to it alone"),
    "of one value": (lambda y, p: y + p["one"], "does not have its shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_is_refused_or_left(name):
    after, why = REFUSED[name]
    shapes = {"up": (3, 4), "ub": (4,), "down": (4, 2), "b": (2,), "one": (1,)}
    params = {name: array(n, *shape) for n, (name, shape) in enumerate(shapes.items())}
    fn = lambda p, x: after(jnp.cos(x @ p["up"] + p["ub"]) @ p["down"], p)
    x = array(7, 5, 3)
    found = groups(fn, params, x)
    plan = keep_channels(found, {found.of("up", 1)[0]: [0, 3]})
    with pytest.raises(CompressError, match=rf"down, in dot_general.* nowhere: .*{why}"):
        fold_removed(fn, params, plan, [x])
    left = fold_removed(fn, params, plan, [x], strict=False)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), left, params))
    # Where nothing is missing, nothing is refused.
    silent = {**params, "down": params["down"].at[jnp.array([1, 2])].set(0)}
    fold_removed(fn, silent, plan, [x])


def test_addends_between_a_product_and_its_bias():
    """Two products and one bias, as in recurrent layers; a residual on the way."""
    shapes = {"a": (3, 4), "b": (3, 4), "c": (4, 2), "d": (4, 2), "bias": (2,)}
    params = {name: array(n, *shape) for n, (name, shape) in enumerate(shapes.items())}
    params = set_zero(set_zero(params, "a", [1]), "b", [2, 3])

    def fn(p, x):
        y = jnp.cos(x @ p["a"]) @ p["c"] + jnp.cos(x @ p["b"]) @ p["d"]
        return jnp.tanh(x[:, :2] + y.astype(jnp.float32) + p["bias"])

    x = array(7, 5, 3)
    plan = zero_channels(fn, params, x)
    assert {(c.kernel, c.into) for c in consumers(fn, params, plan, x)} == {
        ("c", "bias"),
        ("d", "bias"),
    }
    small, fewer = shrink(fn, fold_removed(fn, params, plan, [x], exact=True), plan)
    close(small(fewer, x), fn(params, x))


def test_one_bias_for_two_calls_of_a_function_takes_nothing():
    layer = jax.jit(lambda h, w, b: h @ w + b)
    shapes = {"a": (3, 4), "c": (4, 2), "d": (4, 2), "bias": (2,)}
    params = {name: array(n, *shape) for n, (name, shape) in enumerate(shapes.items())}

    def fn(p, x):
        h = jnp.cos(x @ p["a"])
        return layer(h, p["c"], p["bias"]) * layer(h, p["d"], p["bias"])

    x = array(7, 5, 3)
    found = groups(fn, params, x)
    plan = keep_channels(found, {found.of("a", 1)[0]: [0, 3]})
    with pytest.raises(CompressError, match="bias is read elsewhere too"):
        fold_removed(fn, params, plan, [x])


def test_a_bias_that_a_loop_changes_takes_nothing():
    shapes = {"a": (3, 4), "c": (4, 2), "bias": (2,)}
    params = {name: array(n, *shape) for n, (name, shape) in enumerate(shapes.items())}

    def fn(p, x):
        h = jnp.cos(x @ p["a"])
        return jax.lax.fori_loop(0, 3, lambda i, b: h[0] @ p["c"] + 2 * b, p["bias"])

    x = array(7, 5, 3)
    found = groups(fn, params, x)
    plan = keep_channels(found, {found.of("a", 1)[0]: [0, 3]})
    (reader,) = consumers(fn, params, plan, x)
    assert reader.into is None


def test_a_norm_over_removed_channels_is_refused():
    shapes = {"a": (3, 6), "scale": (6,), "b": (6, 2), "bias": (2,)}
    params = {name: array(n, *shape) for n, (name, shape) in enumerate(shapes.items())}

    def fn(p, x):
        h = x @ p["a"]
        h = h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-3) * p["scale"]
        return h @ p["b"] + p["bias"]

    x = array(7, 5, 3)
    found = groups(fn, params, x)
    plan = keep_channels(found, {found.of("a", 1)[0]: [0, 1, 4]})
    with pytest.raises(CompressError, match=r"the sum in reduce_sum reads .* no leaf weighs"):
        fold_removed(fn, params, plan, [x])
    folded = fold_removed(fn, params, plan, [x], strict=False)
    assert (folded["bias"] != params["bias"]).all()


def test_all_zero_keeps_one_and_what_makes_itself_keeps_all():
    params = {"a": jnp.zeros((3, 4)), "b": array(0, 4, 2), "gain": jnp.zeros(3)}
    fn = lambda p, x: jnp.tanh((x * p["gain"]) @ p["a"]) @ p["b"]
    plan = zero_channels(fn, params, array(1, 2, 3))
    assert kept(plan, "a", 1) == (0,)
    assert kept(plan, "gain", 0) is None


def test_filters_of_all_branches_must_be_zero():
    """A residual stream: both kernels that write it; a square one that reads it as well."""
    params = {"in": array(0, 3, 4), "w": array(1, 4, 4), "out": array(2, 4, 2)}
    fn = lambda p, x: (lambda h: (h + jnp.tanh(h @ p["w"])) @ p["out"])(x @ p["in"])
    x = array(3, 2, 3)
    one = set_zero(params, "in", [1, 2])
    assert kept(zero_channels(fn, one, x), "w", 0) is None
    both = set_zero(one, "w", [2, 3])
    plan = zero_channels(fn, both, x)
    assert kept(plan, "w", 0) == kept(plan, "w", 1) == (0, 1, 3)


PLACES = {
    "resnet": {
        "c0a": ("n0a/mean", -1), "c0b": ("n0b/mean", -1), "c1a": ("n1a/mean", -1),
        "c1b": ("n1b/mean", -1), "cs": ("cs/bias", 1), "head": ("head/bias", 1),
    },
    "inverted": {
        "up": None, "down": None, "squeeze": ("squeeze/bias", 1), "excite": ("excite/bias", 1),
        "head": ("head/bias", 1),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_where_blocks_have_a_place(name):
    """Of each kernel that reads channels; a depthwise one sums over none."""
    (fn, params, args), _ = SLOW[name]()
    found = groups(fn, params, *args)
    plan = keep_channels(found, {g: range(1, g.size) for g in found.removable})
    short = lambda path: path.split("/", 1)[1]
    places = {
        short(c.kernel).removesuffix("/kernel"): c.into and (short(c.into), c.sign)
        for c in consumers(fn, params, plan, *args)
    }
    assert places == PLACES[name]
