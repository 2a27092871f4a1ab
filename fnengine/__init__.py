"""A functional LLM engine: pure steps over explicit state, compiled, batched and served.

Names below are loaded on first use, so that `import fnengine` costs milliseconds and brings no torch.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Choice": "llm",
    "Completion": "llm",
    "Engine": "engine",
    "LLM": "llm",
    "Model": "model",
    "Request": "host.request",
    "Runtime": "runtime",
    "Sampling": "host.request",
    "Sequence": "runtime",
    "Settings": "settings",
    "Stop": "host.request",
    "load": "load",
    "sample": "sampling",
    "verify": "sampling",
}
"""Public name -> the module it lives in."""

__all__ = ["__version__", *sorted(_HOME)]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:
    from fnengine.engine import Engine
    from fnengine.host.request import Request, Sampling, Stop
    from fnengine.llm import LLM, Choice, Completion
    from fnengine.load import load
    from fnengine.model import Model
    from fnengine.runtime import Runtime, Sequence
    from fnengine.sampling import sample, verify
    from fnengine.settings import Settings

# `kernels/` and `graphs/` stand beside this folder in a checkout and inside it once installed. In a checkout the
# package's search path gets the checkout's root as well, so that `fnengine.kernels` is found there; nothing becomes
# importable under a bare top-level name by this.
_ROOT = Path(__file__).resolve().parent.parent
if not (_ROOT / "fnengine" / "kernels").is_dir() and (_ROOT / "kernels" / "contract.py").is_file():
    __path__.append(str(_ROOT))


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fnengine' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fnengine.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
