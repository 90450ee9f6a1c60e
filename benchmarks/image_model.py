"""EfficientNet-Lite0 with its batch norms folded and its weights in eight bits.

    python benchmarks/image_model.py [--quick]

All kernels are int8 with one scale for each output channel, norms folded: rounded to nearest; with
the mean error taken off the biases of all but depthwise layers; or by GPTQ, again all but the
depthwise ones, which have nine or 25 weights to a scale. Both see crops that are not those of the
test. The classes are compared with those of the float32 model on random crops of 27 photographs,
twenty of them from ImageNet. Twenty labels would make no claim of accuracy, so there is none: by
GPTQ the class has to be the same for 97%. With the norms folded and nothing rounded, it may differ
only where two classes are as good as equal.
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
SOLVED = (
    "params/stem/kernel", "params/**/expand/kernel", "params/**/project/kernel",
    "params/head/kernel", "params/classes/kernel",
)  # fmt: skip


def photographs() -> list[Path]:
    """The files, in one order."""
    folders = [fetch("imagenet-photographs"), fetch("photographs")]
    return [file for folder in folders for file in sorted(folder.iterdir())
            if file.suffix in (".jpg", ".png")]  # fmt: skip


def calibrated(folded: Any, files: list[Path]) -> tuple[Any, Any, Any]:
    """Rounded to nearest, the same with other biases, and by GPTQ."""
    images = model.crops(files, 54, seed=1).astype(np.float32)
    batches = [(images[:27],), (images[27:],)]
    stats = jc.observe(model.network, folded, batches, ("mean", "gram"), leaves=SOLVED)
    nearest = jc.compress(folded, {"params/**/kernel": INT8})
    beside = {f"params/{a}/kernel": f"params/{b}/bias" for a, b in model.norms().items()}
    biases = {path: beside.get(path, "params/classes/bias") for path in stats}
    corrected = correct_biases(folded, nearest, stats, biases=biases)
    gptq = GPTQ("int8", tries=20, act_order=True)
    rules = {**dict.fromkeys(SOLVED, gptq), "params/**/kernel": INT8}
    return nearest, corrected, jc.compress(folded, rules, stats=stats)


def run(quick: bool = False) -> list[Row]:
    """The rows; none where the files cannot be fetched."""
    try:
        variables, files = model.load_variables(fetch("efficientnet-lite0")), photographs()
    except AssetError as error:
        print(f"image_model is left out: {error}")
        return []
    images = model.crops(files, 81 if quick else CROPS).astype(np.float32)
    apply = jax.jit(jc.compressed(model.network))

    def logits(variables: Any) -> np.ndarray:
        parts = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
        return np.concatenate([np.asarray(apply(variables, part)) for part in parts])

    dense, classes = logits(variables), lambda x: np.argmax(x, axis=-1)
    folded = fold_batch_norms(variables, model.norms(), epsilon=model.EPSILON)
    nearest, corrected, solved = calibrated(folded, files)
    found = {
        "norms folded": (folded, 0.99),
        "int8": (nearest, None),
        "int8, biases corrected": (corrected, None),
        "int8, GPTQ": (solved, AGREE),
    }
    rows = []
    for name, (tree, least) in found.items():
        ours = logits(tree)
        what = f"EfficientNet-Lite0, {name}"
        same = float(np.mean(classes(ours) == classes(dense)))
        rows.append(row(f"{what}: same class", same, "float32", 1.0, unit=""))
        if least is not None:
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
