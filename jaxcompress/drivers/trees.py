"""Trees that are handed to a training, and what comes back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcompress.arrays.base import is_compressed
from jaxcompress.errors import SpecError


def as_jax(tree: Any) -> Any:
    """Numpy arrays as jax has them, as they come back from a folder."""
    convert = lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x
    return jax.tree.map(convert, tree, is_leaf=is_compressed)


def copied(tree: Any) -> Any:
    """Arrays of their own, which a training may donate to its first step."""
    return jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, tree)


def checked(found: Any, given: Any, number: int) -> Any:
    """What a training returned, as `as_jax` has it.

    Raises:
      SpecError: for another tree than it was given.
    """
    kinds = lambda tree: [_kind(x) for x in jax.tree.leaves(tree)]
    wanted: Any = jax.tree.structure(given)
    if wanted != jax.tree.structure(found) or kinds(found) != kinds(given):
        raise SpecError(
            f"train returned another tree in round {number} than it was given; return the params, "
            "in their structure, shapes and dtypes"
        )
    return as_jax(found)


def _kind(leaf: Any) -> Any:
    return type(leaf) if isinstance(leaf, str) else (jnp.shape(leaf), jnp.result_type(leaf))
