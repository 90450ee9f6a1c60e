"""LeNet-5 on the full MNIST in two bits, ternary and binary weights, fine-tuned from float32.

    python benchmarks/low_bits.py [--quick]

All kernels are quantized, first and last ones too; biases are float32. Each model is trained for
two epochs from the float32 one by the loop of `examples/quantize_lenet.py`, finalized and saved;
its accuracy is that of what is loaded from the file. The rows of the mean are over three seeds; a
quick run has one, fewer epochs and fewer ways. The logits of the file have to be those that were
trained, bit for bit.

References:
  Esser et al., *Learned Step Size Quantization*, 2020; Li, Zhang and Liu, *Ternary Weight
  Networks*, 2016; Zhu et al., *Trained Ternary Quantization*, 2017; Rastegari et al., *XNOR-Net*,
  2016; Ma et al., *The Era of 1-bit LLMs*, 2024.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxcompress.quantization import TTQ, TWN, XNOR, BinaryConnect, BitNet

from common import Row, row, show  # isort: skip

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import quantize_lenet
from _lenet5 import init
from _mnist import load
from assets import AssetError, fetch

EPOCHS, TUNED, SEEDS = 3, 2, (0, 1, 2)
# What is done to the kernels, and the points of accuracy that it may cost.
WAYS: dict[str, tuple[Any, float]] = {
    "LSQ 2 bits": (quantize_lenet.WEIGHTS, 0.3),
    "TWN": ({"**/kernel": TWN()}, 1.0),
    "XNOR": ({"**/kernel": XNOR()}, 1.0),
    "LSQ 2 bits, inputs 2 bits": (quantize_lenet.INPUTS, 0.3),
    "TTQ": ({"**/kernel": TTQ()}, 1.0),
    "BitNet": ({"**/kernel": BitNet()}, 1.0),
    "BinaryConnect": ({"**/kernel": BinaryConnect()}, 1.0),
}
QUICK = ("LSQ 2 bits", "TWN", "XNOR")


def measure(quick: bool, log: Path | None = None) -> list[dict[str, Any]]:
    """What each seed and way comes to; each is written to a log as soon as it is there."""
    digits, found = load(fetch("mnist-full")), []
    epochs, tuned = (2, 1) if quick else (EPOCHS, TUNED)
    with tempfile.TemporaryDirectory() as folder:
        for seed in SEEDS[:1] if quick else SEEDS:
            dense = quantize_lenet.train(init(seed), digits, epochs, 1e-3, seed)
            found.append(quantize_lenet.stage("float32", dense, digits, Path(folder)))
            found[-1]["seed"] = seed
            for name in QUICK if quick else WAYS:
                params = quantize_lenet.quantized(dense, WAYS[name][0], digits)
                params = quantize_lenet.train(params, digits, tuned, 5e-4, seed)
                found.append(quantize_lenet.stage(name, params, digits, Path(folder)))
                found[-1]["seed"] = seed
                if log is not None:
                    log.write_text(json.dumps(found, indent=1) + "\n")
    return found


def rows_of(found: list[dict[str, Any]]) -> list[Row]:
    """The rows; of seeds that came to all ways alone, where a run was cut off."""
    rows = []
    mean = lambda name, what: float(np.mean([x[what] for x in found if x["model"] == name]))
    seeds = lambda name: sum(x["model"] == name for x in found)
    for name in [name for name in WAYS if seeds(name)]:
        points, which = WAYS[name][1], f"LeNet-5, {name}"
        of = f"mean of {seeds(name)}" if seeds(name) > 1 else "one seed"
        error, dense = (100 - mean(x, "accuracy") for x in (name, "float32"))
        peer = f"float32 + {points} points"
        rows.append(
            row(f"{which}: test error, {of}", error, peer, dense + points, at_most=1, unit="%")
        )
        gap = max(x["largest_difference"] for x in found if x["model"] == name)
        what = f"{which}: stored logits equal the trained ones"
        rows.append(row(what, float(gap == 0), "all", 1.0, unit=""))
        rows[-1] |= {"target": "bit for bit", "ok": gap == 0}
        size, whole = mean(name, "file_bytes"), mean("float32", "file_bytes")
        rows.append(row(f"{which}: file", size, "float32", whole, unit="B"))
    return rows


def run(quick: bool = False) -> list[Row]:
    """The rows; none where the images cannot be fetched."""
    try:
        return rows_of(measure(quick))
    except AssetError as error:
        print(f"low_bits is left out: {error}")
        return []


def main() -> None:
    show("few bits", run("--quick" in sys.argv))


if __name__ == "__main__":
    main()
