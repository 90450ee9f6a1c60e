"""Leaves that draw: what `sample` looks for in a tree."""

from __future__ import annotations

from typing import Any

import jax

from jaxcompress.arrays.base import CompressedArray


class NoisyArray(CompressedArray):
    """A leaf that a pure function may put the noise of one step into."""

    def drawn(self, key: jax.Array) -> Any:
        """The leaf with noise in it; itself if it has none."""
        raise NotImplementedError

    def quiet(self) -> Any:
        """The leaf without noise."""
        raise NotImplementedError
