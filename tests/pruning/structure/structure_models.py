"""Small networks of each kind, with the groups of their channels written down by hand."""

import functools
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3] / "examples"))


def array(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(tree, seed=0):
    """Random values in all leaves; variances are positive."""
    rng = np.random.default_rng(seed)

    def one(path, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        values = 0.1 + 0.4 * rng.normal(size=x.shape)
        return jnp.asarray(0.5 + abs(values) if "var" in str(path[-1]) else values, x.dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


def linen(module, *args):
    params = filled(jax.eval_shape(module.init, jax.random.key(0), *args))
    return module.apply, params, args


def members(group):
    """The members of a group as texts: `path[axis] from offset by block x times`."""
    out = set()
    for m in group.members:
        times = int(np.prod([n for n, _ in m.repeats], dtype=int))
        text = f"{m.path.removeprefix('params/')}[{m.axis}]"
        text += f"+{m.offset}" if m.offset else ""
        text += f" by {m.block}" if m.block > 1 else ""
        text += f" x{times}" if times > 1 else ""
        out.add(text)
    return frozenset(out)


def expected(*groups):
    """`(size, "member member ...")` each, in any order."""
    return {(size, frozenset(part.strip() for part in text.split(","))) for size, text in groups}


def norm(name, offset=""):
    leaves = ("batch_stats/{}/mean", "batch_stats/{}/var", "{}/scale", "{}/bias")
    return ", ".join(leaf.format(name) + "[0]" + offset for leaf in leaves)


def mlp():
    params = {"a": array(0, 3, 6), "b": array(1, 6), "c": array(2, 6, 5), "d": array(3, 5, 2)}
    fn = lambda p, x: jnp.tanh(jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"]) @ p["d"]
    return (fn, params, (array(4, 2, 3),)), expected((6, "a[1], b[0], c[0]"), (5, "c[1], d[0]"))


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), use_bias=False)
        x = nn.relu(norm(name="n0")(conv(4, name="c0")(x)))
        for i, width in enumerate((4, 6)):
            y = nn.relu(norm(name=f"n{i}a")(conv(width, name=f"c{i}a", strides=i + 1)(x)))
            y = norm(name=f"n{i}b")(conv(width, name=f"c{i}b")(y))
            if i:
                x = norm(name="ns")(nn.Conv(width, (1, 1), strides=2, name="cs")(x))
            x = nn.relu(x + y)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def resnet():
    wide = ", ".join(["c0[3]", norm("n0"), "c0a[2]", "c0b[3]", norm("n0b"), "c1a[2]", "cs[2]"])
    last = ", ".join(["c1b[3]", norm("n1b"), "cs[3]", "cs/bias[0]", norm("ns"), "head/kernel[0]"])
    groups = expected(
        (4, kernels(wide)),
        (4, kernels(f"c0a[3], {norm('n0a')}, c0b[2]")),
        (6, kernels(f"c1a[3], {norm('n1a')}, c1b[2]")),
        (6, kernels(last)),
    )
    return linen(ResNet(), array(5, 2, 4, 4, 2)), groups


def kernels(text):
    """`c[3]` short for `c/kernel[3]`, where no leaf is named."""
    parts = [part.strip() for part in text.split(",")]
    return ", ".join(p if "/" in p else p.replace("[", "/kernel[", 1) for p in parts)


class Inverted(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu6(norm(name="n0")(nn.Conv(4, (1, 1), use_bias=False, name="c0")(x)))
        y = nn.swish(nn.Conv(6, (1, 1), use_bias=False, name="up")(x))
        y = nn.Conv(6, (3, 3), feature_group_count=6, use_bias=False, name="depthwise")(y)
        y = nn.swish(norm(name="n1")(y))
        gate = nn.relu(nn.Conv(3, (1, 1), name="squeeze")(y.mean((1, 2), keepdims=True)))
        y = y * nn.sigmoid(nn.Conv(6, (1, 1), name="excite")(gate))
        x = x + nn.Conv(4, (1, 1), use_bias=False, name="down")(y)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


def inverted():
    groups = expected(
        (4, kernels(f"c0[3], {norm('n0')}, up[2], down[3], head[0]")),
        (
            6,
            kernels(
                f"up[3], depthwise[3], {norm('n1')}, squeeze[2], excite[3], excite/bias[0], down[2]"
            ),
        ),
        (3, kernels("squeeze[3], squeeze/bias[0], excite[2]")),
    )
    return linen(Inverted(), array(6, 2, 4, 4, 2)), groups


class DenseNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 3), use_bias=False, name="c0")(x)
        for i in range(2):
            y = nn.relu(nn.BatchNorm(use_running_average=True, name=f"n{i}")(x))
            y = nn.Conv(2, (3, 3), use_bias=False, name=f"d{i}")(y)
            x = jnp.concatenate([x, y], -1)
        x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(2, name="head")(x.reshape(len(x), -1))


def densenet():
    groups = expected(
        (3, kernels(f"c0[3], {norm('n0')}, {norm('n1')}, d0[2], d1[2], head[0] x4")),
        (2, kernels(f"d0[3], {norm('n1', '+3')}, d1[2]+3, head[0]+3 x4")),
        (2, kernels("d1[3], head[0]+5 x4")),
    )
    return linen(DenseNet(), array(7, 2, 4, 4, 2)), groups


class UNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        a = nn.relu(nn.Conv(3, (3, 3), use_bias=False, name="a")(x))
        b = nn.relu(nn.Conv(4, (3, 3), use_bias=False, name="b")(nn.avg_pool(a, (2, 2), (2, 2))))
        up = nn.ConvTranspose(5, (2, 2), strides=(2, 2), use_bias=False, name="up")(b)
        near = jax.image.resize(b, (2, 4, 4, 4), "bilinear")
        return nn.Conv(1, (3, 3), name="c")(jnp.concatenate([a, up, near], -1))


def unet():
    groups = expected(
        (3, kernels("a[3], b[2], c[2]")),
        (4, kernels("b[3], up[2], c[2]+8")),
        (5, kernels("up[3], c[2]+3")),
    )
    return linen(UNet(), array(8, 2, 4, 4, 2)), groups


class Grouped(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (1, 1), use_bias=False, name="a")(x)
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2, use_bias=False, name="b")(x))
        return nn.Dense(2, name="head")(x.mean((1, 2)))


