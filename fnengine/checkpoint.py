"""Weights from a folder into a params tree: safetensors read tensor by tensor, fused, cast and placed.

Peak memory is the finished tree, one fused array and its packed form: nothing else is held.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fnengine import experts, fallback, gguf_file, packed, pickled, products, tree
from fnengine.errors import CheckpointError, ConfigError, SpecError
from fnengine.experts import Experts
from fnengine.families import Unknown, family_of, spec_from_config
from fnengine.gguf_file import is_gguf
from fnengine.leaves import Dense, Packing, Tiles, packing, place_ends, tiles
from fnengine.params import ArrayInfo, abstract, arrays, dummy_array, noise, permutation, stored_shape
from fnengine.spec import ModelSpec

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)"""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_ITEM = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of an element in the dtypes that weights may be stored in (safetensors' names)."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError when it is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("no such file", where=str(path), remedy="is this a model's folder?") from None
    except (OSError, ValueError) as e:
        raise CheckpointError(f"cannot be read as JSON: {e}", where=str(path), remedy="fetch it again") from e
    if not isinstance(value, dict):
        raise CheckpointError("holds no JSON object", where=str(path), remedy="fetch it again")
    return value


def read_spec(folder: Path, impl: str = "auto", trust: bool = False) -> ModelSpec:
    """The spec of a model's folder: config.json, and the end-of-sequence ids of generation_config.json beside it.

    Args:
        impl: `auto` takes a family where one knows the architecture, else the fallback; `native` and `transformers`
            take one of them.
        trust: Python files of the folder may be run, where they define what the fallback runs.

    Raises:
        CheckpointError: the folder or its config.json is missing or unreadable.
        SpecError: the config cannot be built.
    """
    folder = Path(folder)
    if is_gguf(folder):
        return _spec(gguf_file.config(folder), str(folder), impl, "")
    if not folder.is_dir():
        raise CheckpointError("no such directory", where=str(folder), remedy="give a model's folder or a hub name")
    if not (folder / "config.json").exists():
        raise CheckpointError("holds no config.json", where=str(folder), remedy="is this a model's folder?")
    spec = _spec(read_json(folder / "config.json"), str(folder / "config.json"), impl, str(folder) if trust else "")
    more = generation_config(folder).get("eos_token_id")
    if more is None:
        return spec
    more = more if isinstance(more, list) else [more]
    if any(isinstance(x, bool) or not isinstance(x, int) for x in more):
        raise SpecError(
            f"eos_token_id = {more!r} holds something that is no token id",
            where=str(folder / "generation_config.json"),
            param="eos_token_id",
        )
    return dataclasses.replace(spec, eos=tuple(dict.fromkeys((*spec.eos, *more))))


IMPLEMENTATIONS = ("auto", "native", "transformers")
"""Who computes the forward."""


def _spec(config: dict[str, Any], where: str, impl: str, code: str) -> ModelSpec:
    if impl not in IMPLEMENTATIONS:
        raise ConfigError(f"{impl!r} is none", where="--model-impl", remedy=" or ".join(IMPLEMENTATIONS))
    if impl == "transformers":
        return fallback.read(config, where, code)
    try:
        return spec_from_config(config, where)
    except Unknown as unknown:
        if impl == "native":
            raise
        try:
            return fallback.read(config, where, code)
        except SpecError as e:
            what = f"{unknown.what}, and {e.what}"
            raise SpecError(what, where=where, remedy=e.remedy, param=unknown.param) from e


def generation_config(folder: Path) -> dict[str, Any]:
    """What the model's makers recommend for generation; empty when they say nothing."""
    path = Path(folder) / "generation_config.json"
    return read_json(path) if path.exists() else {}


def pick_device(device: str | torch.device) -> torch.device:
    """The device to run on; `auto` is cuda where torch finds one. Raises ConfigError when it is not there."""
    name = device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ConfigError(f"no such device: {e}", where="--device", remedy="auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{device.type} is not supported", where="--device", remedy="auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("torch finds no CUDA device", where="--device", remedy="cpu, or a torch built for CUDA")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise ConfigError(f"there is no {device}", where="--device", remedy=f"cuda:0 to cuda:{last}")
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def pick_dtype(spec: ModelSpec, dtype: str, device: torch.device, tiles: Tiles = tiles) -> tuple[torch.dtype, str]:
    """(dtype of parameters, activations and KV; why).

    `auto` is the checkpoint's own dtype, but float16 on a CPU that cannot multiply it runs in float32, which holds
    every float16 exactly.
    """
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"no dtype is called {dtype!r}", where="--dtype", remedy=f"auto, {', '.join(DTYPES)}")
    if dtype != "auto":
        return DTYPES[dtype], f"dtype {dtype}: asked for"
    own = DTYPES[spec.dtype]
    if own is torch.float16 and device.type == "cpu" and packing(device, own, tiles=tiles).kind == "dense":
        return torch.float32, "dtype float32: the checkpoint is float16, which this CPU does not multiply natively"
    return own, f"dtype {spec.dtype}: the checkpoint's own"


def fill(
    folder: Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    load_format: str = "auto",
    *,
    quantization: str = "none",
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], Packing, tuple[str, ...]]:
    """(params on the device in their final form, how they are stored, what was decided on the way).

    Raises:
        ConfigError: load_format or quantization has no meaning here.
        CheckpointError: see `load`.
    """
    how = products.packing(spec, device, dtype, quantization)
    notes = [f"weights {how.name}: {how.reason}"]
    if spec.tied and not how.at(spec.vocab, spec.width).indexable:
        notes.append("the tied embedding is kept twice: dense to look up, packed as the head")
    if load_format == "dummy":
        notes.append(f"weights are random (--load-format dummy, seed {seed})")
        return dummy(spec, dtype, device, how, seed=seed, progress=progress), how, tuple(notes)
    if load_format not in ("auto", "safetensors", "pt", "gguf"):
        raise ConfigError(
            f"{load_format!r} is not implemented", where="--load-format", remedy="auto, safetensors, pt, gguf or dummy"
        )
    if load_format == "gguf" and not is_gguf(folder):
        raise ConfigError("the model is no .gguf file", where="--load-format gguf", remedy="give the file itself")
    if load_format == "pt":
        return load(folder, spec, dtype, device, how, progress=progress, unpickle=True), how, tuple(notes)
    kept = packed_key(folder, spec, dtype, device, how)
    if kept is not None and (params := packed.load(kept, outline(spec, dtype, how))) is not None:
        return params, how, (*notes, f"weights read from {packed.path_of(kept)}, where they were kept in this form")
    return load(folder, spec, dtype, device, how, progress=progress), how, tuple(notes)


