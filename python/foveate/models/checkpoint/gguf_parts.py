"""GGUF files that llama-gguf-split has cut into parts, NAME-00001-of-00003.gguf and so on, read as one model.

The first part has the model's metadata, and every part its own tensors and three keys: split.no, from 0, split.count and
split.tensors.count, of all parts together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from foveate.files.checked import CheckpointError, check, is_there, shown
from foveate.models.checkpoint.gguf_file import GgufFile
from foveate.models.checkpoint.schemas import GGUF

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.ASCII | re.DOTALL)
_NAMED = 4  # missing parts that an error names
_OWN_KEYS = ("split.no", "general.alignment")  # whose values each part may have for itself


class PartName(NamedTuple):
    """What the name of a part says; number counts from 1."""

    model: str
    number: int
    parts: int


def part_name(file: Path) -> PartName | None:
    """None for a file that is not named as a part."""
    found = _PART.fullmatch(file.name)
    return None if found is None else PartName(found[1], int(found[2]), int(found[3]))


def are_parts_of_one(files: Sequence[Path]) -> bool:
    """Whether the names say that all of these files are parts of one model; some may be missing."""
    names = [part_name(file) for file in files]
    return None not in names and len({(name.model, name.parts) for name in names if name is not None}) == 1


def read_gguf(path: Path) -> GgufFile:
    """A whole file, or the first part with the tensors of all parts, whichever part `path` is.

    The names of the other parts come from that of `path` alone, so nothing outside its folder is read. CheckpointError for parts that
    are missing, renamed, damaged or of another model.
    """
    file = _checked(GgufFile(path))
    count = file.fields.get("split.count", 1)
    if count <= 1:
        return file
    name = part_name(path)
    number = file.fields.get("split.no")
    if number is None:
        raise CheckpointError(f"{path} is one of {count} parts of a model and lacks split.no in its metadata")
    if name is None or (name.number, name.parts) != (number + 1, count):
        raise CheckpointError(
            f"{path} is part {number + 1} of {count} of a model by its metadata, and not by its name; name the parts as they were "
            f"published, NAME-{number + 1:05d}-of-{count:05d}.gguf"
        )
    paths = [path.with_name(f"{name.model}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [part.name for part in paths if not is_there(part)]
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise CheckpointError(
            f"{path} is one of {count} parts of a model, and {path.parent} lacks {', '.join(missing[:_NAMED])}{more}; download what is "
            "missing into that folder"
        )
    return _joined([file if part == path else _checked(GgufFile(part)) for part in paths])


def _checked(file: GgufFile) -> GgufFile:
    check(file.fields, GGUF, file.path)
    return file


def _joined(parts: Sequence[GgufFile]) -> GgufFile:
    first = parts[0]
    total = first.fields.get("split.tensors.count")
    if total is None:
        raise CheckpointError(f"{first.path} lacks split.tensors.count in its metadata")
    tensors = dict(first.tensors)
    for number, part in enumerate(parts):
        _check_belongs(part, first, {"split.no": number, "split.count": len(parts), "split.tensors.count": total})
        if part is first:
            continue
        twice = next((name for name in part.tensors if name in tensors), None)
        if twice is not None:
            raise CheckpointError(
                f"{part.path} has the tensor {twice[:80]!r}, which a part before it has too; download the parts again"
            )
        tensors |= part.tensors
    if len(tensors) != total:
        raise CheckpointError(
            f"the {len(parts)} parts of {first.path} have {len(tensors)} tensors, and split.tensors.count={total}; download them again"
        )
    first.tensors, first.paths = tensors, [part.path for part in parts]
    return first


def _check_belongs(part: GgufFile, first: GgufFile, wanted: dict[str, int]) -> None:
    """wanted: the keys of a split, which every part has; any other key that a part repeats has the first part's value."""
    repeated = {key: first.fields[key] for key in part.fields if key in first.fields and key not in _OWN_KEYS}
    for key, value in (repeated | wanted).items():
        found = part.fields.get(key)
        if found != value:
            raise CheckpointError(
                f"{part.path} has {key}={shown(found)}, and a part of {first.path} in its place has {shown(value)}: it is of another "
                "model, or renamed; take all parts from one place"
            )
