"""On-the-fly native ensembles: branches of one network, taught by their gated sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from jaxcompress.distillation.arguments import stacked
from jaxcompress.distillation.logits import soft_targets
from jaxcompress.errors import CompressError
from jaxcompress.specs import is_count


def branch_gate_init(key: jax.Array, features: int, branches: int) -> dict[str, jax.Array]:
    """The params of a `branch_gate`.

    Args:
      key: a random key.
      features: channels of what the gate sees.
      branches: how many branches there are.

    Returns:
      A kernel `[features, branches]` and a bias, float32.

    Raises:
      CompressError: for numbers that are not whole and positive.

    References:
      Lan, Zhu and Gong, *Knowledge Distillation by On-the-Fly Native Ensemble*, 2018.

    Examples:
      >>> import jax
      >>> branch_gate_init(jax.random.key(0), 16, 3)["kernel"].shape
      (16, 3)
    """
    for name, n in (("features", features), ("branches", branches)):
        if not is_count(n, 1):
            raise CompressError(f"{name}={n!r}: write a whole number from 1 on")
    kernel = jax.nn.initializers.lecun_normal()(key, (features, branches), jnp.float32)
    return {"kernel": kernel, "bias": jnp.zeros(branches)}


def branch_gate(params: Mapping[str, jax.Array], features: jax.Array) -> jax.Array:
    """How much each branch counts for each example, `softmax(features @ kernel + bias)`.

    The paper normalizes what goes into the softmax over the batch, and rectifies it; do so with the
    layers of your framework where that helps, for the losses take any weights.

    Args:
      params: of `branch_gate_init`.
      features: `[..., features]`, of the layers that branches share; maps are averaged before.

    Returns:
      float32, `[..., branches]`, which add up to 1.

    Raises:
      CompressError: for features of another size than the kernel's.

    References:
      As `branch_gate_init`.

    Examples:
      >>> import jax.numpy as jnp
      >>> params = {"kernel": jnp.zeros((4, 2)), "bias": jnp.zeros(2)}
      >>> branch_gate(params, jnp.ones((1, 4))).tolist()
      [[0.5, 0.5]]
    """
    kernel = params["kernel"]
    if features.ndim == 0 or features.shape[-1] != kernel.shape[0]:
        raise CompressError(
            f"features {features.shape} do not meet a gate of {kernel.shape[0]} features"
        )
    return jax.nn.softmax(features.astype(jnp.float32) @ kernel + params["bias"], axis=-1)


def native_ensemble(branches: jax.Array | Sequence[jax.Array], gate: jax.Array) -> jax.Array:
    """The logits of the ensemble, `sum_k gate_k logits_k`; the model to use in the end.

    Args:
      branches: logits of K branches, `[K, ..., classes]` or a list of `[..., classes]`.
      gate: `[..., K]`, of `branch_gate`.

    Returns:
      float32, `[..., classes]`.

    Raises:
      CompressError: for shapes that do not fit.

    References:
      As `branch_gate_init`.

    Examples:
      >>> import jax.numpy as jnp
      >>> branches = jnp.array([[[4.0, 0.0]], [[0.0, 8.0]]])
      >>> native_ensemble(branches, jnp.array([[0.75, 0.25]])).tolist()
      [[3.0, 2.0]]
    """
    logits = stacked(branches, "branches")
    wanted = (*logits.shape[1:-1], len(logits))
    if gate.shape != wanted:
        raise CompressError(
            f"a gate of shape {gate.shape} for branches {logits.shape}; its shape is {wanted}"
        )
    weights = jnp.moveaxis(gate.astype(jnp.float32), -1, 0)[..., None]
    # A class that a branch excludes has no slope in the gate, which 0 times infinity would give it.
    never = (logits == -jnp.inf) & (weights > 0)
    parts = weights * jnp.where(logits == -jnp.inf, 0.0, logits)
    return jnp.sum(jnp.where(never, -jnp.inf, parts), axis=0)


def native_ensemble_loss(
    branches: jax.Array | Sequence[jax.Array],
    gate: jax.Array,
    labels: jax.Array,
    *,
    temperature: float | jax.Array = 3.0,
) -> jax.Array:
    """What trains branches and gate together: labels for all, and the ensemble for the branches.

    `H(y, e) + sum_k H(y, z_k) + sum_k T**2 KL(p_e || p_k)` with the ensemble's logits e. The
    gate learns from the first term; the ensemble counts as fixed where it teaches.

    Args:
      branches: logits of K branches, `[K, ..., classes]` or a list of `[..., classes]`.
      gate: `[..., K]`, of `branch_gate`.
      labels: `[...]`, integers.
      temperature: T, positive; 3 in the paper.

    Returns:
      One float32 value per example, `[...]`.

    Raises:
      CompressError: for shapes that do not fit, or a temperature that is no positive number.

    References:
      Lan, Zhu and Gong, *Knowledge Distillation by On-the-Fly Native Ensemble*, 2018.

    Examples:
      >>> import jax.numpy as jnp
      >>> branches, gate = jnp.zeros((2, 1, 4)), jnp.full((1, 2), 0.5)
      >>> loss = native_ensemble_loss(branches, gate, jnp.array([0]))
      >>> bool(abs(loss[0] - 3 * jnp.log(4.0)) < 1e-5)
      True
    """
    logits = stacked(branches, "branches")
    ensemble = native_ensemble(logits, gate)
    if labels.shape != ensemble.shape[:-1]:
        raise CompressError(f"labels {labels.shape} for logits {ensemble.shape}")
    hard = optax.softmax_cross_entropy_with_integer_labels
    of_one = lambda z: hard(z, labels) + soft_targets(z, ensemble, temperature=temperature)
    return hard(ensemble, labels) + jnp.sum(jax.vmap(of_one)(logits), axis=0)
