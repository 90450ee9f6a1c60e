"""Groups, and the models that are left, against Torch-Pruning's on the same torch models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcompress.pruning.structure import groups, keep_channels, shrink

torch = pytest.importorskip("torch")
tp = pytest.importorskip("torch_pruning")
nn = torch.nn


# The layers as functions of the torch model's tensors, by their names and in torch's layout.


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def conv(p, name, x, stride=1, groups=1):
    w = p[f"{name}.weight"]
    pad = w.shape[-1] // 2
    y = jax.lax.conv_general_dilated(
        x, w, (stride, stride), [(pad, pad)] * 2, feature_group_count=groups
    )
    bias = f"{name}.bias"
    return y + p[bias][:, None, None] if bias in p else y


def norm(p, name, x):
    mean, var, scale, bias = (
        p[f"{name}.{n}"][:, None, None] for n in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale + bias


class MLP(nn.Module):
    shape = (3, 5)

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.relu(self.a(x)))))


def mlp(p, x):
    return linear(p, "c", jnp.tanh(linear(p, "b", jax.nn.relu(linear(p, "a", x)))))


class Flat(nn.Module):
    """Convolutions with a norm, flattened before a dense layer."""

    shape = (2, 2, 4, 4)

    def __init__(self):
        super().__init__()
        self.c0, self.n0 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.c1, self.head = nn.Conv2d(4, 6, 3, padding=1), nn.Linear(6 * 16, 3)

    def forward(self, x):
        return self.head(torch.relu(self.c1(torch.relu(self.n0(self.c0(x))))).flatten(1))


def flat(p, x):
    x = jax.nn.relu(norm(p, "n0", conv(p, "c0", x)))
    return linear(p, "head", jax.nn.relu(conv(p, "c1", x)).reshape(len(x), -1))


class Residual(nn.Module):
    """A residual block as it is, and one with a projection."""

    shape = (2, 2, 4, 4)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.a, self.an = nn.Conv2d(4, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.b, self.bn = nn.Conv2d(5, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.c, self.cn = nn.Conv2d(4, 6, 3, 2, padding=1, bias=False), nn.BatchNorm2d(6)
        self.d, self.dn = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.cut, self.head = nn.Conv2d(4, 6, 1, 2), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.bn(self.b(torch.relu(self.an(self.a(x))))))
        x = torch.relu(self.cut(x) + self.dn(self.d(torch.relu(self.cn(self.c(x))))))
        return self.head(x.mean((2, 3)))


def residual(p, x):
    relu = jax.nn.relu
    x = relu(conv(p, "stem", x))
    x = relu(x + norm(p, "bn", conv(p, "b", relu(norm(p, "an", conv(p, "a", x))))))
    y = relu(norm(p, "cn", conv(p, "c", x, 2)))
    x = relu(conv(p, "cut", x, 2) + norm(p, "dn", conv(p, "d", y)))
    return linear(p, "head", x.mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted residual with a squeeze-excite."""

    shape = (2, 2, 4, 4)

    def __init__(self):
        super().__init__()
        self.stem, self.up = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 6, 1, bias=False)
        self.deep, self.n = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6)
        self.squeeze, self.excite = nn.Conv2d(6, 3, 1), nn.Conv2d(3, 6, 1)
        self.down, self.head = nn.Conv2d(6, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        y = torch.relu(self.n(self.deep(self.up(x))))
        gate = self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True))))
        x = x + self.down(y * torch.sigmoid(gate))
        return self.head(x.mean((2, 3)))


def depthwise(p, x):
    x = conv(p, "stem", x)
    y = jax.nn.relu(norm(p, "n", conv(p, "deep", conv(p, "up", x), groups=6)))
    gate = jax.nn.relu(conv(p, "squeeze", y.mean((2, 3), keepdims=True)))
    x = x + conv(p, "down", y * jax.nn.sigmoid(conv(p, "excite", gate)))
    return linear(p, "head", x.mean((2, 3)))


