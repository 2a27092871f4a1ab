"""Rotary positions far out, kind by kind.

Oracle: transformers' own rotary embedding of a Llama of that config, at positions up to 131,071.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fnengine.families import spec_from_config
from fnengine.layers import rope_angles
from fnengine.spec import LongScaling, for_length

LONGEST = 131072
CPU = torch.device("cpu")
SHORT, LONG = [1.0 + i / 64 for i in range(32)], [1.0 + i * i / 16 for i in range(32)]
KINDS: dict[str, dict] = {
    "default": {},
    "linear": dict(factor=32.0),
    "dynamic": dict(factor=4.0),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
    "yarn": dict(factor=32.0, original_max_position_embeddings=4096),
    "yarn of DeepSeek": dict(
        rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.8
    ),
    "longrope": dict(short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=4096),
}


def config(kind: str, longest: int = LONGEST) -> dict:
    parameters = {"rope_type": kind, "rope_theta": 500000.0, **KINDS[kind]}
    sizes = dict(hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    return dict(model_type="llama", **sizes, max_position_embeddings=longest, rope_parameters=parameters)


def upstream(given: dict, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    own = LlamaRotaryEmbedding(LlamaConfig(**{k: v for k, v in given.items() if k != "model_type"}))
    cos, sin = own(torch.zeros(1, 1, 128), position[None])
    return cos[0, :, :32], sin[0, :, :32]


POSITIONS = torch.tensor([0, 1, 4095, 4096, 8191, 65535, 99999, LONGEST - 1])


@pytest.mark.parametrize("kind", KINDS)
def test_angles_at_128k_positions(kind: str):
    """A dynamic rope is never scaled up to max_position_embeddings, which is as long as a sequence may be."""
    given = config(kind)
    rope = for_length(spec_from_config(given), LONGEST).layers[0].mixer.rope
    got, want = rope_angles(rope, POSITIONS), upstream(given, POSITIONS)
    for ours, theirs in zip(got, want, strict=True):
        # An angle of 131,071 rad has 0.004 rad between two float32 numbers.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_longrope_takes_the_short_factors_for_short_engines():
    given = config("longrope")
    near = POSITIONS[:3]
    rope = for_length(spec_from_config(given), 4096).layers[0].mixer.rope
    for ours, theirs in zip(rope_angles(rope, near), upstream(given, near), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert rope is not None and isinstance(rope.scaling, LongScaling)
    other = dataclasses.replace(rope, scaling=dataclasses.replace(rope.scaling, longest=LONGEST))
    assert float((rope_angles(other, near)[0] - rope_angles(rope, near)[0]).abs().max()) > 0.1, "a mutant"


def test_text_positions_of_mrope_are_ordinary_ones():
    """A text's three positions are equal, so sections of a head's channels see the same. Oracle: Qwen2-VL's own."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

    given = dict(rope_type="default", rope_theta=500000.0, mrope_section=[8, 12, 12])
    text = transformers.Qwen2VLConfig(text_config=dict(hidden_size=128, num_attention_heads=2, rope_parameters=given))
    own = Qwen2VLRotaryEmbedding(text.get_text_config())
    cos, sin = own(torch.zeros(1, 1, 128), POSITIONS[None, None].expand(3, 1, -1))
    rope = spec_from_config(config("default")).layers[0].mixer.rope
    got = rope_angles(rope, POSITIONS)
    for ours, theirs in zip(got, (cos, sin), strict=True):
        for row in theirs.reshape(-1, len(POSITIONS), theirs.shape[-1]):
            torch.testing.assert_close(ours, row[:, :32], rtol=0, atol=1e-4)
