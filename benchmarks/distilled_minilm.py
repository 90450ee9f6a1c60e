"""MiniLM of three layers in four bits against the six that taught it: fidelity, bytes and time.

    python benchmarks/distilled_minilm.py [FOLDER ...]

The folders are what `examples/distil_minilm.py --out FOLDER` wrote, one for each seed; without any,
`out/distil-minilm` is taken, if it is there. Times do not depend on training: without a folder they
are those of the student as it begins.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxcompress as jc

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import distil_minilm as example
from _minilm_model import load_params
from assets import AssetError, fetch
from self_distillation import TEACHER, Test

from common import Row, interleaved, row, show  # isort: skip

FOLDER, LENGTH = Path("out/distil-minilm"), 64


def starts(params: Any, test: Test) -> list[Row]:
    """The cosines of three layers as they are: those of the example, every other, and the best."""
    found = {
        layers: test.cosine(example.student_of(params, layers))
        for layers in itertools.combinations(range(TEACHER.layers), example.STUDENT.layers)
    }
    best, every = max(found, key=found.__getitem__), jc.distillation.layer_map(3, 6)
    return [
        row(f"layers {layers} as they are: mean cosine", found[layers], f"the best, {best}",
            found[best], unit="")
        for layers in (example.LAYERS, every)
    ]  # fmt: skip


def times(params: Any, small: Any, batch: int, quick: bool) -> dict[str, float]:
    """Seconds of a forward pass of the teacher, the stored student and one in float32."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(1000, 30_000, (batch, LENGTH)), jnp.int32)
    given = tokens, jnp.ones_like(tokens)
    models = {
        "teacher": (TEACHER.apply, params),
        "stored": (jc.compressed(example.STUDENT.apply), small),
        "float32": (example.STUDENT.apply, jc.decompress(small)),
    }
    made = {name: (jax.jit(fn), {"params": p}) for name, (fn, p) in models.items()}
    call = lambda fn, p: lambda: fn(p, *given)
    return interleaved({name: call(*x) for name, x in made.items()}, rounds=5 if quick else 21)


def run(quick: bool = False, folders: list[Path] | None = None) -> list[Row]:
    """All rows; those of fidelity where there is a trained student."""
    try:
        params = load_params(fetch("minilm"))
    except AssetError as error:
        print(f"distilled_minilm is left out: {error}")
        return []
    files = [folder / "student.safetensors" for folder in folders or [FOLDER]]
    files = [file for file in files if file.is_file()]
    trained, test = [jc.load(file) for file in files], Test(params, example.STUDENT)
    rows = [] if quick else starts(params, test)
    if trained:
        cosines = [test.cosine(student) for student in trained]
        spread = f" +- {stdev(cosines):.4f}" if len(cosines) > 1 else ""
        print(f"mean cosine {mean(cosines):.4f}{spread}: {cosines}", file=sys.stderr)
        size = mean(file.stat().st_size for file in files) / 1e6
        rows += [
            row("three layers in int4: mean cosine", 0.93, "wanted", mean(cosines),
                at_least=1, unit=""),
            row("three layers in int4: file", size, "allowed", 9.0, at_most=1, unit="MB"),
        ]  # fmt: skip
    start = jc.compress(example.student_of(params), example.KERNELS)
    small = trained[0] if trained else _stored(start)
    for batch in (32, 1):
        t = times(params, small, batch, quick)
        target = {"at_least": 1.8} if batch > 1 else {}
        what = f"batch {batch} of {LENGTH} tokens"
        rows.append(row(f"three layers in int4, {what}", t["stored"], "six in float32",
                        t["teacher"], **target))  # fmt: skip
        rows.append(row(f"three layers, {what}", t["float32"], "six in float32",
                        t["teacher"], at_least=1.8))  # fmt: skip
    return rows


def _stored(student: Any) -> Any:
    """Through a file, as one that was trained."""
    with tempfile.TemporaryDirectory() as folder:
        jc.save(Path(folder) / "student.safetensors", jc.finalize(student))
        return jc.load(Path(folder) / "student.safetensors")


def main() -> None:
    names = [Path(arg) for arg in sys.argv[1:] if not arg.startswith("--")]
    show("distilled MiniLM", run("--quick" in sys.argv, names))


if __name__ == "__main__":
    main()
