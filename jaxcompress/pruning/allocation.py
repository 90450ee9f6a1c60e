"""How many weights each leaf keeps when a whole tree is to have one sparsity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from jaxcompress.errors import SpecError
from jaxcompress.pruning.select import kept_count

Shape = tuple[int, ...]


def uniform(shapes: Sequence[Shape], sparsity: float) -> list[int]:
    """Every leaf gets the same sparsity.

    Example:
      >>> uniform([(4, 5), (10,)], 0.5)
      [10, 5]
    """
    return [kept_count(math.prod(shape), sparsity) for shape in shapes]


def erk(shapes: Sequence[Shape], sparsity: float) -> list[int]:
    """Erdos-Renyi-Kernel: small kernels are pruned less than large ones.

    The density of a kernel of shape `(d_1, ..., d_m)` is `min(1, eps (d_1 + ... + d_m) / (d_1 ...
    d_m))`, with the one `eps` for which `round(N (1 - sparsity))` of all N weights stay: exactly,
    by the largest remainders.

    References:
      Mocanu et al., *Scalable Training of Artificial Neural Networks with Adaptive Sparse
      Connectivity Inspired by Network Science*, 2018; Evci et al., *Rigging the Lottery: Making
      All Tickets Winners*, 2020 (kernels).

    Example:
      >>> erk([(100, 100), (100, 10)], 0.9)
      [710, 390]
    """
    sizes = [math.prod(shape) for shape in shapes]
    budget = kept_count(sum(sizes), sparsity)
    raw = [float(sum(shape)) if size else 0.0 for shape, size in zip(shapes, sizes)]
    full = [size == 0 for size in sizes]
    while True:
        # Kernels that would keep more than they have keep all; the others share what is left.
        left = budget - sum(n for n, f in zip(sizes, full) if f)
        total = sum(r for r, f in zip(raw, full) if not f)
        shares = [
            float(n) if f else left * r / total if total else 0.0
            for n, f, r in zip(sizes, full, raw)
        ]
        over = [not f and share > n for share, n, f in zip(shares, sizes, full)]
        if not any(over):
            break
        full = [f or o for f, o in zip(full, over)]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i])
    for i in by_remainder[: budget - sum(counts)]:
        counts[i] += 1
    return counts


ALLOCATIONS: dict[str, Callable[[Sequence[Shape], float], list[int]]] = {
    "uniform": uniform,
    "erk": erk,
}


def allocation(name: str) -> Callable[[Sequence[Shape], float], list[int]]:
    """The allocation of a name.

    Raises:
      SpecError: for any other name.
    """
    if name not in ALLOCATIONS:
        raise SpecError(f"allocation={name!r}: write one of {', '.join(ALLOCATIONS)}")
    return ALLOCATIONS[name]
