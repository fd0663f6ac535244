"""`digits`: 1,797 real handwritten digits of 8 x 8 pixels from 43 people (UCI, Alpaydin and Kaynak 1998).

They ship with scikit-learn. 597 are the test set, 1,200 the pool that regimes are drawn from.
"""

from __future__ import annotations

import torch
from torch import nn

from l2t import check
from l2t.tasks.regimes import Regime, pair_flip, stratified, symmetric
from l2t.tasks.task import Setting, Source, Task

TEST_SEED = 1998
TEST_SIZE = 597


def source() -> Source:
    """Pool and test set, split by a seed of this file alone."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise check.missing_package("digits", "scikit-learn") from error
    pixels, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(pixels, dtype=torch.float32)
    y = torch.as_tensor(labels, dtype=torch.int64)
    test, pool = stratified(y, TEST_SIZE, torch.Generator().manual_seed(TEST_SEED))
    return Source((x[pool], y[pool]), (x[test], y[test]))


def mlp(hidden: int, activation: type[nn.Module]) -> nn.Module:
    """Perceptron 64-hidden-10."""
    return nn.Sequential(nn.Linear(64, hidden), activation(), nn.Linear(hidden, 10))


def cnn() -> nn.Module:
    """Two 3 x 3 convolutions of stride 2 on the 8 x 8 image and a linear read-out, 5,994 parameters."""
    return nn.Sequential(
        nn.Unflatten(-1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


_RECIPE = {"steps": 200, "batch_size": 32, "updates": 30}
_SOFT_TARGETS = {"weight": "full", "link": "identity"}
_CLASS_WEIGHTS = {"weight": "per-class", "link": "identity"}
_ROBUST = {"weight": "shared", "link": "sigmoid", "diagonal_range": 1.5, "bias_range": 4.0}

TASK = Task(
    name="digits",
    title="1,797 real handwritten digits of 8 x 8 pixels, from scikit-learn",
    num_classes=10,
    source=source,
    students={
        "mlp": lambda: mlp(64, nn.Tanh),
        "mlp-relu": lambda: mlp(64, nn.ReLU),
        "mlp-wide": lambda: mlp(128, nn.Tanh),
        "cnn": cnn,
    },
    settings={
        "clean": Setting(Regime("1,200 training samples with their own labels"), _RECIPE, _SOFT_TARGETS),
        "few": Setting(Regime("150 training samples", samples=150), _RECIPE, _SOFT_TARGETS),
        "symmetric": Setting(
            Regime(
                "1,000 training samples, 40% of the labels replaced by another class; 200 clean dev samples",
                dev=200,
                noise=lambda classes: symmetric(classes, 0.4),
            ),
            _RECIPE,
            _ROBUST,
        ),
        "pair-flip": Setting(
            Regime(
                "1,000 training samples, 40% of the labels moved to the next class; 200 clean dev samples",
                dev=200,
                noise=lambda classes: pair_flip(classes, 0.4),
            ),
            _RECIPE,
            _SOFT_TARGETS,
        ),
        "long-tail": Setting(
            Regime("class counts fall from 120 to 6 along an exponential", imbalance=20.0),
            _RECIPE,
            _CLASS_WEIGHTS,
        ),
    },
)
