"""Tiny random encoders, classifiers and embedders, made and saved by transformers, and transformers' own answers."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fnengine import model as fn_model
from fnengine.model import Model

PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
BERT: dict[str, Any] = dict(
    vocab_size=131,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=160,
    type_vocab_size=2,
)
ROBERTA = {**BERT, "type_vocab_size": 1, "pad_token_id": 1}
MODERN: dict[str, Any] = dict(
    vocab_size=131,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=256,
    local_attention=12,
    **{f"{k}_token_id": 0 for k in ("pad", "bos", "eos", "cls", "sep")},
)
DECODER: dict[str, Any] = dict(
    vocab_size=131,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    pad_token_id=0,
    rope_parameters=PLAIN,
)
GEMMA: dict[str, Any] = {
    **DECODER,
    "num_hidden_layers": 3,
    "query_pre_attn_scalar": 20,
    "sliding_window": 8,
    "use_bidirectional_attention": True,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {"sliding_attention": PLAIN, "full_attention": {"rope_type": "default", "rope_theta": 1e6}},
}
LABELS = {"id2label": {0: "calm", 1: "glad", 2: "sad"}, "label2id": {"calm": 0, "glad": 1, "sad": 2}}
ONE = {"num_labels": 1}

TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", BERT),
    "bert-fills": ("BertForMaskedLM", BERT),
    "bert-labels": ("BertForSequenceClassification", {**BERT, **LABELS}),
    "bert-one": ("BertForSequenceClassification", {**BERT, **ONE}),
    "roberta": ("RobertaModel", ROBERTA),
    "roberta-labels": ("RobertaForSequenceClassification", {**ROBERTA, **LABELS}),
    "xlm-roberta": ("XLMRobertaModel", ROBERTA),
    "xlm-roberta-one": ("XLMRobertaForSequenceClassification", {**ROBERTA, **ONE}),
    "xlm-roberta-fills": ("XLMRobertaForMaskedLM", ROBERTA),
    "modernbert": ("ModernBertModel", MODERN),
    "modernbert-fills": ("ModernBertForMaskedLM", MODERN),
    "modernbert-labels": ("ModernBertForSequenceClassification", {**MODERN, **LABELS, "norm_bias": True}),
    "modernbert-mean": (
        "ModernBertForSequenceClassification",
        {**MODERN, **ONE, "classifier_pooling": "mean", "classifier_bias": True, "attention_bias": True},
    ),
    "llama-labels": ("LlamaForSequenceClassification", {**DECODER, **LABELS}),
    "qwen2-one": ("Qwen2ForSequenceClassification", {**{k: v for k, v in DECODER.items() if k != "head_dim"}, **ONE}),
    "qwen3-labels": ("Qwen3ForSequenceClassification", {**DECODER, **LABELS}),
    "gpt2-labels": (
        "GPT2ForSequenceClassification",
        dict(vocab_size=131, n_embd=48, n_layer=2, n_head=4, n_positions=128, pad_token_id=0, **LABELS),
    ),
    "gemma2-labels": (
        "Gemma2ForSequenceClassification",
        {**DECODER, **LABELS, "sliding_window": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 20},
    ),
    "qwen3-moe-labels": (
        "Qwen3MoeForSequenceClassification",
        {**DECODER, **LABELS, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    ),
    "qwen3": ("Qwen3Model", DECODER),
    "gemma3": ("Gemma3TextModel", GEMMA),
    "gemma3-labels": ("Gemma3TextForSequenceClassification", {**GEMMA, **LABELS}),
}
"""Name -> (transformers' class, what its config says)."""


@functools.cache
def folder_of(name: str, dtype: str = "float32") -> Path:
    """A folder that transformers saved. Made once a session."""
    import transformers

    architecture, options = TINY[name]
    cls = getattr(transformers, architecture)
    torch.manual_seed(4321)
    m = cls(cls.config_class(**options))
    with torch.no_grad():  # norms and biases away from their 1 and 0, weights large enough to matter
        for key, p in m.named_parameters():
            if p.dim() == 1 and key.endswith(".weight"):
                p.copy_(1 + 0.3 * torch.randn_like(p))
            else:
                p.copy_((0.3 if p.dim() == 1 else 0.2) * torch.randn_like(p))
    folder = Path(tempfile.mkdtemp(prefix=f"fnengine-whole-{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    m.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


@functools.cache
def upstream(name: str) -> Any:
    """transformers' own model from that folder, float32: the oracle."""
    import transformers

    cls = getattr(transformers, TINY[name][0])
    return cls.from_pretrained(folder_of(name), dtype=torch.float32, attn_implementation="eager").eval()


@functools.cache
def whole_model(name: str, dtype: str = "float32") -> Model:
    """The same weights in this engine."""
    return fn_model.load(folder_of(name), dtype=dtype, device="cpu")


@torch.no_grad()
def hidden(name: str, tokens: list[int], types: list[int] | None = None) -> Tensor:
    """[n, D]: what transformers' last layer says of one text, alone and without padding."""
    m = upstream(name)
    base = getattr(m, m.base_model_prefix, m)
    more = {} if types is None else {"token_type_ids": torch.tensor([types])}
    return base(torch.tensor([tokens]), **more).last_hidden_state[0]


@torch.no_grad()
def logits(name: str, tokens: list[int], types: list[int] | None = None) -> Tensor:
    """[N]: transformers' numbers of one text, alone and without padding."""
    more = {} if types is None else {"token_type_ids": torch.tensor([types])}
    return upstream(name)(torch.tensor([tokens]), **more).logits[0]


def config_of(name: str) -> dict[str, Any]:
    return json.loads((folder_of(name) / "config.json").read_text())


# --- tokenizers -------------------------------------------------------------------------------------------------------

WORDS = [
    "the",
    "a",
    "red",
    "blue",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "mat",
    "fast",
    "slow",
    "good",
    "bad",
    "film",
    "book",
    "was",
    "is",
    "not",
    "very",
]


def wordpiece(folder: Path) -> None:
    """Writes a WordPiece tokenizer as BERT's: lower case, [CLS] a [SEP] b [SEP], the second text of type 1."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), *WORDS, ".", "?"]
    pieces = list(dict.fromkeys(pieces))
    t = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    t.normalizer = normalizers.BertNormalizer(lowercase=True)
    t.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    t.decoder = decoders.WordPiece()
    t.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    t.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    named = {f"{k}_token": f"[{k.upper()}]" for k in ("pad", "unk", "cls", "sep", "mask")}
    _written(folder, t, {"tokenizer_class": "BertTokenizer", **named})


def unigram(folder: Path) -> None:
    """Writes a Unigram tokenizer as XLM-R's: <s> a </s></s> b </s>, all of type 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz.?"
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(c, -6.0) for c in letters] + [(f"▁{w}", -3.0 - i / 50) for i, w in enumerate(WORDS)]
    t = Tokenizer(models.Unigram(pieces, unk_id=3))
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.decoder = decoders.Metaspace()
    t.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s>:0 $A:0 </s>:0 </s>:0 $B:0 </s>:0", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    t.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>"])
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "<s>"}
    _written(folder, t, {"tokenizer_class": "XLMRobertaTokenizer", **named, "sep_token": "</s>"})


def _written(folder: Path, tokenizer: Any, config: dict[str, Any]) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@functools.cache
def spoken(name: str) -> Path:
    """The folder of a model with a tokenizer: Unigram for those of RoBERTa's kind, else WordPiece."""
    folder = folder_of(name)
    (unigram if "roberta" in name else wordpiece)(folder)
    return folder


@functools.cache
def upstream_tokenizer(name: str) -> Any:
    """transformers' fast tokenizer over the same file."""
    from transformers import PreTrainedTokenizerFast

    config = json.loads((spoken(name) / "tokenizer_config.json").read_text())
    named = {k: v for k, v in config.items() if k.endswith("_token")}
    return PreTrainedTokenizerFast(tokenizer_file=str(spoken(name) / "tokenizer.json"), **named)
