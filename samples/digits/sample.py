"""Handwritten digits: a small residual CNN, trained from a fixed seed on the 1,797 real scans that scikit-learn ships.

source() -> the trained network; calibration(), heldout() -> one scan a batch; evaluate(run) -> accuracy on others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import exporter

SEED = 0
EPOCHS = 5
BATCH = 32
PEAK_RATE = 4e-3
TEST, HELDOUT = 400, 100  # scans; the other 1,297 train
CALIBRATION = 128  # of those that train

Batch = dict[str, np.ndarray]


class Residual(nn.Module):
    """x -> relu(x + norm(conv(relu(norm(conv(x)))))): the Add that int8 has to requantize."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(self.first(x)))


def _conv(incoming: int, outgoing: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(incoming, outgoing, 3, padding=1, bias=False), nn.BatchNorm2d(outgoing), nn.ReLU())


def _network() -> nn.Sequential:
    """14.2 million multiply-adds a scan: small, and enough for integers to win time at batch 1."""
    return nn.Sequential(
        _conv(1, 64), _conv(64, 96), Residual(96), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10)
    )


@functools.cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """All scans in one fixed shuffled order: float32 [1797, 1, 8, 8] in 0..1, and their digits int64 [1797]."""
    pixels, digits = load_digits(return_X_y=True)
    order = np.random.default_rng(SEED).permutation(len(digits))
    images = (pixels / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)  # load_digits counts ink in 0..16
    return images[order], digits[order].astype(np.int64)


@functools.cache
def _trained() -> nn.Module:
    """The network after EPOCHS epochs: AdamW under a one-cycle rate.

    On one thread, so that sums have one order and the weights one value on a kind of CPU. Leaves torch's random state
    and thread count as they were.
    """
    images, digits = (torch.from_numpy(rows[TEST + HELDOUT :]) for rows in _scans())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(SEED)
            network = _network()
            optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE)
            steps = EPOCHS * -(-len(digits) // BATCH)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps)
            for _ in range(EPOCHS):
                for rows in torch.randperm(len(digits)).split(BATCH):
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(network(images[rows]), digits[rows]).backward()
                    optimizer.step()
                    schedule.step()
    finally:
        torch.set_num_threads(threads)
    return network.eval().requires_grad_(False)


def source() -> exporter.Source:
    example = _scans()[0][TEST : TEST + 1]
    return exporter.from_module(
        _trained(), inputs={"image": example}, outputs=["logits"], dynamic={"image": {0: "batch"}}, name="digits"
    )


def calibration() -> Iterator[Batch]:
    """Scans the network was trained on."""
    images, _ = _scans()
    start = TEST + HELDOUT
    return ({"image": images[row : row + 1]} for row in range(start, start + CALIBRATION))


def heldout() -> Iterator[Batch]:
    """Scans that neither training nor calibration has seen."""
    images, _ = _scans()
    return ({"image": images[row : row + 1]} for row in range(TEST, TEST + HELDOUT))


def evaluate(run: Callable[[Batch], Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Share of the 400 test scans whose largest logit is their digit; they are in no other part."""
    images, digits = (rows[:TEST] for rows in _scans())
    found = run({"image": images})["logits"].argmax(axis=1)
    return {"top1": float((found == digits).mean())}