def grouped():
    groups = expected(
        (2, kernels("a[3] by 3, b[3] by 4, head[0] by 4")),
        (3, kernels("a[3] x2, b[2]")),
        (4, kernels("b[3] x2, head[0] x2")),
    )
    return linen(Grouped(), array(9, 2, 4, 4, 2)), groups


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.RNN(nn.OptimizedLSTMCell(5, name="lstm"))(x)
        return nn.Dense(2, name="head")(x)


def recurrent():
    gates = [f"lstm/h{g}/{leaf}" for g in "ifgo" for leaf in ("kernel[0]", "kernel[1]", "bias[0]")]
    gates += [f"lstm/i{g}/kernel[1]" for g in "ifgo"]
    return linen(Recurrent(), array(10, 2, 3, 3)), expected(
        (5, ", ".join([*gates, "head/kernel[0]"]))
    )


def scanned():
    """A stack of layers in one leaf each, run by a scan, each layer computed anew for gradients."""

    def fn(params, x):
        def layer(x, p):
            return x + jax.nn.gelu(x @ p["up"] + p["b"]) @ p["down"], None

        x, _ = jax.lax.scan(jax.checkpoint(layer), x @ params["in"], params["layers"])
        return x @ params["head"]

    layers = {"up": array(0, 3, 4, 6), "b": array(1, 3, 6), "down": array(2, 3, 6, 4)}
    params = {"in": array(3, 2, 4), "layers": layers, "head": array(4, 4, 2)}
    groups = expected(
        (4, "in[1], layers/up[1], layers/down[2], head[0]"),
        (6, "layers/up[2], layers/b[1], layers/down[1]"),
    )
    return (fn, params, (array(5, 2, 2),)), groups


FAST = {"mlp": mlp, "scanned": scanned}
SLOW = {
    "resnet": resnet,
    "inverted": inverted,
    "densenet": densenet,
    "grouped": grouped,
    "unet": unet,
    "recurrent": recurrent,
}
