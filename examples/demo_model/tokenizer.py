"""The demo model's tokenizer: byte-level BPE; every digit, and every letter of a run of capitals, is one token."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import corpus
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 2048
CONTEXT = 1024
# Digits, then capitals outside of a capitalised word, then words, then other signs, then white space.
PIECES = r"\p{N}| ?[A-Z](?![a-z])| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}
{{- raise_exception("The demo model knows no role '" ~ message['role'] ~ "', only system, user, assistant, tool.") -}}
{%- endif -%}
{%- set content = message['content'] -%}
{%- if content is string -%}
{%- set text = content -%}
{%- elif content -%}
{%- set parts = namespace(text='') -%}
{%- for part in content -%}
{%- if part['type'] != 'text' -%}
{{- raise_exception("The demo model reads only text parts, not '" ~ part['type'] ~ "'.") -}}
{%- endif -%}
{%- set parts.text = parts.text ~ part['text'] -%}
{%- endfor -%}
{%- set text = parts.text -%}
{%- else -%}
{%- set text = '' -%}
{%- endif -%}
{%- if text or message['role'] != 'assistant' -%}
{{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ text ~ '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def build(seed: int, count: int = 30_000) -> Tokenizer:
    """A tokenizer trained on the first `count` documents of the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [
        AddedToken(text, special=True, normalized=False) for text in (corpus.END, corpus.IM_START, corpus.IM_END)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(corpus.documents(seed), count), trainer)
    return tokenizer


def write(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja."""
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"eos_token": corpus.IM_END, "pad_token": corpus.END}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
        **named,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(named, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
