"""The only module that reads or sets the process's environment; imported before torch, and free of it."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Where compiled artifacts and native kernels are kept: FNENGINE_CACHE, else XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("FNENGINE_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fnengine"


def threads() -> int:
    """Threads a step may use: FNENGINE_THREADS, else the processors this process may run on."""
    own = os.environ.get("FNENGINE_THREADS")
    if own:
        return max(1, int(own))
    return len(os.sched_getaffinity(0))
