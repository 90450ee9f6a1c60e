"""`jaxcompress compress` on a safetensors file of 2 GB, as a process (Linux).

    python benchmarks/command_line.py [--quick]

Against copying the file, flushed to the disk as well, and one pass over it that reads every weight:
three candidates in turn, for disks differ from minute to minute. The peak is what the kernel says
of the finished process.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import Row, row, show
from safetensors.numpy import save_file

WIDTH = 4096
MB = 1e6


def _copy_and_pass(source: Path, target: Path) -> None:
    with open(source, "rb") as a, open(target, "wb") as b:
        shutil.copyfileobj(a, b, 1 << 24)
        b.flush()
        os.fsync(b.fileno())
    greatest = 0.0
    with open(source, "rb") as a:
        while (part := np.fromfile(a, np.float32, 1 << 22)).size:
            greatest = max(greatest, float(np.abs(part).max()))


def _command(source: Path, target: Path, *options: str) -> int:
    """Runs the command; its peak of resident memory in bytes."""
    args = [sys.executable, "-m", "jaxcompress", "compress", str(source), str(target), "-q"]
    pid = os.spawnv(os.P_NOWAIT, sys.executable, [*args, "-r", "int8", *options])
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"the command failed: {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024


def _seconds(work: Callable[[], object]) -> float:
    os.sync()  # what the one before left to be written is not this one's
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def run(quick: bool = False) -> list[Row]:
    """The rows: with and without entropy coding."""
    leaves, rounds = (6, 1) if quick else (30, 5)
    with tempfile.TemporaryDirectory() as folder:
        source, copy, small = (Path(folder, name) for name in ("in.safetensors", "copy", "small"))
        rng = np.random.default_rng(0)
        draw = lambda: rng.standard_normal((WIDTH, WIDTH), np.float32)
        save_file({f"layers.{i}.weight": draw() for i in range(leaves)}, source)
        peaks: dict[str, list[int]] = {"coded": [], "uncoded": []}
        times: dict[str, list[float]] = {"copy": [], "coded": [], "uncoded": []}
        for _ in range(rounds):
            times["copy"].append(_seconds(lambda: _copy_and_pass(source, copy)))
            for name, options in (("coded", ()), ("uncoded", ("--uncoded",))):
                work = lambda o=options, n=name: peaks[n].append(_command(source, small, *o))
                times[name].append(_seconds(work))
        total = source.stat().st_size
    limit = 3 * 4 * WIDTH * WIDTH + 500e6
    rows = []
    for name in ("coded", "uncoded"):
        what = f"compress {total / 1e9:.1f} GB to int8, {name}"
        rows.append(row(what, float(np.median(times[name])), "copy and a pass",
                        float(np.median(times["copy"])), at_most=3))  # fmt: skip
        rows.append(row(f"{what}: peak", max(peaks[name]) / MB, "3 leaves + 500 MB", limit / MB,
                        at_most=1, unit="MB"))  # fmt: skip
    return rows


def main() -> None:
    show("command line", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
