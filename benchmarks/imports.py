"""What `import jaxcompress` adds to `import jax, flax, optax`, in new processes.

python benchmarks/imports.py [--quick]
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from common import Row, row, show  # isort: skip

ALLOWED = 0.25
_CHILD = """
import time
import jax, flax, optax
start = time.perf_counter()
import jaxcompress
print(time.perf_counter() - start)
"""


def run(quick: bool = False) -> list[Row]:
    """The row: a median, files cached by the system from the first process on."""
    command = [sys.executable, "-c", _CHILD]
    seconds = [
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(4 if quick else 12)
    ]
    added = float(np.median(seconds[1:]))
    return [row("import jaxcompress after jax, flax, optax", added, "allowed", ALLOWED, at_most=1)]


def main() -> None:
    show("imports", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
