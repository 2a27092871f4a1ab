"""Flags out of a file: `--config FILE` stands for the flags in it, and what the command line says goes before."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fnengine.errors import ConfigError

FLAG = "--config"


def expand(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(words with the flags of the file in place of `--config`, flag -> file of those that came from there).

    A file is YAML (or JSON, which is YAML): a mapping of flags, with or without dashes, to values. true is the flag,
    false its --no- form, a list several words, a mapping JSON, null nothing.

    Raises:
        ConfigError: the file cannot be read, or is no such mapping.
    """
    end = list(words).index("--") if "--" in words else len(words)
    kept, path, rest = [], None, list(words[:end])
    while rest:
        word = rest.pop(0)
        name, has_value, value = word.partition("=")
        if name != FLAG:
            kept.append(word)
            continue
        if path is not None:
            raise ConfigError("is given twice", where=FLAG, remedy="put the flags into one file")
        if not has_value and not rest:
            raise ConfigError("expected a file", where=FLAG)
        path = value if has_value else rest.pop(0)
    if path is None:
        return list(words), {}
    said = {spelled(w.partition("=")[0]) for w in kept}
    found: list[str] = []
    origins = {}
    for key, value in read(path).items():
        flag = spelled(f"--{key}")
        if flag in said or f"--no-{flag[2:]}" in said or flag.replace("--no-", "--") in said:
            continue
        found += flagged(flag, value, path)
        origins[flag] = path
    return [*kept, *found, *words[end:]], origins


def spelled(word: str) -> str:
    """A flag with dashes, as this program has them."""
    return "--" + word[2:].replace("_", "-") if word.startswith("--") else word


def read(path: str) -> dict[str, Any]:
    """The mapping in a file. Raises as `expand` does."""
    import yaml

    try:
        value = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot read {path}: {e}", where=FLAG) from None
    except (yaml.YAMLError, RecursionError) as e:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(e).split())[:200]}", where=FLAG) from None
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
        raise ConfigError(f"{path} must be a mapping of flags to values", where=FLAG)
    return value


def flagged(flag: str, value: Any, path: str) -> list[str]:
    """A flag and its value as words."""
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, dict):
        return [flag, json.dumps(value)]
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(v, str | int | float) for v in values):
        raise ConfigError(f"{path}: {flag[2:]} must be a text, a number or a list of them", where=FLAG)
    if len(values) == 1:
        return [f"{flag}={values[0]}"]
    return [flag, *map(str, values)]
