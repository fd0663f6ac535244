"""The settings that benchmarks/teaching.py runs and docs/results.md reports: one line of commands each.

A setting says what `l2t teach` and `l2t compare` are given beside task, regime and student; what it does not
say is the default of the task. To add one, add it to SETTINGS, TRANSLATORS or TRANSFERS, run `python
benchmarks/teaching.py NAME`, and `make results`. A setting stays here when it is lost: the table is of what
was tried.

Students are many where they are cheap: what dynamic and static losses differ in is half a point. Where a
first comparison of twenty had been looked at, the students are others (``--seed 1``).

A course of a translator is long, so its arms are those that were asked about: maximum likelihood, label
smoothing of three strengths (for the first LSTM of five, up to where it is best), a focal loss, and the
static taught loss beside the dynamic one. After Holm's correction a win takes so many standard deviations of
a pair's difference: of 8 tests 2.4 with 5 students and 1.1 with 10, of 6 tests 2.2 and 1.1. Expected minutes
of one core, the arms' for 3 to 5 rates each:

    translator                     steps   a course   arms   students   all arms   a teacher
    translation-lstm                 700        2.3      9         10   269 to 310       130
    translation-lstm-windows-20      700        2.3      7          5   129 to 161        70
    translation-transformer          500        2.0      7         10   182 to 210        85

A teacher of the first is 24 windows of 700 steps, of which each takes two times its steps, beside a pool
and a trial of 6 runs; those of the others are 160 windows of 20, of which each takes 4 to 5 times its steps,
beside 2 pools and a trial of 6 runs.
"""

from __future__ import annotations

from typing import NamedTuple

# What `l2t teach` is given for a teacher of the kind, and what it calls its run, before the seed.
KINDS = {
    "dynamic": ("", "seed"),
    "static": ("--slots 1", "static"),
    "weight-net": ("--teacher weight-net", "weight-net"),
}


# Where noise or a long tail make weights of rows the classic thing to learn.
BESIDE = ("dynamic", "static", "weight-net")


class Setting(NamedTuple):
    """A task, regime and student, with what taught and compared there.

    Attributes:
        task: of `l2t teach`.
        regime: of the task.
        student: of the task.
        teach: further arguments of `l2t teach`.
        compare: further arguments of `l2t compare`.
        kinds: kinds of teachers, of KINDS; each is taught with every seed.
        seeds: of the teachers.
        students: fresh students an arm.
    """

    task: str
    regime: str
    student: str
    teach: str = ""
    compare: str = ""
    kinds: tuple[str, ...] = ("dynamic", "static")
    seeds: tuple[int, ...] = (0, 1, 2)
    students: int = 20


class Transfer(NamedTuple):
    """Teachers of a setting that teach elsewhere.

    Attributes:
        source: the setting that taught them, a name in SETTINGS.
        task: where they teach.
        regime: of the task.
        student: of the task.
        transfer: further arguments of `l2t transfer`, for example ``--steps 1000``.
        students: fresh students an arm.
    """

    source: str
    task: str
    regime: str
    student: str
    transfer: str = ""
    students: int = 20


class Translator(NamedTuple):
    """A translator of the pairs that `l2t data translation` makes, with what is taught and compared.

    Attributes:
        student: of `l2t teach translation`.
        teach: its further arguments.
        compare: further arguments of `l2t compare`.
        kinds: as in :class:`Setting`.
        seeds: of the teachers.
        students: fresh students an arm.
    """

    student: str
    teach: str = ""
    compare: str = ""
    kinds: tuple[str, ...] = ("dynamic", "static")
    seeds: tuple[int, ...] = (0,)
    students: int = 10


