"""Where the files of a data set lie, what they must be, and how they are fetched.

A folder of the data set's name is looked for in ``$L2T_DATA``, then in ``~/.cache/l2t`` (or
``$XDG_CACHE_HOME/l2t``), then where Debian's package puts it. Nothing is fetched but by `fetch`, which
`l2t data NAME` calls. What the files hold is not here (see ``readers.py``).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from l2t import check
from l2t.tasks.readers import File, members, unpacked


@dataclass(frozen=True)
class Place:
    """The files of a data set.

    Attributes:
        name: of the data set and of its folder.
        files: the files' names and the checksums of their contents, unpacked, as ``"sha256:..."`` or, where
            the source tells no other, ``"md5:..."``. A file may also lie there as ``<name>.gz``.
        archive: a .tar.gz that may lie there in place of them, or ``""``.
        inside: the folder that they are in within the archive, and may be in within this one.
        debian: a Debian package that brings them, or ``""``.
        installed: where that package puts them.
        torchvision: the class of ``torchvision.datasets`` that downloads them, or ``""``.
    """

    name: str
    files: Mapping[str, str]
    archive: str = ""
    inside: str = ""
    debian: str = ""
    installed: str = ""
    torchvision: str = ""

    def folders(self) -> list[Path]:
        """Where the files are looked for, in this order; `fetch` puts them into the first.

        Without a home directory its ``~`` stays as it is, and nothing is there.
        """
        root = os.environ.get("L2T_DATA")
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "l2t"
        found = [*([Path(os.path.expanduser(root))] if root else []), cache]
        return [
            *(folder / self.name for folder in found),
            *([Path(self.installed)] if self.installed else []),
        ]

    def _in(self, folder: Path) -> dict[str, Path]:
        """The paths of those files that lie in a folder; of the archive where it takes their place."""
        found = {}
        for name in self.files:
            for path in (folder / name, folder / f"{name}.gz", folder / self.inside / name):
                if os.path.isfile(path):  # of which Path.is_file raises where it may not look
                    found[name] = path
                    break
        archive = folder / self.archive
        if len(found) < len(self.files) and self.archive and os.path.isfile(archive):
            return dict.fromkeys(self.files, archive)
        return found

    def paths(self) -> dict[str, Path]:
        """The path of each file, all in the first folder that has any of them.

        Raises:
            FileNotFoundError: no folder has any, or that one lacks some.
        """
        for folder in self.folders():
            if found := self._in(folder):
                break
        else:
            folder = self.folders()[0]
        if missing := [name for name in self.files if name not in found]:
            raise check.data_missing(self.name, folder, missing)
        return found

    def checksums(self) -> list[tuple[Path, str, bool]]:
        """Each file's path, the checksum of its content, and whether that is the standard one.

        Raises:
            FileNotFoundError, ValueError: as `read`.
        """
        found = []
        for name, (path, content) in _contents(self.paths(), self.inside).items():
            checksum = digest(content, self.files[name])
            found.append((path, checksum, checksum == self.files[name]))
        return found

    def read(self) -> dict[str, File]:
        """All files, by name. A content that is not the standard one is told by a warning.

        Raises:
            FileNotFoundError: as `paths`.
            ValueError: for a broken archive.
        """
        contents = _contents(self.paths(), self.inside)
        for name, (path, content) in contents.items():
            if (found := digest(content, self.files[name])) != self.files[name]:
                warnings.warn(check.data_not_standard(self.name, path, self.files[name], found), stacklevel=2)
        return contents

    def fetch(self) -> None:
        """Fetches the files into the first of `folders`: each is checked before the first one is put there.

        Raises:
            FileNotFoundError: there is no way to fetch them on this machine, or no folder for them.
            OSError: it failed.
            ValueError: what came is not the standard content.
        """
        target = self.folders()[0]
        check.data_home(target)
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=target) as part:
            if self.debian and shutil.which("apt-get") and shutil.which("dpkg-deb"):
                folder = self._from_debian(Path(part))
            elif self.torchvision and importlib.util.find_spec("torchvision"):
                folder = self._from_torchvision(Path(part))
            else:
                raise check.data_not_fetched(self.name, target, list(self.files), self.archive)
            found = self._in(folder)
            if missing := [name for name in self.files if name not in found]:
                raise check.data_missing(self.name, folder, missing)
            for name, (path, content) in _contents(found, self.inside).items():
                if digest(content, self.files[name]) != self.files[name]:
                    raise check.data_corrupted(self.name, path.name, self.files[name])
            for path in set(found.values()):
                os.replace(path, target / path.name)

    def _from_debian(self, part: Path) -> Path:
        """Downloads the package by apt-get, which shows its own progress, and unpacks it into ``part``."""
        for command in (["apt-get", "download", self.debian], ["dpkg-deb", "-x"]):
            files = [*map(str, part.glob("*.deb")), "."] if command[0] == "dpkg-deb" else []
            done = subprocess.run([*command, *files], cwd=part, stderr=subprocess.PIPE, text=True)
            if done.returncode != 0:
                said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                raise check.data_fetch_failed(self.name, " ".join(command), said[-1])
        return part / self.installed.lstrip("/")

    def _from_torchvision(self, part: Path) -> Path:
        """Downloads the files by torchvision, which shows its own progress, into ``part``."""
        datasets = importlib.import_module("torchvision.datasets")
        try:
            getattr(datasets, self.torchvision)(part, download=True)
        except Exception as error:  # whatever the net or torchvision says
            raise check.data_fetch_failed(
                self.name, f"torchvision.datasets.{self.torchvision}", str(error)
            ) from error
        return part if self.archive else part / self.torchvision / "raw"


def digest(content: bytes, like: str) -> str:
    """The checksum of a content by the algorithm that ``like`` names, in its form.

    Example:
        >>> digest(b"abc", "md5:")
        'md5:900150983cd24fb0d6963f7d28e17f72'
    """
    algorithm = like.partition(":")[0]
    return f"{algorithm}:{hashlib.new(algorithm, content, usedforsecurity=False).hexdigest()}"


def _contents(paths: Mapping[str, Path], inside: str) -> dict[str, File]:
    """Reads files as `Place._in` has found them."""
    (first, *others) = set(paths.values())
    if first.name.endswith(".tar.gz") and not others:
        found = members(first, [f"{inside}/{name}" for name in paths])
        return {name: File(first / inside / name, found[f"{inside}/{name}"]) for name in paths}
    return {name: File(path, unpacked(path)) for name, path in paths.items()}
