"""`cifar100`: 60,000 photographs of a hundred kinds of things, 32 x 32 colour pixels (Krizhevsky 2009).

50,000 are the pool, the other 10,000 the standard test set; labels are the hundred fine ones.
"""

from __future__ import annotations

from l2t.tasks.networks import image_students
from l2t.tasks.places import Place
from l2t.tasks.readers import cifar_batch
from l2t.tasks.regimes import standard
from l2t.tasks.task import Setting, Source, Task

PLACE = Place(
    name="cifar100",
    files={
        "train": "md5:16019d7e3df5f24257cddd939b257f8d",
        "test": "md5:f0ef6b0ae62326f3e7ffdfab6717acfc",
    },
    archive="cifar-100-python.tar.gz",
    inside="cifar-100-python",
    torchvision="CIFAR100",
)


def source() -> Source:
    """Pool and test set as their batches have them, (N, 3, 32, 32)."""
    pool, test = (cifar_batch(file, "fine_labels", 100) for file in PLACE.read().values())
    return Source(pool, test)


_RECIPE = {"steps": 300, "batch_size": 50, "updates": 60, "augment": "crop-flip"}

TASK = Task(
    name="cifar100",
    title="60,000 photographs of a hundred kinds of things, 32 x 32 colour pixels",
    origin="Krizhevsky, Nair and Hinton (Krizhevsky 2009), www.cs.toronto.edu/~kriz/cifar.html",
    licence="none stated by its makers",
    place=PLACE,
    num_classes=100,
    source=source,
    students=image_students(3, 32, 100),
    settings={
        name: Setting(regime, _RECIPE)
        for name, regime in standard(50_000, 100, few=5000, small=10_000, dev=1000, imbalance=10.0).items()
    },
)
