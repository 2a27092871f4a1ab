"""Weights from a folder into a params tree: safetensors read tensor by tensor, fused, cast and placed.

Peak memory is the finished tree, one fused array and its packed form: nothing else is held.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fnengine import experts, fallback, fp8_file, gguf_file, modules, packed, pickled, products, tree
from fnengine.errors import CheckpointError, ConfigError, SpecError
from fnengine.experts import Experts
from fnengine.families import Unknown, family_of, spec_from_config, whole
from fnengine.families.names import Family
from fnengine.gguf_file import is_gguf
from fnengine.leaves import Dense, Packing, Tiles, packing, place_ends, tiles
from fnengine.params import ArrayInfo, abstract, arrays, dummy_array, noise, permutation, stored_shape, taken
from fnengine.spec import ModelSpec, Whole

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
    found = _spec(read_json(folder / "config.json"), str(folder / "config.json"), impl, str(folder) if trust else "")
    spec = beside(folder, found)
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


def beside(folder: Path, spec: ModelSpec) -> ModelSpec:
    """The spec with what sentence-transformers keeps beside a model, of one that is saved so.

    Raises:
        CheckpointError, SpecError: see `modules.bridges` and `whole.of`.
    """
    if not (folder / "modules.json").is_file():
        return spec
    bridges = modules.bridges(folder)
    if spec.whole is None and (bridges or _headless(folder, spec)):
        spec = whole.of(spec, Whole(), str(folder / "modules.json"))
    if spec.whole is None:
        return spec
    if bridges and bridges[0].reads != spec.width:
        raise CheckpointError(
            f"reads {bridges[0].reads} numbers, and the model gives {spec.width}", where=str(folder / bridges[0].folder)
        )
    return modules.longest(folder, dataclasses.replace(spec, whole=dataclasses.replace(spec.whole, bridges=bridges)))


def _headless(folder: Path, spec: ModelSpec) -> bool:
    """Whether a model with a head of its own was saved without it."""
    family, index = family_of(spec), folder / "model.safetensors.index.json"
    if spec.tied:
        return False
    if index.exists():
        names = set(read_json(index).get("weight_map") or {})
    elif any(folder.glob("*.safetensors")):
        with open_tensors(folder) as files:
            names = set(files)
    else:
        return False
    return f"{family.names['head']}.weight" not in names and not any(n.startswith(prefix(family)) for n in names)


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
    notes = [f"weights {how.name}: {how.reason}", *left_out(spec)]
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
    if not is_gguf(folder):
        notes += fp8_file.said(Path(folder), dtype)
    if load_format == "pt":
        return load(folder, spec, dtype, device, how, progress=progress, unpickle=True), how, tuple(notes)
    kept = packed_key(folder, spec, dtype, device, how)
    if kept is not None and (params := packed.load(kept, outline(spec, dtype, how))) is not None:
        return params, how, (*notes, f"weights read from {packed.path_of(kept)}, where they were kept in this form")
    return load(folder, spec, dtype, device, how, progress=progress), how, tuple(notes)


def left_out(spec: ModelSpec) -> tuple[str, ...]:
    """What a start says of the parts of a checkpoint that are not loaded, if it may have some."""
    apart = family_of(spec).apart
    return (f"read for text alone: tensors that begin with {', '.join(apart)} are left out",) if apart else ()


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
    files = [file for at in ("", *_folders(spec)) for file in _files(Path(folder) / at)]
    return packed.key(files, spec, dtype, how)


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

        def get(name: str) -> Tensor:
            nonlocal done
            held = files[name].tensor()
            done += _bytes(files[name])
            if progress is not None:
                progress(done, total)
            return held

        return build(infos, lambda _, info: assembled(info, get, dtype).to(device), how)


def assembled(info: ArrayInfo, get: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
    """The array from its parts in a checkpoint, where parameters are kept in `dtype`."""
    out = torch.empty(info.shape, dtype=info.kept_in(dtype))
    flat, row = out.view(-1, *info.shape[2:]) if len(info.shape) == 3 else out, 0
    for name, rows in info.parts:
        flat[row : row + rows].copy_(taken(info, get(name)).reshape(rows, *flat.shape[1:]))
        row += rows
    return out if info.order is None else out[permutation(info.order)]


def stored_as(info: ArrayInfo, files: Container[str]) -> ArrayInfo:
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
    return build(abstract(spec), lambda _, info: torch.empty(info.shape, dtype=info.kept_in(dtype), device="meta"), how)


def build(infos: dict[str, Any], make: Callable[[str, ArrayInfo], Tensor], how: Packing) -> dict[str, Any]:
    """The tree with `make(path, info)` for every array, each multiplied leaf placed as soon as it is whole."""
    params = {
        k: tuple({k: placed(f"layers.{i}.{k}", v, make, how) for k, v in layer.items()} for i, layer in enumerate(part))
        if k == "layers"
        # The ends wait, because a tied one may serve as both.
        else placed(k, part, make, None if k in ("embed", "head") else how.ends)
        for k, part in infos.items()
    }
    return {**params, **place_ends(params, how)} if "head" in params else params  # else it is looked up only


def placed(path: str, node: Any, make: Callable[[str, ArrayInfo], Tensor], how: Packing | None) -> Any:
    """A node of an abstract tree with its arrays made, stored as `how` says, or as they are."""
    if isinstance(node, ArrayInfo):
        return make(path, node)
    if isinstance(node, dict):
        return {k: placed(f"{path}.{k}", v, make, how) for k, v in node.items()}
    if isinstance(node, Dense):
        bias = None if node.bias is None else make(f"{path}.bias", node.bias)  # type: ignore[arg-type]
        whole = Dense(make(f"{path}.weight", node.weight), bias)  # type: ignore[arg-type]
        return whole if how is None else how.place(whole)
    if isinstance(node, Experts):
        bias = None if node.bias is None else make(f"{path}.bias", node.bias)  # type: ignore[arg-type]
        weight = make(f"{path}.weight", node.weight)  # type: ignore[arg-type]
        return experts.place(Experts(weight, bias), 0 if how is None else how.experts)
    return None


@dataclasses.dataclass(frozen=True)
class Stored:
    """The file that holds a tensor, opened."""

    path: Path
    handle: Any
    """safetensors.safe_open: memory-mapped"""
    name: str
    """Of the tensor in it."""

    def tensor(self) -> Tensor:
        """The tensor, read. Raises CheckpointError when it cannot be."""
        try:
            return self.handle.get_tensor(self.name)
        except Exception as e:
            raise CheckpointError(f"tensor {self.name} cannot be read: {e}", where=str(self.path)) from e


@contextmanager
def open_tensors(folder: Path, beside: tuple[str, ...] = ()) -> Iterator[dict[str, Stored]]:
    """Tensor name -> open file, over all safetensors of a folder, shut at the end; `folder/name` for those of folders
    beside them."""
    from safetensors import SafetensorError, safe_open

    with ExitStack() as stack:
        found: dict[str, Stored] = {}
        wanted = [(f"{at}/" if at else "", *item) for at in ("", *beside) for item in _files(folder / at).items()]
        for at, path, names in wanted:
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
                if at + name in found:
                    raise CheckpointError(f"tensor {name} is in {found[at + name].path.name} too", where=str(path))
                found[at + name] = Stored(path, handle, name)
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
        with open_tensors(folder, _folders(spec)) as files:
            yield named(spec, files)


def named(spec: ModelSpec, files: dict[str, Stored]) -> dict[str, Stored]:
    """The files under the names that the spec's arrays have, where a checkpoint has others; what is stored in 8 bits as
    what it stands for."""
    if spec.upstream is None:
        family = family_of(spec)
        return with_prefix(widened({respelt(name, family): file for name, file in files.items()}), prefix(family))
    return {name: files[stored] for stored, name in fallback.names(spec, files).items()}


def widened(files: dict[str, Stored]) -> dict[str, Stored]:
    """The files with every weight of 8 bits as one of 32, made of it and its scales as it is read."""
    weights = fp8_file.pairs(files)
    if not weights:
        return files
    gone = fp8_file.unread(files, weights)
    wide = {name: Stored(w.path, fp8_file.Scaled(w, s), name) for name, (w, s) in weights.items()}
    return {name: wide.get(name, file) for name, file in files.items() if name not in gone}


def respelt(name: str, family: Family) -> str:
    """A tensor's name as the family has it."""
    for theirs, ours in family.spelt.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def with_prefix(files: dict[str, Stored], prefix: str) -> dict[str, Stored]:
    """The files under full names, where a checkpoint was saved without its head and leaves the prefix out (GPT-2)."""
    files = {spelt(name): file for name, file in files.items()}
    if not prefix or any(name.startswith(prefix) for name in files):
        return files
    return {name if "/" in name else prefix + name: file for name, file in files.items()}


