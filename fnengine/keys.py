"""A key: what something kept was made from, as a tree of JSON values that can be printed, digested and compared.

Its digest names the file; the key itself lies beside it as JSON, so that a miss can be explained later: two keys of one
thing differ in named fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Key = dict[str, Any]
"""Field -> text, a list of words whose order is of no matter, or a key of its own."""

ABSENT = "none"
"""What `differences` shows for a field that one of the keys does not have."""


@dataclass(frozen=True)
class Difference:
    """A field in which two keys differ."""

    field: str
    """Dotted path, such as `source.layers.py`."""
    old: str
    new: str


@dataclass(frozen=True)
class Nearest:
    """The kept key that is most like a wanted one."""

    name: str
    """Of its file, without the suffix."""
    differences: tuple[Difference, ...]


def text(key: Key) -> str:
    """The key as it is kept."""
    return json.dumps(key, indent=1, sort_keys=True)


def digest(key: Key, length: int = 20) -> str:
    """Hexadecimal digits that differ wherever the key does."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:length]


def described(value: Any) -> Any:
    """A frozen dataclass as a key: its fields, and its class, because two classes may have equal fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: described(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"is": type(value).__name__, **fields}
    return str(value)


def of_files(files: Iterable[Path]) -> Key:
    """File name -> digest of its content, so that a difference names the file that changed."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files}


def flat(key: Key, path: str = "") -> dict[str, str]:
    """Dotted path -> text of every field; a word of a list is a field that says `yes`."""
    found: dict[str, str] = {}
    for name, value in key.items():
        here = f"{path}.{name}" if path else str(name)
        if isinstance(value, list):
            found |= {f"{here}.{word}": "yes" for word in value}
        elif isinstance(value, dict):
            found |= flat(value, here)
        else:
            found[here] = str(value)
    return found


def differences(old: Key, new: Key) -> tuple[Difference, ...]:
    """The fields in which two keys differ, in the order of their names."""
    a, b = flat(old), flat(new)
    return tuple(Difference(f, a.get(f, ABSENT), b.get(f, ABSENT)) for f in sorted({*a, *b}) if a.get(f) != b.get(f))


def kept(folder: Path, pattern: str = "*.json") -> dict[str, Key]:
    """Name -> key of everything kept in a folder, newest first; files that are no keys are passed over."""
    found: dict[str, Key] = {}
    for _, file in sorted(((_modified(f), f) for f in folder.glob(pattern)), reverse=True):
        try:
            key = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(key, dict):
            found[file.stem] = key
    return found


def nearest(wanted: Key, kept: dict[str, Key], related: Callable[[Key], bool] = lambda _: True) -> Nearest | None:
    """The related key with the fewest fields that differ, the first of equals; None where none is related.

    Fields of the top count before those within them: an artifact of another torch is nearer than one of another dtype,
    in which every shape differs.
    """
    best: tuple[tuple[int, int], Nearest] | None = None
    for name, key in kept.items():
        if not related(key):
            continue
        found = differences(key, wanted)
        rank = len({d.field.split(".")[0] for d in found}), len(found)
        if best is None or rank < best[0]:
            best = rank, Nearest(name, found)
    return None if best is None else best[1]


def _modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0
