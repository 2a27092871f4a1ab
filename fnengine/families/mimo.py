"""MiMo-7B: Qwen2 with a layer of its own that predicts one further token, which `decoding.mtp` drafts with."""

from __future__ import annotations

from dataclasses import replace

from fnengine.families import qwen2
from fnengine.families.fields import Fields
from fnengine.families.names import IGNORED, MIMO, NAMES, Family
from fnengine.spec import ModelSpec


def read(config: dict, where: str = "config.json") -> ModelSpec:
    """The spec of a MiMoForCausalLM config.

    Source: MiMo-7B (arXiv 2505.07608), whose own code makes it of Qwen2's.
    """
    f = Fields(config, where)
    f.integer("num_nextn_predict_layers", 1, least=0)
    f.only("attention_bias", True)
    own = {key: value for key, value in config.items() if key not in f.used}
    return replace(qwen2.read(own, where), family="mimo", architecture="MiMoForCausalLM")


FAMILY = Family("mimo", "MiMoForCausalLM", read, NAMES, IGNORED, further=MIMO)
