"""Factors the convolutions of a trained ResNet-8, and trains the factors.

    python examples/factorize.py
    python examples/factorize.py --form separable --widths 32 64 128 --epochs 6 --tuned 3

A ResNet-8 is trained on Fashion-MNIST. Each 3x3 kernel is written as a Tucker-2 decomposition: a
convolution of a pixel to fewer channels, one of 3x3 on those, and one of a pixel back; or as one of
3x1 and one of 1x3. Under `jc.compressed` the model runs these, though its code knows of one; the
factors are ordinary arrays to the optimizer, and the loop that trained the model trains them. What
is reported is what the compiler counts, and what is loaded from the file.

References:
  Jaderberg, Vedaldi and Zisserman, *Speeding up Convolutional Neural Networks with Low Rank
  Expansions*, 2014; Kim et al., *Compression of Deep Convolutional Neural Networks for Fast and
  Low Power Mobile Applications*, 2016.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _resnet8_training
import jax
import jax.numpy as jnp
import optax
from _mnist import Digits
from _resnet8 import ResNet8
from rich.console import Console

import jaxcompress as jc

SHARE = 0.5
# Of a share and a block's channels: both sides of a Tucker-2 have channels of their own.
FORMS: dict[str, Callable[[float, int], jc.Spec]] = {
    "tucker": lambda share, width: jc.Tucker(share),
    "separable": lambda share, width: jc.Separable(round(share * width)),
}


def rules(model: ResNet8, form: str, share: float) -> dict[str, Any]:
    """For each 3x3 kernel but the first, a share of the channels as ranks."""
    return {
        f"params/block{n}_conv*/kernel": FORMS[form](share, width)
        for n, width in enumerate(model.widths)
    }


def train(
    model: ResNet8, variables: Any, data: Digits, epochs: int, rate: float, seed: int = 0
) -> Any:
    """Trains dense or factored variables with Adam and a cosine schedule."""
    apply = jc.compressed(functools.partial(model.apply, train=True, mutable=["batch_stats"]))
    tx = optax.adam(_resnet8_training.cosine(data, epochs, rate))
    return _resnet8_training.train(apply, variables, tx, None, data, epochs, seed=seed)[0]


@functools.cache
def forward(model: ResNet8) -> Any:
    """The jitted forward pass, of dense and factored variables."""
    return jax.jit(jc.compressed(model.apply))


def flops(model: ResNet8, variables: Any) -> float:
    """What the compiler counts for one image."""
    compiled = forward(model).lower(variables, jnp.zeros((1, 784))).compile()
    return float(compiled.cost_analysis()["flops"])


def stage(name: str, model: ResNet8, variables: Any, data: Digits, folder: Path) -> dict[str, Any]:
    """Saves a model, loads it again, and measures what came back."""
    file = folder / f"{name.replace(' ', '-')}.safetensors"
    jc.save(file, variables)
    back = jc.load(file)
    return {
        "model": name,
        "accuracy": _resnet8_training.accuracy(forward(model), back, data),
        "flops": flops(model, back),
        "file_bytes": file.stat().st_size,
    }


def compare(
    model: ResNet8,
    data: Digits,
    folder: Path,
    *,
    epochs: int,
    tuned: int,
    form: str = "tucker",
    share: float = SHARE,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], Any, Any]:
    """A row for each model, the dense one, and the one of trained factors."""
    folder.mkdir(parents=True, exist_ok=True)
    variables = model.init(jax.random.key(seed), jnp.zeros((1, 784)))
    dense = train(model, variables, data, epochs, 4e-3, seed)
    rows = [stage("dense", model, dense, data, folder)]
    small = jc.compress(dense, rules(model, form, share))
    rows.append(stage("factored", model, small, data, folder))
    small = train(model, small, data, tuned, 2e-3, seed)
    rows.append(stage("factored and trained", model, small, data, folder))
    return rows, dense, small


def main() -> None:
    """Trains, factors, trains the factors, and prints the table."""
    parser = _resnet8_training.parser(__doc__, ResNet8.widths, 2, "out/factorize")
    parser.add_argument("--form", choices=FORMS, default="tucker")
    parser.add_argument("--share", type=float, default=SHARE, help="of the channels, as ranks")
    args = parser.parse_args()
    data = _resnet8_training.pictures(args)
    given = {name: getattr(args, name) for name in ("epochs", "tuned", "form", "share")}
    rows, *_ = compare(ResNet8(tuple(args.widths)), data, args.out, **given)
    _resnet8_training.show(rows, "flops", "operations", Console())


if __name__ == "__main__":
    main()
