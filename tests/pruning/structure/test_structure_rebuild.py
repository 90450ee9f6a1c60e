"""Modules made anew with smaller widths: where they are equal, and where they are refused."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from structure_models import array, filled

from jaxcompress import CompressError
from jaxcompress.pruning.structure import groups, keep_channels, plan, shrink
from jaxcompress.pruning.structure.rebuilding import rebuild


def near(a, b):
    """The same sums, compiled apart."""
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, float(jnp.abs(b).max())))


def halved(module, *args, only=None, share=0.5):
    params = filled(jax.eval_shape(module.init, jax.random.key(0), *args))
    found = groups(module.apply, params, *args)
    chosen = plan(found, params, share, round_to=1, only=only)
    return chosen, *shrink(module.apply, params, chosen)


class Mlp(nn.Module):
    widths: tuple[int, ...]
    classes: int = 2

    @nn.compact
    def __call__(self, x):
        for width in self.widths:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


def test_an_mlp_of_fields():
    """Two layers of one width that become different ones."""
    model, x = Mlp((8, 8)), array(0, 3, 4)
    params = filled(jax.eval_shape(model.init, jax.random.key(0), x))
    found = groups(model.apply, params, x)
    first, second = found.removable
    chosen = keep_channels(found, {first: [0, 2, 3, 5, 6, 7], second: [1, 4, 6]})
    small, fewer = shrink(model.apply, params, chosen)
    new = rebuild(model, chosen, fewer, x)
    assert new == Mlp((6, 3))
    near(new.apply(fewer, x), small(fewer, x))
    assert rebuild(model, keep_channels(found, {}), params, x) == model


class Block(nn.Module):
    width: int
    inner: int
    strides: int = 1

    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), use_bias=False)
        y = nn.relu(norm()(conv(self.inner, strides=self.strides)(x)))
        y = norm()(conv(self.width)(y))
        if x.shape != y.shape:
            x = norm()(nn.Conv(self.width, (1, 1), strides=self.strides)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    config: Any  # a dict of widths, as many models have one

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(self.config["stem"], (3, 3), use_bias=False)(x))
        for i, (width, inner) in enumerate(self.config["blocks"]):
            x = Block(width, inner, i + 1)(x, train)
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.mark.slow
def test_a_residual_network_with_batch_norm():
    model, x = ResNet({"stem": 4, "blocks": ((4, 4), (6, 6))}), array(1, 2, 6, 6, 2)
    chosen, small, fewer = halved(model, x)
    new = rebuild(model, chosen, fewer, x, train=False)
    assert dict(new.config) == {"stem": 2, "blocks": ((2, 2), (3, 3))}
    near(new.apply(fewer, x), small(fewer, x))
    (a, b) = (
        jax.grad(lambda p, f=f: jnp.sum(jnp.sin(f({**fewer, "params": p}, x))))(fewer["params"])
        for f in (new.apply, small)
    )
    jax.tree.map(near, a, b)


class Encoder(nn.Module):
    model: int
    heads: int
    depth: int
    mlp: int

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm()(nn.Dense(self.model, name="in")(x))
        part = lambda name: nn.DenseGeneral((self.heads, self.depth), name=name)(x)
        q, k, v = part("q"), part("k"), part("v")
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(self.depth))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        x = nn.LayerNorm()(x + nn.DenseGeneral(self.model, axis=(-2, -1), name="o")(y))
        y = nn.Dense(self.model, name="down")(nn.gelu(nn.Dense(self.mlp, name="up")(x)))
        return nn.Dense(2, name="head")(nn.LayerNorm()(x + y))


def of(*names):
    return lambda group: any(m.path.split("/")[1] in names for m in group.members)


@pytest.mark.slow
def test_heads_and_mlp_of_a_transformer_and_not_its_model_width():
    model, x = Encoder(8, 4, 3, 12), array(2, 2, 5, 3)
    inner = lambda group: not of("LayerNorm_0")(group) and group.size in (4, 12)
    chosen, small, fewer = halved(model, x, only=inner)
    new = rebuild(model, chosen, fewer, x)
    assert new == Encoder(8, 2, 3, 6)
    near(new.apply(fewer, x), small(fewer, x))
    chosen, small, fewer = halved(model, x, only=of("LayerNorm_0"))
    with pytest.raises(CompressError, match=r"LayerNorm_0, it has 4, and the masked model 8; run"):
        rebuild(model, chosen, fewer, x)
    depth = lambda group: not of("LayerNorm_0")(group) and group.size == 3
    chosen, small, fewer = halved(model, x, only=depth, share=0.7)
    with pytest.raises(CompressError, match="is not the masked model"):
        rebuild(model, chosen, fewer, x)


class Merged(nn.Module):
    """Heads as a part of a merged axis, whose number no shape shows."""

    heads: int = 4
    inner: int = 12

    @nn.compact
    def __call__(self, x):
        parts = nn.Dense(self.inner, use_bias=False)(x)
        parts = parts.reshape(*x.shape[:-1], self.heads, self.inner // self.heads)
        return nn.Dense(2)(
            (parts / (1 + jnp.abs(parts).max(-1, keepdims=True))).reshape(len(x), -1)
        )


def test_a_number_that_no_shape_shows_is_found_by_what_is_computed():
    model, x = Merged(), array(3, 5, 4)
    params = filled(jax.eval_shape(model.init, jax.random.key(0), x))
    found = groups(model.apply, params, x)
    heads = next(group for group in found.removable if group.size == 4)
    chosen = keep_channels(found, {heads: [0, 3]})
    small, fewer = shrink(model.apply, params, chosen)
    new = rebuild(model, chosen, fewer, x)
    assert (new.heads, new.inner) == (2, 6)
    near(new.apply(fewer, x), small(fewer, x))


class Shared(nn.Module):
    width: int = 6

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Dense(self.width)(nn.relu(nn.Dense(self.width)(x)))))


def test_layers_that_share_a_width_and_lose_different_ones():
    model, x = Shared(), array(4, 3, 4)
    params = filled(jax.eval_shape(model.init, jax.random.key(0), x))
    found = groups(model.apply, params, x)
    chosen = keep_channels(found, {found.removable[0]: [0, 1, 2]})
    _, fewer = shrink(model.apply, params, chosen)
    with pytest.raises(CompressError, match=r"(?s)by hand:.*Dense_0/kernel: \(6, 2\) -> \(3, 2\)"):
        rebuild(model, chosen, fewer, x)
    with pytest.raises(CompressError, match="the plan is for"):
        rebuild(model, chosen, params, x)
    with pytest.raises(CompressError, match="is no module that can be made anew"):
        rebuild(lambda x: x, chosen, fewer, x)


class NnxMlp(nnx.Module):
    def __init__(self, inputs, hidden, *, classes=2, rngs):
        self.up = nnx.Linear(inputs, hidden, rngs=rngs)
        self.norm = nnx.BatchNorm(hidden, use_running_average=True, rngs=rngs)
        self.down = nnx.Linear(hidden, classes, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.norm(self.up(x))))


@pytest.mark.slow
def test_an_nnx_module():
    make, x = functools.partial(NnxMlp, 3, 8, classes=2), array(5, 4, 3)
    graph, state = nnx.split(make(rngs=nnx.Rngs(0)))
    state = jax.tree.map(jnp.abs, filled(state, 6))  # variances among them
    fn = lambda state, x: nnx.merge(graph, state)(x)
    chosen = plan(groups(fn, state, x), state, 0.5, round_to=1)
    small, fewer = shrink(fn, state, chosen)
    new = rebuild(make, chosen, fewer, x)
    assert (new.up.out_features, new.norm.num_features, new.down.in_features) == (4, 4, 4)
    near(new(x), small(fewer, x))
