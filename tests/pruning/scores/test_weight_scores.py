"""Scores of weights, filters and feature maps: numpy, brute force and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxcompress as jc
from jaxcompress.pruning import scores
from jaxcompress.pruning.masks import make_masks


def normal(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def test_magnitude_and_random_over_odd_leaves():
    params = {
        "w": jnp.asarray([[-1.5, 2.0]], jnp.bfloat16), "empty": jnp.zeros((0, 3)),
        "scalar": jnp.float16(-2), "ids": jnp.arange(3), "name": "x",
    }  # fmt: skip
    found = scores.magnitude(params)
    assert found["w"].tolist() == [[1.5, 2.0]]
    assert found["empty"].shape == (0, 3)
    assert float(found["scalar"]) == 2
    assert found["ids"] is None
    assert found["name"] is None
    drawn = scores.random(params, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves((found, drawn))} == {jnp.dtype("float32")}
    assert jax.tree.structure(drawn) == jax.tree.structure(found)
    again = scores.random({**params, "extra": jnp.ones(2)}, jax.random.key(0))
    same = scores.random(params, jax.random.key(0))
    np.testing.assert_array_equal(drawn["w"], same["w"])
    assert np.ptp(np.asarray(again["extra"])) > 0


LAMP = jax.jit(scores.lamp)


def lamp_of(w):
    """The definition with a loop, in float64; of equals the first is the smaller."""
    w = np.ravel(w).astype(np.float64)
    order = sorted(range(w.size), key=lambda i: (abs(w[i]), -i))
    out = np.zeros(w.size)
    for place, i in enumerate(order):
        rest = np.sum(w[order[place:]] ** 2)
        out[i] = w[i] ** 2 / rest if rest else 0
    return out


@settings(max_examples=25)
@given(st.lists(st.floats(-(2.0**50), 2.0**50, width=32), min_size=7, max_size=7))
def test_lamp_by_its_definition(values):
    w = np.asarray(values, np.float32)
    w[np.abs(w) < 1e-6 * np.abs(w).max(initial=0)] = 0  # squares that would be subnormal
    found = LAMP({"w": w})["w"]
    # Seven squares summed and one division: 9 roundings of 6e-8.
    np.testing.assert_allclose(np.sort(found), np.sort(lamp_of(w)), rtol=1e-6)


def test_lamp_ranks_each_weight_of_a_stack_for_itself():
    w = normal((3, 20, 30))
    found = jax.jit(scores.lamp)({"kernel": w})["kernel"]
    for layer, mine in zip(w, found):
        np.testing.assert_allclose(np.ravel(mine), lamp_of(layer), rtol=1e-5)
        assert float(mine.max()) == 1


FILTERS = {
    "conv": {"kernel": normal((3, 3, 4, 5), 1)},
    "stack": {"kernel": normal((2, 6, 7), 2)},
    "query": {"kernel": normal((6, 2, 3), 3)},
    "torch": {"weight": normal((5, 4), 4)},
    "bias": normal((5,), 5),
}


def filters_of(path, w):
    """The filters of each weight of a stack as rows, in numpy: `[stack, outputs, weights]`."""
    if path == "conv":
        return w.reshape(1, -1, 5).transpose(0, 2, 1)
    if path == "stack":
        return w.transpose(0, 2, 1)
    if path == "query":
        return w.reshape(1, 6, 6).transpose(0, 2, 1)
    return w[None]


def spread(path, values, w):
    if path == "stack":
        return np.broadcast_to(values[:, None], w.shape)
    if path == "query":
        return np.broadcast_to(values.reshape(1, 2, 3), w.shape)
    if path == "torch":
        return np.broadcast_to(values[0][:, None], w.shape)
    return np.broadcast_to(values[0], w.shape)


def check_filters(found, brute):
    assert found["bias"] is None
    for path in ("conv", "stack", "query", "torch"):
        ((name, w),) = FILTERS[path].items()
        rows = filters_of(path, w.astype(np.float64))
        expected = np.array([brute(x) for x in rows])
        # Sums of 36 positive terms, each rounded to 6e-8.
        np.testing.assert_allclose(found[path][name], spread(path, expected, w), rtol=5e-6)


def test_filter_norms():
    check_filters(jax.jit(scores.filter_norm)(FILTERS), lambda x: np.abs(x).sum(axis=1))
    norm = jax.jit(lambda params: scores.filter_norm(params, p=2))
    check_filters(norm(FILTERS), lambda x: np.linalg.norm(x, axis=1))
    large = jax.tree.map(lambda x: np.full_like(x, 2.0**120), FILTERS)
    np.testing.assert_array_equal(norm(large)["torch"]["weight"], 2.0**121)
    with pytest.raises(jc.SpecError, match="p=3: write 1 or 2"):
        scores.filter_norm(FILTERS, p=3)


def test_geometric_median_by_brute_force():
    brute = lambda x: [sum(np.linalg.norm(a - b) for b in x) for a in x]
    check_filters(jax.jit(scores.geometric_median)(FILTERS), brute)


def test_the_filter_at_the_geometric_median_goes_first():
    # Around a centre in a ring: the norm of the centre is the least but for one far off.
    angles = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    ring = np.stack([10 + np.cos(angles), np.sin(angles)])
    w = jnp.asarray(np.concatenate([ring, [[10.0], [0.0]], [[0.1], [0.0]]], axis=1), jnp.float32)
    masks = make_masks(scores.geometric_median({"kernel": w}), 0.1, {"*": "filter"})
    assert np.flatnonzero(~np.asarray(masks["kernel"])[0]).tolist() == [8]
    masks = make_masks(scores.filter_norm({"kernel": w}), 0.1, {"*": "filter"})
    assert np.flatnonzero(~np.asarray(masks["kernel"])[0]).tolist() == [9]


def test_filters_close_to_each_other_are_told_apart():
    w = np.full((8, 3), 1000.0, np.float32)
    w[0] = [1000.0, 1000.25, 1001.0]
    found = np.asarray(scores.geometric_median({"kernel": jnp.asarray(w)})["kernel"])[0]
    np.testing.assert_array_equal(found, [1.25, 1.0, 1.75])


def test_batch_norm_slimming():
    params = {
        "conv": {"kernel": jnp.ones((3, 3, 2, 4))}, "bn": {"scale": jnp.array([0.5, -3.0, 0.0, 1.0])},
        "stack": {"kernel": jnp.ones((2, 3, 4))}, "norms": {"scale": -jnp.arange(8.0).reshape(2, 4)},
        "head": {"kernel": jnp.ones((4, 2))},
    }  # fmt: skip
    pairs = {"conv/kernel": "bn/scale", "stack/kernel": "norms/scale"}
    found = scores.batch_norm_slimming(params, pairs)
    assert found["head"]["kernel"] is None
    np.testing.assert_array_equal(
        found["conv"]["kernel"], np.broadcast_to([0.5, 3, 0, 1], (3, 3, 2, 4))
    )
    np.testing.assert_array_equal(found["stack"]["kernel"][1], [[4, 5, 6, 7]] * 3)
    masks = make_masks(found, 0.5, {"conv/kernel": "filter", "bn/scale": "unstructured"})
    np.testing.assert_array_equal(masks["conv"]["kernel"][0, 0, 0], [False, True, False, True])
    np.testing.assert_array_equal(masks["bn"]["scale"], [False, True, False, True])
    with pytest.raises(jc.SpecError, match=r"'bn/scale' of shape \(4,\) does not fit the outputs"):
        scores.batch_norm_slimming(params, {"head/kernel": "bn/scale"})
    with pytest.raises(jc.SpecError, match="pairs: 'cnv/kernel' names no floating leaf"):
        scores.batch_norm_slimming(params, {"cnv/kernel": "bn/scale"})


def test_hrank_by_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    # Ranks 0 to 5 by construction, and one full of noise.
    maps = np.stack(
        [
            np.stack(
                [rng.normal(size=(6, r)) @ rng.normal(size=(r, 5)) for r in (0, 1, 2, 3, 4, 5)], -1
            )
            for _ in range(4)
        ]
    ).astype(np.float32)
    maps[0, ..., 2] = 0
    params = {"conv": {"kernel": jnp.ones((3, 3, 2, 6)), "bias": jnp.ones(6)}}
    fn = lambda params, x: {"conv/kernel": x}
    batches = [jnp.asarray(maps[:3]), jnp.asarray(maps[3:])]  # of unequal size
    found = scores.hrank(fn, params, batches)
    assert found["conv"]["bias"] is None
    ranks = torch.linalg.matrix_rank(torch.from_numpy(maps).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_array_equal(ranks.mean(axis=0), [0, 1, 1.5, 3, 4, 5])
    np.testing.assert_array_equal(
        found["conv"]["kernel"], np.broadcast_to(ranks.mean(axis=0), (3, 3, 2, 6))
    )
    with pytest.raises(jc.SpecError, match=r"return \[n, h, w, 6\]"):
        scores.hrank(lambda params, x: {"conv/kernel": x[..., :2]}, params, batches)
    with pytest.raises(jc.SpecError, match="feature_fn's 'conv' names no floating leaf"):
        scores.hrank(lambda params, x: {"conv": x}, params, batches)
    with pytest.raises(jc.SpecError, match="batches is empty"):
        scores.hrank(fn, params, [])


def test_hrank_is_compiled_once_for_all_calls():
    traces = []

    def fn(params, x, name):
        traces.append(name)
        return {"kernel": x}

    params, batch = {"kernel": jnp.ones((1, 1, 1, 2))}, (jnp.ones((2, 3, 3, 2)), "train")
    for _ in range(2):
        found = scores.hrank(fn, params, [batch, batch])
    assert found["kernel"].ravel().tolist() == [1, 1]
    assert traces == ["train"]


def test_lamp_and_the_median_on_a_mesh_of_explicit_axes():
    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    place = jax.NamedSharding(mesh, jax.P("a", "b"))
    w = normal((4, 6))
    for score in (scores.lamp, scores.geometric_median):
        found = score({"kernel": jax.device_put(w, place)})["kernel"]
        assert found.sharding == place
        np.testing.assert_array_equal(found, score({"kernel": w})["kernel"])


def test_nisp_of_convolutions_of_one_and_three_spatial_axes():
    for shape in ((2, 3, 4), (1, 2, 1, 3, 4)):
        first, second = normal((1,) * (len(shape) - 2) + (2, 3)), normal(shape, 1)
        params = {"a": first, "b": second}
        with pytest.raises(jc.SpecError, match=r"write axes=\{'b': KernelAxes\(\(") as told:
            scores.nisp(params, ["a", "b"])
        at = jc.KernelAxes(tuple(range(-len(shape), -1)), (-1,))
        assert f"KernelAxes({at.input}, {at.output})" in str(told.value)
        found = scores.nisp(params, ["a", "b"], axes={"a": at, "b": at})
        expected = np.abs(second).sum(axis=(*range(len(shape) - 2), -1))  # of each input channel
        mine = np.asarray(found["a"]).reshape(-1, 3)[0]
        np.testing.assert_allclose(mine / mine.sum(), expected / expected.sum(), rtol=1e-5)


def test_nisp_in_loops():
    conv, dense, head = normal((3, 3, 2, 4), 1), normal((12, 5), 2), normal((5, 3), 3)
    params = {"a": {"kernel": conv}, "b": {"kernel": dense}, "c": {"kernel": head, "bias": head[0]}}
    final = np.array([1.0, 0.0, 2.0])
    found = scores.nisp(params, ["a/kernel", "b/kernel", "c/kernel"], importance=jnp.asarray(final))
    assert found["c"]["bias"] is None
    hidden = np.zeros(5)
    for i in range(5):
        for j in range(3):
            hidden[i] += abs(float(head[i, j])) * final[j]
    channels = np.zeros(4)
    for place in range(3):  # 12 inputs are 3 places of 4 channels, channels last
        for c in range(4):
            for j in range(5):
                channels[c] += abs(float(dense[place * 4 + c, j])) * hidden[j]
    for path, expected in (("c", final), ("b", hidden), ("a", channels)):
        mine = np.asarray(found[path]["kernel"], np.float64)
        assert np.all(mine == mine[(0,) * (mine.ndim - 1)])
        mine = mine[(0,) * (mine.ndim - 1)]
        np.testing.assert_allclose(mine / mine.max(), expected / expected.max(), rtol=2e-6)
    with pytest.raises(jc.SpecError, match="write the kernels one after the other"):
        scores.nisp(params, ["c/kernel", "a/kernel"])


def test_karnin_goes_inside_of_what_gathers_steps():
    tx = optax.sgd(1.0)
    with pytest.raises(jc.SpecError, match=r"write MultiSteps\(track_karnin\(tx\), k\)"):
        scores.track_karnin(optax.MultiSteps(tx, 2))
    params = {"w": jnp.array([1.0, 2.0])}
    within = optax.chain(optax.clip(1.0), optax.MultiSteps(tx, 2).gradient_transformation())
    for gathers in (within, optax.apply_every(2)):
        with pytest.raises(jc.SpecError, match="gathers several steps"):
            scores.track_karnin(gathers).init(params)
    both = optax.MultiSteps(scores.track_karnin(tx), 2)
    state = both.init(params)
    for g in (jnp.array([1.0, 0.0]), jnp.array([3.0, 2.0])):  # means 2 and 1
        updates, state = both.update({"w": g}, state, params)
        params = optax.apply_updates(params, updates)
    # -sum g dw w_f / (w_f - w_i), of one step of the mean: 4 * -1 / -2 and 1 * 1 / -1.
    assert scores.karnin(state, params)["w"].tolist() == [2.0, -1.0]


def test_karnin_is_the_papers_formula_for_gradient_descent():
    rate, a = 0.125, np.array([1.0, 3.0, 2.0, 1.0])
    w = np.array([1.0, -2.0, 0.5, 0.0])
    grad = lambda w: a * (w - np.array([2.0, 1.0, 0.25, 0.0]))
    tx = scores.track_karnin(optax.sgd(rate))
    params = {"w": jnp.asarray(w, jnp.float32), "n": jnp.float32(1)}
    state = optax.chain(tx).init(params)
    step = jax.jit(optax.chain(tx).update)
    start, total = w.copy(), np.zeros(4)
    for _ in range(12):
        g = {
            "w": jnp.asarray(grad(np.asarray(params["w"], np.float64)), jnp.float32),
            "n": jnp.float32(0),
        }
        updates, state = step(g, state, params)
        params = optax.apply_updates(params, updates)
        change = -rate * grad(w)
        total += change**2
        w = w + change
    way = np.where(w == start, 1, w - start)
    expected = np.where(w == start, 0, total / rate * w / way)
    found = scores.karnin(state, params)
    # Twelve steps, each rounded to 6e-8 of numbers of order one.
    np.testing.assert_allclose(found["w"], expected, rtol=1e-5, atol=1e-6)
    assert float(found["w"][3]) == 0  # never moved
    with pytest.raises(jc.SpecError, match="holds 0 of track_karnin"):
        scores.karnin(optax.sgd(0.1).init(params), params)
    with pytest.raises(jc.SpecError, match="another tree"):
        scores.karnin(state, {"v": jnp.ones(2)})


def test_karnin_under_adam_and_sparsify():
    tx = scores.track_karnin(optax.adam(0.01))
    params = {"kernel": jnp.asarray(normal((3, 4)))}
    wrapped = jc.sparsify(
        tx, jc.pruning.magnitude(), jc.pruning.one_shot(0.5), {"*": "unstructured"}
    )
    plain, state, inner = params, wrapped.init(params), tx.init(params)
    written = np.zeros((3, 4))
    for i in range(4):
        grads = {"kernel": jnp.asarray(normal((3, 4), i + 1))}
        updates, inner = tx.update(grads, inner, plain)
        expected, _ = optax.adam(0.01).update(grads, _adam_before(i), plain)
        np.testing.assert_array_equal(updates["kernel"], expected["kernel"])
        written += np.asarray(grads["kernel"], np.float64) * np.asarray(updates["kernel"])
        plain = optax.apply_updates(plain, updates)
    np.testing.assert_allclose(inner.sums["kernel"], written, rtol=1e-5, atol=1e-7)
    wf, wi = np.asarray(plain["kernel"], np.float64), np.asarray(params["kernel"], np.float64)
    # The way is a difference of numbers 25 times larger, each rounded to 6e-8.
    np.testing.assert_allclose(
        scores.karnin(inner, plain)["kernel"], -written * wf / (wf - wi), rtol=1e-4, atol=1e-5
    )
    updates, state = wrapped.update(grads, state, params)
    assert scores.karnin(state, params)["kernel"].shape == (3, 4)


def _adam_before(i):
    """Adam's state after the first i gradients of the test above."""
    tx, params = optax.adam(0.01), {"kernel": jnp.zeros((3, 4))}
    state = tx.init(params)
    for n in range(i):
        state = tx.update({"kernel": jnp.asarray(normal((3, 4), n + 1))}, state, params)[1]
    return state
