"""Sequences on disk: tokens and KV in one file, which the same weights, code and machine resume bit by bit.

    8 bytes   length of the header
    header    JSON: digest of the file, what made it (`identity`), tokens of the prompt, a table of the tensors
    data      K and V of each layer, the sequence's blocks in order; states of recurrent layers after the last token;
              then the token ids

The format is safetensors', so that others can read it. KV is kept as it lies in the pool and not token by token: of
rounded KV codes and scales are the value, and rounding again what was widened need not give the same ones. To be
portable it would have to be canonical, but on another processor the sums of the next step have other bits anyway. What
stands behind the sequence's end in its last block is somebody else's, so zeros are written there.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

import fnengine
from fnengine import kernels, keys, recurrent, tree
from fnengine.build import Built
from fnengine.errors import KeptError
from fnengine.graphs import compile
from fnengine.host.step import BLOCK
from fnengine.kernels import KVLayout, native
from fnengine.kernels.layout import movable
from fnengine.leaves import Packed
from fnengine.model import Model
from fnengine.spec import ModelSpec, for_length, recurrents
from fnengine.state import Memory, Pool

FORMAT = "sequence 1"
"""Of the file; another one is refused."""
UNKNOWN = "0" * 32
"""The digest in a header while the file is digested."""
MOST_HEADER = 1 << 26
"""Bytes of a header above which a file is none of ours."""
SHOWN = 6
"""Most fields that a refusal names."""
_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}
"""safetensors' names of the dtypes that pools have."""


# ---- what made it ---------------------------------------------------------------------------------------------------


def identity(model: Model, built: Built) -> keys.Key:
    """What the bits of a sequence's KV, and of what is computed from it, follow from.

    Weights are known by their content and not by where they came from, because parameters may be anything a user made.
    """
    spec = for_length(model.spec, built.pool.max_len)
    compiled = built.execution.startswith("compiled")
    apart = {"python", "index"} if compiled else {"python", "index", "threads"}  # compiled code is made for threads
    machine = {k: v for k, v in compile.environment_key(model.device).items() if k not in apart}
    return {
        "model": {
            "architecture": spec.architecture,
            "vocab": str(spec.vocab),
            "width": str(spec.width),
            "layers": str(len(spec.layers)),
            "digest": _maths(spec),
        },
        "weights": {
            "content": content(model.params),
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.quantization,
            "layout": model.how.name,
        },
        "kv": {"layout": built.ops.kv.name, "block": str(BLOCK)},
        "kernels": {
            **{op: backend for op, backend, _, _ in kernels.describe(built.ops)},
            **{b.op.name: b.name for b in (recurrent.backends(model.device) if recurrents(spec) else ())},
        },
        "execution": "compiled" if compiled else "eager",
        "machine": machine,
        "source": _sources(),
    }


def _maths(spec: ModelSpec) -> str:
    """Digest of what a spec computes."""
    parts = {"layers": repr(spec.layers), "eps": repr(spec.eps), "tied": str(spec.tied), "ends": repr(spec.ends)}
    if spec.upstream is not None:
        parts["upstream"] = repr(spec.upstream)
    return keys.digest(parts)


def content(params: dict[str, Any]) -> str:
    """Digest of every weight of a tree; reads all of them once, by as many threads as a step has."""
    paths, weights = zip(*tree.items(params, stop=Packed), strict=True)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return keys.digest(dict(zip(paths, pool.map(_content_of, weights), strict=True)), 32)


def _content_of(x: Tensor | Packed) -> str:
    if isinstance(x, Packed):  # opaque: digested as what it was made from
        return " ".join(_content_of(t) for t in (x.weight.to_dense(), x.bias) if t is not None)
    return f"{x.dtype} {list(x.shape)} {hashlib.sha256(_bytes(x)).hexdigest()}"


def _bytes(x: Tensor) -> memoryview:
    return x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


