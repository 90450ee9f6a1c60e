"""Integer quantization against numpy, torch and torchao."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcompress.arrays import affine
from jaxcompress.arrays.affine import CONVENTIONS, IntFormat, int_format
from jaxcompress.errors import SpecError

# Compiled as a whole: step by step, each operation of each shape would be compiled alone.
affine_params = jax.jit(
    affine.affine_params,
    static_argnums=1,
    static_argnames=("axes", "group_size", "symmetric", "scale_dtype", "convention"),
)
quantize = jax.jit(affine.quantize, static_argnums=3, static_argnames=("axes", "group_size"))
dequantize = jax.jit(affine.dequantize, static_argnames=("axes", "group_size", "dtype"))


def weight(*shape, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape) * scale, jnp.float32)


def repeat(x, n, axis, group_size):
    """A scale or zero point, with one entry for each weight along the grouped axis."""
    x = np.asarray(x, np.float32)
    return x if group_size is None else np.repeat(x, group_size, axis).take(np.arange(n), axis)


def steps(w, fmt, **kwargs):
    scale, zero = affine.affine_params(w, fmt, **kwargs)
    where = {k: kwargs[k] for k in ("axes", "group_size") if k in kwargs}
    codes = affine.quantize(w, scale, zero, fmt, **where)
    return scale, zero, codes, affine.dequantize(codes, scale, zero, **where)


roundtrip = jax.jit(
    steps,
    static_argnums=1,
    static_argnames=("axes", "group_size", "symmetric", "scale_dtype", "convention"),
)


def test_formats():
    assert int_format("int4") == IntFormat.of(4, True)
    assert int_format("uint3") == IntFormat.of(3, False)
    assert int_format(IntFormat.of(5, True)) == IntFormat.of(5, True)
    for name in [*(f"int{b}" for b in range(2, 9)), *(f"uint{b}" for b in range(2, 9))]:
        fmt = int_format(name)
        assert str(fmt) == name
        assert fmt.qmax - fmt.qmin == 2**fmt.bits - 1
        assert np.iinfo(fmt.dtype).min <= fmt.qmin <= 0 < fmt.qmax <= np.iinfo(fmt.dtype).max
    for name in ("int0", "int9", "float8", "INT4", "int4 ", ""):
        with pytest.raises(SpecError):
            int_format(name)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_symmetric_scales(bits, convention):
    w = weight(64, 3, seed=bits)
    scale, zero = affine_params(
        w, f"int{bits}", axes=-2, convention=convention, scale_dtype=jnp.float32
    )
    x = np.asarray(w)
    top = np.float32(2 ** (bits - 1) - 1)
    expected = {
        "absmax": np.abs(x).max(0) / top,
        "full": np.abs(x).max(0) / np.float32((2**bits - 1) / 2),
        "power_of_two": 2.0 ** (np.floor(np.log2(np.abs(x).max(0))) - (bits - 2)),
        "no_clip": np.maximum(-x.min(0) / np.float32(2 ** (bits - 1)), x.max(0) / top),
    }[convention]
    assert zero is None
    np.testing.assert_array_equal(scale, expected[None])


@pytest.mark.parametrize("fmt", ["uint8", "int8", "uint4", "int3", "uint2"])
def test_affine_parameters(fmt):
    w = weight(64, 5) + jnp.asarray([0.0, 3.0, -3.0, 10.0, 0.5])
    f = int_format(fmt)
    scale, zero = affine_params(w, fmt, axes=-2, symmetric=False, scale_dtype=jnp.float32)
    lo = np.minimum(np.asarray(w).min(0), 0)
    hi = np.maximum(np.asarray(w).max(0), 0)
    s = (hi - lo) / np.float32(2**f.bits - 1)
    np.testing.assert_array_equal(scale, s[None])
    np.testing.assert_array_equal(zero, np.round(np.clip(f.qmin - lo / s, f.qmin, f.qmax))[None])
    assert zero.dtype == f.dtype
    assert not dequantize(
        quantize(jnp.zeros_like(w), scale, zero, fmt, axes=-2), scale, zero, axes=-2
    ).any()  # zero is exact


CASES = [
    ("int8", True, None),
    ("int4", True, 16),
    ("int3", True, 7),
    ("uint8", False, None),
    ("int8", False, 16),
    ("uint4", False, 7),
    ("int2", True, 1000),
]


@pytest.mark.thin(8)
@pytest.mark.parametrize(("fmt", "symmetric", "group_size"), CASES)
@pytest.mark.parametrize("axis", [-1, -2])
def test_codes_match_numpy_exactly_compiled_or_not(fmt, symmetric, group_size, axis):
    w = weight(96, 90)
    n, f = w.shape[axis], int_format(fmt)

    options = {"axes": axis, "group_size": group_size, "symmetric": symmetric}
    plain, compiled = steps(w, fmt, **options), roundtrip(w, fmt, **options)
    for a, b in zip(plain, compiled):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    g = None if group_size is None else min(group_size, n)
    scale = repeat(plain[0], n, axis, g)
    zero = 0 if plain[1] is None else repeat(plain[1], n, axis, g)
    expected = np.clip(np.round(np.asarray(w) / scale) + zero, f.qmin, f.qmax)
    np.testing.assert_array_equal(plain[2], expected)
    np.testing.assert_array_equal(plain[3], (expected - zero) * scale)


@pytest.mark.parametrize("zero", [None, 3, -4])
def test_halves_round_to_even_before_the_zero_point(zero):
    w = jnp.arange(-20, 21) / 2.0
    z = None if zero is None else jnp.full(1, zero, jnp.int8)
    codes = quantize(w, jnp.ones(1), z, "int8", axes=-1)
    np.testing.assert_array_equal(codes, np.round(np.asarray(w)) + (zero or 0))


@pytest.mark.parametrize("fmt", ["int8", "uint8", "int4", "uint2"])
def test_values_out_of_range_are_clamped(fmt):
    f = int_format(fmt)
    w = jnp.asarray([-jnp.inf, -1e30, -1e4, 0.0, 1e4, 1e30, jnp.inf])
    for zero in (None, jnp.full(1, f.qmax, f.dtype)):
        codes = quantize(w, jnp.ones(1), zero, fmt, axes=-1)
        z = 0 if zero is None else f.qmax
        expected = np.clip(np.asarray(w) + z, f.qmin, f.qmax)
        np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize(
    ("shape", "axes", "group_size", "expected"),
    [
        ((6, 4), (-2,), None, (1, 4)),
        ((6, 4), (-2,), 2, (3, 4)),
        ((6, 4), (-2,), 4, (2, 4)),
        ((6, 4), (-2,), 100, (1, 4)),
        ((6, 4), (-1,), 3, (6, 2)),
        ((6, 4), (-2, -1), None, (1, 1)),
        ((2, 6, 4), (-2,), 2, (2, 3, 4)),
        ((3, 3, 6, 4), (-4, -3, -2), None, (1, 1, 1, 4)),
        ((3, 3, 6, 4), (-4, -3, -2), 2, (3, 3, 3, 4)),
        ((2, 3, 4, 5), (-3, -2), 3, (2, 3, 2, 5)),
        ((5,), (-1,), 2, (3,)),
        ((0, 4), (-2,), None, (1, 4)),
        ((0, 4), (-2,), 2, (0, 4)),
        ((6, 0), (-2,), 4, (2, 0)),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_shapes(shape, axes, group_size, expected, symmetric):
    w = weight(*shape)
    scale, zero, codes, out = roundtrip(
        w, "int5", axes=axes, group_size=group_size, symmetric=symmetric
    )
    assert scale.shape == expected
    assert (zero is None) if symmetric else (zero.shape == expected)
    assert codes.shape == out.shape == shape
    if w.size:
        assert float(jnp.abs(out - w).max()) < 0.3 * float(jnp.abs(w).max())


@pytest.mark.parametrize("n", [1, 64, 65, 131, 1000, 4099])
@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_ranges_of_any_length(n, axis):
    shape = [2, 3, 2]
    shape[axis] = n
    w = weight(*shape, seed=n)
    scale, zero = affine_params(w, "uint8", axes=axis, symmetric=False, scale_dtype=jnp.float32)
    lo = np.minimum(np.asarray(w).min(axis, keepdims=True), 0)
    hi = np.maximum(np.asarray(w).max(axis, keepdims=True), 0)
    np.testing.assert_array_equal(scale, (hi - lo) / np.float32(255))
    assert zero.shape == scale.shape


def test_a_short_last_group_has_its_own_range():
    w = jnp.concatenate([jnp.full(4, 7.0), jnp.full(2, -0.7)])
    scale, _ = affine_params(w, "int4", axes=-1, group_size=4, scale_dtype=jnp.float32)
    np.testing.assert_array_equal(scale, np.asarray([1.0, np.float32(0.7) / np.float32(7)]))


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_zeros(symmetric):
    w = jnp.zeros((8, 3)).at[4:].set(1.0)
    scale, zero, codes, out = roundtrip(w, "int4", axes=-2, group_size=4, symmetric=symmetric)
    assert (scale[0] == 1).all()
    assert (codes[:4] == (0 if zero is None else zero[0])).all()
    assert not out[:4].any()
    np.testing.assert_allclose(out[4:], 1.0, rtol=2**-8)


@pytest.mark.parametrize("scale_dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e-6, 1.0, 1e6, 3e38])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_stay_normal_numbers(scale_dtype, size, symmetric):
    w = weight(32, 4, scale=1.0) / 5 * np.float32(size)
    scale, _, codes, out = roundtrip(
        w, "int8", axes=-2, scale_dtype=scale_dtype, symmetric=symmetric
    )
    assert scale.dtype == scale_dtype
    info = jnp.finfo(scale_dtype)
    wide = np.asarray(scale, np.float64)
    assert (wide >= float(info.smallest_normal)).all()
    assert (wide <= float(info.max)).all()
    assert jnp.isfinite(out).all()
    assert codes.dtype == jnp.int8


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_weights_are_computed_in_float32(dtype):
    w = weight(64, 8).astype(dtype)
    narrow = roundtrip(w, "int4", axes=-2, group_size=16)
    wide = roundtrip(w.astype(jnp.float32), "int4", axes=-2, group_size=16)
    for a, b in zip(narrow, wide):
        if a is not None:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    out = dequantize(narrow[2], narrow[0], axes=-2, group_size=16, dtype=dtype)
    assert out.dtype == dtype
    np.testing.assert_array_equal(np.asarray(out), np.asarray(wide[3].astype(dtype)))


@settings(max_examples=12)
@given(
    bits=st.integers(2, 8),
    signed=st.booleans(),
    symmetric=st.booleans(),
    group_size=st.none() | st.integers(1, 12),
    scale_dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    seed=st.integers(0, 100),
)
def test_error_is_at_most_half_a_step(bits, signed, symmetric, group_size, scale_dtype, seed):
    symmetric = symmetric and signed
    w = weight(10, 4, seed=seed) + (seed % 3 - 1)
    fmt = f"{'' if signed else 'u'}int{bits}"
    scale, zero, _, out = roundtrip(
        w, fmt, axes=-2, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype
    )
    step = repeat(scale, 10, 0, None if group_size is None else min(group_size, 10))
    # A rounded scale or zero point may put the extreme value half a step outside the codes.
    slack = (2.0**bits * 2.0**-9 + (0.5 if zero is not None else 0.0)) * step
    assert (np.abs(np.asarray(out) - np.asarray(w)) <= 0.5 * step * (1 + 1e-5) + slack).all()


def test_vmap_and_gradient():
    w = weight(3, 20, 4)
    one = lambda w: roundtrip(w, "int4", axes=-2, group_size=6)
    for a, b in zip(jax.vmap(one)(w), one(w)):
        if a is not None:
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    # The scale is differentiable: the gradient goes to the largest magnitudes.
    total = lambda w: affine_params(w, "int8", axes=-2, scale_dtype=jnp.float32)[0].sum()
    grad = jax.grad(total)(w[0])
    x = np.asarray(w[0])
    top = np.abs(x) == np.abs(x).max(0)
    np.testing.assert_allclose(grad, np.where(top, np.sign(x) / 127, 0), rtol=1e-6)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"format": "int4", "axes": 0},
        {"format": "int4", "axes": -3},
        {"format": "int4", "axes": ()},
        {"format": "int4", "axes": (-1, -1)},
        {"format": "int4", "axes": -1, "group_size": 0},
        {"format": "uint4", "axes": -1},
        {"format": "int4", "axes": -1, "convention": "max"},
        {"format": "int16", "axes": -1},
    ],
)
def test_errors(kwargs):
    with pytest.raises(SpecError):
        affine.affine_params(jnp.ones((4, 4)), **kwargs)


# Peers. torch and torchao multiply by the inverse of the scale, which is within two rounding
# errors (2**-23) of the quotient: the code can be another one, by 1, only where the quotient is
# that close to a half. Away from the halves every code must be the same.


def assert_same_codes(ours, theirs, w, scale, zero=0):
    """Codes agree but for quotients within rounding error of a half."""
    ours, theirs = np.asarray(ours, np.int64), np.asarray(theirs, np.int64)
    quotient = np.asarray(w, np.float64) / np.asarray(scale, np.float64)
    near = np.abs(np.abs(quotient - np.floor(quotient)) - 0.5)
    tie = near <= 2.0**-22 * (np.abs(quotient) + np.abs(zero) + 1)
    np.testing.assert_array_equal(ours[~tie], theirs[~tie])
    assert (np.abs(ours - theirs) <= 1).all()
    assert tie.mean() < 0.1  # the greatest of a group lies on a half when scale = amax / 7.5


@pytest.fixture
def torch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("torch")


@pytest.mark.parametrize("fmt", ["int8", "uint8"])
def test_torch_quantize_per_tensor_and_per_channel(torch, fmt):
    w = weight(64, 32)
    dtype = torch.qint8 if fmt == "int8" else torch.quint8
    scale, zero = affine_params(w, fmt, axes=(-2, -1), symmetric=False, scale_dtype=jnp.float32)
    ours = quantize(w, scale, zero, fmt, axes=(-2, -1))
    x = torch.tensor(np.asarray(w))
    theirs = torch.quantize_per_tensor(x, float(scale[0, 0]), int(zero[0, 0]), dtype)
    assert_same_codes(ours, theirs.int_repr().numpy(), w, scale)
    np.testing.assert_allclose(
        dequantize(ours, scale, zero, axes=-1), theirs.dequantize().numpy(),
        atol=float(scale[0, 0]) * 1.001,
    )  # fmt: skip

    scale, zero = affine_params(w, fmt, axes=-2, symmetric=False, scale_dtype=jnp.float32)
    ours = quantize(w, scale, zero, fmt, axes=-2)
    theirs = torch.quantize_per_channel(
        x, torch.tensor(np.asarray(scale[0])), torch.tensor(np.asarray(zero[0], np.int64)), 1, dtype
    )
    assert_same_codes(ours, theirs.int_repr().numpy(), w, scale)


@pytest.mark.parametrize(("fmt", "symmetric"), [("int4", True), ("int8", False), ("uint3", False)])
def test_torch_fake_quantize(torch, fmt, symmetric):
    f, w = int_format(fmt), weight(48, 40)
    scale, zero = affine_params(w, fmt, axes=-2, symmetric=symmetric, scale_dtype=jnp.float32)
    codes = quantize(w, scale, zero, fmt, axes=-2)
    z = np.zeros(40, np.int32) if zero is None else np.asarray(zero[0], np.int32)
    theirs = torch.fake_quantize_per_channel_affine(
        torch.tensor(np.asarray(w)), torch.tensor(np.asarray(scale[0])), torch.tensor(z), 1,
        f.qmin, f.qmax,
    ).numpy()  # fmt: skip
    # Adding the zero point before rounding loses at most one more rounding error.
    assert_same_codes(codes, np.round(theirs / np.asarray(scale)) + z, w, scale, z)
    ours = np.asarray(dequantize(codes, scale, zero, axes=-2))
    same = np.round(theirs / np.asarray(scale)) + z == np.asarray(codes)
    np.testing.assert_array_equal(ours[same], theirs[same])


def test_torch_observer_convention(torch):
    observers = pytest.importorskip("torch.ao.quantization.observer")
    w = jnp.asarray([-1.0, 0.0, 3.0])
    for scheme, symmetric, convention in (
        (torch.per_tensor_affine, False, "absmax"),
        (torch.per_tensor_symmetric, True, "full"),
    ):
        observer = observers.MinMaxObserver(dtype=torch.qint8, qscheme=scheme)
        observer(torch.tensor(np.asarray(w)))
        s, z = observer.calculate_qparams()
        scale, zero = affine_params(
            w, "int8", axes=-1, symmetric=symmetric, convention=convention,
            scale_dtype=jnp.float32,
        )  # fmt: skip
        np.testing.assert_allclose(scale, s.numpy(), rtol=1e-6)
        assert int(z) == (0 if zero is None else int(zero[0]))


@pytest.mark.parametrize("mapping", ["SYMMETRIC", "SYMMETRIC_NO_CLIPPING_ERR", "ASYMMETRIC"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [16, 64])
def test_torchao(torch, mapping, bits, group_size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ao = pytest.importorskip("torchao.quantization.quant_primitives")
    w = weight(24, 64, seed=bits)
    f = int_format(f"int{bits}")
    x, block = torch.tensor(np.asarray(w)), (1, group_size)
    s, z = ao.choose_qparams_affine(
        x, getattr(ao.MappingType, mapping), block, torch.int8, f.qmin, f.qmax,
        scale_dtype=torch.float32, zero_point_dtype=torch.int32,
    )  # fmt: skip
    theirs = ao.quantize_affine(x, block, s, z, torch.int8, f.qmin, f.qmax).numpy()
    scale, zero, codes, _ = roundtrip(
        w, f, axes=-1, group_size=group_size, symmetric=mapping != "ASYMMETRIC",
        convention={"SYMMETRIC": "full", "SYMMETRIC_NO_CLIPPING_ERR": "no_clip"}.get(
            mapping, "absmax"
        ),
        scale_dtype=jnp.float32,
    )  # fmt: skip
    np.testing.assert_array_equal(scale, s.numpy().reshape(scale.shape))
    if zero is not None:
        np.testing.assert_array_equal(zero, z.numpy().reshape(zero.shape))
    assert_same_codes(codes, theirs, w, repeat(scale, 64, -1, group_size))
