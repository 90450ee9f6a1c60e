"""Scores by gradients, against a network written out in float64: derivatives without autodiff.

Gradients are complex steps, exact to rounding; Hessians are central differences of them, which are
off by some `h**2 = 1e-10`. Float32 autodiff sums at most some hundred products of the largest
magnitude, each rounded to 6e-8: within 1e-5 of that magnitude.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxcompress as jc
from jaxcompress.pruning import scores
from jaxcompress.pruning.masks import make_masks

SHAPES = {"a/kernel": (3, 4), "b/kernel": (4, 2), "b/bias": (2,)}


def loss_fn(params, x, y):
    hidden = jnp.tanh(x @ params["a"]["kernel"])
    return jnp.mean((hidden @ params["b"]["kernel"] + params["b"]["bias"] - y) ** 2)


def params_of(vector, dtype=jnp.float32):
    parts = split(vector)
    a, b, bias = (jnp.asarray(parts[name], dtype) for name in SHAPES)
    return {"a": {"kernel": a}, "b": {"kernel": b, "bias": bias}, "step": jnp.int32(7)}


def split(vector):
    out, at = {}, 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        out[name], at = vector[at : at + size].reshape(shape), at + size
    return out


def loss64(vector, x, y):
    p = split(vector)
    out = np.tanh(x @ p["a/kernel"]) @ p["b/kernel"] + p["b/bias"]
    return np.mean((out - y) ** 2)


def grad64(vector, x, y):
    steps = vector + 1e-30j * np.eye(vector.size)
    return np.array([loss64(step, x, y).imag / 1e-30 for step in steps])


def hessian64(vector, x, y):
    rows = [
        (grad64(vector + step, x, y) - grad64(vector - step, x, y)) / 2e-5
        for step in 1e-5 * np.eye(vector.size)
    ]
    return np.array(rows)


def flat(tree):
    assert tree["step"] is None
    return np.concatenate(
        [np.ravel(tree[k.split("/")[0]][k.split("/")[1]]).astype(np.float64) for k in SHAPES]
    )


def close(found, expected):
    np.testing.assert_allclose(flat(found), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


class Problem:
    def __init__(self):
        rng = np.random.default_rng(0)
        # What float32 holds exactly, so that both see the same numbers.
        draw = lambda *shape: rng.normal(size=shape).astype(np.float32).astype(np.float64)
        self.w, self.x, self.y = draw(22), draw(6, 3), draw(6, 2)
        halves = [slice(0, 3), slice(3, 6)]
        self.batches = [(jnp.float32(self.x[i]), jnp.float32(self.y[i])) for i in halves]
        self.params = params_of(self.w)
        # The mean over two batches of equal size is that over all examples.
        self.g = grad64(self.w, self.x, self.y)
        self.h = hessian64(self.w, self.x, self.y)
        one = lambda i: grad64(self.w, self.x[i : i + 1], self.y[i : i + 1])
        self.each = np.array([one(i) for i in range(6)])


@pytest.fixture(scope="module")
def problem():
    return Problem()


def unit_sum(values):
    """At each weight of a kernel the sum over its column; biases as they are."""
    out = split(values)
    for name in ("a/kernel", "b/kernel"):
        out[name] = np.broadcast_to(out[name].sum(axis=0), SHAPES[name])
    return np.concatenate([np.ravel(out[name]) for name in SHAPES])


UNITS = {"*/kernel": "filter"}


def test_snip_and_first_order_taylor(problem):
    p = problem
    close(scores.snip(loss_fn, p.params, iter(p.batches)), np.abs(p.g * p.w))
    close(
        scores.taylor(loss_fn, p.params, p.batches, units=UNITS),
        np.abs(unit_sum(p.g * p.w)),
    )


def test_skeletonization_is_the_derivative_by_a_gate(problem):
    p = problem
    found = flat(scores.skeletonization(loss_fn, p.params, p.batches, UNITS))

    def gated(unit, a):
        w = split(p.w.copy())
        w["a/kernel"][:, unit] *= a
        return loss64(np.concatenate([np.ravel(w[n]) for n in SHAPES]), p.x, p.y)

    for unit in range(4):  # central differences, off by h**2
        slope = (gated(unit, 1 + 1e-5) - gated(unit, 1 - 1e-5)) / 2e-5
        np.testing.assert_allclose(split(found)["a/kernel"][:, unit], -slope, atol=1e-5)
    close(scores.skeletonization(loss_fn, p.params, p.batches, UNITS), -unit_sum(p.g * p.w))


def test_grasp_is_half_the_fall_of_the_gradient_norm(problem):
    p = problem
    found = scores.grasp(loss_fn, p.params, iter(p.batches))
    close(found, p.w * (p.h @ p.g))
    # The sign: towards zero along one weight, |g|**2 falls by twice the score, to first order.
    k = int(np.argmax(np.abs(flat(found))))
    step = np.zeros(22)
    step[k] = -1e-5 * p.w[k]
    norm = lambda w: np.sum(grad64(w, p.x, p.y) ** 2)
    fall = (norm(p.w - step) - norm(p.w + step)) / 2e-5
    np.testing.assert_allclose(flat(found)[k], fall / 2, rtol=1e-4)


def test_grasp_hands_the_temperature_to_the_loss(problem):
    warm = lambda params, x, y, temperature: loss_fn(params, x, y) / temperature
    found = scores.grasp(warm, problem.params, problem.batches, temperature=2.0)
    close(found, problem.w * (problem.h @ problem.g) / 4)
    with pytest.raises(jc.SpecError, match="temperature=0"):
        scores.grasp(warm, problem.params, problem.batches, temperature=0)


def test_fisher_and_second_order_taylor(problem):
    p = problem
    fisher = np.mean((p.each * p.w) ** 2, axis=0)
    close(scores.fisher(loss_fn, p.params, p.batches), fisher / 2)
    close(scores.obd(loss_fn, p.params, p.batches, curvature="fisher"), fisher / 2)
    close(
        scores.taylor(loss_fn, p.params, iter(p.batches), order=2),
        np.abs(-p.g * p.w + fisher / 2),
    )
    gates = np.array([unit_sum(g * p.w) for g in p.each])
    found = scores.fisher(
        loss_fn, p.params, p.batches, units=UNITS, cost={"a/kernel": 3.0}, beta=0.5
    )
    cost = np.concatenate([np.full(12, 1.5), np.zeros(10)])
    close(found, np.mean(gates**2, axis=0) / 2 - cost)


def test_the_hessian_written_out_is_that_of_autodiff(problem):
    p = problem
    vector = jnp.asarray(p.w, jnp.float32)
    exact = jax.jit(
        jax.hessian(lambda v: loss_fn(params_of(v), jnp.float32(p.x), jnp.float32(p.y)))
    )(vector)
    np.testing.assert_allclose(exact, p.h, rtol=0, atol=1e-5 * np.abs(p.h).max())


def test_hutchinson_within_its_variance(problem):
    p = problem
    n = 500
    found = scores.obd(loss_fn, p.params, p.batches, key=jax.random.key(0), probes=n)
    found = 2 * flat(found) / p.w**2
    # Each of the n probes of each batch sees the Hessian of its batch.
    bound = np.zeros(22)
    for i in (slice(0, 3), slice(3, 6)):
        h = hessian64(p.w, p.x[i], p.y[i])
        bound += (h**2).sum(axis=1) - np.diag(h) ** 2
    sigma = np.sqrt(bound / 4 / n)
    error = np.abs(found - np.diag(p.h))
    assert np.all(error < 5 * sigma + 1e-4)
    # And it is no other diagonal: the estimate tells the entries apart.
    assert np.all(sigma < np.diag(p.h).max() / 4)


def test_hutchinson_is_exact_where_the_hessian_is_diagonal():
    w, a = jnp.array([0.5, -2.0, 4.0]), jnp.array([3.0, 1.0, -0.25])
    quartic = lambda params, a: jnp.sum(a * params["w"] ** 4)
    found = scores.obd(quartic, {"w": w}, [a, 3 * a], key=jax.random.key(1), probes=2)
    # The second derivative of the mean of `a w**4` and `3 a w**4` is `24 a w**2`.
    expected = 12 * np.asarray(a, np.float64) * np.asarray(w, np.float64) ** 4
    np.testing.assert_allclose(found["w"], expected, rtol=1e-6)


def test_one_trace_for_all_batches_of_a_shape_and_all_calls(problem):
    traces = []

    def counted(params, x, y):
        traces.append(x.shape)
        return loss_fn(params, x, y)

    for _ in range(2):
        scores.snip(counted, problem.params, problem.batches * 3)
    assert len(traces) == 1


def test_batches_with_static_parts_and_no_tuples(problem):
    def loss(params, batch):
        assert batch["name"] == "train"
        return loss_fn(params, batch["x"], batch["y"])

    batches = [{"x": x, "y": y, "name": "train"} for x, y in problem.batches]
    close(scores.snip(loss, problem.params, batches), np.abs(problem.g * problem.w))


def test_bfloat16_params_have_float32_scores(problem):
    params = params_of(problem.w, jnp.bfloat16)
    found = scores.snip(loss_fn, params, problem.batches)
    assert found["a"]["kernel"].dtype == jnp.float32
    w = np.concatenate([np.ravel(split(problem.w)[n]) for n in SHAPES]).astype(jnp.bfloat16)
    expected = np.abs(grad64(w.astype(np.float64), problem.x, problem.y) * w.astype(np.float64))
    # The hidden units and gradients of 8 bits: some roundings of 2**-9 each.
    np.testing.assert_allclose(flat(found), expected, atol=0.03 * expected.max())


def test_units_of_scores_are_those_of_masks(problem):
    found = scores.taylor(loss_fn, problem.params, problem.batches, units=UNITS)
    masks = make_masks(found, 0.5, UNITS)
    kept = np.asarray(masks["a"]["kernel"])
    assert kept.all(axis=0).sum() == 2
    assert kept.any(axis=0).sum() == 2
    sums = np.asarray(found["a"]["kernel"])[0]
    assert sums[kept[0]].min() >= sums[~kept[0]].max()


def quadratic(params, x):
    return jnp.mean((x @ params["w"]) ** 2)


METHODS = {
    "snip": scores.snip,
    "taylor": lambda *args: scores.taylor(*args, order=2),
    "grasp": scores.grasp,
    "obd": lambda *args: scores.obd(*args, key=jax.random.key(0), probes=2),
    "fisher": scores.fisher,
    "skeletonization": lambda *args: scores.skeletonization(*args, {"w": "unstructured"}),
    "force": lambda *args: scores.force(*args, 0.5, {"w": "unstructured"}, rounds=2).scores,
}


@pytest.mark.parametrize("name", METHODS)
def test_traced_scores_are_those_of_arrays(name):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    ws = jnp.asarray(np.random.default_rng(1).normal(size=(2, 4)), jnp.float32)
    of = lambda w: METHODS[name](quadratic, {"w": w}, [x])["w"]
    plain = of(ws[0])
    # Some ten float32 products, which a compiler may sum in another order.
    close = lambda found: np.testing.assert_allclose(
        found, plain, rtol=0, atol=1e-5 * np.abs(plain[np.isfinite(plain)]).max()
    )
    close(jax.jit(of)(ws[0]))
    close(jax.vmap(of)(ws)[0])


def test_nothing_is_traced_again_in_rounds_or_later_calls():
    traces = []

    class Loss:  # without a hash, as a module with a list among its fields
        __hash__ = None

        def __call__(self, params, x, temperature=1.0):
            traces.append(temperature)
            return quadratic(params, x) / temperature

    loss, params, batches = Loss(), {"w": jnp.arange(1.0, 9.0)}, [jnp.eye(8)]
    scores.force(loss, params, batches, 0.5, {"w": "unstructured"}, rounds=5)
    assert len(traces) == 1
    traces.clear()
    with_hash = lambda params, x, temperature: loss(params, x, temperature)
    counts = []
    for temperature in (200.0, 200):
        scores.grasp(with_hash, params, batches, temperature=temperature)
        counts.append(len(traces))
    assert counts[0] == counts[1] > 0


def test_examples_beside_arguments_without_axes(problem):
    p, scale = problem, jnp.float32(0.5)
    loss = lambda params, x, y, scale, times: times * scale * loss_fn(params, x, y)
    batches = [(x, y, scale, 2) for x, y in p.batches]
    close(scores.fisher(loss, p.params, batches), (p.each**2 * p.w**2).mean(axis=0) / 2)
    with pytest.raises(jc.SpecError, match=r"arrays of shapes \[\(3, 3\), \(2, 2\)\]; the exam"):
        scores.fisher(loss_fn, p.params, [(p.batches[0][0], p.batches[0][1][:2])])
    with pytest.raises(jc.SpecError, match=r"arrays of shapes \[\]"):
        scores.obd(lambda q, s: s, p.params, [scale], curvature="fisher")


def test_hutchinson_on_a_mesh_of_explicit_axes():
    mesh = jax.make_mesh((1,), ("m",), axis_types=(jax.sharding.AxisType.Explicit,))
    place = jax.NamedSharding(mesh, jax.P("m"))
    with jax.set_mesh(mesh):
        params = {"w": jax.device_put(jnp.array([1.0, 2.0]), place)}
        loss = lambda params, a: jnp.sum(a * params["w"] ** 2)
        found = scores.obd(loss, params, [jnp.array([3.0, 1.0])], key=jax.random.key(0))
    assert found["w"].tolist() == [3.0, 4.0]
    assert found["w"].sharding == place


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: scores.snip(loss_fn, p.params, []), "batches is empty"),
        (lambda p: scores.snip(lambda q, x, y: x, p.params, p.batches), "return one number"),
        (lambda p: scores.taylor(loss_fn, p.params, p.batches, order=3), "write 1 or 2"),
        (lambda p: scores.obd(loss_fn, p.params, p.batches), "write key=jax.random.key"),
        (lambda p: scores.obd(loss_fn, p.params, p.batches, curvature="x"), "'hutchinson' or"),
        (
            lambda p: scores.obd(loss_fn, p.params, [], key=jax.random.key(0), probes=0),
            "probes=0: write a whole number",
        ),
        (lambda p: scores.fisher(loss_fn, p.params, p.batches, cost={"c": 1.0}), "cost 'c' names"),
        (
            lambda p: scores.taylor(loss_fn, p.params, p.batches, units={"*/kernel": "2:4"}),
            "has no units",
        ),
        (
            lambda p: scores.snip(lambda q, x, y: jnp.log(q["b"]["bias"][0] * 0), p.params, p.batches),
            "b/bias: its gradients are NaN or infinite",
        ),
        (
            lambda p: scores.snip(loss_fn, {"w": jc.Quantize("int8")(jnp.ones((2, 2)))}, p.batches),
            r"w: a QuantizedArray has no dense weights to score; write jc.decompress\(params\)",
        ),
    ],
)  # fmt: skip
def test_errors_say_what_to_write(problem, call, message):
    with pytest.raises(jc.CompressError, match=message):
        call(problem)
