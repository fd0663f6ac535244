"""Files written whole or not at all: to a temporary neighbour, flushed to the disk, renamed over the name.

A reader, or a run that resumes after a kill at any moment, sees the old file or the new one and never a
part of either. Tensors go to safetensors with their settings in its one metadata entry, so that a file
explains itself and two writes of the same content are the same bytes. Nothing here is ever pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from l2t import check

# One entry only: safetensors writes several in no fixed order, and equal content should be equal bytes.
_ENTRY = "l2t"


def write_whole(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write ``content`` (text as UTF-8) to ``path``, by a temporary file beside it and ``os.replace``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write ``content`` as JSON, whole, by :func:`to_json`."""
    write_whole(path, to_json(content) + "\n")


def read_json(path: str | os.PathLike[str], *names: str) -> dict[str, Any]:
    """Read what :func:`write_json` wrote of a mapping.

    Raises:
        ValueError: the file is not whole, or lacks one of the names.
    """
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as error:  # UnicodeDecodeError among them
        raise check.run_file(path, f"what breaks off or is none ({error})") from error
    if not isinstance(content, dict):
        raise check.run_file(path, f"a {type(content).__name__}")
    missing = [name for name in names if name not in content]
    if missing:
        raise check.run_file(path, f"an object without {', '.join(missing)}")
    return content


def to_json(content: Any) -> str:
    """``content`` as JSON; NaN and infinity, which JSON has no numbers for, are null."""
    return json.dumps(_finite(content), indent=1, allow_nan=False)


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if content - content == 0 else None
    if isinstance(content, Mapping):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return content


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    """Write ``tensors`` and the JSON-able record ``about`` into one safetensors file, whole."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(tensors.items())}
    write_whole(path, save(plain, {_ENTRY: json.dumps(about, sort_keys=True)}))


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote: ``(tensors, about)``, on the CPU."""
    with safe_open(str(path), framework="pt", device="cpu") as file:
        about = json.loads((file.metadata() or {}).get(_ENTRY, "{}"))
        tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors, about
