"""The default sentence pairs: LibreOffice's help pages and messages, from Debian's packages (MPL-2.0).

The packages are downloaded and unpacked into a temporary folder, and never installed. Paragraphs of the help
are aligned by file and element id, messages by their names. What becomes of the pairs is in ``corpus.py``.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path

from tqdm import tqdm

from l2t import check
from l2t.tasks.places import Place, digest
from l2t.translation.corpus import Corpus, Pairs, cleaned, read_catalogues, split, text_of

SOURCES = ("de", "fr", "es")
ORIGIN = "help pages and messages of LibreOffice, in Debian's packages"
LICENCE = "MPL-2.0"

TESTED: Mapping[str, Mapping[str, str]] = {
    "libreoffice-help-de": {
        "4:7.4.7-1+deb12u14": "sha256:00490b63c509ac96f7f212d6a6e40452d3e0d1f97ccf4b824dd5ec4c01e8277f",
        "4:25.2.3-2+deb13u9": "sha256:252fe175ee7f9db0b4959bc47a88f84a8bbee09f0b56fa3f99103289921a47c9",
    },
    "libreoffice-help-en-us": {
        "4:7.4.7-1+deb12u14": "sha256:8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712",
        "4:25.2.3-2+deb13u9": "sha256:5f5876c55315bef731dd63ab007d9ea247e1120d25320c78dfdd8adfc61eb721",
    },
    "libreoffice-help-es": {
        "4:7.4.7-1+deb12u14": "sha256:9128a84d83d92c8b1c618d90469d16affddb7d1290b09d42a0c5109cb16f0480",
    },
    "libreoffice-help-fr": {
        "4:7.4.7-1+deb12u14": "sha256:c796530d3e95af1ea4d054076682efc8aad2b569ae9513f3d4a776b2df3fd206",
    },
    "libreoffice-l10n-de": {
        "4:7.4.7-1+deb12u14": "sha256:aee22c8e3b3c0431f6e1b0bc66f757ba36c860e2651a05eb050fde4897f06548",
        "4:25.2.3-2+deb13u9": "sha256:9fa176f0715fd8a5a79136fc7f6a670190c262c4866a45a99531b0270112b815",
    },
    "libreoffice-l10n-es": {
        "4:7.4.7-1+deb12u14": "sha256:ec8c42bbef9a1d6053cb32380739fa7551968708205a629a91e82484865d9822",
    },
    "libreoffice-l10n-fr": {
        "4:7.4.7-1+deb12u14": "sha256:111da5e1b8379dc58a127ef76ef85e2b6819da5cb2c5fe73d13b25a0437f988c",
    },
}
"""Checksums of packages by version: those that this file has been tried with."""

_HELP = Path("usr/share/libreoffice/help")
_MESSAGES = Path("usr/lib/libreoffice/program/resource")


def packages(source: str) -> tuple[str, ...]:
    """Debian's packages for a source language.

    Raises:
        ValueError: for a language other than de, fr and es.

    Example:
        >>> packages("fr")
        ('libreoffice-help-en-us', 'libreoffice-help-fr', 'libreoffice-l10n-fr')
    """
    check.known("data", "source language without --from", source, SOURCES)
    return "libreoffice-help-en-us", f"libreoffice-help-{source}", f"libreoffice-l10n-{source}"


def put_by_hand() -> Path:
    """The folder whose packages are taken, where somebody has put them there, in place of a download."""
    return Place("libreoffice", {}).folders()[0]


def build(source: str = "de", seed: int = 0, progress: bool = True) -> Corpus:
    """Fetches the packages and makes a corpus of them, into English.

    Args:
        source: ``"de"``, ``"fr"`` or ``"es"``.
        seed: draws the splits.
        progress: whether a bar shows the pages that have been read. apt-get shows its own.

    Raises:
        FileNotFoundError: no packages and no tool to fetch them on this machine, or they lack what is read.
        OSError: a tool failed.
        ValueError: a package is not what it was when it was tried, or a file in it is broken.
    """
    by_hand = _packages_in(put_by_hand(), source)
    for tool in ["dpkg-deb"] if by_hand else ["apt-get", "dpkg-deb"]:
        if not shutil.which(tool):
            raise check.corpus_tool_missing(tool, packages(source), put_by_hand())
    with tempfile.TemporaryDirectory(prefix="l2t-") as folder:
        part = Path(folder)
        found = {}
        for name, path in (by_hand or _downloaded(source, part)).items():
            found[name] = _examined(name, path)
            _run(["dpkg-deb", "-x", str(path), str(part / "unpacked")], part)
        pairs = cleaned(read_unpacked(part / "unpacked", source, progress))
    return split(pairs, source, "en", {"origin": ORIGIN, "licence": LICENCE, "packages": found}, seed)


def _packages_in(folder: Path, source: str) -> dict[str, Path]:
    """The packages in a folder, if it has them all; of several versions the last by name."""
    found = {name: sorted(folder.glob(f"{name}_*.deb")) for name in packages(source)}
    return {name: paths[-1] for name, paths in found.items()} if all(found.values()) else {}


def _downloaded(source: str, part: Path) -> dict[str, Path]:
    """The packages, downloaded by apt-get, which needs no root for it.

    Where it has no index of packages, or one that is out of date, it makes one in a folder of ours.
    """
    download = ["download", *packages(source)]
    try:
        _run(["apt-get", *download], part, shown=True)
    except OSError:
        (part / "state/lists/partial").mkdir(parents=True)
        ours = ["-o", f"Dir::State={part / 'state'}", "-o", f"Dir::Cache={part / 'cache'}"]
        _run(["apt-get", *ours, "update"], part, shown=True)
        _run(["apt-get", *ours, *download], part, shown=True)
    if found := _packages_in(part, source):
        return found
    raise check.data_fetch_failed("translation", f"apt-get {' '.join(download)}", "no such files")


def _examined(name: str, path: Path) -> dict[str, object]:
    """Version and checksum of a package, and whether it is one that was tried."""
    version = _run(["dpkg-deb", "-f", str(path), "Version"], path.parent).strip()
    checksum = digest(path.read_bytes(), "sha256:")
    tested = TESTED[name].get(version)
    if tested not in (None, checksum):
        raise check.data_corrupted("translation", path.name, str(tested))
    return {"version": version, "checksum": checksum, "tested": tested is not None}


def _run(command: Sequence[str], where: Path, shown: bool = False) -> str:
    """What a command says, unless it is shown to the user; the end of its errors where it fails."""
    done = subprocess.run(
        command, cwd=where, text=True, stdout=None if shown else subprocess.PIPE, stderr=subprocess.PIPE
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise check.data_fetch_failed("translation", " ".join(command), said[-1])
    return done.stdout or ""


# ---- what is in the packages ----


def read_unpacked(root: Path, source: str, progress: bool = True) -> Pairs:
    """Pairs from packages that are unpacked into a folder, as they stand there.

    Args:
        root: holds ``usr``.
        source: language code.
        progress: whether a bar shows the pages that have been read.

    Raises:
        FileNotFoundError: there are no messages.
        ValueError: there are no pages in both languages, or a file is broken.
    """
    ours, english = (root / _HELP / language / "text" for language in (source, "en-US"))
    pages = [(page, english / page.relative_to(ours)) for page in sorted(ours.rglob("*.html"))]
    pages = [(page, other) for page, other in pages if other.is_file()]
    if not pages:
        raise check.corpus_file(root / _HELP, f"a folder with pages in {source} and en-US", "none")
    pairs: Pairs = []
    for page, other in tqdm(pages, disable=not progress, desc="reading", unit="page"):
        left, right = paragraphs(text_of(page)), paragraphs(text_of(other))
        pairs += [(text, right[name]) for name, text in left.items() if name in right]
    return pairs + read_catalogues(root / _MESSAGES, source, "en")


def paragraphs(page: str) -> dict[str, str]:
    """The texts of a page's paragraphs and headings by their ids.

    Example:
        >>> paragraphs('<h1 id="a">Fish &amp; <i>chips</i></h1><p>nameless</p><p id="b">one<br>two</p>')
        {'a': 'Fish & chips', 'b': 'one two'}
    """
    parser = _Page()
    parser.feed(page)
    parser.close()
    return parser.texts


class _Page(HTMLParser):
    """Gathers the text of elements that have an id; of an id that comes twice, the first."""

    elements = ("p", "h1", "h2", "h3", "h4", "h5", "h6")

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.name: str | None = None  # of the element that is open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.elements:
            name = dict(attrs).get("id")
            self.name = None if name in self.texts else name
        elif tag == "br":
            self.handle_data(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in self.elements:
            self.name = None

    def handle_data(self, data: str) -> None:
        if self.name:
            self.texts[self.name] = self.texts.get(self.name, "") + data
