"""A leaf is dense only while its contraction runs: values, derivatives and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jaxcompress as jc
from jaxcompress.arrays.deferred import deferred

WIDTH, LAYERS = 256, 12
LEAF = WIDTH * WIDTH * 4
FORMS = {
    "int8": jc.Quantize("int8"),
    "int4 groups": jc.Quantize("int4", group_size=64),
    "uint3 affine": jc.Quantize("uint3", group_size=64, symmetric=False),
    "codebook": jc.Codebook(4),
    "sparse": jc.Prune(0.9),
}

cpu_only = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the branch that bounds memory is lowered on CPU only"
)


def weights():
    keys = jax.random.split(jax.random.key(0), LAYERS)
    return [jax.random.normal(k, (WIDTH, WIDTH)) / WIDTH**0.5 for k in keys]


def unrolled(ws, x):
    for w in ws:
        x = jax.nn.relu(x @ w)
    return x


def decode(ws, x):
    return jax.lax.fori_loop(0, 4, lambda _, x: unrolled(ws, x), x)


def scan_decode(ws, x):
    return jax.lax.scan(lambda x, _: (unrolled(ws, x), None), x, None, length=4)[0]


def fan_out(ws, x):
    return sum(jnp.tanh(x @ w) for w in ws)


def temporaries(fn, *args):
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def heavy(form, fn):
    """The scatters of twelve sparse leaves take long to compile; one function will do."""
    slow = form == "sparse" and fn is not unrolled
    return pytest.param(form, fn, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.thin(8)
@cpu_only
@pytest.mark.parametrize(
    ("form", "fn"), [heavy(form, fn) for form in FORMS for fn in (unrolled, decode, fan_out)]
)
def test_no_two_layers_are_dense_at_once(form, fn):
    ws, x = weights(), jnp.ones((1, WIDTH))
    small = [FORMS[form](w) for w in ws]
    # Expanding a sparse leaf itself takes its int32 positions, so up to two more leaves.
    assert temporaries(jc.compressed(fn), small, x) <= 4 * LEAF + 64 * x.nbytes
    # The check can fail: expanding up front keeps all twelve.
    assert temporaries(lambda s, x: fn(jc.decompress(s), x), small, x) > 8 * LEAF


@cpu_only
@pytest.mark.parametrize("fn", [unrolled, scan_decode, fan_out])
def test_gradient_keeps_codes_and_not_weights(fn):
    ws, x = weights(), jnp.ones((1, WIDTH))
    small = [FORMS["int8"](w) for w in ws]

    def gradient(run):
        return jax.grad(lambda x, s: run(s, x).sum())

    assert temporaries(gradient(jc.compressed(fn)), x, small) <= 4 * LEAF + 256 * x.nbytes


@cpu_only
def test_scanned_stack_is_sliced_before_it_is_expanded():
    stack, x = jnp.stack(weights()), jnp.ones((1, WIDTH))
    small = jc.Quantize("int4", group_size=64)(stack)

    def scanned(stack, x):
        return jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, stack)[0]

    assert temporaries(jc.compressed(scanned), small, x) <= 4 * LEAF + 64 * x.nbytes


@pytest.mark.thin(8)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_forward_is_the_dense_one_bit_for_bit(form, batch):
    w, x = weights()[0], jax.random.normal(jax.random.key(1), (batch, WIDTH))
    small = FORMS[form](w)
    ours = jax.jit(jc.compressed(jnp.matmul))(x, small)
    np.testing.assert_array_equal(ours, jax.jit(jnp.matmul)(x, small.materialize()))


def expand_and_multiply(codes, scale, x):
    return jnp.sin(x @ (codes.astype(jnp.float32) * scale))


def operands():
    codes = jax.random.randint(jax.random.key(0), (5, 3), -7, 8, jnp.int8)
    return codes, jnp.linspace(0.1, 0.3, 3), jax.random.normal(jax.random.key(1), (4, 5))


def test_derivatives_against_finite_differences():
    codes, scale, x = operands()
    fn = lambda s, x: deferred(expand_and_multiply, codes, s, x)
    # float32 finite differences resolve about the cube root of eps = 5e-3 relative.
    check_grads(fn, (scale, x), order=2, modes=["fwd", "rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("transform", [jax.jacfwd, jax.jacrev, jax.hessian])
def test_derivatives_are_those_of_the_plain_function(transform):
    codes, scale, x = operands()
    ours = transform(lambda s: deferred(expand_and_multiply, codes, s, x))(scale)
    plain = transform(lambda s: expand_and_multiply(codes, s, x))(scale)
    # Sums of at most 20 terms of magnitude up to 50, in another order.
    np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=50 * 20 * 1.2e-7)


@pytest.mark.parametrize("axes", [(None, None, 0), (0, None, None), (None, 0, 0), (0, 0, 0)])
def test_vmap_over_any_operands(axes):
    args = [a if d is None else jnp.stack([a, a * 2, a * 3]) for a, d in zip(operands(), axes)]
    ours = jax.vmap(lambda *a: deferred(expand_and_multiply, *a), axes)(*args)
    np.testing.assert_allclose(ours, jax.vmap(expand_and_multiply, axes)(*args), atol=2e-6)


def test_vmap_over_inputs_does_not_expand_the_weight_for_each():
    codes, scale, x = operands()
    fn = jax.vmap(lambda x: deferred(expand_and_multiply, codes, scale, x))
    jaxpr = jax.make_jaxpr(fn)(jnp.stack([x] * 9))
    shapes = [v.aval.shape for e in jaxpr.eqns[0].params["jaxpr"].eqns for v in e.outvars]
    assert (5, 3) in shapes
    assert (9, 5, 3) not in shapes


def test_empty_operands():
    out = deferred(expand_and_multiply, jnp.zeros((0, 3), jnp.int8), jnp.ones(3), jnp.ones((4, 0)))
    np.testing.assert_array_equal(jax.jit(lambda: out)(), np.zeros((4, 3)))


def test_layers_of_one_shape_are_traced_once():
    from jaxcompress.arrays import deferred as module

    ws, x = weights(), jnp.ones((3, WIDTH))
    small = [jc.Quantize("int7")(w) for w in ws]
    module._traced.cache_clear()
    jax.jit(jc.compressed(unrolled)).trace(small, x)
    assert module._traced.cache_info().misses == 1
