"""Groups against those written down by hand, and what must be pinned."""

import jax
import jax.numpy as jnp
import pytest
from structure_models import FAST, SLOW, array, expected, linen, members

from jaxcompress import CompressError
from jaxcompress.pruning.structure import groups, keep_channels, mask_channels, shrink

pytest.importorskip("tokenizers")
import _lenet5 as lenet5  # isort: skip
import _smollm2_model as llama  # isort: skip
from _minilm_model import MiniLM  # isort: skip


def removable(found):
    return {(group.size, members(group)) for group in found.removable}


@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_groups_are_those_written_by_hand(name):
    (fn, params, args), want = (FAST | SLOW)[name]()
    assert removable(groups(fn, params, *args)) == want


def test_lenet5():
    found = groups(lenet5.network, jax.eval_shape(lambda: lenet5.init(0)), array(0, 2, 784))
    assert removable(found) == expected(
        (20, "first/kernel[3], first/bias[0], second/kernel[2]"),
        (50, "second/kernel[3], second/bias[0], third/kernel[0] x16"),
        (500, "third/kernel[1], third/bias[0], head/kernel[0]"),
    )
    # 24 x 24 places of 25 x 20 products, 8 x 8 of 25 x 20 x 50, and the dense layers; a batch of 2.
    each = 24**2 * 25 * 20 + 8**2 * 25 * 20 * 50 + 800 * 500 + 500 * 10
    assert found.multiplications() == 2 * each
    assert found.parameters() == 431_080
    assert found.nbytes() == 4 * 431_080


def test_minilm():
    tokens = jnp.zeros((2, 6), jnp.int32)
    fn, params, args = linen(MiniLM(32, 16, 12, 2, 3, 10), tokens, tokens)
    found = groups(fn, params, *args)
    want = set()
    for i in range(2):
        at = f"encoder/layer_{i}/attention"
        qk = [f"{at}/{n}/{leaf}" for n in ("query", "key") for leaf in ("kernel[1]", "bias[0]")]
        v = [f"{at}/value/kernel[1]", f"{at}/value/bias[0]", f"{at}/out/kernel[0]"]
        mlp = f"encoder/layer_{i}/mlp"
        want |= expected(
            (3, ", ".join(f"{leaf} by 4" for leaf in qk + v)),
            (4, ", ".join(f"{leaf} x3" for leaf in qk)),
            (4, ", ".join(f"{leaf} x3" for leaf in v)),
            (10, f"{mlp}/up/kernel[1], {mlp}/up/bias[0], {mlp}/down/kernel[0]"),
        )
    assert removable(found) == want
    (width,) = found.of("params/embeddings/word/embedding", 1)
    assert width.size == 12
    assert width.pinned == "it is an axis of the result"
    (words,) = found.of("params/embeddings/word/embedding", 0)
    assert words.pinned == "it is looked up in gather"


def test_llama(monkeypatch):
    for name, value in {"LAYERS": 1, "HEADS": 4, "KV_HEADS": 2, "DEPTH": 4}.items():
        monkeypatch.setattr(llama, name, value)
    found = groups(llama.network, llama_params(), jnp.zeros((2, 6), jnp.int32))
    at = "decoder/layer_0"
    inputs = [f"{at}/attention/{n}/kernel[0]" for n in ("query", "key", "value")]
    inputs += [f"{at}/mlp/{n}/kernel[0]" for n in ("gate", "up")]
    norms = [f"{at}/attention_norm/scale[0]", f"{at}/mlp_norm/scale[0]", "norm/scale[0]"]
    outputs = [f"{at}/attention/out/kernel[1]", f"{at}/mlp/down/kernel[1]", "token/embedding[1]"]
    query, key = f"{at}/attention/query/kernel[1]", f"{at}/attention/key/kernel[1]"
    value, out = f"{at}/attention/value/kernel[1]", f"{at}/attention/out/kernel[0]"
    assert removable(found) == expected(
        (16, ", ".join(inputs + norms + outputs)),
        (2, f"{query} by 8, {key} by 4, {value} by 4, {out} by 8"),  # heads of keys with their two
        (2, f"{query} by 4 x2, {out} by 4 x2"),  # one of the two everywhere
        (2, f"{query} by 2 x4, {key} by 2 x2"),  # pairs that rotate together
        (4, f"{value} x2, {out} x4"),
        (20, f"{at}/mlp/gate/kernel[1], {at}/mlp/up/kernel[1], {at}/mlp/down/kernel[0]"),
    )