SETTINGS = {
    "mnist1d-mlp-clean": Setting("mnist1d", "clean", "mlp", compare="--seed 1", students=60),
    "mnist1d-mlp-few": Setting("mnist1d", "few", "mlp", compare="--seed 1", students=60),
    "mnist1d-mlp-symmetric": Setting("mnist1d", "symmetric", "mlp", kinds=BESIDE, students=60),
    "mnist1d-mlp-pair-flip": Setting("mnist1d", "pair-flip", "mlp", compare="--seed 1", students=60),
    "mnist1d-mlp-long-tail": Setting("mnist1d", "long-tail", "mlp", kinds=BESIDE, students=60),
    "mnist1d-relu-clean-800": Setting("mnist1d", "clean", "mlp-relu", "--set steps=800", students=60),
    "mnist1d-cnn-clean": Setting("mnist1d", "clean", "cnn", students=40),
    "digits-mlp-clean": Setting("digits", "clean", "mlp", students=60),
    "digits-mlp-few": Setting("digits", "few", "mlp", students=60),
    "digits-mlp-symmetric": Setting("digits", "symmetric", "mlp", kinds=BESIDE, students=60),
    "digits-mlp-pair-flip": Setting("digits", "pair-flip", "mlp", students=60),
    "digits-mlp-long-tail": Setting("digits", "long-tail", "mlp", students=60),
    "mnist-5k-mlp-clean": Setting("mnist-5k", "clean", "mlp", students=40),
    "mnist-5k-mlp-symmetric": Setting("mnist-5k", "symmetric", "mlp", students=40),
    "mnist-cnn-clean-100": Setting(
        "mnist", "clean", "cnn", "--set steps=100 batch_size=32", "--seed 1", students=60
    ),
    "fashion-mnist-cnn-clean-200": Setting(
        "fashion-mnist", "clean", "cnn", "--set steps=200 batch_size=32", students=40
    ),
    "fashion-mnist-mlp-symmetric": Setting("fashion-mnist", "symmetric", "mlp", students=40),
}

# Shorter than the runs of `l2t train translation`: an arm is a dozen of them.
_WINDOWS = "--window 20 --updates 40 --measure calibrated-cross-entropy --set refresh=20 lr_warmup=100"
_ARMS = "--arms maximum-likelihood label-smoothing-0.05 label-smoothing-0.1 label-smoothing-0.2 focal-1"
# From the strongest fixed loss on, at the rate that all arms are tuned to. Windows are whole runs: what
# smoothing does early pays late, which windows of 100 steps do not see, and over a whole run the reverse pass
# gives noise.
_WHOLE = (
    "--lr 0.006 --smoothing 0.8 --weight shared --features progress --window 700 --updates 6 --students 4 "
    "--set gradient=evolution spread=0.4 dev_batches=20 lr_warmup=100 refresh=6 smoothing_range=4 "
    "teacher_lr=0.2 warmup=2"
)
TRANSLATORS = {
    "translation-lstm": Translator(
        "lstm",
        f"--steps 700 --slots 8 {_WHOLE}",
        f"{_ARMS} label-smoothing-0.4 label-smoothing-0.8",
    ),
    "translation-lstm-windows-20": Translator("lstm", f"--steps 700 {_WINDOWS}", _ARMS, students=5),
    "translation-transformer": Translator("transformer", f"--steps 500 {_WINDOWS}", _ARMS),
}

TRANSFERS = {
    "mnist1d-mlp-clean-to-relu": Transfer("mnist1d-mlp-clean", "mnist1d", "clean", "mlp-relu"),
    # A full matrix is about the classes of its data set, a loss that all classes share about noise.
    "mnist1d-mlp-symmetric-to-digits": Transfer("mnist1d-mlp-symmetric", "digits", "symmetric", "mlp"),
    "mnist1d-mlp-clean-to-digits": Transfer("mnist1d-mlp-clean", "digits", "clean", "mlp"),
    "mnist1d-mlp-clean-to-1000-steps": Transfer(
        "mnist1d-mlp-clean", "mnist1d", "clean", "mlp", "--steps 1000"
    ),
}
