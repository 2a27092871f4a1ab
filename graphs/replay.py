"""A compiled artifact without its compiler: the generated code and its native kernels, loaded in milliseconds.

What Inductor makes of a layer on CPU is a short Python function that allocates buffers and calls kernels, each in a
shared library of its own. Loading it through Inductor imports Inductor (2.5 s of Python, half of a warm start), which
the function itself does not need. Kept here are the function's source and the libraries, in one zip; whatever is not as
expected makes the caller load the artifact the long way.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import hashlib
import importlib.util
import math
import os
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fnengine.environment import setting

POINTER = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"
"""Where a kernel's module looks, when it is loaded, for the address of torch's accessor of tensor data."""
SOURCE = "runner.py"


class NotReplayable(Exception):
    """The generated code is of another form than this module knows."""


@dataclass(frozen=True)
class Hooks:
    """What stands between generated code and its kernels and buffers, so that somebody can write down what it does."""

    kernel: Callable[[Callable[..., None], int], Callable[..., None]]
    """(a kernel, where its machine code begins) -> what the code calls."""
    empty: Callable[[Callable[..., torch.Tensor]], Callable[..., torch.Tensor]]
    """The allocator (shape, stride, dtype) of CPU buffers -> what the code calls."""


def keep(module: types.ModuleType, path: Path) -> None:
    """Writes the generated `module` and its kernels to `path`, whole or not at all.

    Raises:
        NotReplayable: the module is of another form, or needs names that `names` does not have.
        OSError: the file cannot be written.
    """
    assert module.__file__ is not None
    source = _runner(Path(module.__file__).read_text())
    kernels = {
        name: f for name, f in vars(module).items() if isinstance(f, types.BuiltinFunctionType) and name in source
    }
    libraries = {}
    for name, function in kernels.items():
        file = getattr(function.__self__, "__file__", None)
        if file is not None and file.endswith(".so"):
            libraries[name] = Path(file).read_bytes()
    missing = _free_names(source) - set(_names()) - set(libraries)
    if missing:
        raise NotReplayable(f"the generated code uses {', '.join(sorted(missing))}")
    descriptor, part = tempfile.mkstemp(dir=path.parent)
    os.close(descriptor)
    with zipfile.ZipFile(part, "w") as archive:
        archive.writestr(SOURCE, source)
        for name, data in libraries.items():
            archive.writestr(f"{name}.so", data)
    os.replace(part, path)


def load(path: Path, hooks: Hooks | None = None) -> Callable[[list[Any]], tuple[Any, ...]]:
    """The generated function: a list of tensors, which it empties -> a tuple of results.

    Raises:
        NotReplayable, OSError, zipfile.BadZipFile, ImportError: load the artifact the long way.
    """
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    source = files.pop(SOURCE, b"").decode()
    space = _names()
    setting(POINTER, str(torch._C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr))  # type: ignore[attr-defined]
    place = path.parent if os.access(path.parent, os.W_OK) else None  # /tmp may be mounted so that nothing in it runs
    with tempfile.TemporaryDirectory(prefix="kernels-", dir=place) as folder:
        for file, data in files.items():
            name = file.removesuffix(".so")
            kernel, at = _kernel(Path(folder) / file, data)
            space[name] = kernel if hooks is None else hooks.kernel(kernel, at)
    if hooks is not None:
        space["empty_strided_cpu"] = hooks.empty(space["empty_strided_cpu"])
    exec(compile(source, str(path), "exec"), space)
    return space["Runner"]([]).call


def _kernel(file: Path, data: bytes) -> tuple[Any, int]:
    """The function in a library, and where its machine code begins; its file may go once it is mapped."""
    name = f"fnengine_{hashlib.sha256(data).hexdigest()[:16]}.kernel"  # the part after the dot names its init function
    if name not in sys.modules:
        file.write_bytes(data)
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        code = ctypes.CDLL(str(file)).kernel
        vars(module)["machine_code"] = ctypes.cast(code, ctypes.c_void_p).value
        sys.modules[name] = module
    module = sys.modules[name]
    return module.kernel, vars(module)["machine_code"]


def _runner(text: str) -> str:
    """The class `Runner` of a generated module."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == "Runner":
            return ast.get_source_segment(text, node) or ""
    raise NotReplayable("the generated code has no Runner")


def _free_names(source: str) -> set[str]:
    """Names that the source reads and neither it nor Python defines."""
    tree = ast.parse(source)
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
    bound = {n.id for n in names if not isinstance(n.ctx, ast.Load)} | {
        n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)
    }
    return {n.id for n in names} - bound - set(dir(builtins))


def _names() -> dict[str, Any]:
    """What generated code may use besides its kernels, under the names it uses."""
    guards = torch._C._dynamo.guards  # type: ignore[attr-defined]
    return {
        "torch": torch,
        "math": math,
        "inf": math.inf,
        "nan": math.nan,
        "aten": torch.ops.aten,
        "device": torch.device,
        "empty_strided": torch.empty_strided,
        "empty_strided_cpu": guards._empty_strided_cpu,
        "reinterpret_tensor": guards._reinterpret_tensor,
        "extern_kernels": types.SimpleNamespace(mm=torch.mm, addmm=torch.addmm, bmm=torch.bmm, baddbmm=torch.baddbmm),
    }
