"""Scores by the flow of synapses: without data, and without a layer that collapses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxcompress.errors import SpecError
from jaxcompress.gradients.batches import hashable
from jaxcompress.gradients.weights import Weights, float32
from jaxcompress.numerics import unit_scale
from jaxcompress.pruning.masks import count_kept
from jaxcompress.pruning.scores.iterated import ScoredMasks, rounds_of
from jaxcompress.rules import KernelAxes


def synaptic_flow(
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    rescale: bool = False,
    axes: Mapping[str, KernelAxes] | None = None,
) -> Any:
    """`|w| dR / d|w|` with `R = sum fn(|params|, ones)`: the flow through each weight.

    For a network without biases that is homogeneous in each of its kernels (ReLU, average or max
    pooling), the scores of each kernel sum to R, and those of the weights into a hidden unit to
    those of the weights out of it.

    R is a product over the layers, about `|w|` times the fan-in each, and leaves float32 at 2**128:
    a net of 25 layers of 1000 units does. `rescale` divides each kernel by a power of two, so that
    no unit gains more than twofold, which divides all scores of such a network by the same number.
    Where there are biases it changes them.

    Args:
      fn: of the params and inputs, in evaluation mode, such as a Linen module's `apply`.
      params: a tree of dense arrays.
      *inputs: what it takes, arrays or `jax.ShapeDtypeStruct`s; ones are put in their place.
      rescale: see above.
      axes: the input and output axes of leaves by path, for `rescale`.

    Returns:
      As `snip`, never negative for a network whose activations never fall.

    Raises:
      SpecError: for a compressed leaf, and when R is zero, infinite or NaN.

    References:
      Tanaka et al., *Pruning Neural Networks without Any Data by Iteratively Conserving Synaptic
      Flow*, 2020.

    Examples:
      >>> import jax.numpy as jnp
      >>> fn = lambda params, x: x @ params["a"] @ params["b"]
      >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[3.0], [1.0]])}
      >>> scores = synaptic_flow(fn, params, jnp.ones((1, 1)))
      >>> scores["a"].tolist(), scores["b"].tolist()
      ([[3.0, 2.0]], [[3.0], [2.0]])
    """
    weights = Weights.of(params)
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), inputs)
    where = tuple(weights.axes(axes))
    return weights.scores(_checked(*_flow(hashable(fn), where, rescale, weights, ones)))


def synflow(
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    sparsity: float,
    rules: Mapping[str, str | None],
    rounds: int = 100,
    scope: str = "global",
    rescale: bool = False,
    axes: Mapping[str, KernelAxes] | None = None,
) -> ScoredMasks:
    """`synaptic_flow` in rounds, `(1 - sparsity)**(k / rounds)` of the weights left after round k.

    In one round it would cut whole layers, the widest first, since what they conserve is shared by
    more weights. In many, a layer whose weights are few has large ones: it keeps the last of them
    until each layer has but one (maximal critical compression).

    Args:
      fn: see `synaptic_flow`.
      params: a tree of dense arrays, before training.
      *inputs: what `fn` takes, arrays or `jax.ShapeDtypeStruct`s.
      sparsity: the share to remove in the end, from 0 to below 1.
      rules: `{glob: pattern or None}` as for `make_masks`.
      rounds: how many; one compiled step serves all.
      scope: `global` or `local`.
      rescale: see `synaptic_flow`.
      axes: the input and output axes of leaves by path.

    Returns:
      The scores of the last round, minus infinity for a weight that was removed before, and the
      masks.

    Raises:
      SpecError: for no rounds, a sparsity out of range, a round that cuts every path, as one does
        that leaves less than one weight a layer, and as `synaptic_flow`.
      RuleError: for a rule that matches nothing.

    References:
      Tanaka et al., *Pruning Neural Networks without Any Data by Iteratively Conserving Synaptic
      Flow*, 2020.

    Examples:
      >>> import jax.numpy as jnp
      >>> fn = lambda params, x: x @ params["a"] @ params["b"]
      >>> params = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([[3.0], [1.0]])}
      >>> x, rules = jnp.ones((1, 1)), {"*": "unstructured"}
      >>> found = synflow(fn, params, x, sparsity=0.5, rules=rules, rounds=4)
      >>> found.masks["a"].tolist(), found.masks["b"].tolist()
      ([[True, False]], [[True], [False]])
    """
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), inputs)
    fn, where = hashable(fn), tuple(Weights.of(params).axes(axes))

    def score(masked: Any, masks: Any) -> Any:
        here = Weights.of(masked)
        flow, found = _flow(fn, where, rescale, here, ones)
        return here.scores(_checked(flow, found, masks))

    return rounds_of(score, params, sparsity, rules, rounds, scope, axes)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _flow(
    fn: Callable[..., Any],
    where: tuple[KernelAxes, ...],
    rescale: bool,
    weights: Weights,
    ones: tuple[Any, ...],
) -> tuple[jax.Array, list[jax.Array]]:
    values = [jnp.abs(x) for x in weights.values]
    if rescale:
        values = [x * _inverse_gain(x, at) for x, at in zip(values, where)]

    def total(values: list[jax.Array]) -> jax.Array:
        out = jax.tree.leaves(fn(weights.params(values), *ones))
        return sum((jnp.sum(float32(x)) for x in out), jnp.zeros(()))

    flow, grads = jax.value_and_grad(total)(values)
    return flow, [float32(x) * float32(g) for x, g in zip(values, grads)]


def _inverse_gain(x: jax.Array, axes: KernelAxes) -> jax.Array:
    """A power of two near the inverse of the largest sum over inputs; 1 where there are none."""
    if not axes.output or not x.size:
        return jnp.ones((), x.dtype)
    return unit_scale(jnp.max(jnp.sum(float32(x), axis=axes.input)))[1].astype(x.dtype)


def _checked(flow: jax.Array, scores: list[jax.Array], masks: Any = None) -> list[jax.Array]:
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in [flow, *scores]]))
    if isinstance(flow, jax.core.Tracer):
        return scores
    if masks is not None and float(flow) == 0:
        left, layers = count_kept(masks), len(jax.tree.leaves(masks))
        few = "less than one weight a layer; write a lower sparsity"
        raise SpecError(
            f"no path is left through the {left} weights that a round leaves of {layers} layers: "
            + (few if left < layers else "write more rounds, or a lower sparsity")
        )
    if not (bool(finite) and float(flow) > 0):
        raise SpecError(
            f"the synaptic flow is {float(flow):g}, and must be positive and finite: write "
            "rescale=True for a deep network, or look for a layer of zeros"
        )
    return scores
