"""Weights in their final form, kept on disk: a start reads them in one piece instead of fusing and packing them.

One file a (checkpoint, dtype, layout): the header of safetensors and the tensors, each beginning at a multiple of 64
bytes, under the paths of the params tree. Its key lies beside it as JSON (`keys.py`). It is read, not mapped: pages of
a file are small, and products read large ones half as fast again (`kernels/memory.py`), which is more than mapping
saves.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fnengine import keys, tree
from fnengine.environment import cache_dir
from fnengine.kernels import linear, memory, native, quantized
from fnengine.leaves import QUANTIZED, Packing
from fnengine.params import abstract, arrays
from fnengine.spec import ModelSpec

Key = keys.Key

ALIGN = 64
"""Bytes of a cache line, which no vector load should straddle."""

KINDS = ("tiled", *QUANTIZED)
"""Layouts that are plain tensors and differ from what a checkpoint holds."""

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8"}
"""safetensors' names of the dtypes that leaves have."""


LONGEST_HEADER = 1 << 24
"""Bytes of a checkpoint file that are looked at: a GGUF file does not begin with the length of its header."""


def folder() -> Path:
    """Where they are kept."""
    return cache_dir() / "weights"


def key(files: list[Path], spec: ModelSpec, dtype: torch.dtype, how: Packing) -> keys.Key:
    """What packed weights are made from: these checkpoint files, by size, time and header, laid out so by this code."""
    here = Path(__file__).parent
    made_by = [here / f"{name}.py" for name in ("checkpoint", "experts", "gguf_file", "leaves", "packed", "params")]
    made_by += [Path(str(module.__file__)) for module in (linear, quantized)]
    made_by += [native.SOURCE / name for name in ("linear.cpp", "quantized.cpp")]
    return {
        "checkpoint": {os.path.relpath(f, files[0].parent): _identity(f) for f in files},
        "arrays": keys.digest({path: keys.described(info) for path, info in arrays(abstract(spec))}),
        "dtype": str(dtype).removeprefix("torch."),
        "layout": {
            "kind": how.kind,
            "atom": how.atom,
            "experts": how.experts,
            **{f"{N} x {K}": kind for (N, K), kind in how.table},
        },
        "source": keys.of_files(made_by),
    }


def path_of(key: keys.Key) -> Path:
    """Where weights of this key are, or would be."""
    return folder() / f"{keys.digest(key)}.safetensors"


def save(key: keys.Key, params: dict[str, Any]) -> Path:
    """Keeps a params tree on CPU. Whole files are renamed, the key before the weights, so that processes may race.

    Raises:
        OSError: the cache cannot be written, for want of space say.
    """
    path = path_of(key)
    tensors = sorted(tree.items(params), key=lambda item: item[1].nbytes % ALIGN != 0)  # odd sizes come last
    table, at = {}, 0
    for name, tensor in tensors:
        table[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    head = json.dumps(table).encode()
    head += b" " * (-(len(head) + 8) % ALIGN)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(len(head).to_bytes(8, "little") + head)
            for _, tensor in tensors:
                file.write(_bytes(tensor))
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    path.with_suffix(".json").write_text(keys.text(key))
    return path


def load(key: keys.Key, outline: dict[str, Any]) -> dict[str, Any] | None:
    """The params tree of `outline` (on the meta device, see `checkpoint.outline`) from the kept file, or None where
    there is none, or one whose tensors are not those of the outline (damaged: it is left alone)."""
    want = {name: (_NAMES.get(t.dtype), list(t.shape), t.nbytes) for name, t in tree.items(outline)}
    try:
        with path_of(key).open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            length = os.fstat(file.fileno()).st_size - 8 - size
            table = json.loads(file.read(size)) if length >= 0 else {}

            def fits(name: str, dtype: str | None, shape: list[int], nbytes: int) -> bool:
                found = table.get(name, {})
                first, last = found.get("data_offsets", (0, -1))
                fields = (found.get("dtype"), found.get("shape"), last - first)
                return fields == (dtype, shape, nbytes) and first >= 0 and last <= length

            if set(table) != set(want) or not all(fits(name, *fields) for name, fields in want.items()):
                return None
            whole = memory.zeros((length,), torch.uint8)
            if file.readinto(whole.numpy().data) != length:
                return None
    except (OSError, ValueError):
        return None

    def view(name: str, like: Tensor) -> Tensor:
        first, last = table[name]["data_offsets"]
        return whole[first:last].view(like.dtype).view(like.shape)

    return tree.map_with_path(view, outline)


def _identity(file: Path) -> str:
    """Of a checkpoint file, without reading it whole: size, time of its last change, digest of its header."""
    stat = file.stat()
    with file.open("rb") as opened:
        size = min(int.from_bytes(opened.read(8), "little"), stat.st_size, LONGEST_HEADER)
        head = keys.digest({"header": opened.read(size).hex()}, 16)
    return f"{stat.st_size} bytes, {stat.st_mtime_ns} ns, header {head}"


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