def packed_key(
    folder: Path, spec: ModelSpec, dtype: torch.dtype, device: torch.device, how: Packing
) -> packed.Key | None:
    """Under which key the final form of a folder's weights is kept, or None where it cannot be, or has no advantage.

    Raises:
        CheckpointError: the folder holds no weights.
    """
    plain = {*packed.KINDS, "dense"}
    if device.type != "cpu" or set(how.kinds) == {"dense"} or not plain.issuperset(how.kinds):
        return None
    return packed.key(list(_files(Path(folder))), spec, dtype, how)


def keep(
    folder: Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str = "none",
    *,
    progress: Progress | None = None,
) -> tuple[Path, bool] | str:
    """(the file that now holds a folder's weights in their final form, whether it is new), or why there is none.

    Raises:
        CheckpointError, ConfigError: as `fill`.
        OSError: the cache cannot be written.
    """
    how = products.packing(spec, device, dtype, quantization)
    key = packed_key(folder, spec, dtype, device, how)
    if key is None:
        return f"{how.name} weights on {device.type} are loaded as the checkpoint has them"
    if packed.load(key, outline(spec, dtype, how)) is not None:
        return packed.path_of(key), False
    return packed.save(key, load(folder, spec, dtype, device, how, progress=progress)), True


def load(
    folder: Path,
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    how: Packing,
    *,
    progress: Progress | None = None,
    unpickle: bool = False,
) -> dict[str, Any]:
    """The params tree from a folder's safetensors, from a GGUF file, or, only if asked to `unpickle`, from .bin files.

    Raises:
        CheckpointError: weights are missing, truncated, of another shape, in a dtype that is no float, or unused;
            the message names file and tensor.
    """
    with _opened(Path(folder), spec, unpickle) as files:
        infos = tree.map_with_path(lambda _, info: stored_as(info, files), abstract(spec), stop=ArrayInfo)
        _check(spec, infos, files, Path(folder))
        total = sum(_bytes(files[name]) for _, info in arrays(infos) for name, _ in info.parts)
        done = 0

        def make(path: str, info: ArrayInfo) -> Tensor:
            nonlocal done
            out = torch.empty(info.shape, dtype=dtype)
            flat, row = out.view(-1, *info.shape[2:]) if len(info.shape) == 3 else out, 0
            for name, rows in info.parts:
                file = files[name]
                try:
                    held = file.handle.get_tensor(file.name)
                    held = held.mT if info.transposed or (info.fused and info.fused.transposed) else held
                    flat[row : row + rows].copy_(held.reshape(rows, *flat.shape[1:]))
                except Exception as e:
                    raise CheckpointError(f"tensor {name} cannot be read: {e}", where=str(file.path)) from e
                row += rows
                done += _bytes(file)
                if progress is not None:
                    progress(done, total)
            return (out if info.order is None else out[permutation(info.order)]).to(device)

        return build(infos, make, how)


