"""Readers of image files and places of data sets, on small files of the true formats, written byte by byte.

Broken ones give one sentence, and nothing half-loaded or half-fetched.
"""

import gzip
import hashlib
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import types
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from l2t.tasks import places, readers
from l2t.tasks.places import Place
from l2t.tasks.readers import File

PIXELS = bytes(range(12))  # 3 images of 2 x 2
IMAGES = b"\0\0\x08\x03" + b"\0\0\0\x03" + b"\0\0\0\x02" + b"\0\0\0\x02" + PIXELS
LABELS = b"\0\0\x08\x01" + b"\0\0\0\x03" + b"\x02\x00\x01"


def images(content: bytes = IMAGES) -> File:
    return File(Path("some-images"), content)


def labels(content: bytes = LABELS) -> File:
    return File(Path("some-labels"), content)


# ---- IDX


def test_idx_images_and_labels():
    x, y = readers.idx_samples(images(), labels(), 3)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert x.tolist() == [
        [[[0, 1], [2, 3]]],
        [[[4, 5], [6, 7]]],
        [[[8, 9], [10, 11]]],
    ]
    assert y.tolist() == [2, 0, 1]


def test_idx_sizes_are_big_endian():
    wide = b"\0\0\x08\x03" + b"\0\0\0\x01" + b"\0\0\x01\x01" + b"\0\0\0\x01" + bytes(257)
    assert readers.idx(images(wide), 3).shape == (1, 257, 1)


@pytest.mark.parametrize("length", range(len(IMAGES)))
def test_an_idx_file_cut_anywhere_is_refused(length):
    with pytest.raises(
        ValueError, match=r"l2t.tasks: some-images must be .*, got .*\. Put the file there again"
    ):
        readers.idx(images(IMAGES[:length]), 3)


@pytest.mark.parametrize(
    ("content", "dims", "sentence"),
    [
        (b"", 3, "must be IDX with magic 00000803, got an empty file"),
        (LABELS, 3, "must be IDX with magic 00000803, got 00000801"),
        (IMAGES, 1, "must be IDX with magic 00000801, got 00000803"),
        (b"\0\0\x0d\x03" + IMAGES[4:], 3, "must be IDX with magic 00000803, got 00000d03"),  # floats
        (IMAGES[:-1], 3, "must be 28 bytes long, as its head says, got 27"),
        (IMAGES + b"\0", 3, "must be 28 bytes long, as its head says, got 29"),
        (IMAGES[:4] + b"\xff\xff\xff\xff" + IMAGES[8:], 3, "must be 17,179,869,196 bytes long, .*, got 28"),
    ],
)
def test_idx_files_of_another_kind_are_refused(content, dims, sentence):
    with pytest.raises(ValueError, match=sentence):
        readers.idx(images(content), dims)


@pytest.mark.parametrize(
    ("content", "num_classes", "sentence"),
    [
        (LABELS, 2, "some-labels must be labels from 0 to 1, got 0 to 2"),
        (
            b"\0\0\x08\x01\0\0\0\x02\0\0",
            3,
            r"one whole number for each of 3 images, got uint8 of shape \(2,\)",
        ),
    ],
)
def test_labels_that_do_not_fit_are_refused(content, num_classes, sentence):
    with pytest.raises(ValueError, match=sentence):
        readers.idx_samples(images(), labels(content), num_classes)


def test_no_images_are_refused():
    nothing = File(Path("none"), b"\0\0\x08\x03" + b"\0\0\0\0" + b"\0\0\0\x02" + b"\0\0\0\x02")
    with pytest.raises(ValueError, match="some-labels must be labels of one image or more, got none"):
        readers.idx_samples(nothing, labels(b"\0\0\x08\x01\0\0\0\0"), 3)


def test_plain_and_gz_files_have_the_same_content(tmp_path):
    (tmp_path / "plain").write_bytes(IMAGES)
    (tmp_path / "packed.gz").write_bytes(gzip.compress(IMAGES))
    assert readers.unpacked(tmp_path / "plain") == readers.unpacked(tmp_path / "packed.gz") == IMAGES


PACKED = gzip.compress(IMAGES, mtime=0)


