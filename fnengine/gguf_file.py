"""GGUF files as checkpoints: a config of their metadata, and tensors under the names that families know.

The `gguf` package parses the file, decodes quantized blocks and knows llama.cpp's name of every module; here stands
what llama.cpp's converter changes in values, to be undone: rows of q and k (`permuted`), norms that it stores whole
where a checkpoint stores what differs from 1, experts in one tensor.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fnengine.errors import CheckpointError, SpecError

LONGEST = 1 << 22
"""Most elements of an array in the metadata; vocabularies and merges have some 10^5."""


@dataclass(frozen=True)
class Kind:
    """How one of llama.cpp's architectures stands in transformers' words."""

    architecture: str
    model_type: str
    permuted: bool = False
    """Rows of q and k alternate between the halves of a head."""
    plus: float = 0.0
    """What was added to norms."""
    more: Callable[[File], dict[str, Any]] = lambda file: {}
    """Keys of config.json beside those that all have."""


def is_gguf(path: Path | str) -> bool:
    """Whether a path is that of a GGUF file, by its name."""
    return str(path).endswith(".gguf")


@dataclass(frozen=True)
class File:
    """A parsed file."""

    path: Path
    reader: Any
    """gguf.GGUFReader, memory-mapped"""

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the metadata; `{}` in a key stands for the architecture."""
        field = self.reader.fields.get(key.replace("{}", self.arch))
        return default if field is None else field.contents()

    def need(self, key: str) -> Any:
        """A value that must be there. Raises CheckpointError."""
        value = self.get(key)
        if value is None:
            raise damaged(self.path, f"has no {key.replace('{}', self.arch)}")
        return value

    @functools.cached_property
    def arch(self) -> str:
        field = self.reader.fields.get("general.architecture")
        if field is None or not isinstance(field.contents(), str):
            raise damaged(self.path, "has no general.architecture")
        return field.contents()

    @functools.cached_property
    def tensors(self) -> dict[str, Any]:
        return {t.name: t for t in self.reader.tensors}


def damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(what, where=str(path), remedy="fetch it again")


@functools.lru_cache(maxsize=2)
def _parsed(path: Path, _changed: int) -> File:
    gguf = _package(path)

    class Reader(gguf.GGUFReader):
        """The package's, which reads beyond a file's end as nothing and would count to any number in it."""

        def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
                raise ValueError(f"ends before byte {int(offset) + np.dtype(dtype).itemsize * int(count)}")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            if raw_type == gguf.GGUFValueType.ARRAY and int(self._get(orig_offs + 4, np.uint64)[0]) > LONGEST:
                raise ValueError(f"has an array of more than {LONGEST} elements")
            return super()._get_field_parts(orig_offs, raw_type)

    try:
        return File(path, Reader(str(path)))
    except Exception as e:  # the package raises whatever meets it in a damaged file
        raise damaged(path, f"is truncated or no GGUF file: {e}") from e


def parsed(path: Path) -> File:
    """The file's metadata and tensors, none of them read.

    Raises:
        CheckpointError: it is damaged, or the gguf package is missing.
    """
    path = Path(path)
    try:
        return _parsed(path, path.stat().st_mtime_ns)
    except OSError as e:
        raise damaged(path, f"cannot be read: {e}") from e


def _package(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            "GGUF files are read by the gguf package, which is not installed",
            where=str(path),
            remedy="pip install gguf",
        ) from None
    return gguf


# --- config -----------------------------------------------------------------------------------------------------------