def stored_as(info: ArrayInfo, files: dict[str, Stored]) -> ArrayInfo:
    """The array with the one form that these files have it in: its parts, or its fused tensor as the only part."""
    if info.fused is None:
        return info
    if info.fused.name in files or not info.parts:
        flat = info.size // info.shape[-1] if len(info.shape) == 3 else info.shape[0]
        return dataclasses.replace(info, parts=((info.fused.name, flat),))
    return dataclasses.replace(info, fused=None)


def dummy(
    spec: ModelSpec,
    dtype: torch.dtype,
    device: torch.device,
    how: Packing,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A params tree of random weights, a function of (spec, dtype, seed)."""
    infos, base = abstract(spec), noise(seed)
    total, done = sum(info.size for _, info in arrays(infos)) * dtype.itemsize, 0

    def make(path: str, info: ArrayInfo) -> Tensor:
        nonlocal done
        out = dummy_array(path, info, dtype, base, device)
        done += info.size * dtype.itemsize
        if progress is not None:
            progress(done, total)
        return out

    return build(infos, make, how)


def outline(spec: ModelSpec, dtype: torch.dtype, how: Packing) -> dict[str, Any]:
    """A params tree on the meta device: the shapes and dtypes that `load` and `dummy` give, and no values."""
    return build(abstract(spec), lambda _path, info: torch.empty(info.shape, dtype=dtype, device="meta"), how)


def build(infos: dict[str, Any], make: Callable[[str, ArrayInfo], Tensor], how: Packing) -> dict[str, Any]:
    """The tree with `make(path, info)` for every array, each multiplied leaf placed as soon as it is whole."""

    def fill_in(path: str, node: Any, place: bool = True) -> Any:  # the ends wait, because a tied one may serve as both
        if isinstance(node, ArrayInfo):
            return make(path, node)
        if isinstance(node, dict):
            return {k: fill_in(f"{path}.{k}", v) for k, v in node.items()}
        if isinstance(node, Dense):
            bias = None if node.bias is None else make(f"{path}.bias", node.bias)  # type: ignore[arg-type]
            whole = Dense(make(f"{path}.weight", node.weight), bias)  # type: ignore[arg-type]
            return how.place(whole) if place else whole
        if isinstance(node, Experts):
            bias = None if node.bias is None else make(f"{path}.bias", node.bias)  # type: ignore[arg-type]
            return experts.place(Experts(make(f"{path}.weight", node.weight), bias), how.experts)  # type: ignore
        return None

    params = {
        k: tuple({k: fill_in(f"layers.{i}.{k}", v) for k, v in layer.items()} for i, layer in enumerate(part))
        if k == "layers"
        else fill_in(k, part, place=False)
        for k, part in infos.items()
    }
    return {**params, **place_ends(params, how)}


@dataclasses.dataclass(frozen=True)
class Stored:
    """The file that holds a tensor, opened."""

    path: Path
    handle: Any
    """safetensors.safe_open: memory-mapped"""
    name: str
    """Of the tensor in it."""


@contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, Stored]]:
    """Tensor name -> open file, over all safetensors of a folder, shut at the end."""
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        found: dict[str, Stored] = {}
        wanted = _files(folder)
        for path, names in wanted.items():
            try:
                handle = stack.enter_context(safe_open(str(path), framework="pt"))
            except (SafetensorError, OSError, ValueError) as e:
                with path.open("rb") as file:
                    lfs = file.read(40).startswith(b"version https://git-lfs")
                raise CheckpointError(
                    "is a Git LFS pointer, not the weights" if lfs else f"is truncated or corrupt: {e}",
                    where=str(path),
                    remedy="run `git lfs pull` there" if lfs else "fetch it again",
                ) from e
            held = set(handle.keys())
            for name in names or held:
                if name not in held:
                    raise CheckpointError(
                        f"tensor {name} is not in it, though the index says so",
                        where=str(path),
                        remedy="fetch it again",
                    )
                if name in found:
                    raise CheckpointError(f"tensor {name} is in {found[name].path.name} too", where=str(path))
                found[name] = Stored(path, handle, name)
        yield found


@contextmanager
def _opened(folder: Path, spec: ModelSpec, unpickle: bool) -> Iterator[dict[str, Stored]]:
    """Every tensor of a checkpoint under the name that the spec's arrays have."""
    if unpickle:
        held = pickled.opened(folder)
        yield named(spec, {name: Stored(path, handle, name) for name, (path, handle) in held.items()})
    elif is_gguf(folder):
        a, wanted = spec.layers[0].mixer, [name for _, info in arrays(abstract(spec)) for name, _ in info.parts]
        tensors = gguf_file.opened(folder, wanted, a.heads, a.kv_heads)
        yield {name: Stored(folder, handle, name) for name, handle in tensors.items()}
    else:
        with open_tensors(folder) as files:
            yield named(spec, files)


def named(spec: ModelSpec, files: dict[str, Stored]) -> dict[str, Stored]:
    """The files under the names that the spec's arrays have, where a checkpoint has others."""
    if spec.upstream is None:
        return with_prefix(files, family_of(spec).prefix)
    return {name: files[stored] for stored, name in fallback.names(spec, files).items()}


def with_prefix(files: dict[str, Stored], prefix: str) -> dict[str, Stored]:
    """The files under full names, where a checkpoint was saved without its head and leaves the prefix out (GPT-2)."""
    if not prefix or any(name.startswith(prefix) for name in files):
        return files
    return {prefix + name: file for name, file in files.items()}


def _files(folder: Path) -> dict[Path, list[str] | None]:
    """Weight files -> the names to take from each (None: all)."""
    if is_gguf(folder):
        return {folder: None}
    index = folder / "model.safetensors.index.json"
    if index.exists():
        table = read_json(index).get("weight_map")
        if not isinstance(table, dict) or not table:
            raise CheckpointError("has no weight_map", where=str(index), remedy="fetch it again")
        files: dict[Path, list[str] | None] = {}
        for name, shard in sorted(table.items(), key=lambda kv: (kv[1], kv[0])):
            if Path(shard).name != shard:
                raise CheckpointError(f"shard {shard!r} is not a plain file name", where=str(index))
            if not (folder / shard).exists():
                raise CheckpointError(
                    f"names the shard {shard}, which is missing", where=str(index), remedy="fetch the model again"
                )
            names = files.setdefault(folder / shard, [])
            assert names is not None
            names.append(name)
        return files
    if (folder / "model.safetensors").exists():
        return {folder / "model.safetensors": None}
    every = sorted(folder.glob("*.safetensors"))
    # Mistral's own format lies beside the usual one under this name and holds the same weights.
    some = [p for p in every if not p.name.startswith("consolidated")]
    if some:
        return {p: None for p in some}
    if pickled.files(folder):
        raise CheckpointError(
            "holds weights only as pickled PyTorch files, which are not read unless asked for",
            where=str(folder),
            remedy="--load-format pt reads them, tensors alone and no code",
        )
    if any(folder.glob("*.gguf")):
        raise CheckpointError("holds weights only as GGUF", where=str(folder), remedy="give the .gguf file itself")
    raise CheckpointError(
        "holds no *.safetensors", where=str(folder), remedy="fetch the model again, or use --load-format dummy"
    )


def _check(spec: ModelSpec, infos: dict[str, Any], files: dict[str, Stored], folder: Path) -> None:
    """Raises unless the files hold every wanted tensor in its shape and none that nobody wants."""
    wanted = {name: stored_shape(info, rows) for _, info in arrays(infos) for name, rows in info.parts}
    missing = [name for name in wanted if name not in files]
    if missing:
        remedy = "fetch the model again"
        if missing == ["lm_head.weight"]:
            remedy = "if the head is the embedding, config.json must say tie_word_embeddings: true"
        raise CheckpointError(
            f"tensor {missing[0]} is missing" + (f", and {len(missing) - 1} more" if missing[1:] else ""),
            where=str(folder),
            remedy=remedy,
        )
    for name, shape in wanted.items():
        file = files[name]
        view = file.handle.get_slice(file.name)
        if tuple(view.get_shape()) != shape and not (len(shape) == 1 and prod(view.get_shape()) == shape[0]):
            raise CheckpointError(
                f"tensor {name} has shape {list(view.get_shape())}, the config asks for {list(shape)}",
                where=str(file.path),
                remedy="config.json and weights belong to different models",
            )
        if view.get_dtype() not in _ITEM:
            raise CheckpointError(
                f"tensor {name} is stored as {view.get_dtype()}, which cannot be read",
                where=str(file.path),
                remedy="use the unquantized checkpoint",
            )
    ignored = family_of(spec).ignored + (("lm_head.weight",) if spec.tied else ())
    unused = [name for name in files if name not in wanted and not name.endswith(ignored) and not _further(spec, name)]
    if unused:
        raise CheckpointError(
            f"tensor {unused[0]} belongs to nothing in a {spec.architecture} of this config"
            + (f", and {len(unused) - 1} more" if unused[1:] else ""),
            where=str(files[unused[0]].path),
            remedy="config.json and weights belong to different models",
        )


def _further(spec: ModelSpec, name: str) -> bool:
    """Whether a tensor is of a layer beyond the config's last one, where a family has such."""
    begin = family_of(spec).further
    number = name.removeprefix(begin).partition(".")[0]
    return bool(begin) and name.startswith(begin) and number.isdecimal() and int(number) >= len(spec.layers)


def _bytes(file: Stored) -> int:
    view = file.handle.get_slice(file.name)
    size = _ITEM[view.get_dtype()]
    for n in view.get_shape():
        size *= n
    return size