@pytest.mark.parametrize(
    "content",
    [IMAGES, PACKED[:5], PACKED[:-9], PACKED[:-1], PACKED[:-8] + bytes(8), PACKED[:12] + b"\xff" * 9],
    ids=["not gzip", "in the head", "in the data", "at the end", "another checksum", "scrambled"],
)
def test_a_broken_gz_file_is_refused(tmp_path, content):
    (tmp_path / "broken.gz").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"broken.gz must be a whole gzip file, got .*\. Put the file there again"
    ):
        readers.unpacked(tmp_path / "broken.gz")


# ---- CIFAR


def text(string: bytes) -> bytes:  # SHORT_BINSTRING, what Python 2 called a str
    return b"U" + bytes([len(string)]) + string


def array(rows: int, columns: int, values: bytes, dtype: bytes = b"u1") -> bytes:
    """The opcodes by which Python 2 pickled a NumPy array in protocol 2."""
    start = (
        b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + b"K\0\x85" + text(b"b") + b"\x87R"
    )
    shape = b"J" + struct.pack("<i", rows) + b"M" + struct.pack("<H", columns) + b"\x86"
    of = (
        b"cnumpy\ndtype\n"
        + text(dtype)
        + b"K\0K\1\x87R"
        + b"(K\3"
        + text(b"|")
        + b"NNN"
        + b"J\xff\xff\xff\xff" * 2
    )
    data = b"T" + struct.pack("<i", len(values)) + values
    return start + b"(K\1" + shape + of + b"K\0tb" + b"\x89" + data + b"tb"


def numbers(values: bytes) -> bytes:
    return b"](" + b"".join(b"K" + bytes([value]) for value in values) + b"e"


def batch(key: bytes = b"labels", values: bytes = b"\x03\x09", **items: bytes) -> bytes:
    """A batch of two images: the first all in its channel's number, the second counting."""
    pixels = b"\x0a" * 1024 + b"\x14" * 1024 + b"\x1e" * 1024 + bytes(i % 251 for i in range(3072))
    content = {b"batch_label": text(b"batch 1 of 1"), b"data": array(2, 3072, pixels), key: numbers(values)}
    content |= {name.encode(): value for name, value in items.items()}
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in content.items()) + b"u."


def file(content: bytes) -> File:
    return File(Path("data_batch_1"), content)


@pytest.mark.parametrize("key", ["labels", "fine_labels"])
def test_cifar_batches_of_python_2(key):
    x, y = readers.cifar_batch(file(batch(key.encode())), key, 10)
    assert x.shape == (2, 3, 32, 32)
    assert x.dtype == torch.float32
    assert [x[0, channel].unique().tolist() for channel in range(3)] == [[10], [20], [30]]
    assert x[1, 1, 2, 5] == (1024 + 2 * 32 + 5) % 251  # channel, row, column
    assert y.tolist() == [3, 9]


def test_cifar_batches_of_python_3():
    content = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 0]}
    assert readers.cifar_batch(file(pickle.dumps(content, protocol=4)), "labels", 10)[1].tolist() == [1, 0]


class _Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (pickle.dumps(_Call(os.mkdir, "harm"), protocol=2), "mkdir"),
        (pickle.dumps({b"data": _Call(eval, "1"), b"labels": [0]}), "eval"),
        (pickle.dumps({b"data": Path("x"), b"labels": [0]}), "Path"),
        (b"cos\nmkdir\n(S'harm'\ntR.", "os.mkdir"),
        (b"\x80\x04\x8c\x05numpy\x8c\x0a__loader__\x93.", "numpy.__loader__"),
        (pickle.dumps(_Call(np.ndarray, (1,), np.dtype("O"), b"pointers")), "numpy.dtype 'O8'"),
    ],
)
def test_a_pickle_that_names_anything_else_is_refused_and_does_nothing(tmp_path, monkeypatch, content, named):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=rf"data_batch_1 must be a CIFAR batch, .*, got one that names .*{named}"
    ):
        readers.cifar_batch(file(content), "labels", 10)
    assert not list(tmp_path.iterdir())