@cache
def _sources() -> keys.Key:
    """Digests of the code that a step's bits follow from."""
    house, here = Path(fnengine.__file__).parent, Path(str(kernels.__file__)).parent
    ours = [house / f"{name}.py" for name in ("layers", "leaves", "model", "program", "recurrent", "state", "step")]
    return {
        "fnengine": keys.of_files([*ours, Path(compile.__file__)]),
        "kernels": keys.of_files(sorted(here.glob("*.py"))),
        "csrc": keys.of_files(sorted(native.SOURCE.glob("*.[ch]*"))),
        "triton": keys.of_files(sorted((here / "triton").glob("*.py"))),
    }


# ---- writing --------------------------------------------------------------------------------------------------------


def write(
    path: Path,
    key: keys.Key,
    tokens: np.ndarray,
    prompt_len: int,
    pool: tuple[Pool, ...],
    blocks: np.ndarray,
    kv: KVLayout,
    *,
    steer: str,
    pure: int,
    memories: tuple[Memory, ...] = (),
    place: int = -1,
) -> None:
    """Keeps a sequence: `blocks` (in order) of the pool hold its tokens. The file is renamed when it is whole.

    Args:
        memories, place: what recurrent layers remember, and where of these tokens.
        steer, pure: digest of the steering under which the first `pure` tokens were computed; empty for none.

    Raises:
        KeptError: it cannot be written.
    """
    n = len(tokens)
    about = {
        "digest": UNKNOWN,
        "format": FORMAT,
        "prompt_len": str(prompt_len),
        "steer": steer,
        "pure": str(pure),
        "key": keys.text(key),
    }
    head = json.dumps({"__metadata__": about, **_table(pool, memories, n)}).encode()
    head += b" " * (-(len(head) + 8) % 64)
    index = torch.from_numpy(blocks.astype(np.int64))
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
            try:
                digest = hashlib.blake2b(head, digest_size=len(UNKNOWN) // 2)
                file.write(len(head).to_bytes(8, "little") + head)

                def put(data: memoryview) -> None:
                    digest.update(data)
                    file.write(data)

                for p in pool:
                    k, v = (movable(x)[index.to(x.device)].view(x.dtype).cpu() for x in (p.k, p.v))
                    if n % BLOCK:
                        kv.clear(k[-1:], v[-1:], n % BLOCK)
                    put(_bytes(k))
                    put(_bytes(v))
                for m in memories if n else ():
                    put(_bytes(m.tail[place]))
                    put(_bytes(m.matrix[place]))
                put(np.ascontiguousarray(tokens, np.int32).view(np.uint8).data)
                file.seek(8 + head.index(UNKNOWN.encode()))  # the first field
                file.write(digest.hexdigest().encode())
                file.flush()
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as e:
        raise KeptError(f"cannot be written: {e.strerror or e}", where=str(path)) from e


def _table(pool: tuple[Pool, ...], memories: tuple[Memory, ...], n: int) -> dict[str, dict[str, Any]]:
    """What the header says of the tensors of a sequence of `n` tokens; of none there is no state."""
    table, at = {}, 0

    def add(name: str, dtype: str, shape: list[int], nbytes: int) -> None:
        nonlocal at
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes

    blocks = -(-n // BLOCK)
    for i, p in enumerate(pool):
        for name, x in (("k", p.k), ("v", p.v)):
            add(f"layers.{i}.{name}", _NAMES[x.dtype], [blocks, *x.shape[1:]], blocks * x[0].nbytes)
    for i, m in enumerate(memories if n else ()):
        for name, x in (("tail", m.tail), ("matrix", m.matrix)):
            add(f"states.{i}.{name}", _NAMES[x.dtype], list(x.shape[1:]), x[0].nbytes)
    add("tokens", "I32", [n], 4 * n)
    return table


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """A file whose header is as it should be; its data is not read yet."""

    path: Path
    file: BinaryIO
    head: bytes
    """The header as it was digested."""
    digest: str
    length: int
    """Tokens."""
    prompt_len: int
    steer: str
    pure: int

    def fill(
        self, pool: tuple[Pool, ...], blocks: np.ndarray, memories: tuple[Memory, ...] = (), place: int = -1
    ) -> np.ndarray:
        """The tokens; their KV is in `blocks` then, and what recurrent layers remember of them in `place`. Once.

        Raises:
            KeptError: the data is not what was written. The blocks hold some of it.
        """
        digest = hashlib.blake2b(self.head, digest_size=len(UNKNOWN) // 2)
        index = torch.from_numpy(blocks.astype(np.int64))

        def take(nbytes: int) -> np.ndarray:
            data = np.empty(nbytes, np.uint8)
            if self.file.readinto(data.data) != nbytes:  # type: ignore[attr-defined]
                raise _damaged(self.path, "it ends early")
            digest.update(data.data)
            return data

        with torch.inference_mode():
            for p in pool:
                for x in (movable(x) for x in (p.k, p.v) if x.numel()):
                    new = torch.from_numpy(take(len(blocks) * x[0].nbytes)).view(x.dtype)
                    x[index.to(x.device)] = new.view(len(blocks), *x.shape[1:]).to(x.device)
            for x in (x for m in memories for x in (m.tail, m.matrix)):
                x[place] = torch.from_numpy(take(x[0].nbytes)).view(x.dtype).view(x.shape[1:]).to(x.device)
        tokens = take(4 * self.length).view(np.int32)
        if digest.hexdigest() != self.digest:
            raise _damaged(self.path, "its content is not what was written")
        return tokens


@contextmanager
def opened(path: Path, key: keys.Key, pool: tuple[Pool, ...], memories: tuple[Memory, ...] = ()) -> Iterator[Opened]:
    """A kept sequence that was made by what `key` says, for a pool of these shapes.

    Raises:
        KeptError: see `Runtime.load`.
    """
    try:
        with path.open("rb") as file:
            yield _header(path, file, key, pool, memories)
    except OSError as e:
        raise KeptError(f"cannot be read: {e.strerror or e}", where=str(path)) from e


def _header(path: Path, file: BinaryIO, key: keys.Key, pool: tuple[Pool, ...], memories: tuple[Memory, ...]) -> Opened:
    size, begin = os.fstat(file.fileno()).st_size, file.read(8)
    length = int.from_bytes(begin, "little")
    if len(begin) < 8 or not 2 <= length <= min(size - 8, MOST_HEADER):
        raise _damaged(path, "it holds no header")
    head = file.read(length)
    try:
        table = json.loads(head)
        about = table.pop("__metadata__")
        digest, form, prompt_len = about["digest"], about["format"], int(about["prompt_len"])
        theirs, n = json.loads(about["key"]), int(table["tokens"]["shape"][0])
        steer, pure = about.get("steer", ""), int(about.get("pure", n))
        if (
            not isinstance(theirs, dict)
            or not isinstance(digest, str)
            or not 0 <= prompt_len <= n
            or not 0 <= pure <= n
        ):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise _damaged(path, "its header is not one of a sequence") from None
    if form != FORMAT:
        raise KeptError(f"is of format {form!r}, this version reads {FORMAT!r}", where=str(path), remedy=_ANEW)
    if found := keys.differences(theirs, key):
        said = "; ".join(f"{d.field}: {d.old} there, {d.new} here" for d in found[:SHOWN])
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise KeptError(f"was made by something else: {said}{more}", where=str(path), remedy=_ANEW)
    wanted = _table(pool, memories, n)
    if table != wanted:
        raise _damaged(path, "its table of tensors is not that of a sequence of this model")
    data = wanted["tokens"]["data_offsets"][1]
    if size != 8 + length + data:
        raise _damaged(path, f"it has {size} bytes and should have {8 + length + data}")
    return Opened(
        path, file, head.replace(digest.encode(), UNKNOWN.encode(), 1), digest, n, prompt_len, str(steer), pure
    )


_ANEW = "extend `rt.empty` by its tokens, which any reader of safetensors finds in it under `tokens`"


def _damaged(path: Path, how: str) -> KeptError:
    return KeptError(f"is damaged, or no file of a sequence: {how}", where=str(path), remedy="save it again")
