"""`mnist`: 70,000 handwritten digits, 28 x 28 grey pixels (LeCun, Bottou, Bengio and Haffner 1998).

60,000 are the pool, the other 10,000 the standard test set.
"""

from __future__ import annotations

from l2t.tasks.networks import image_students
from l2t.tasks.places import Place
from l2t.tasks.readers import idx_samples
from l2t.tasks.regimes import standard
from l2t.tasks.task import Setting, Source, Task

PLACE = Place(
    name="mnist",
    files={
        "train-images-idx3-ubyte": "sha256:ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "sha256:65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "sha256:0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "sha256:ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    torchvision="MNIST",
)


def source() -> Source:
    """Pool and test set as their files have them, (N, 1, 28, 28)."""
    pool_x, pool_y, test_x, test_y = PLACE.read().values()
    return Source(idx_samples(pool_x, pool_y, 10), idx_samples(test_x, test_y, 10))


_RECIPE = {"steps": 300, "batch_size": 50, "updates": 60}

TASK = Task(
    name="mnist",
    title="70,000 handwritten digits, 28 x 28 grey pixels",
    origin="LeCun, Cortes and Burges, from NIST's Special Databases 1 and 3",
    licence="none stated by its makers",
    place=PLACE,
    num_classes=10,
    source=source,
    students=image_students(1, 28, 10),
    settings={
        name: Setting(regime, _RECIPE)
        for name, regime in standard(60_000, 10, few=1000, small=5000, dev=500, imbalance=50.0).items()
    },
)