def config(path: Path) -> dict[str, Any]:
    """What config.json of the model would say.

    Raises:
        CheckpointError: the file is damaged or lacks a value.
        SpecError: its architecture has no family here.
    """
    file = parsed(path)
    kind = kind_of(file)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise damaged(file.path, "has no tensor token_embd.weight")
    heads = file.need("{}.attention.head_count")
    eos = [file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return {
        "architectures": [kind.architecture],
        "model_type": kind.model_type,
        "hidden_size": file.need("{}.embedding_length"),
        "num_hidden_layers": file.need("{}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.get("{}.attention.head_count_kv", heads),
        "intermediate_size": file.get("{}.feed_forward_length"),
        "max_position_embeddings": file.need("{}.context_length"),
        "rms_norm_eps": rounded(file.need("{}.attention.layer_norm_rms_epsilon")),
        "vocab_size": int(embedding.shape[1]),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": rope(file),
        "torch_dtype": dtype_of(file),
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [id for id in eos if id is not None] or None,
        **kind.more(file),
    }


def kind_of(file: File) -> Kind:
    """What its architecture is here. Raises SpecError when it is nothing."""
    name = "mixtral" if file.arch == "llama" and file.get("llama.expert_count") else file.arch
    if name not in KINDS:
        raise SpecError(
            f"no family reads GGUF files of general.architecture = {name!r}",
            where=str(file.path),
            remedy=f"those of {', '.join(KINDS)} are read; the model's safetensors may do",
            param="general.architecture",
        )
    return KINDS[name]


def rounded(value: float) -> float:
    """The shortest number that is this float32: 1e-05 and not 9.99999974e-06."""
    return float(str(np.float32(value)))


def dtype_of(file: File) -> str:
    """That of most of its values: the widest float, or bfloat16 for quantized blocks."""
    types = {t.tensor_type.name for t in file.tensors.values() if len(t.shape) > 1}
    return {"F32": "float32", "F16": "float16"}.get(types.pop() if len(types) == 1 else "", "bfloat16")


def rope(file: File) -> dict[str, Any]:
    """Rotary positions; factors that lie in tensors become those of a longrope."""
    theta = rounded(file.get("{}.rope.freq_base", 10000.0))
    longest, original = file.need("{}.context_length"), file.get("{}.rope.scaling.original_context_length")
    kind, factor = file.get("{}.rope.scaling.type", "none"), file.get("{}.rope.scaling.factor")
    found = {"rope_theta": theta, "rope_type": "default"}
    factors = [values(file, f"rope_{name}.weight") for name in ("freqs", "factors_short", "factors_long")]
    if factors[0] is not None:  # Llama 3: one set for every length
        both = factors[0].tolist()
        return {**found, "rope_type": "longrope", "short_factor": both, "long_factor": both, "attention_factor": 1.0}
    if factors[1] is not None and factors[2] is not None:
        gain = file.get("{}.rope.scaling.attn_factor")
        return {
            **found,
            "rope_type": "longrope",
            "short_factor": factors[1].tolist(),
            "long_factor": factors[2].tolist(),
            "original_max_position_embeddings": original or longest,
            **({} if gain is None else {"attention_factor": rounded(gain)}),
        }
    if kind == "linear" and factor:
        return {**found, "rope_type": "linear", "factor": rounded(factor)}
    if kind == "yarn" and factor:
        more = {"original_max_position_embeddings": original} if original else {}
        return {**found, "rope_type": "yarn", "factor": rounded(factor), **more}
    if kind != "none":
        raise SpecError(
            f"rope.scaling.type = {kind!r} with factor {factor} is not implemented",
            where=str(file.path),
            remedy="linear and yarn are",
        )
    return found


def values(file: File, name: str) -> Tensor | None:
    """A small tensor, decoded; None where there is none."""
    return None if name not in file.tensors else decoded(file, file.tensors[name])


def head_dim(file: File) -> dict[str, Any]:
    """Where a head's width is not the model's over the heads."""
    width = file.get("{}.attention.key_length", file.get("{}.rope.dimension_count"))
    return {} if width is None else {"head_dim": width}


def llama(file: File) -> dict[str, Any]:
    biased = "blk.0.attn_q.bias" in file.tensors
    return {**head_dim(file), "attention_bias": biased, "mlp_bias": "blk.0.ffn_up.bias" in file.tensors}


def mixtral(file: File) -> dict[str, Any]:
    used = file.need("{}.expert_used_count")
    return {**head_dim(file), "num_local_experts": file.need("{}.expert_count"), "num_experts_per_tok": used}


def qwen3_moe(file: File) -> dict[str, Any]:
    return {
        **head_dim(file),
        "num_experts": file.need("{}.expert_count"),
        "num_experts_per_tok": file.need("{}.expert_used_count"),
        "moe_intermediate_size": file.need("{}.expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def gemma2(file: File) -> dict[str, Any]:
    width, layers = file.need("{}.attention.key_length"), file.need("{}.block_count")
    own = file.need("{}.embedding_length") / file.need("{}.attention.head_count")
    return {
        "head_dim": width,
        "query_pre_attn_scalar": own if layers in (46, 62) else width,  # the 27B ones; files do not say
        "sliding_window": file.get("{}.attention.sliding_window"),
        "attn_logit_softcapping": file.get("{}.attn_logit_softcapping"),
        "final_logit_softcapping": file.get("{}.final_logit_softcapping"),
    }


def gemma3(file: File) -> dict[str, Any]:
    near = rounded(file.get("{}.rope.freq_base_swa", 10000.0))
    near_too = {"rope_theta": near, "rope_type": "default"}
    return {**gemma2(file), "rope_parameters": {"full_attention": rope(file), "sliding_attention": near_too}}


def granite(file: File) -> dict[str, Any]:
    names = {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    found = {ours: file.get("{}." + theirs) for ours, theirs in names.items()}
    return {ours: rounded(value) for ours, value in found.items() if value is not None}


def phi3(file: File) -> dict[str, Any]:
    own = file.need("{}.embedding_length") / file.need("{}.attention.head_count")
    share = file.get("{}.rope.dimension_count", 0) / own
    window = file.get("{}.attention.sliding_window")
    turning = {**rope(file), "partial_rotary_factor": share or 1.0}
    original = file.get("{}.rope.scaling.original_context_length")
    return {
        "rope_parameters": turning,
        "sliding_window": window or None,
        **({} if original is None else {"original_max_position_embeddings": original}),
    }


KINDS: dict[str, Kind] = {
    "llama": Kind("LlamaForCausalLM", "llama", permuted=True, more=llama),
    "mixtral": Kind("MixtralForCausalLM", "mixtral", permuted=True, more=mixtral),
    "qwen2": Kind("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Kind("Qwen3ForCausalLM", "qwen3", more=head_dim),
    "qwen3moe": Kind("Qwen3MoeForCausalLM", "qwen3_moe", more=qwen3_moe),
    "gemma": Kind("GemmaForCausalLM", "gemma", plus=1.0, more=head_dim),
    "gemma2": Kind("Gemma2ForCausalLM", "gemma2", plus=1.0, more=gemma2),
    "gemma3": Kind("Gemma3ForCausalLM", "gemma3_text", plus=1.0, more=gemma3),
    "phi3": Kind("Phi3ForCausalLM", "phi3", more=phi3),
    "granite": Kind("GraniteForCausalLM", "granite", permuted=True, more=granite),
    "olmo2": Kind("Olmo2ForCausalLM", "olmo2"),
}
"""llama.cpp's architectures; `mixtral` is its `llama` with experts."""

# --- tensors ----------------------------------------------------------------------------------------------------------

EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Opened:
    """A tensor of the file as a checkpoint has it. Like a handle of safetensors, which knows tensors by name."""

    file: File
    tensor: Any
    kind: Kind
    expert: int | None = None
    heads: int = 0
    """Of q or k, whose rows are put back; 0: they stay."""

    def get_tensor(self, _name: str) -> Tensor:
        """Decoded to float32, or as it is where it is a float."""
        out = decoded(self.file, self.tensor, self.expert)
        if self.heads:
            out = out.view(self.heads, -1, 2, *out.shape[1:]).transpose(1, 2).reshape(out.shape)
        return out - self.kind.plus if self.kind.plus and self.tensor.name.endswith("norm.weight") else out

    def get_slice(self, _name: str) -> Opened:
        return self

    def get_shape(self) -> list[int]:
        shape = [int(n) for n in reversed(self.tensor.shape)]
        return shape if self.expert is None else shape[1:]

    def get_dtype(self) -> str:
        return "F32"


def decoded(file: File, tensor: Any, expert: int | None = None) -> Tensor:
    """The values of a tensor, or of one expert of it. Raises CheckpointError when its blocks cannot be decoded."""
    from gguf import dequantize

    data = tensor.data if expert is None else tensor.data[expert]
    try:
        found = data if data.dtype in (np.float32, np.float16) else dequantize(data, tensor.tensor_type)
    except Exception as e:
        raise CheckpointError(
            f"tensor {tensor.name} of type {tensor.tensor_type.name} cannot be decoded: {e}", where=str(file.path)
        ) from e
    return torch.from_numpy(np.array(found))


def opened(path: Path, wanted: Iterable[str], heads: int, kv_heads: int) -> dict[str, Opened]:
    """Checkpoint name -> tensor; what nobody wants stands under its own name.

    Args:
        wanted: names that the model's arrays have in a checkpoint.
        heads, kv_heads: H and K.
    """
    import gguf

    file = parsed(path)
    kind = kind_of(file)
    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == file.arch)
    table = gguf.get_tensor_name_map(arch, file.need("{}.block_count"))
    found, used = {}, {"rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"}
    for name in wanted:
        expert = EXPERT.search(name)
        theirs = table.get_name(EXPERT.sub(".experts.", name), try_suffixes=(".weight", ".bias"))
        if theirs not in file.tensors:
            continue
        used.add(theirs)
        part = theirs.split(".")[-2]
        groups = {"attn_q": heads, "attn_k": kv_heads}.get(part, 0) if kind.permuted else 0
        number = None if expert is None or len(file.tensors[theirs].shape) < 3 else int(expert[1])
        found[name] = Opened(file, file.tensors[theirs], kind, number, groups)
    return {**found, **{name: Opened(file, t, kind) for name, t in file.tensors.items() if name not in used}}
