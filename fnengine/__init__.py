"""A functional LLM engine: pure steps over explicit state, compiled, batched and served.

Names below are loaded on first use, so that `import fnengine` costs milliseconds and brings no torch.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fnengine import environment, errors

__version__ = "0.1.0"

_HOME = {
    "Choice": "llm",
    "Completion": "llm",
    "Engine": "engine",
    "LLM": "llm",
    "Model": "model",
    "Reader": "reader",
    "Request": "host.request",
    "Runtime": "runtime",
    "Sampling": "host.request",
    "Sequence": "runtime",
    "Settings": "settings",
    "Speculate": "host.request",
    "Stop": "host.request",
    "Verdict": "vectors",
    "load": "load",
    "register": "families",
    "sample": "sampling",
    "strategy": "decoding.strategy",
    "verify": "sampling",
}
"""Public name -> the module it lives in."""

__all__ = [
    "LLM",
    "Choice",
    "Completion",
    "Engine",
    "Model",
    "Reader",
    "Request",
    "Runtime",
    "Sampling",
    "Sequence",
    "Settings",
    "Speculate",
    "Stop",
    "Verdict",
    "__version__",
    "errors",
    "load",
    "register",
    "sample",
    "strategy",
    "verify",
]

if TYPE_CHECKING:
    from fnengine.decoding.strategy import strategy
    from fnengine.engine import Engine
    from fnengine.families import register
    from fnengine.host.request import Request, Sampling, Speculate, Stop
    from fnengine.llm import LLM, Choice, Completion
    from fnengine.load import load
    from fnengine.model import Model
    from fnengine.reader import Reader
    from fnengine.runtime import Runtime, Sequence
    from fnengine.sampling import sample, verify
    from fnengine.settings import Settings
    from fnengine.vectors import Verdict

_ROOT = Path(__file__).resolve().parent.parent
_BESIDE = {"fnengine.kernels": "contract.py", "fnengine.graphs": "compile.py"}
"""Package -> a file that tells our folder from any other of that name."""


class _Beside:
    """Finds `fnengine.kernels` and `fnengine.graphs` beside this folder, where a checkout has them.

    An installation has them inside it, or its own finder for an editable one; but in a checkout's root `fnengine/`
    hides any installation. Only the two full names are answered, so nothing becomes importable under a bare name
    (Hugging Face has a package called `kernels`, which transformers looks for).
    """

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        folder = _ROOT / name.rpartition(".")[2]
        if name not in _BESIDE or not (folder / _BESIDE[name]).is_file():
            return None
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


sys.meta_path.append(_Beside)  # last: an installation's own finder comes first
environment.prepare()  # before torch, which nothing above imports


class _Package(ModuleType):
    """This package, where importing the module `fnengine.load` does not hide the function of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fnengine' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fnengine.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
