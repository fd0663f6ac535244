"""`cifar10`: 60,000 photographs of ten kinds of things, 32 x 32 colour pixels (Krizhevsky 2009).

The five training batches are the pool, the test batch is the standard test set.
"""

from __future__ import annotations

import torch

from l2t.tasks.networks import image_students
from l2t.tasks.places import Place
from l2t.tasks.readers import cifar_batch
from l2t.tasks.regimes import standard
from l2t.tasks.task import Setting, Source, Task

PLACE = Place(
    name="cifar10",
    files={
        "data_batch_1": "md5:c99cafc152244af753f735de768cd75f",
        "data_batch_2": "md5:d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "md5:54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "md5:634d18415352ddfa80567beed471001a",
        "data_batch_5": "md5:482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "md5:40351d587109b95175f43aff81a1287e",
    },
    archive="cifar-10-python.tar.gz",
    inside="cifar-10-batches-py",
    torchvision="CIFAR10",
)


def source() -> Source:
    """Pool and test set as their batches have them, (N, 3, 32, 32)."""
    *pool, test = [cifar_batch(file, "labels", 10) for file in PLACE.read().values()]
    return Source((torch.cat([x for x, _ in pool]), torch.cat([y for _, y in pool])), test)


_RECIPE = {"steps": 300, "batch_size": 50, "updates": 60, "augment": "crop-flip"}

TASK = Task(
    name="cifar10",
    title="60,000 photographs of ten kinds of things, 32 x 32 colour pixels",
    origin="Krizhevsky, Nair and Hinton (Krizhevsky 2009), www.cs.toronto.edu/~kriz/cifar.html",
    licence="none stated by its makers",
    place=PLACE,
    num_classes=10,
    source=source,
    students=image_students(3, 32, 10),
    settings={
        name: Setting(regime, _RECIPE)
        for name, regime in standard(50_000, 10, few=1000, small=5000, dev=500, imbalance=50.0).items()
    },
)
