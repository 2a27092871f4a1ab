"""Models that also see or hear: the part of them for text, from their own checkpoints.

Oracle: transformers' whole model on the same tiny random weights, in float32, given a text.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fnengine as fn
from fnengine import checkpoint, params
from fnengine.errors import CheckpointError, SpecError
from fnengine.families import spec_from_config
from fnengine.spec import Rope, Tempered
from tests.models import random_weights, text_config, threads

CONFIGS = Path(__file__).parent / "configs"
TOLERANCE = 1e-5
"""Largest difference of a logit over the largest logit."""


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def pixtral() -> Any:
    from transformers import PixtralVisionConfig

    sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    return PixtralVisionConfig(**sizes, image_size=32, patch_size=8)


def gemma4_vision() -> Any:
    from transformers import Gemma4VisionConfig

    sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2)
    return Gemma4VisionConfig(**sizes, num_key_value_heads=2, head_dim=16, position_embedding_size=16)


def no_tower() -> None:
    return None


WHOLE = {
    "mistral3": ("Mistral3", "ministral3", pixtral),
    "mistral3-small": ("Mistral3", "mistral", pixtral),
    "gemma4": ("Gemma4", "gemma4", no_tower),
    "gemma4-moe": ("Gemma4", "gemma4-moe", gemma4_vision),
}
"""Name -> what its classes are called, the tiny model whose text it has, the config of its tower."""


@functools.cache
def upstream(name: str) -> Any:
    import transformers

    family, text, tower = WHOLE[name]
    given = dict(text_config=text_config(text), vision_config=tower())
    given["tie_word_embeddings"] = name == "mistral3"
    config = getattr(transformers, f"{family}Config")(**given)
    config._attn_implementation = "eager"
    torch.manual_seed(1234)
    return random_weights(getattr(transformers, f"{family}ForConditionalGeneration")(config)).eval()


@pytest.mark.parametrize("converted", [True, False], ids=["as published", "as in memory"])
@pytest.mark.parametrize("name", WHOLE)
def test_logits_of_a_text(name: str, converted: bool, tmp_path: Path):
    """Both spellings of names that transformers writes. What sees is named as left out."""
    from safetensors.torch import load_file, save_file

    theirs, ids = upstream(name), torch.randint(11, 131, (41,), generator=torch.Generator().manual_seed(1)).tolist()
    theirs.save_pretrained(tmp_path, save_original_format=converted)
    held = load_file(tmp_path / "model.safetensors")
    begin = "language_model.model." if converted and name.startswith("mistral3") else "model.language_model."
    assert any(n.startswith(begin) for n in held)
    model = fn.load(tmp_path, dtype="float32", device="cpu")
    assert any("vision_tower" in note and "left out" in note for note in model.notes)
    rt = fn.Runtime(model, max_num_seqs=2, max_model_len=64, kv_cache_memory_bytes=1 << 20, enforce_eager=True)
    got = rt.extend(rt.empty, ids, logits="all")[1]
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits[0]
    assert float((got - want).abs().max()) < TOLERANCE * float(want.abs().max())
    save_file({**held, "model.language_model.layers.0.extra.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="extra"):
        checkpoint.load(tmp_path, model.spec, torch.float32, torch.device("cpu"), model.how)


def published(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


def test_ministral_3_is_read():
    """Oracle: its published 3.4 billion parameters beside what sees, and the config's own numbers."""
    spec = spec_from_config(published("Ministral-3-3B-Instruct-2512"))
    rope = spec.layers[0].mixer.rope
    assert isinstance(rope, Tempered) and isinstance(rope.rope, Rope)
    assert (rope.every, rope.scale, rope.first, rope.rope.theta) == (16384, 0.1, 0, 1e6)
    assert (spec.tied, spec.dtype, spec.max_len, len(spec.layers), spec.eos) == (True, "bfloat16", 262144, 26, (2,))
    assert params.count(spec) == 3_429_006_336


@pytest.mark.parametrize(("beta", "tempered"), [(0.0, False), (None, False), (0.1, True)])
def test_without_its_factor_there_is_no_temperature(beta: float | None, tempered: bool):
    """Devstral 2 says 0."""
    text = published("Ministral-3-3B-Instruct-2512")["text_config"]
    text["rope_parameters"]["llama_4_scaling_beta"] = beta
    spec = spec_from_config({**text, "architectures": ["Ministral3ForCausalLM"]})
    assert isinstance(spec.layers[0].mixer.rope, Tempered if tempered else Rope)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text_config": 7}, "text_config = 7 is not an object"),
        ({"hearing": True}, "hearing = True is not understood"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"stored quantized \(gptq\)"),
    ],
)
def test_configs_that_cannot_be_built_say_why(change: dict, says: str):
    with pytest.raises(SpecError, match=says):
        spec_from_config({**published("Ministral-3-3B-Instruct-2512"), **change})


@pytest.mark.parametrize("beta", [-1.0, "much", True])
def test_a_temperature_is_a_number(beta: object):
    config = published("Ministral-3-3B-Instruct-2512")
    config["text_config"]["rope_parameters"]["llama_4_scaling_beta"] = beta
    with pytest.raises(SpecError, match="llama_4_scaling_beta"):
        spec_from_config(config)
