"""MNIST: the full set from its IDX files, or 5,000 images that come with a package."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import NamedTuple

import numpy as np
from assets import fetch


class Digits(NamedTuple):
    """Images `[n, 784]` from 0 to 1 and labels, for training and for the test."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file of bytes: two zeros, a type, the number of axes, their sizes."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is no IDX file of bytes")
    shape = np.frombuffer(raw, ">u4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def load(folder: Path | None = None) -> Digits:
    """MNIST, or Fashion-MNIST, from a folder with its four IDX files, gzipped or not.

    Without one, the 5,000 images of the asset `mnist`, 400 of each digit for training and 100 for
    the test, by one fixed permutation.
    """
    if folder is None:
        return _few()
    parts = []
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        found = [folder / f"{name}-ubyte", folder / f"{name}-ubyte.gz"]
        path = next((p for p in found if p.is_file()), found[0])
        if not path.is_file():
            raise SystemExit(
                f"{path} is not there; `make data` fetches the full MNIST into .assets/mnist-full"
            )
        parts.append(read_idx(path))
    return Digits(_scaled(parts[0]), parts[1], _scaled(parts[2]), parts[3])


def _few() -> Digits:
    with gzip.open(fetch("mnist") / "mnist_5k.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    table = np.random.default_rng(0).permutation(table)
    images, labels = _scaled(table[:, :-1]), table[:, -1]
    test = np.zeros(len(labels), bool)
    for digit in range(10):
        test[np.flatnonzero(labels == digit)[:100]] = True
    return Digits(images[~test], labels[~test], images[test], labels[test])


def _scaled(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float32) / 255
