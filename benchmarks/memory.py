"""Peak memory of `compress` on a tree of 2 GB, each mode in a process of its own (Linux).

python benchmarks/memory.py [--quick]
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

from common import Row, row, show

MEBI = 2**20


def _resident(field: str) -> int:
    """Resident bytes now (`VmRSS`) or at their greatest (`VmHWM`)."""
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(rf"{field}:\s+(\d+)", status.read())[1])


def _measure(donate: bool, leaves: int) -> None:
    import jax
    import jax.numpy as jnp

    import jaxcompress as jc

    # What importing and compiling take is there before the tree is.
    jc.compress({"w": jnp.ones((512, 512))}, {"w": jc.Quantize("int8")}, donate=donate)
    fill = jax.jit(lambda key: jax.random.uniform(key, (4096, 4096)), donate_argnums=())
    jax.block_until_ready(fill(jax.random.key(0)))
    base = _resident("VmRSS")
    params = {f"layer_{i}": fill(jax.random.key(i)) for i in range(leaves)}
    jax.block_until_ready(params)
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")  # forget the peak so far
    small = jc.compress(params, {"**": jc.Quantize("int8")}, donate=donate)
    peak = _resident("VmHWM") - base
    print(json.dumps({"peak": peak, "output": jc.nbytes(small), "leaf": 4 * 4096 * 4096}))


def run(quick: bool = False) -> list[Row]:
    """The rows: with and without `donate`."""
    leaves = 8 if quick else 32
    rows = []
    for donate in (True, False):
        command = [sys.executable, __file__, "--measure", str(int(donate)), str(leaves)]
        out = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        total = leaves * out["leaf"]
        bound = total + 2 * out["leaf"] + 200 * MEBI + (0 if donate else out["output"])
        what = f"peak of compress, {total / 1e9:.1f} GB tree, donate={donate}"
        limit = "input + 2 leaves + 200 MiB" if donate else "input + output + 2 leaves + 200 MiB"
        rows.append(row(what, out["peak"] / 1e6, limit, bound / 1e6, at_most=1, unit="MB"))
    return rows


def main() -> None:
    if "--measure" in sys.argv:
        _measure(bool(int(sys.argv[2])), int(sys.argv[3]))
    else:
        show("memory", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
