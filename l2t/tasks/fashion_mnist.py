"""`fashion-mnist`: 70,000 pictures of ten kinds of clothing, 28 x 28 grey pixels (Xiao, Rasul and Vollgraf
2017, arXiv 1708.07747).

60,000 are the pool, the other 10,000 the standard test set.
"""

from __future__ import annotations

from l2t.tasks.networks import image_students
from l2t.tasks.places import Place
from l2t.tasks.readers import idx_samples
from l2t.tasks.regimes import standard
from l2t.tasks.task import Setting, Source, Task

PLACE = Place(
    name="fashion-mnist",
    files={
        "train-images-idx3-ubyte": "sha256:c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "sha256:bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "sha256:5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "sha256:0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    debian="dataset-fashion-mnist",
    installed="/usr/share/datasets/fashion-mnist",
    torchvision="FashionMNIST",
)


def source() -> Source:
    """Pool and test set as their files have them, (N, 1, 28, 28)."""
    pool_x, pool_y, test_x, test_y = PLACE.read().values()
    return Source(idx_samples(pool_x, pool_y, 10), idx_samples(test_x, test_y, 10))


_RECIPE = {"steps": 300, "batch_size": 50, "updates": 60}

TASK = Task(
    name="fashion-mnist",
    title="70,000 pictures of clothing, 28 x 28 grey pixels",
    origin="Zalando Research (Xiao, Rasul and Vollgraf 2017), in Debian's package dataset-fashion-mnist",
    licence="MIT",
    place=PLACE,
    num_classes=10,
    source=source,
    students=image_students(1, 28, 10),
    settings={
        name: Setting(regime, _RECIPE)
        for name, regime in standard(60_000, 10, few=1000, small=5000, dev=500, imbalance=50.0).items()
    },
)
