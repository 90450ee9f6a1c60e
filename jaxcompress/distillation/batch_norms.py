"""Stored statistics of activations, and how far those of other inputs are from them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxcompress.distillation.tags import listening
from jaxcompress.errors import CompressError


class Moments(NamedTuple):
    """Of each channel, float32 `[channels]`.

    Attributes:
      mean: over all but the channels.
      variance: about that mean, divided by the count.
    """

    mean: jax.Array
    variance: jax.Array


def moments(features: jax.Array, *, axis: int = -1) -> Moments:
    """The mean and the variance of each channel, over examples and places.

    Args:
      features: `[batch, ..., channels]`.
      axis: the axis of the channels.

    Raises:
      CompressError: for features without an axis beside the channels, empty ones, or an axis that
        they do not have.

    Examples:
      >>> import jax.numpy as jnp
      >>> moments(jnp.array([[1.0, 0.0], [3.0, 0.0]]))
      Moments(mean=Array([2., 0.], dtype=float32), variance=Array([1., 0.], dtype=float32))
    """
    if features.ndim < 2 or features.size == 0:
        raise CompressError(f"features {features.shape} have no mean; write [batch, ..., channels]")
    if not -features.ndim <= axis < features.ndim:
        raise CompressError(f"features {features.shape} have no axis={axis}; -1 is the last")
    x = features.astype(jnp.float32)
    over = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    # About the mean, not a difference of squares, which would cancel.
    return Moments(jnp.mean(x, over), jnp.var(x, over))


def batch_norm_loss(
    measured: Mapping[str, Moments],
    stored: Mapping[str, Moments],
    *,
    weights: Mapping[str, float] | None = None,
) -> jax.Array:
    """How far inputs are from looking like the training data to each layer.

    `sum_l w_l (|mean_l - stored mean_l|_2 + |variance_l - stored variance_l|_2)`. With what batch
    norms have stored, this is the prior of DeepInversion; with `moments` of any layers that were
    recorded from the training data, a data-free distillation from metadata.

    Args:
      measured: of the inputs at hand, by layer.
      stored: of the training data, by layer. No gradient passes to them.
      weights: of layers; those that are not named have 1.

    Returns:
      One float32 number, for a batch as a whole. Where nothing differs, the gradient is 0.

    Raises:
      CompressError: for layers or shapes that differ, or weights of other layers.

    References:
      Yin et al., *Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion*, 2020;
      Lopes, Fenu and Starner, *Data-Free Knowledge Distillation for Deep Neural Networks*, 2017.

    Examples:
      >>> import jax.numpy as jnp
      >>> stored = {"norm": Moments(jnp.zeros(2), jnp.ones(2))}
      >>> measured = {"norm": Moments(jnp.array([3.0, 4.0]), jnp.ones(2))}
      >>> float(batch_norm_loss(measured, stored))
      5.0
    """
    weights = weights or {}
    if measured.keys() != stored.keys() or not weights.keys() <= stored.keys():
        raise CompressError(
            f"statistics of {sorted(measured)}, stored ones of {sorted(stored)} and weights of "
            f"{sorted(weights)}: name the same layers"
        )
    total = jnp.zeros(())
    for layer, kept in stored.items():
        for name, seen, wanted in zip(Moments._fields, measured[layer], kept):
            if seen.shape != wanted.shape:
                raise CompressError(f"{layer}: {name} {seen.shape}, stored {wanted.shape}")
            apart = seen.astype(jnp.float32) - jax.lax.stop_gradient(wanted).astype(jnp.float32)
            total += weights.get(layer, 1.0) * optax.safe_norm(apart, 0.0)
    return total


def stored_moments(batch_stats: Mapping[str, Any]) -> dict[str, Moments]:
    """The statistics that batch norms have stored, by the path of each.

    Args:
      batch_stats: the collection of a Linen model, or the state of an NNX model, with `mean` and
        `var` of each norm.

    Raises:
      CompressError: for a collection without any.

    Examples:
      >>> import jax.numpy as jnp
      >>> stats = {"block": {"norm": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}}
      >>> list(stored_moments(stats))
      ['block/norm']
    """
    found: dict[str, Moments] = {}

    def look(tree: Any, path: tuple[str, ...]) -> None:
        if isinstance(tree, Mapping):
            if {"mean", "var"} <= tree.keys():
                found["/".join(path)] = Moments(tree["mean"], tree["var"])
            for name, below in tree.items():
                look(below, (*path, str(name)))

    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(batch_stats, nnx.State):
        batch_stats = nnx.to_pure_dict(batch_stats)
    look(batch_stats, ())
    if not found:
        raise CompressError(
            "no mean and var in the collection: give variables['batch_stats'], or of NNX "
            "nnx.state(model)"
        )
    return found


def with_norm_moments(fn: Callable[..., Any]) -> Callable[..., tuple[Any, dict[str, Moments]]]:
    """A Flax model that also gives the moments of what goes into its batch norms.

    The model is not changed. Norms inside lifted transformations (`scan`, `remat`, `jit` of Flax)
    are not for this function, since their inputs do not leave those.

    Args:
      fn: a Linen module's `apply`, an NNX module or its method, or a function that calls modules;
        not one that is compiled already.

    Returns:
      A function of the same arguments, of `(output, moments)`, by the path of each norm, which in
      NNX begins at the outermost module that is called; of a norm that runs several times, over all
      its inputs. It compiles, and has a gradient in the inputs; around it goes
      `jaxcompress.compressed`, or a `tap`.

    References:
      As `batch_norm_loss`.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> model = nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=True)])
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 2)))
      >>> output, seen = with_norm_moments(model.apply)(variables, jnp.ones((4, 2)))
      >>> seen["layers_1"].mean.shape
      (3,)
    """

    def run(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Moments]]:
        inputs: dict[str, list[jax.Array]] = {}

        def listen(module: Any, path: str, given: Any, named: Any) -> None:
            if isinstance(module, norms):
                x = jnp.moveaxis(given[0] if given else named["x"], module.axis, -1)
                inputs.setdefault(path, []).append(x.reshape(-1, x.shape[-1]))

        norms = _batch_norms()
        with listening(listen):
            output = fn(*args, **kwargs)
        return output, {path: moments(jnp.concatenate(rows)) for path, rows in inputs.items()}

    return run


def _batch_norms() -> Any:
    """A tuple of the classes that are imported already: no model is of another."""
    places = (sys.modules.get(name) for name in ("flax.linen", "flax.nnx"))
    return tuple(place.BatchNorm for place in places if place is not None)