def test_a_cifar_batch_cut_anywhere_is_refused():
    whole = batch()
    for length in [*range(0, len(whole), 97), *range(len(whole) - 20, len(whole))]:
        with pytest.raises(ValueError, match=r"must be a CIFAR batch, .*, got one that cannot be read"):
            readers.cifar_batch(file(whole[:length]), "labels", 10)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (pickle.dumps([1]), "got a list without them"),
        (batch(b"coarse_labels"), "got a dict without them"),
        (
            batch(data=array(1, 3071, bytes(3071))),
            r"data of uint8 and shape \(N, 3072\), got uint8 \(1, 3071\)",
        ),
        (batch(data=array(2, 3072, bytes(6144), b"i1")), r"data of uint8 .*, got int8 \(2, 3072\)"),
        (batch(data=numbers(b"\0")), "data of uint8 .*, got list"),
        (batch(labels=text(b"ab")), "with labels as a list of whole numbers, got bytes"),
        (batch(labels=b"](G" + struct.pack(">d", 0.5) + b"K\0e"), "as a list of whole numbers, got list"),
        (batch(values=b"\0"), r"one whole number for each of 2 images, got int64 of shape \(1,\)"),
        (batch(values=b"\0\x0a"), "data_batch_1 must be labels from 0 to 9, got 0 to 10"),
        (b"not a pickle", "cannot be read"),
    ],
)
def test_cifar_batches_of_another_kind_are_refused(content, sentence):
    with pytest.raises(ValueError, match=sentence):
        readers.cifar_batch(file(content), "labels", 10)


def archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_files_in_an_archive(tmp_path):
    path = archive(tmp_path / "all.tar.gz", {"in/readme": b"no", "in/b": batch(), "in/a": b"1"})
    assert readers.members(path, ["in/a", "in/b"]) == {"in/a": b"1", "in/b": batch()}
    with pytest.raises(ValueError, match="must be an archive with in/a, in/c, got none of in/c"):
        readers.members(path, ["in/a", "in/c"])
    whole = path.read_bytes()
    for length in range(0, 80, 5):
        path.write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=r"all.tar.gz must be (a whole \.tar\.gz|an archive with in/a, in/b), got"
        ):
            readers.members(path, ["in/a", "in/b"])


# ---- folders of images


