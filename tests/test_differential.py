"""Programs drawn at random: `compressed(fn)` equals `fn` on the decompressed tree.

A program is a list of integers that `run` reads while it is traced: each step picks an operation
and its axes from the shape at hand, so that every list is a program and hypothesis can shrink it.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxcompress as jc
from jaxcompress.rules import KernelAxes
from jaxcompress.specs import LeafContext

LIMIT = 512  # values of an intermediate array


def fresh(shape, seed):
    """A constant of the program, of unit scale."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def transpose(v, a, b):
    order = list(np.random.default_rng(a).permutation(v.ndim))
    return jnp.transpose(v, order)


def merge(v, a, b):
    if v.ndim < 2:
        return v[None]
    i = a % (v.ndim - 1)
    return v.reshape(*v.shape[:i], v.shape[i] * v.shape[i + 1], *v.shape[i + 2 :])


def split(v, a, b):
    i = a % max(1, v.ndim)
    if not v.ndim or v.shape[i] % 2:
        return v[..., None]
    return v.reshape(*v.shape[:i], 2, v.shape[i] // 2, *v.shape[i + 1 :])


def strided(v, a, b):
    i = a % v.ndim
    return lax.slice_in_dim(v, b % v.shape[i], v.shape[i], 1 + b % 2, axis=i)


def squeeze(v, a, b):
    return jnp.squeeze(v)


def expand(v, a, b):
    return jnp.expand_dims(v, a % (v.ndim + 1))


def broadcast(v, a, b):
    return jnp.broadcast_to(v[None], (1 + a % 2, *v.shape))


def narrow(v, a, b):
    return v.astype((jnp.bfloat16, jnp.float16)[a % 2])


def widen(v, a, b):
    return v.astype(jnp.float32)


def dynamic(v, a, b):
    i = a % v.ndim
    return lax.dynamic_slice_in_dim(v, jnp.int32(b), max(1, v.shape[i] // 2), axis=i)


def take(v, a, b):
    i = a % v.ndim
    ids = jnp.asarray(np.random.default_rng(b).integers(-1, v.shape[i] + 1, (2, 2)))
    return jnp.take(v, ids, axis=i, mode=("clip", "wrap")[b % 2])


def pick(v, a, b):
    return v[b % v.shape[0]]


def reverse(v, a, b):
    return lax.rev(v, (a % v.ndim,))


def twice(v, a, b):
    return jnp.concatenate([v, v], axis=a % v.ndim)


def scale(v, a, b):
    return v * jnp.asarray(0.5 + (a % 4), v.dtype)


def sine(v, a, b):
    return jnp.sin(v)


def total(v, a, b):
    return v.sum(a % v.ndim) / math.sqrt(v.shape[a % v.ndim])


def contract(v, a, b):
    """A product over one axis, the leaf on either side, with or without a batch axis."""
    i = a % v.ndim
    n = v.shape[i]
    if v.ndim > 1 and b % 3 == 0:
        j = (i + 1) % v.ndim
        x = fresh((v.shape[j], n, 3), a).astype(v.dtype) / math.sqrt(n)
        return lax.dot_general(v, x, (((i,), (1,)), ((j,), (0,))))
    x = fresh((3, n), a).astype(v.dtype) / math.sqrt(n)
    if b % 3 == 1:
        return lax.dot_general(x, v, (((1,), (i,)), ((), ())))
    return lax.dot_general(v, x, (((i,), (1,)), ((), ())))


def contract_pair(v, a, b):
    if v.ndim < 2:
        return contract(v, a, b)
    i, j = a % v.ndim, (a + 1 + b % (v.ndim - 1)) % v.ndim
    x = fresh((v.shape[i], 2, v.shape[j]), b).astype(v.dtype)
    x = x / math.sqrt(v.shape[i] * v.shape[j])
    return lax.dot_general(v, x, (((i, j), (0, 2)), ((), ())))


def convolve(v, a, b):
    """With the value as the kernel, in a layout and with groups that its shape allows."""
    if v.ndim < 3:
        return contract(v, a, b)
    v = v.reshape(math.prod(v.shape[:-2]), *v.shape[-2:])  # [width, in, out]
    groups = 2 if b % 2 and v.shape[2] % 2 == 0 else 1
    x = fresh((2, 4, v.shape[1] * groups), a).astype(v.dtype)
    x = x / math.sqrt(v.shape[0] * v.shape[1])
    return lax.conv_general_dilated(
        x, v, (1 + a % 2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=groups,
    )  # fmt: skip


def scan_over(v, a, b):
    def step(carry, w):
        out = contract(w, a, b) if w.ndim else jnp.sin(w)
        return carry + out.astype(jnp.float32).sum() / math.sqrt(out.size), out

    carry, out = lax.scan(step, jnp.float32(0), v, reverse=bool(b % 2))
    return out * jnp.cos(carry).astype(out.dtype)


def map_over(v, a, b):
    return jax.vmap(lambda w: contract(w, a, b) if w.ndim else jnp.sin(w), in_axes=a % v.ndim)(v)


def carried(v, a, b):
    """The leaf rides along a loop unchanged while a vector is multiplied with it."""
    i = a % v.ndim
    n = v.shape[i]
    x = fresh((n,), b).astype(v.dtype) / math.sqrt(n)

    def body(_, state):
        w, x = state
        y = lax.dot_general(x, w, (((0,), (i,)), ((), ())))
        return w, x * jnp.cos(y.sum())

    return lax.fori_loop(0, 2, body, (v, x))[1]


def branch(v, a, b):
    chosen = jnp.asarray(np.float32(b % 3))
    branches = [lambda v: v, lambda v: jnp.sin(v), lambda v: v + v]
    return lax.switch(chosen.astype(int), branches, v)


def remat(v, a, b):
    return jax.checkpoint(lambda v: jnp.sin(contract(v, a, b)))(v)


def inner_jit(v, a, b):
    return jax.jit(contract, static_argnums=(1, 2))(v, a, b)


@jax.custom_vjp
def tripled(v):
    return jnp.sin(v)


tripled.defvjp(lambda v: (jnp.sin(v), v), lambda v, g: ((3 * g * jnp.cos(v)).astype(v.dtype),))


def custom(v, a, b):
    return tripled(v)


# Structure first: a leaf meets most of them before something makes it dense.
OPS = (
    transpose, merge, split, strided, squeeze, expand, broadcast, narrow, widen, dynamic, take,
    pick, reverse, twice, scale, sine, total, contract, contract_pair, convolve, scan_over,
    map_over, carried, branch, remat, inner_jit, custom, contract, transpose, take, contract_pair,
    scan_over, convolve,
)  # fmt: skip


def run(program, v, x):
    for step, a, b in program:
        if v.ndim == 0:
            break
        out = OPS[step % len(OPS)](v, a, b)
        v = out if 0 < out.size <= LIMIT else v
    # An activation meets what is left, so that there is a gradient in it, too.
    v = v.astype(jnp.float32).reshape(-1)
    return v * jnp.cos(x[0]) + jnp.sin(x).sum()


BASE = {
    "int8": jc.Quantize("int8"),
    "int3": jc.Quantize("int3", group_size=2),
    "int5 ragged": jc.Quantize("int5", group_size=3),
    "uint4 affine": jc.Quantize("uint4", group_size=4, symmetric=False),
    "uint6 along the last axis": jc.Quantize("uint6", axis=-1, symmetric=False),
    "sparse": jc.Prune(0.5),
    "gaps": jc.Prune(0.95),
    "2:4": jc.Prune(0.5, pattern="2:4"),
    "codebook": jc.Codebook(3),
    "low rank": None,
}
NEXT = {
    "": None,
    "int8": jc.Quantize("int8"),
    "int4": jc.Quantize("int4", group_size=2),
    "codebook": jc.Codebook(2),
    "sparse": jc.Prune(0.4),
}


def spec_for(base, following, shape):
    """The chain of the drawn names: a rank must fit, and quantized codes end a chain."""
    rank = max(1, min(shape[-2:]) - 1)
    spec = BASE[base] if base != "low rank" else jc.LowRank(rank, allow_larger=True)
    follows = NEXT[following]
    return spec if follows is None or isinstance(spec, jc.Quantize) else jc.chain(spec, follows)


steps = st.tuples(st.integers(0, len(OPS) - 1), st.integers(0, 11), st.integers(0, 11))
examples = given(
    base=st.sampled_from(sorted(BASE)),
    following=st.sampled_from(sorted(NEXT)),
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4),
    dtype=st.sampled_from(["float32", "float32", "bfloat16", "float16"]),
    program=st.lists(steps, min_size=1, max_size=5),
)


def check(base, following, shape, dtype, program):
    shape = tuple(shape)
    spec = spec_for(base, following, shape)
    context = LeafContext("w", KernelAxes((-2,), (-1,)))
    leaf = spec(fresh(shape, 0).astype(dtype), context)
    x = fresh((3,), 1)
    trainable, rest = jc.partition(leaf)

    def both(apply, expand):
        def loss(trainable, x):
            y = apply(expand(jc.combine(trainable, rest)), x)
            return jnp.sum(jnp.cos(y)) / math.sqrt(y.size), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    fn = functools.partial(run, tuple(program))
    ((_, y), grads) = both(jc.compressed(fn), lambda w: w)(trainable, x)
    ((_, wanted), wanted_grads) = both(fn, jc.decompress)(trainable, x)
    assert np.isfinite(np.asarray(wanted)).all()
    # Both round each operation to the coarsest dtype in play, and a low rank in another order.
    # Steps are of unit scale and move a relative error by a factor of at most 6 (`scale` and the
    # tripled gradient), so five of them by at most a few thousand in the worst and by tens in the
    # usual case; 512 roundings of the largest value are what is allowed.
    ops = {OPS[s % len(OPS)] for s, _, _ in program}
    low = [jnp.bfloat16] if narrow in ops else []
    eps = max(float(jnp.finfo(d).eps) for d in (dtype, *low))
    for ours, dense in zip(
        jax.tree.leaves((y, grads)), jax.tree.leaves((wanted, wanted_grads)), strict=True
    ):
        assert (ours.shape, ours.dtype) == (dense.shape, dense.dtype)
        dense = np.asarray(dense.astype(jnp.float32))
        bound = (512 if eps < 1e-6 else 16) * eps * max(1.0, np.abs(dense).max(initial=0))
        np.testing.assert_allclose(ours.astype(jnp.float32), dense, atol=bound, rtol=0)


@settings(max_examples=15, derandomize=True, database=None)
@examples
def test_a_random_program_runs_as_on_the_decompressed_tree(**drawn):
    check(**drawn)


@pytest.mark.slow
@settings(max_examples=600, database=None)
@examples
def test_many_random_programs_run_as_on_the_decompressed_tree(**drawn):
    check(**drawn)


def test_the_check_can_fail():
    """A leaf type whose rule is wrong is found out."""
    leaf_type = jc.QuantizedArray
    from jaxcompress.arrays import base

    right = base._RULES[jc.CompressedArray, "dot_general"]

    @jc.register_rule(leaf_type, "dot_general")
    def wrong(index, operands, params):
        return right(index, operands, params) * 1.001

    try:
        with pytest.raises(AssertionError):
            check("int8", "", (4, 6), "float32", [(OPS.index(contract), 0, 1)])
    finally:
        del base._RULES[leaf_type, "dot_general"]
    check("int8", "", (4, 6), "float32", [(OPS.index(contract), 0, 1)])