class Joined(nn.Module):
    """Layers that see all those before them."""

    shape = (2, 2, 4, 4)

    def __init__(self):
        super().__init__()
        self.c0, self.n0 = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.c1, self.n1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(7)
        self.c2, self.head = nn.Conv2d(7, 5, 3, padding=1), nn.Linear(12, 3)

    def forward(self, x):
        x = self.c0(x)
        x = torch.cat([x, self.c1(torch.relu(self.n0(x)))], 1)
        x = torch.cat([self.c2(torch.relu(self.n1(x))), x], 1)
        return self.head(x.mean((2, 3)))


def joined(p, x):
    x = conv(p, "c0", x)
    x = jnp.concatenate([x, conv(p, "c1", jax.nn.relu(norm(p, "n0", x)))], 1)
    x = jnp.concatenate([conv(p, "c2", jax.nn.relu(norm(p, "n1", x))), x], 1)
    return linear(p, "head", x.mean((2, 3)))


MODELS = {"mlp": (MLP, mlp), "flat": (Flat, flat), "residual": (Residual, residual),
          "depthwise": (Depthwise, depthwise), "joined": (Joined, joined)}  # fmt: skip


def torch_model(make):
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for x in (module.weight.data, module.bias.data, module.running_mean):
                x.uniform_(0.5, 1.5)
    tensors = {k: jnp.asarray(x.numpy()) for k, x in model.state_dict().items() if x.ndim}
    return model, tensors, torch.randn(*make.shape)


def our_places(group, channels):
    """`(layer, side, places)` of some channels; norms, biases and depthwise layers are outputs."""
    out = set()
    for member in group.members:
        name, _, leaf = member.path.rpartition(".")
        inputs = leaf == "weight" and member.axis == 1
        places = sorted(member.places(np.asarray(channels)).reshape(-1).tolist())
        out.add((name, "in" if inputs else "out", tuple(places)))
    return out


def their_places(group, model):
    names = {module: name for name, module in model.named_modules()}
    out = set()
    for item in group:
        layer = names.get(item.dep.target.module)
        if layer is not None:
            inputs = item.dep.handler.__name__ == "prune_in_channels"
            whole = isinstance(item.dep.target.module, nn.BatchNorm2d)
            side = "in" if inputs and not whole and layer != "deep" else "out"
            out.add((layer, side, tuple(sorted(item.idxs))))
    return out


def root_of(group, model):
    """A layer whose outputs are the channels of a group, one by one."""
    for member in group.members:
        name, _, leaf = member.path.rpartition(".")
        module = model.get_submodule(name)
        if leaf == "weight" and member.axis == 0 and isinstance(module, (nn.Conv2d, nn.Linear)):
            linear = isinstance(module, nn.Linear)
            return module, tp.prune_linear_out_channels if linear else tp.prune_conv_out_channels
    raise AssertionError(f"no layer makes {group.name}")


@pytest.mark.parametrize("name", MODELS)
def test_groups_and_models_are_those_of_torch_pruning(name):
    make, fn = MODELS[name]
    model, tensors, x = torch_model(make)
    found = groups(fn, tensors, jnp.asarray(x.numpy()))
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    theirs = [graph.get_pruning_group(*root_of(g, model), idxs=[0, 2]) for g in found.removable]
    ours = [our_places(g, [0, 2]) for g in found.removable]
    assert [their_places(g, model) for g in theirs] == ours
    # They have no other groups: each layer whose outputs may go is in one of ours.
    everyone = {layer for places in ours for layer, side, _ in places if side == "out"}
    last = {n for n in ("c", "head") if isinstance(getattr(model, n, None), nn.Linear)}
    assert everyone == {n for n, _ in model.named_children()} - last
    for g in found.removable:  # asked for again, as those before it moved places
        graph.get_pruning_group(*root_of(g, model), idxs=[0, 2]).prune()
    kept = {g: sorted(set(range(g.size)) - {0, 2}) for g in found.removable}
    small, fewer = shrink(fn, tensors, keep_channels(found, kept))
    for key, tensor in model.state_dict().items():
        if tensor.ndim:
            np.testing.assert_array_equal(fewer[key], tensor.numpy())
    with torch.no_grad():
        want = model(x).numpy()
    # Sums of some hundred products of about 1 in float32, in another order.
    np.testing.assert_allclose(small(fewer, jnp.asarray(x.numpy())), want, rtol=1e-4, atol=1e-5)
