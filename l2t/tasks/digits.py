"""`digits`: 1,797 real handwritten digits of 8 x 8 pixels from 43 people (UCI, Alpaydin and Kaynak 1998).

They ship with scikit-learn. 597 are the test set, 1,200 the pool that regimes are drawn from.
"""

from __future__ import annotations

import torch
from torch import nn

from l2t import check
from l2t.tasks.regimes import standard, stratified
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


_RECIPE = {"steps": 200, "batch_size": 32, "updates": 60}

TASK = Task(
    name="digits",
    title="1,797 real handwritten digits of 8 x 8 pixels",
    origin="UCI (Alpaydin and Kaynak 1998), in the package scikit-learn",
    licence="CC BY 4.0",
    package="scikit-learn",
    num_classes=10,
    source=source,
    students={
        "mlp": lambda: mlp(64, nn.Tanh),
        "mlp-relu": lambda: mlp(64, nn.ReLU),
        "mlp-wide": lambda: mlp(128, nn.Tanh),
        "cnn": cnn,
    },
    settings={
        name: Setting(regime, _RECIPE)
        for name, regime in standard(1200, 10, few=150, dev=200, imbalance=20.0).items()
    },
)
