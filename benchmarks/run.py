"""Runs every benchmark, each in a process of its own, and prints one table.

    python benchmarks/run.py [--quick] [--json PATH] [NAME ...]

Names are those of the files beside this one: imports, quantize, kmeans, selection, forward, memory,
sparsify, fake_quantize, observe, coding, command_line, one_shot, lenet_pruning, mnist, minilm,
low_bits, calibrated, mixed_precision, activations, gptq, image_model, language_model,
decomposition, low_rank, factored, product, deep_compression,
teacher_step, recovered, student_losses, distilled_minilm, structure, shrink.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from common import Row, show

HERE = Path(__file__).parent
NAMES = (
    "imports", "quantize", "kmeans", "selection", "forward", "memory", "sparsify", "fake_quantize",
    "observe", "coding", "command_line", "one_shot", "lenet_pruning", "mnist", "minilm",
    "low_bits", "calibrated", "mixed_precision", "activations", "gptq", "image_model",
    "language_model", "decomposition", "low_rank", "factored", "product", "deep_compression",
    "teacher_step", "recovered", "student_losses", "distilled_minilm", "structure", "shrink",
)  # fmt: skip
# Where pages happen to lie moves a memory-bound program by a tenth from one process to the next,
# so these run in several, and the median ratio of each row counts.
PROCESSES = {"quantize": 5, "sparsify": 5}

_CHILD = """
import importlib, json, sys
try:
    rows = importlib.import_module(sys.argv[1]).run(quick=sys.argv[2] == "True")
except ModuleNotFoundError as error:  # torch, which is not asked for in every Python
    print(f"{sys.argv[1]} is left out: {error}")
    rows = []
json.dump(rows, open(sys.argv[3], "w"))
"""


def collect(name: str, quick: bool, folder: Path) -> list[Row]:
    """The rows of one benchmark, which runs alone in a process of its own, or several."""
    out = folder / f"{name}.json"
    command = [sys.executable, "-c", _CHILD, name, str(quick), str(out)]
    runs = []
    for _ in range(1 if quick else PROCESSES.get(name, 1)):
        subprocess.run(command, check=True, cwd=HERE)
        runs.append(json.loads(out.read_text()))
    middle = len(runs) // 2
    return [sorted(same, key=lambda row: row["ratio"])[middle] for same in zip(*runs)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller inputs")
    parser.add_argument("--json", type=Path, help="write all rows there as well")
    args = parser.parse_args()
    folder = HERE.parent / "build" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for name in args.names or NAMES:
        if name not in NAMES:
            parser.error(f"{name!r} is none of {', '.join(NAMES)}")
        found = collect(name, args.quick, folder)
        show(name, found)
        rows += found
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    missed = [row["what"] for row in rows if not row["ok"]]
    print(
        f"{len(rows) - len(missed)} of {len(rows)} targets met"
        + "".join(f"\n  {m}" for m in missed)
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
