"""Load the data: 1797 handwritten digits of 8 × 8 pixels that come with scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neuronscope.arrays import IntArray
from neuronscope.errors import requiring

__all__ = ["Digits", "load_digits"]

#: One image in five is for testing; the split is the same for every run.
_TRAIN_SHARE = 0.8
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits:
    """Hold the images, as rows of standardised pixels, and the digits that they show."""

    train_x: Tensor  # float32 ``(1437, 64)``
    train_y: Tensor  # int64 ``(1437,)``, 0 … 9
    test_x: Tensor  # float32 ``(360, 64)``
    test_y: Tensor  # int64 ``(360,)``


def load_digits() -> Digits:
    """Load the digits, split into training and test images.

    All pixels are standardised by the mean and the deviation over all training images.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    with requiring("scikit-learn", "the demo's digits", "'neuronscope[demo]'"):
        from sklearn.datasets import load_digits as load
    pixels, labels = load(return_X_y=True)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(labels))
    train, test = np.split(order, [int(_TRAIN_SHARE * len(labels))])
    mean, deviation = pixels[train].mean(), pixels[train].std()

    def images(rows: IntArray) -> Tensor:
        return torch.from_numpy(((pixels[rows] - mean) / deviation).astype(np.float32))

    def digits(rows: IntArray) -> Tensor:
        return torch.from_numpy(labels[rows].astype(np.int64))

    return Digits(images(train), digits(train), images(test), digits(test))
