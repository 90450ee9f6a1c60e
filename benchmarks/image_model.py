"""EfficientNet-Lite0 with its batch norms folded and its weights in eight bits.

    python benchmarks/image_model.py [--quick]

All kernels are int8 with one scale for each output channel, norms folded: rounded to nearest or by
GPTQ, and the same with the mean error of each layer taken off its biases. The classes are compared
with those of the float32 model on random crops of 27 photographs, twenty of them from ImageNet;
what is calibrated has seen crops of every other photograph only, and is tested on those of the
rest, both ways. Twenty labels would make no claim of accuracy, so there is none: the class has to
be the same for 97%. With the norms folded and nothing rounded, it may differ only where two classes
are as good as equal.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxcompress as jc
from jaxcompress.quantization import GPTQ, correct_biases, fold_batch_norms

from common import Row, row, show  # isort: skip

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import _efficientnet_model as model
from assets import AssetError, fetch

CROPS, BATCH, AGREE = 500, 20, 0.97
INT8 = jc.Quantize("int8", estimator="mse")
KERNELS = "params/**/kernel"


def photographs() -> list[Path]:
    """The files, in one order."""
    folders = [fetch("imagenet-photographs"), fetch("photographs")]
    return [file for folder in folders for file in sorted(folder.iterdir())
            if file.suffix in (".jpg", ".png")]  # fmt: skip


def calibrated(folded: Any, nearest: Any, files: list[Path]) -> dict[str, Any]:
    """By statistics of some photographs: other biases, and kernels by GPTQ."""
    images = model.crops(files, 54, seed=1).astype(np.float32)
    batches = [(images[:27],), (images[27:],)]
    stats = jc.observe(model.network, folded, batches, ("mean", "gram"), leaves=KERNELS)
    beside = {f"params/{a}/kernel": f"params/{b}/bias" for a, b in model.norms().items()}
    biases = {path: beside.get(path, "params/classes/bias") for path in stats}
    solved = jc.compress(folded, {KERNELS: GPTQ("int8", act_order=True)}, stats=stats)
    return {
        f"{name}, biases corrected": correct_biases(folded, small, stats, biases=biases)
        for name, small in {"int8": nearest, "int8, GPTQ": solved}.items()
    }


def run(quick: bool = False) -> list[Row]:
    """The rows; none where the files cannot be fetched."""
    try:
        variables, files = model.load_variables(fetch("efficientnet-lite0")), photographs()
    except AssetError as error:
        print(f"image_model is left out: {error}")
        return []
    images = model.crops(files, 81 if quick else CROPS).astype(np.float32)
    apply = jax.jit(jc.compressed(model.network))

    def logits(variables: Any, images: np.ndarray) -> np.ndarray:
        whole = -(-len(images) // BATCH) * BATCH  # one shape, and so one compilation
        padded = np.resize(images, (whole, *images.shape[1:]))
        parts = [apply(variables, padded[i : i + BATCH]) for i in range(0, whole, BATCH)]
        return np.concatenate([np.asarray(part) for part in parts])[: len(images)]

    dense, classes = logits(variables, images), lambda x: np.argmax(x, axis=-1)
    folded = fold_batch_norms(variables, model.norms(), epsilon=model.EPSILON)
    nearest = jc.compress(folded, {KERNELS: INT8})
    found = {"norms folded": logits(folded, images), "int8": logits(nearest, images)}
    half = np.arange(len(images)) % len(files) % 2
    for mine in (0, 1):
        for name, small in calibrated(folded, nearest, files[1 - mine :: 2]).items():
            moved = found.setdefault(name, np.zeros_like(dense))
            moved[half == mine] = logits(small, images[half == mine])
    rows = []
    for name, ours in found.items():
        what, least = f"EfficientNet-Lite0, {name}", 0.99 if name == "norms folded" else AGREE
        same = float(np.mean(classes(ours) == classes(dense)))
        rows.append(row(f"{what}: same class", same, "float32", 1.0, unit=""))
        rows[-1] |= {"target": f">= {least:g}", "ok": same >= least}
        rows.append(row(f"{what}: KL", _divergence(dense, ours), "one", 1.0, unit="nats"))
    size = float(jc.nbytes(nearest))
    rows.append(
        row("EfficientNet-Lite0, int8", size, "float32", float(jc.nbytes(variables)), unit="B")
    )
    return rows


def _divergence(p: np.ndarray, q: np.ndarray) -> float:
    """The mean of KL(p | q)."""
    log_p, log_q = (np.asarray(jax.nn.log_softmax(x)) for x in (p, q))
    return float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)))


def main() -> None:
    show("an image model", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
