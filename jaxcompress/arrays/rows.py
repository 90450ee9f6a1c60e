"""The one kind of `gather` that embeddings are: whole rows of a table, by their numbers."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxcompress.arrays.base import CompressedArray


class Rows(NamedTuple):
    """Which rows a gather reads.

    Attributes:
      number: int32, within bounds.
      inside: where the number asked for was within bounds; None where it does not matter.
      fill: what a row out of bounds reads.
    """

    number: jax.Array
    inside: jax.Array | None
    fill: Any

    def filled(self, rows: jax.Array) -> jax.Array:
        """The rows, with the fill value where the number was out of bounds."""
        if self.inside is None:
            return rows
        inside = self.inside.reshape(*self.inside.shape, *(1,) * (rows.ndim - self.inside.ndim))
        return jnp.where(inside, rows, jnp.asarray(self.fill, rows.dtype))


def plain_rows(leaf: CompressedArray, operands: list[Any], params: dict[str, Any]) -> Rows | None:
    """The rows that a `gather` of a leaf reads along its first axis; None for any other gather."""
    numbers, batch = params["dimension_numbers"], operands[1].ndim - 1
    plain = (
        leaf.batch_ndim == 0
        and leaf.size
        and not numbers.operand_batching_dims
        and tuple(numbers.start_index_map) == tuple(numbers.collapsed_slice_dims) == (0,)
        and tuple(params["slice_sizes"][1:]) == leaf.shape[1:]
        and tuple(numbers.offset_dims) == tuple(range(batch, batch + leaf.ndim - 1))
    )
    if not plain:
        return None
    row, last = operands[1][..., 0], leaf.shape[0] - 1
    fills = lax.GatherScatterMode.from_any(params["mode"]) == lax.GatherScatterMode.FILL_OR_DROP
    fill = jnp.nan if params["fill_value"] is None else params["fill_value"]
    inside = (row >= 0) & (row <= last) if fills else None
    return Rows(jnp.clip(row, 0, last).astype(jnp.int32), inside, fill)