def prefix(family: Family) -> str:
    """What every name but the heads' begins with, and what a model that was saved without them leaves out."""
    embed = family.names["embed"]
    assert isinstance(embed, str)
    return family.prefix or embed.partition(".")[0] + "."


def _folders(spec: ModelSpec) -> tuple[str, ...]:
    """Folders beside the model's own files that hold weights, too."""
    return () if spec.whole is None else tuple(bridge.folder for bridge in spec.whole.bridges)


def spelt(name: str) -> str:
    """A tensor's name as it is spelt today: the oldest checkpoints of BERT call a norm's two gamma and beta."""
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


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
    family = family_of(spec)
    ignored, apart = family.ignored + (("lm_head.weight",) if spec.tied else ()), family.apart
    unused = [
        name
        for name in files
        if name not in wanted
        and not name.endswith(ignored)
        and not (apart and name.startswith(apart))
        and not family.unread(spec, name)
        and not _further(spec, name)
    ]
    if unused:
        raise CheckpointError(
            f"tensor {unused[0]} belongs to nothing in a {spec.architecture} of this config"
            + (f", and {len(unused) - 1} more" if unused[1:] else ""),
            where=str(files[unused[0]].path),
            remedy="config.json and weights belong to different models",
        )


def _further(spec: ModelSpec, name: str) -> bool:
    """Whether a tensor is of a layer that predicts further tokens, where a family has such."""
    further = family_of(spec).further
    return further is not None and further.has(name, len(spec.layers))


def _bytes(file: Stored) -> int:
    view = file.handle.get_slice(file.name)
    size = _ITEM[view.get_dtype()]
    for n in view.get_shape():
        size *= n
    return size
