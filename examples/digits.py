"""What the demo trains, and on what: images of digits, how they are distorted, and a small convolutional network."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import loopwright as lw


class Split(NamedTuple):
    """Images [N, 1, 8, 8], float32 in [0, 1], and their digits [N], int64, of each part."""

    train: tuple[np.ndarray, np.ndarray]
    valid: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def load(seed: int) -> Split:
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype("float32").reshape(-1, 1, 8, 8)
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.25, stratify=y, random_state=seed)
    X, X_valid, y, y_valid = train_test_split(X, y, test_size=0.1, stratify=y, random_state=seed)
    return Split((X, y), (X_valid, y_valid), (X_test, y_test))


class Distort(lw.Callback):
    """Turns, stretches, slants and moves each training image a little, and adds noise: all images of a batch at once.

    Reads: nothing. Changes: the images that are trained on, never those of a validation or test.
    """

    def __init__(self, degrees: float = 10, stretch: float = 0.1, slant: float = 0.1, pixels: float = 0.5) -> None:
        self.largest = torch.tensor([math.radians(degrees), stretch, slant, pixels / 4, pixels / 4])

    def map_batch(self, run: lw.Run, batch: list[Tensor]) -> list[Tensor]:
        images, digits = batch
        drawn = torch.rand(len(images), 5, device=images.device) * 2 - 1
        angle, stretch, slant, right, down = (drawn * self.largest.to(images.device)).unbind(1)
        cos, sin = angle.cos() * (1 + stretch), angle.sin() * (1 + stretch)
        affine = torch.stack([cos, slant - sin, right, sin, cos, down], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(affine, list(images.shape), align_corners=False)
        images = F.grid_sample(images, grid, align_corners=False)
        return [images + 0.03 * torch.randn_like(images), digits]


def network(width: int = 24) -> nn.Sequential:
    """Four convolutions with batch norm: images [N, 1, 8, 8] to scores [N, 10]."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    wide = 2 * width
    return nn.Sequential(
        *block(1, width), *block(width, width), nn.MaxPool2d(2),
        *block(width, wide), *block(wide, wide), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(4 * wide, 10),
    )  # fmt: skip
