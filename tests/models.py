"""Tiny random models, made by transformers from a seed and saved once per session, and a plain way to run them here."""

from __future__ import annotations

import atexit
import contextlib
import copy
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fnengine import model as fn_model
from fnengine.host.step import BLOCK
from fnengine.kernels.layout import Tokens
from fnengine.model import Model, embed, head_logits
from fnengine.spec import Recurrent
from fnengine.state import Batch, LayerState, Memory, Pool, Rows, locate, memory_shapes, pool_shapes

TINY: dict[str, dict[str, Any]] = {
    "llama2": dict(
        architecture="LlamaForCausalLM",
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "llama31": dict(
        architecture="LlamaForCausalLM",
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama-linear-biased": dict(
        architecture="LlamaForCausalLM",
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    ),
    "mistral": dict(
        architecture="MistralForCausalLM",
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        sliding_window=9,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "qwen2": dict(
        architecture="Qwen2ForCausalLM",
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "qwen2-window": dict(
        architecture="Qwen2ForCausalLM",
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "qwen3": dict(
        architecture="Qwen3ForCausalLM",
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    ),
    "mixtral": dict(
        architecture="MixtralForCausalLM",
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=9,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "qwen3-moe": dict(
        architecture="Qwen3MoeForCausalLM",
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=40,
        norm_topk_prob=True,
        mlp_only_layers=[0],
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "qwen2-moe": dict(
        architecture="Qwen2MoeForCausalLM",
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=72,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "olmoe": dict(
        architecture="OlmoeForCausalLM",
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=4,
        clip_qkv=1.5,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "glm4-moe": dict(
        architecture="Glm4MoeForCausalLM",
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        n_shared_experts=2,
        moe_intermediate_size=40,
        routed_scaling_factor=1.7,
        use_qk_norm=True,
        attention_bias=True,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    "phimoe": dict(
        architecture="PhimoeForCausalLM",
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=5,
        router_jitter_noise=0.3,
        attention_bias=True,
        lm_head_bias=True,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.6, 2.0, 3.0],
            "long_factor": [2.0] * 8,
            "short_mscale": 1.2,
            "long_mscale": 1.2,
            "original_max_position_embeddings": 512,
        },
    ),
    "deepseek-v2": dict(
        architecture="DeepseekV2ForCausalLM",
        num_attention_heads=4,
        q_lora_rank=28,
        kv_lora_rank=24,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=10,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        n_shared_experts=2,
        moe_intermediate_size=40,
        routed_scaling_factor=1.7,
        first_k_dense_replace=1,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "beta_fast": 8.0,
            "beta_slow": 1.0,
            "mscale": 0.7,
            "mscale_all_dim": 1.4,
            "original_max_position_embeddings": 64,
        },
    ),
    "deepseek-v2-lite": dict(
        architecture="DeepseekV2ForCausalLM",
        num_attention_heads=2,
        q_lora_rank=None,
        kv_lora_rank=30,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=40,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "deepseek-v3": dict(
        architecture="DeepseekV3ForCausalLM",
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=28,
        kv_lora_rank=24,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=16,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        moe_intermediate_size=40,
        first_k_dense_replace=1,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "beta_fast": 8.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "glm4-moe-lite": dict(
        architecture="Glm4MoeLiteForCausalLM",
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=20,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "llama4": dict(
        architecture="Llama4ForCausalLM",
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=40,
        intermediate_size_mlp=96,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        attention_chunk_size=18,
        floor_scale=7,
        attn_scale=0.4,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "gpt-oss": dict(
        architecture="GptOssForCausalLM",
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=6,
        num_experts_per_tok=2,
        swiglu_limit=1.5,
        sliding_window=9,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "beta_fast": 8.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    ),
}
"""Name -> what differs from the shape that all of them share."""

SHARED = dict(
    vocab_size=131,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
HEADS = dict(num_attention_heads=4, num_key_value_heads=2)
PARTLY = {**PLAIN, "partial_rotary_factor": 0.5}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

MORE: dict[str, dict[str, Any]] = {
    "llama-yarn": dict(architecture="LlamaForCausalLM", **HEADS, rope_parameters=YARN),
    "llama-dynamic": dict(
        architecture="LlamaForCausalLM",
        **HEADS,
        rope_parameters={**PLAIN, "rope_type": "dynamic", "factor": 4.0},
    ),
    "ministral": dict(
        architecture="MinistralForCausalLM",
        **HEADS,
        head_dim=16,
        sliding_window=9,
        num_hidden_layers=4,
        layer_types=["full_attention", "sliding_attention"] * 2,
        rope_parameters=PLAIN,
    ),
    "ministral3": dict(
        architecture="Ministral3ForCausalLM",
        **HEADS,
        head_dim=16,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 8.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.6,
        },
    ),
    "smollm3": dict(architecture="SmolLM3ForCausalLM", **HEADS, num_hidden_layers=4, rope_parameters=PLAIN),
    "granite": dict(
        architecture="GraniteForCausalLM",
        **HEADS,
        embedding_multiplier=3.0,
        logits_scaling=0.5,
        residual_multiplier=0.4,
        attention_multiplier=0.1,
        rope_parameters=PLAIN,
    ),
    "olmo2": dict(architecture="Olmo2ForCausalLM", **HEADS, rope_parameters=PLAIN),
    "olmo3": dict(
        architecture="Olmo3ForCausalLM", **HEADS, num_hidden_layers=4, sliding_window=9, rope_parameters=YARN
    ),
    "phi3": dict(architecture="Phi3ForCausalLM", **HEADS, sliding_window=20, rope_parameters=PLAIN),
    "phi3-long": dict(
        architecture="Phi3ForCausalLM",
        **HEADS,
        original_max_position_embeddings=8,
        rope_parameters={**LONG, "partial_rotary_factor": 0.5, "original_max_position_embeddings": 8},
    ),
    "gemma": dict(architecture="GemmaForCausalLM", **HEADS, head_dim=24, rope_parameters=PLAIN),
    "gemma2": dict(
        architecture="Gemma2ForCausalLM",
        tie_word_embeddings=False,
        **HEADS,
        head_dim=24,
        query_pre_attn_scalar=20,
        sliding_window=9,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        rope_parameters=PLAIN,
    ),
    "gemma3": dict(
        architecture="Gemma3ForCausalLM",
        **HEADS,
        head_dim=24,
        num_hidden_layers=3,
        query_pre_attn_scalar=20,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": PLAIN,
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        },
    ),
    "gemma4": dict(
        architecture="Gemma4ForCausalLM",
        tie_word_embeddings=False,
        **HEADS,
        head_dim=16,
        global_head_dim=32,
        num_hidden_layers=5,
        sliding_window=9,
        layer_types=["sliding_attention", *["sliding_attention", "full_attention"] * 2],
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=24,
        vocab_size_per_layer_input=131,
        use_double_wide_mlp=True,
        final_logit_softcapping=12.0,
    ),
    "gemma4-moe": dict(
        architecture="Gemma4ForCausalLM",
        tie_word_embeddings=False,
        **HEADS,
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=6,
        top_k_experts=2,
        moe_intermediate_size=40,
    ),
    "cohere": dict(
        architecture="CohereForCausalLM",
        tie_word_embeddings=False,
        **HEADS,
        logit_scale=0.5,
        use_qk_norm=True,
        rope_parameters=PLAIN,
    ),
    "cohere2": dict(
        architecture="Cohere2ForCausalLM",
        **HEADS,
        num_hidden_layers=4,
        logit_scale=0.5,
        sliding_window=9,
        rope_parameters=PLAIN,
    ),
    "glm": dict(architecture="GlmForCausalLM", **HEADS, head_dim=16, rope_parameters=PARTLY),
    "glm4": dict(architecture="Glm4ForCausalLM", **HEADS, head_dim=16, rope_parameters=PARTLY),
    "starcoder2": dict(architecture="Starcoder2ForCausalLM", **HEADS, sliding_window=20, rope_parameters=PLAIN),
    "stablelm": dict(architecture="StableLmForCausalLM", **HEADS, use_qkv_bias=True, rope_parameters=PARTLY),
    "stablelm-parallel": dict(
        architecture="StableLmForCausalLM",
        **HEADS,
        qk_layernorm=True,
        use_parallel_residual=True,
        rope_parameters=PARTLY,
    ),
    "phi": dict(architecture="PhiForCausalLM", **HEADS, rope_parameters=PARTLY),
    "gpt-neox": dict(architecture="GPTNeoXForCausalLM", num_attention_heads=4, rope_parameters=PARTLY),
    "gpt-neox-in-turn": dict(
        architecture="GPTNeoXForCausalLM", num_attention_heads=4, use_parallel_residual=False, rope_parameters=PARTLY
    ),
    "gpt2": dict(
        architecture="GPT2LMHeadModel", tie_word_embeddings=False, num_attention_heads=4, drop=("intermediate_size",)
    ),
    "opt": dict(
        architecture="OPTForCausalLM",
        tie_word_embeddings=False,
        num_attention_heads=4,
        ffn_dim=96,
        word_embed_proj_dim=64,
        drop=("intermediate_size",),
    ),
    "falcon-7b": dict(
        architecture="FalconForCausalLM", num_attention_heads=4, rope_parameters=PLAIN, drop=("intermediate_size",)
    ),
    "falcon-40b": dict(
        architecture="FalconForCausalLM",
        tie_word_embeddings=False,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        rope_parameters=PLAIN,
        drop=("intermediate_size",),
    ),
    "falcon-in-turn": dict(
        architecture="FalconForCausalLM",
        tie_word_embeddings=False,
        num_attention_heads=4,
        multi_query=False,
        parallel_attn=False,
        bias=True,
        ffn_hidden_size=96,
        rope_parameters=PLAIN,
        drop=("intermediate_size",),
    ),
}
"""More of them, which tests/test_dense_families.py looks at."""


HYBRID: dict[str, dict[str, Any]] = {
    "qwen3-next": dict(
        architecture="Qwen3NextForCausalLM",
        **HEADS,
        head_dim=24,
        num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=12,
        linear_value_head_dim=20,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=48,
        mlp_only_layers=[2],
        rope_parameters=PARTLY,
    ),
    "qwen3-5": dict(
        architecture="Qwen3_5ForCausalLM",
        **HEADS,
        head_dim=16,
        num_hidden_layers=3,
        layer_types=["linear_attention", "linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        tie_word_embeddings=True,
        rope_parameters={**PARTLY, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    ),
    "qwen3-5-moe": dict(
        architecture="Qwen3_5MoeForCausalLM",
        **HEADS,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=1,
        linear_num_value_heads=3,
        linear_key_head_dim=16,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=48,
        drop=("intermediate_size",),
        rope_parameters={**PARTLY, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    ),
    "bamba": dict(
        architecture="BambaForCausalLM",
        **HEADS,
        num_hidden_layers=3,
        attn_layer_indices=[1],
        mamba_n_heads=8,
        mamba_n_groups=2,
        mamba_d_state=12,
        mamba_chunk_size=16,
        time_step_limit=[0.01, 2.0],
        rope_parameters=PLAIN,
    ),
}
"""Models with recurrent layers, which tests/test_hybrid_families.py looks at."""


OTHERS: dict[str, dict[str, Any]] = {
    "persimmon": dict(architecture="PersimmonForCausalLM", num_attention_heads=4, rope_parameters=PARTLY),
    "nemotron": dict(architecture="NemotronForCausalLM", **HEADS, rope_parameters=PARTLY),
    "exaone4": dict(
        architecture="Exaone4ForCausalLM",
        **HEADS,
        num_hidden_layers=3,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=PLAIN,
    ),
    "gptj": dict(
        architecture="GPTJForCausalLM",
        n_embd=64,
        n_head=4,
        n_layer=2,
        n_positions=256,
        rotary_dim=8,
        drop=("intermediate_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"),
    ),
    "ernie-moe": dict(
        architecture="Ernie4_5_MoeForCausalLM",
        **HEADS,
        moe_num_experts=6,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_intermediate_size=40,
        num_hidden_layers=2,
        rope_parameters=PLAIN,
    ),
}
"""Of architectures that no family knows, for tests/test_fallback.py."""


WRITTEN: dict[str, dict[str, Any]] = {
    "mixtral-open": {**TINY["mixtral"], "sliding_window": None},
    "qwen3-moe-all": {**TINY["qwen3-moe"], "mlp_only_layers": []},
    "gemma2-tied": {**MORE["gemma2"], "tie_word_embeddings": True, "query_pre_attn_scalar": 24},
    "gemma3-six": {
        **MORE["gemma3"],
        "num_hidden_layers": 6,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
}
"""What llama.cpp's files can say, for tests/test_gguf.py."""


def _config(name: str) -> tuple[Any, Any]:
    import transformers

    # Copied to the last dictionary: transformers writes into rope_parameters, which models share here.
    options = copy.deepcopy({**SHARED, **{**TINY, **MORE, **HYBRID, **OTHERS, **WRITTEN}[name]})
    for key in options.pop("drop", ()):
        del options[key]
    if "rope_parameters" in options and int(transformers.__version__.split(".")[0]) < 5:  # the old spelling of the same
        rope = dict(options.pop("rope_parameters"))
        options["rope_theta"] = rope.pop("rope_theta")
        options["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    cls = getattr(transformers, options.pop("architecture"))
    return cls, cls.config_class(**options)


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """`n` threads for torch. Tiny models run fastest on one: waking the others costs more than their share."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_weights(m: Any) -> Any:
    """The module with weights of torch's generator, so large that every part of it matters."""
    with torch.no_grad():  # norms and biases away from their 1 and 0, weights large enough to matter
        for key, p in m.named_parameters():
            if p.dim() == 1 and key.endswith(".weight"):
                p.copy_(1 + 0.3 * torch.randn_like(p))
            elif p.dim() == 1:
                p.copy_(0.3 * torch.randn_like(p))
            else:
                p.copy_(torch.randn_like(p) * (0.15 if p.shape[1] > 90 else 0.2))
        for key, b in m.named_buffers():
            if key.endswith("e_score_correction_bias"):
                b.copy_(0.2 * torch.randn_like(b))
            if key.endswith("layer_scalar"):
                b.copy_(1 + 0.3 * torch.randn_like(b))
    return m


def text_config(name: str) -> Any:
    """transformers' config of a tiny model."""
    return _config(name)[1]


@functools.cache
def tiny_folder(name: str, dtype: str = "float32") -> Path:
    """A folder that transformers saved: config.json and model.safetensors. Made once a session."""
    cls, config = _config(name)
    torch.manual_seed(1234)
    m = random_weights(cls(config))
    folder = Path(tempfile.mkdtemp(prefix=f"fnengine-tiny-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    m.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


@functools.cache
def upstream(name: str) -> Any:
    """transformers' own model from that folder, float32: the oracle."""
    cls, _ = _config(name)
    return cls.from_pretrained(tiny_folder(name), dtype=torch.float32, attn_implementation="eager").eval()


@functools.cache
def tiny_model(name: str, dtype: str = "float32") -> Model:
    """The same weights in this engine."""
    return fn_model.load(tiny_folder(name), dtype=dtype, device="cpu")


@dataclass
class Paged:
    """Sequences over a paged pool, driven by hand: no ledger, no scheduler, blocks handed out in order."""

    model: Model
    ops: Any
    rows: Rows
    pool: tuple[LayerState, ...]
    free: list[int]

    @classmethod
    def make(cls, model: Model, ops: Any, rows: int = 8, blocks: int = 64, max_len: int = 128) -> Paged:
        M, P = rows + 1, -(-max_len // BLOCK)
        z = torch.zeros
        none: Any = None
        at = [none] * len(dataclasses.fields(Rows))
        state = Rows(*at)
        state = dataclasses.replace(
            state,
            length=z(M, dtype=torch.int32),
            table=z(M, P, dtype=torch.int32),
            history=z(M, max_len + 1),
            behind=z(M, dtype=torch.int32),
            near=z(M, 0, dtype=torch.int32),
        )
        pool = tuple(
            Memory(*(z(M, *shape) + torch.nan for some in memory_shapes(m) for shape in some))
            if isinstance(m := la.mixer, Recurrent)
            else Pool(*(z(s, dtype=model.dtype) for s in pool_shapes(ops.kv, m, blocks)))
            for la in model.spec.layers
        )
        # Scattered blocks, so that a table read wrongly shows.
        order = torch.randperm(blocks - 1, generator=torch.Generator().manual_seed(5)) + 1
        return cls(model, ops, state, pool, order.tolist())

    def extend(self, new: list[tuple[int, list[int]]], least: int = 4, spec: Any = None) -> list[Tensor]:
        """Logits [n, V] of every new token of every (row, tokens), all in one forward, padded to `least` tokens."""
        spec = self.model.spec if spec is None else spec
        null = self.rows.length.shape[0] - 1
        for row, tokens in new:
            have, want = int(self.rows.length[row]), int(self.rows.length[row]) + len(tokens)
            for column in range(-(-have // BLOCK), -(-want // BLOCK)):
                self.rows.table[row, column] = self.free.pop()
        flat = [t for _, tokens in new for t in tokens]
        sizes = [len(tokens) for _, tokens in new]
        row_ids = [row for row, _ in new]
        if len(flat) < least:
            sizes.append(least - len(flat))
            flat += [0] * (least - len(flat))
            row_ids.append(null)
        start = [0]
        for n in sizes:
            start.append(start[-1] + n)
        i32 = functools.partial(torch.tensor, dtype=torch.int32)
        token, row = i32(flat), i32(row_ids)
        batch = Batch(row, i32(start), token, torch.zeros_like(row), None)
        where = dataclasses.replace(locate(self.rows, batch, BLOCK), token=token)
        hidden, _ = fn_model.body(
            spec,
            self.model.params,
            self.pool,
            where,
            self.ops,
            embed(spec, self.model.params, token, where.position),
            fn_model.one_by_one(),
        )
        logits = head_logits(spec, self.model.params, hidden)
        self.rows.length[row.long()] = where.length
        self.rows.length[null] = 0
        return [logits[start[i] : start[i + 1]] for i in range(len(new))]


def dense_ops() -> Any:
    """The ops of a step in the plainest torch there is, one row and one head at a time: slow and easy to believe."""

    def rope_write(qkv, q_norm, k_norm, cos, sin, k_pool, v_pool, slot, eps):
        K, C = k_pool.shape[2:]
        heads = qkv.unflatten(1, (-1, C))
        if not v_pool.numel():  # written as well as all others, and never read
            heads, v_pool = torch.cat([heads, heads[:, -K:]], 1), torch.empty_like(k_pool)
        q_THC = torch.empty_like(heads[:, : -2 * K])
        for t in range(len(slot)):
            at = divmod(int(slot[t]), k_pool.shape[1])
            for h, x in enumerate(heads[t, :-K].float()):
                norm = q_norm if h < q_THC.shape[1] else k_norm
                if norm is not None:
                    x = (x / (x.square().mean() + eps).sqrt() * norm.float()).to(qkv.dtype).float()
                # a rotation in the plane of channels i and i + W, as complex numbers
                W = cos.shape[1]
                turned = torch.complex(x[:W], x[W : 2 * W]) * torch.complex(cos[t], sin[t])
                x = torch.cat([turned.real, turned.imag, x[2 * W :]])
                if h < q_THC.shape[1]:
                    q_THC[t, h] = x
                else:
                    k_pool[at][h - q_THC.shape[1]] = x
            v_pool[at] = heads[t, -K:]
        return q_THC

    def paged_attention(q, k_pool, v_pool, table, row, start, length, scale, window, soft_cap, sink):
        out = torch.empty_like(q)
        for r in range(len(row)):
            lo, hi, n = int(start[r]), int(start[r + 1]), int(length[r])
            if hi == lo:
                continue
            blocks = table[int(row[r])].long()
            k = k_pool[blocks].flatten(0, 1)[:n].float()
            v = v_pool[blocks].flatten(0, 1)[:n].float() if v_pool.numel() else k
            if k.shape[0] < n:  # padding tokens beyond the null row's table
                out[lo:hi] = 0
                continue
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            at = torch.arange(n - (hi - lo), n)[:, None]
            kv = torch.arange(n)[None, :]
            seen = (kv <= at) & ((kv > at - window) if window > 0 else torch.ones_like(kv <= at))
            if window < 0:
                seen &= kv // -window == at // -window
            score = torch.einsum("thc,shc->hts", q[lo:hi].float(), k) * scale
            if soft_cap:
                score = soft_cap * (score / soft_cap).tanh()
            p = score.masked_fill(~seen, float("-inf")).exp()
            total = p.sum(-1, keepdim=True) + (0 if sink is None else sink.float().exp()[:, None, None])
            p = p / total
            out[lo:hi] = torch.einsum("hts,shc->thc", p, v).to(q.dtype)
        return out

    class Ops:
        pass

    ops: Any = Ops()
    ops.rope_write, ops.paged_attention, ops.kv = rope_write, paged_attention, Tokens()
    return ops
