"""1,797 handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak, 1998), from scikit-learn."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images `[n, 64]` from 0 to 1 and labels: 1,400 for training, the rest for the test."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order].astype(np.float32) / 16, labels[order].astype(np.int32)
    return images[:1400], labels[:1400], images[1400:], labels[1400:]


def load_large() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The same on 28 x 28 pixels `[n, 784]`, as the networks for MNIST want them."""
    images, labels, test_images, test_labels = load()
    return _large(images), labels, _large(test_images), test_labels


def _large(images: np.ndarray) -> np.ndarray:
    each = np.kron(images.reshape(-1, 8, 8), np.ones((1, 3, 3), np.float32))
    return np.pad(each, ((0, 0), (2, 2), (2, 2))).reshape(len(images), -1)
