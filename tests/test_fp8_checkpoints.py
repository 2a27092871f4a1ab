"""Checkpoints whose weights are floats of 8 bits. Oracles: transformers' own decoding of the same file, and blocks
multiplied one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fnengine as fn
from fnengine import checkpoint, fp8_file
from fnengine.errors import CheckpointError
from fnengine.model import Model
from tests.models import threads, tiny_folder, tiny_model


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def rounded(weight: Tensor, side: int | None) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a weight: one scale, or one for each block of side x side."""
    N, K = weight.shape
    if side is None:
        scale = weight.abs().max() / 448
        return (weight / scale).to(torch.float8_e4m3fn), scale
    scale = torch.empty(-(-N // side), -(-K // side))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            scale[i, j] = weight[i * side : (i + 1) * side, j * side : (j + 1) * side].abs().max() / 448
    wide = scale.repeat_interleave(side, 0)[:N].repeat_interleave(side, 1)[:, :K]
    return (weight / wide).to(torch.float8_e4m3fn), scale


def save(at: Path, name: str, side: int | None, **config: object) -> Path:
    """A tiny model's folder with the weights of its layers in 8 bits, as `quant_method: fp8` has them."""
    from safetensors.torch import load_file, save_file

    source, held = tiny_folder(name), {}
    for key, weight in load_file(source / "model.safetensors").items():
        held[key] = weight
        if key.endswith("_proj.weight"):
            codes, scales = rounded(weight, side)
            held |= {key: codes, f"{key}_scale_inv": scales}
            if side is None:
                held[key.replace(".weight", ".activation_scale")] = torch.tensor(0.1)
    stored = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": None if side is None else [side, side],
    }
    stored |= {"modules_to_not_convert": ["lm_head"], **config}
    given = {**json.loads((source / "config.json").read_text()), "quantization_config": stored}
    (at / "config.json").write_text(json.dumps(given))
    save_file(held, at / "model.safetensors")
    return at


@pytest.mark.parametrize("side", [None, 32])
def test_logits_are_those_of_transformers(side: int | None, tmp_path: Path):
    """Oracle: transformers' own model, with weights that its own code decodes (`Fp8Dequantize`)."""
    import transformers
    from safetensors.torch import load_file
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    folder = save(tmp_path, "ministral3", side, **({"activation_scheme": "static"} if side is None else {}))
    held, decode = load_file(folder / "model.safetensors"), Fp8Dequantize(None)._dequantize_one
    wide = {}
    for key, weight in held.items():
        if key.endswith("weight"):
            scales = held.get(f"{key}_scale_inv")
            wide[key] = weight if scales is None else decode(weight, scales, torch.float32)
    config = transformers.AutoConfig.from_pretrained(tiny_folder("ministral3"), attn_implementation="eager")
    theirs = transformers.Ministral3ForCausalLM(config).eval()  # type: ignore[arg-type]
    theirs.load_state_dict(wide)
    model = fn.load(folder, dtype="float32", device="cpu")
    assert any("floats of 8 bits and decoded to float32" in note for note in model.notes)
    ids = [5, 9, 77, 23, 41, 8, 100] * 5
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits[0]
    least = 1e-5 * float(want.abs().max())
    assert float((logits(model, ids) - want).abs().max()) < least
    assert float((logits(tiny_model("ministral3"), ids) - want).abs().max()) > 100 * least, "8 bits are too few to tell"


def logits(model: Model, ids: list[int]) -> Tensor:
    sizes: dict[str, Any] = dict(max_num_seqs=2, max_model_len=64, kv_cache_memory_bytes=1 << 20)
    rt = fn.Runtime(model, **sizes, enforce_eager=True)
    return rt.extend(rt.empty, ids, logits="all")[1]


@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((64, 48), ()),
        ((64, 48), (1,)),
        ((64, 48), (64, 1)),
        ((64, 48), (64,)),
        ((576, 300), (5, 3)),
        ((3, 64, 48), (3, 2, 2)),
    ],
    ids=str,
)
def test_blocks_are_multiplied_by_their_scales(shape: tuple[int, ...], scales: tuple[int, ...]):
    """Oracle: every number times the scale of the block that it lies in, one by one for some of them."""
    g = torch.Generator().manual_seed(0)
    codes = torch.randn(shape, generator=g).to(torch.float8_e4m3fn)
    s = torch.rand(scales, generator=g) + 0.5
    got = fp8_file.decoded(codes, s)
    assert got.dtype == torch.float32 and got.shape == codes.shape
    side = {(5, 3): 128, (3, 2, 2): 32}.get(scales, 0)
    for at in torch.cartesian_prod(*(torch.tensor([0, n // 2, n - 1]) for n in shape)).tolist():
        if not scales or scales == (1,):
            by = s.reshape(())
        elif side:
            by = s[(*at[:-2], at[-2] // side, at[-1] // side)]
        else:
            by = s.flatten()[at[-2]]
        assert got[tuple(at)] == codes[tuple(at)].float() * by


def test_scales_that_fit_no_block_are_refused():
    with pytest.raises(CheckpointError, match=r"w has shape \[96, 96\], and its scales \[7, 1\] are of no block"):
        fp8_file.decoded(torch.zeros(96, 96), torch.ones(7, 1), "w")


def test_scales_that_are_no_floats_are_refused():
    """Bytes that stand for exponents would be read as numbers."""
    with pytest.raises(CheckpointError, match=r"its scales are torch\.uint8"):
        fp8_file.decoded(torch.zeros(64, 64), torch.ones(2, 2, dtype=torch.uint8), "w")


def test_a_weight_without_scales_is_refused(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = save(tmp_path, "qwen3", None)
    held = load_file(folder / "model.safetensors")
    del held["model.layers.1.mlp.up_proj.weight_scale_inv"]
    save_file(held, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is stored as F8_E4M3"):
        fn.load(folder, dtype="float32", device="cpu")


def test_scales_of_nothing_are_refused(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = save(tmp_path, "qwen3", None)
    held = load_file(folder / "model.safetensors")
    save_file({**held, "model.extra.weight_scale_inv": torch.ones(())}, folder / "model.safetensors")
    spec = checkpoint.read_spec(folder)
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight_scale_inv belongs to nothing"):
        checkpoint.fill(folder, spec, torch.float32, torch.device("cpu"))