def png(pixels: np.ndarray) -> bytes:
    """A PNG file of (H, W) grey or (H, W, 3) colour pixels of one or, grey ones, two bytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = pixels.shape[:2]
    depth, kind = 8 * pixels.dtype.itemsize, 2 if pixels.ndim == 3 else 0
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in pixels)  # filter 0
    parts = chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def colours(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_an_image_of_the_right_size_keeps_its_pixels(tmp_path):
    (tmp_path / "a.png").write_bytes(png(colours(8, 8)))
    assert readers.image(tmp_path / "a.png", 8).tolist() == colours(8, 8).transpose(2, 0, 1).tolist()


def test_an_image_is_cut_to_its_middle_and_resampled(tmp_path):
    sides = np.full((8, 24), 7, np.uint8)
    sides[:, :3] = sides[:, 21:] = 255
    (tmp_path / "a.png").write_bytes(png(sides))  # the middle square is columns 8 to 15
    found = readers.image(tmp_path / "a.png", 4)
    assert found.shape == (3, 4, 4)
    assert (found == 7).all()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "must be an image that Pillow can read, got cannot identify"),
        (png(colours(40, 40))[:900], "must be an image that Pillow can read, got"),
        (png(colours(40, 40))[:-700] + bytes(700), "must be an image that Pillow can read, got"),
        (png(np.zeros((4, 4), np.uint16)), "must be an image of 8 bits a channel, got Pillow's mode I"),
    ],
    ids=["empty", "cut", "scrambled", "16 bits"],
)
def test_a_broken_image_is_refused(tmp_path, content, sentence):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.png {sentence}") as caught:
        readers.image(tmp_path / "a.png", 8)
    assert str(caught.value).endswith(". Mend it, or take it out of your folder.")  # which nothing fetches


def test_images_need_pillow(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"l2t.folder: the package pillow must be installed"):
        readers.image(tmp_path / "a.png", 8)


def test_classes_are_the_sorted_folders(tmp_path):
    for name in ("b/2.png", "b/1.JPG", "a/x.jpeg", "a/notes.txt", "a/.hidden.png", ".cache/x.png", "c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = readers.class_files(tmp_path)
    assert found == {"a": [tmp_path / "a/x.jpeg"], "b": [tmp_path / "b/1.JPG", tmp_path / "b/2.png"]}
    assert list(found) == ["a", "b"]
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match=r"/c must be a folder of images \(\.png, .*\), got none"):
        readers.class_files(tmp_path)
    with pytest.raises(ValueError, match=r"a folder of images for each of two classes or more, got 0"):
        readers.class_files(tmp_path / "a")


# ---- places

SUMS = {
    "images": "sha256:" + hashlib.sha256(IMAGES).hexdigest(),
    "labels": "md5:" + hashlib.md5(LABELS).hexdigest(),
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    monkeypatch.setenv("L2T_DATA", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Place("toy", SUMS, installed=str(tmp_path / "usr" / "share" / "toy"))


def put(folder: Path, content: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)


BOTH = {"images": IMAGES, "labels": LABELS}


def test_folders_are_looked_through_in_their_order(place, tmp_path):
    for folder in ("usr/share/toy", "cache/l2t/toy", "mine/toy"):  # the last first
        put(tmp_path / folder, BOTH)
        assert set(place.paths().values()) == {tmp_path / folder / name for name in BOTH}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {name: file.content for name, file in place.read().items()} == BOTH
    assert place.checksums() == [(tmp_path / "mine/toy" / name, SUMS[name], True) for name in BOTH]


def test_the_cache_is_in_the_home_where_nothing_else_is_said(place, tmp_path, monkeypatch):
    monkeypatch.delenv("L2T_DATA")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place.folders()[0] == tmp_path / ".cache" / "l2t" / "toy"


def test_without_a_home_only_what_needs_a_folder_says_so(place, monkeypatch):
    for name in ("L2T_DATA", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where there is none
    with pytest.raises(FileNotFoundError, match=r"Run: l2t data toy\."):
        place.paths()
    with pytest.raises(
        FileNotFoundError, match=r"got ~/\.cache/l2t/toy and no home directory\. Set L2T_DATA"
    ):
        place.fetch()


def test_packed_files_are_found_and_checked_by_their_content(place, tmp_path):
    put(tmp_path / "mine/toy", {"images.gz": gzip.compress(IMAGES), "labels": LABELS})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert place.read()["images"] == File(tmp_path / "mine/toy/images.gz", IMAGES)


def test_an_archive_stands_for_its_files(place, tmp_path):
    place = Place("toy", SUMS, archive="toy.tar.gz", inside="in")
    put(tmp_path / "mine/toy", {})
    archive(tmp_path / "mine/toy/toy.tar.gz", {f"in/{name}": data for name, data in BOTH.items()})
    assert {name: file.content for name, file in place.read().items()} == BOTH
    put(tmp_path / "mine/toy/in", BOTH)  # as tar unpacks it
    assert place.paths()["labels"] == tmp_path / "mine/toy/in/labels"


def test_missing_files_are_told_with_the_command(place, tmp_path):
    sentence = r"files of toy must be in .*mine/toy, got none called images, labels\. Run: l2t data toy\."
    with pytest.raises(FileNotFoundError, match=sentence):
        place.paths()
    put(tmp_path / "mine/toy", {"images": IMAGES})
    put(tmp_path / "cache/l2t/toy", BOTH)  # a half set before a whole one is no reason to look further
    with pytest.raises(FileNotFoundError, match="got none called labels"):
        place.read()


def test_another_content_is_told(place, tmp_path):
    put(tmp_path / "mine/toy", BOTH | {"labels": LABELS[:-1] + b"\0"})
    with pytest.warns(
        UserWarning, match="labels must have the checksum md5:.* to be the standard toy, got md5:"
    ):
        place.read()
    assert [standard for _, _, standard in place.checksums()] == [True, False]


# ---- fetching


def tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("#!/bin/sh\n" + script)
    (folder / name).chmod(0o755)


@pytest.fixture
def debian(place, tmp_path, monkeypatch) -> Place:
    """A place with a package that a false apt-get downloads; dpkg-deb is the true one."""
    if not shutil.which("dpkg-deb"):
        pytest.skip("no dpkg-deb here")
    package = tmp_path / "package"
    put(package / "usr/share/toy", {"images.gz": gzip.compress(IMAGES), "labels": LABELS})
    put(
        package / "DEBIAN", {"control": b"Package: toy\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\n"}
    )
    put(package / "DEBIAN", {"control": (package / "DEBIAN/control").read_bytes() + b"Description: toy\n"})
    subprocess.run(
        ["dpkg-deb", "--build", package, tmp_path / "toy.deb"], check=True, stdout=subprocess.DEVNULL
    )
    tool(
        tmp_path / "bin",
        "apt-get",
        f'[ "$1 $2" = "download toy-data" ] && cp {tmp_path}/toy.deb toy_1_all.deb',
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return Place("toy", SUMS, debian="toy-data", installed="/usr/share/toy")


def test_fetching_from_debian_puts_checked_files_into_the_first_folder(debian, tmp_path):
    debian.fetch()
    assert sorted(path.name for path in (tmp_path / "mine/toy").iterdir()) == ["images.gz", "labels"]
    assert {name: file.content for name, file in debian.read().items()} == BOTH


def test_what_is_not_the_standard_content_is_not_kept(debian, tmp_path):
    other = Place("toy", SUMS | {"labels": "md5:00"}, debian="toy-data", installed="/usr/share/toy")
    with pytest.raises(ValueError, match="fetched labels of toy must have the checksum md5:00, got another"):
        other.fetch()
    assert not list((tmp_path / "mine/toy").iterdir())


def test_a_package_without_the_files_is_told(debian, tmp_path):
    other = Place("toy", SUMS | {"more": "md5:00"}, debian="toy-data", installed="/usr/share/toy")
    with pytest.raises(FileNotFoundError, match="got none called more"):
        other.fetch()
    assert not list((tmp_path / "mine/toy").iterdir())


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        (
            "echo 'W: a warning' >&2; echo 'E: Unable to locate package toy-data' >&2; exit 100",
            "E: Unable to locate",
        ),
        ("exit 7", "exit code 7"),
        ("echo broken > toy.deb", "toy.deb"),
    ],
)
def test_a_failing_tool_is_quoted(debian, tmp_path, script, sentence):
    tool(tmp_path / "bin", "apt-get", script)
    with pytest.raises(
        OSError, match=rf"l2t.data: toy must be fetched by `.*`, got: .*{sentence}.* try again"
    ):
        debian.fetch()
    assert not list((tmp_path / "mine/toy").iterdir())


def torchvision(monkeypatch, **classes: object) -> None:
    """A torchvision whose data sets write what they are told to into the folder that the true ones use."""
    package, datasets = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    package.__spec__ = types.SimpleNamespace(name="torchvision")
    vars(datasets).update(classes)
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)


def test_fetching_by_torchvision(place, tmp_path, monkeypatch):
    def toy(root: Path, download: bool) -> None:
        assert download
        put(Path(root) / "Toy/raw", BOTH | {"images.gz": gzip.compress(IMAGES)})

    def cifar(root: Path, download: bool) -> None:
        put(Path(root) / "in", BOTH)
        archive(Path(root) / "toy.tar.gz", {f"in/{name}": data for name, data in BOTH.items()})

    def broken(root: Path, download: bool) -> None:
        put(Path(root) / "in", {"images": IMAGES})
        raise RuntimeError("no net")

    torchvision(monkeypatch, Toy=toy, Cifar=cifar, Broken=broken)
    Place("toy", SUMS, torchvision="Toy").fetch()
    Place("cifar", SUMS, archive="toy.tar.gz", inside="in", torchvision="Cifar").fetch()
    for name in ("toy", "cifar"):
        assert sorted(path.name for path in (tmp_path / "mine" / name).iterdir()) == ["images", "labels"]
    with pytest.raises(
        OSError, match=r"by `torchvision.datasets.Broken`, got: no net\. Look whether the net is there"
    ):
        Place("broken", SUMS, torchvision="Broken").fetch()
    assert not list((tmp_path / "mine/broken").iterdir())


def test_without_a_tool_the_files_are_named(place, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(places.importlib.util, "find_spec", lambda name: None)
    for archive, what in (("", "each as .gz"), ("toy.tar.gz", "toy.tar.gz")):
        sentence = (
            rf"toy must be fetched by a tool .*Put images, labels \(or {what}\) into .*mine/toy, or install"
        )
        with pytest.raises(FileNotFoundError, match=sentence):
            Place("toy", SUMS, archive=archive, debian="toy-data", torchvision="Toy").fetch()