def llama_params():
    kernel = lambda n, *shape: {"kernel": 0.3 * array(n, *shape)}
    attention = {"query": kernel(0, 16, 16), "key": kernel(1, 16, 8), "value": kernel(2, 16, 8)}
    mlp = {"gate": kernel(4, 16, 20), "up": kernel(5, 16, 20), "down": kernel(6, 20, 16)}
    layer = {"attention": {**attention, "out": kernel(3, 16, 16)}, "mlp": mlp}
    layer |= {name: {"scale": array(7, 16)} for name in ("attention_norm", "mlp_norm")}
    return {
        "token": {"embedding": array(8, 32, 16)},
        "decoder": {"layer_0": layer},
        "norm": {"scale": array(9, 16)},
    }


PINS = {
    # What each function does with a hidden value, and the word that the reason has.
    "softmax": (jax.nn.softmax, "reduce"),
    "sort": (lambda h: jnp.sort(h, -1), "sort"),
    "argmax": (lambda h: h * jnp.argmax(h, -1, keepdims=True), "argmax"),
    "largest": (lambda h: h / jnp.max(h, -1, keepdims=True), "reduce_max"),
    "cumsum": (lambda h: jnp.cumsum(h, -1), "cumsum"),
    "reversed": (lambda h: h[:, ::-1] * h, "rev"),
    "shuffled": (lambda h: h[:, jnp.array([1, 0, 3, 2, 5, 4])], "gather"),
    "exp": (lambda h: h / jnp.sum(jnp.exp(h), -1, keepdims=True), "reduce_sum"),
    "two-pass variance": (lambda h: h / jnp.std(h, -1, keepdims=True), "reduce_sum"),
    "fft": (lambda h: jnp.abs(jnp.fft.fft(h)), "fft"),
}


@pytest.mark.parametrize("name", PINS)
def test_what_would_see_a_removed_channel_pins_it(name):
    act, word = PINS[name]
    params = {"up": array(0, 3, 6), "down": array(1, 6, 2)}
    found = groups(lambda p, x: act(x @ p["up"]) @ p["down"], params, array(2, 4, 3))
    # A look-up of channels in another order can give fewer of them to what reads them.
    assert all(member.path == "down" for group in found.removable for member in group.members)
    assert not found.removable or name == "shuffled"
    (group,) = found.of("up", 1)
    assert word in group.pinned


def test_a_sum_over_zeros_does_not_pin():
    """The mean of squares of an RMS norm, and both sums of a layer norm."""
    params = {"up": array(0, 3, 6), "scale": array(1, 6), "down": array(2, 6, 2)}

    def fn(p, x):
        h = x @ p["up"]
        h = h * jax.lax.rsqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6) * p["scale"]
        variance = jnp.mean(h**2, -1) - jnp.mean(h, -1) ** 2
        return ((h - jnp.mean(h, -1, keepdims=True)) / variance[:, None] * p["scale"]) @ p["down"]

    assert removable(groups(fn, params, array(3, 4, 3))) == expected(
        (6, "up[1], scale[0], down[0]")
    )


def test_groups_print_with_reasons():
    (fn, params, args), _ = FAST["mlp"]()
    found = groups(fn, params, *args)
    text = str(found)
    assert "it is an axis of the result" in text
    assert "c[0]" in text
    assert repr(found) == "Groups(2 removable of 11 channels, 2 pinned)"


def test_groups_are_drawn():
    (fn, params, args), _ = FAST["mlp"]()
    found = groups(fn, params, *args)
    drawn = found.dot()
    edges = [line.strip() for line in drawn.splitlines() if " -- " in line]
    assert len(edges) == sum(len(group.members) for group in found.removable)
    assert sum(edge.endswith('-- "b" [label="[0]"];') for edge in edges) == 1
    assert drawn.startswith("graph groups {")
    assert drawn.endswith("}")
    assert found.dot(pinned=True).count("style=dashed") == 2


def test_nnx_and_linen_alike():
    """An NNX module split into its state, with a batch norm."""
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(3, 6, rngs=rngs)
            self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
            self.b = nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.b(nnx.relu(self.norm(self.a(x))))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    fn = lambda state, x: nnx.merge(graph, state)(x)
    x = array(0, 4, 3)
    found = groups(fn, state, x)
    names = [f"norm/{n}[0]" for n in ("mean", "var", "scale", "bias")]
    assert removable(found) == expected(
        (6, ", ".join([*names, "a/kernel[1]", "a/bias[0]", "b/kernel[0]"]))
    )
    plan = keep_channels(found, {found.removable[0]: [1, 4]})
    small, fewer = shrink(fn, state, plan)
    want = fn(mask_channels(state, plan), x)
    assert jnp.allclose(jax.jit(small)(fewer, x), want, atol=1e-6)


def test_params_that_are_no_arrays_are_refused():
    with pytest.raises(CompressError, match=r"a is 'text', and params are arrays"):
        groups(lambda p: p, {"a": "text"})
