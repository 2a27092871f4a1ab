"""Token ids to text and back, read from a checkpoint folder without importing transformers.

How ids become text is decided once, from the checkpoint's own decoder (`Decoding`). For the two decoders that language
models use, byte-level BPE and SentencePiece with byte fallback, text is *defined* as the tokens' true bytes joined and
decoded as UTF-8 with U+FFFD for what is invalid. Whole decoding (`Tokenizer.decode`) and incremental decoding
(`text.Detokenizer`) share that definition, so that streaming and not streaming agree for every sequence of ids. It
differs from transformers in two places, on purpose: a run of byte-fallback tokens with an invalid byte keeps its valid
characters (upstream replaces the whole run), and a special token spelt in Latin-1 letters keeps its spelling.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import tokenizers

from fnengine.errors import CheckpointError, RequestError
from fnengine.host.template import ContentFormat, choose, render

FILES = ("vocab.json", "tokenizer.model", "spiece.model", "tekken.json", "vocab.txt", "sentencepiece.bpe.model")
"""Vocabularies that only transformers can turn into a tokenizer; any of them beside a missing tokenizer.json."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens with a name; templates see them under it."""
MAX_ID = 2**32
"""Ids from here on cannot be asked of the backend."""


@dataclass(frozen=True)
class Decoding:
    """How token strings become text."""

    kind: Literal["byte_level", "byte_fallback", "window"]
    """`byte_level`: characters stand for bytes (GPT-2's alphabet). `byte_fallback`: SentencePiece; <0xE4> is a byte,
    everything else is text. `window`: anything else; only the backend can decode it, a few tokens at a time."""
    replace: tuple[tuple[str, str], ...] = ()
    """byte_fallback: (from, to) within each token, e.g. ('▁', ' ')."""
    strip: int = 0
    """byte_fallback: at most this many spaces are dropped at the start of the whole text."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary with its text rules. A value: nothing about it changes after `load`."""

    backend: tokenizers.Tokenizer
    decoding: Decoding
    special_ids: frozenset[int]
    """Ids whose text `skip_special` leaves out."""
    specials: Mapping[str, str] = field(default_factory=dict)
    """Named special tokens (`bos_token`, `eos_token`, ...) as chat templates see them."""
    templates: Mapping[str, str] = field(default_factory=dict)
    """Chat templates by name; usually only `default`."""
    content_format: ContentFormat = "auto"
    """How contents of messages reach the template."""
    notes: tuple[str, ...] = ()
    """What the files ask for and this tokenizer does not do, one sentence each."""
    _bytes: dict[int, bytes] = field(default_factory=dict, repr=False)
    """Memo of `token_bytes`; every entry can be worked out again from the other fields."""
    whole_texts: dict[int, str] = field(default_factory=dict, repr=False)
    """Of the tokens in that memo that are no special ones and whole characters by themselves, those characters."""

    @staticmethod
    def load(folder: Path | str) -> Tokenizer:
        """The tokenizer of a checkpoint folder.

        Raises: CheckpointError when no tokenizer is there or a file cannot be read, naming the file.
        """
        return load(Path(folder))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's embedding may be larger."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos(self) -> int | None:
        """Id of the beginning-of-sequence token, if the checkpoint names one."""
        return self.id_of(self.specials.get("bos_token"))

    @property
    def eos(self) -> int | None:
        """Id of the end-of-sequence token, if the checkpoint names one."""
        return self.id_of(self.specials.get("eos_token"))

    def id_of(self, token: str | None) -> int | None:
        """The id of exactly this token, or None."""
        return None if token is None else self.backend.token_to_id(token)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written in it count as such.

        Args:
            add_special: put BOS or EOS around it where tokenizer.json says so. False for a rendered chat, whose
                template has written them already.

        Raises: RequestError when the text is no Unicode text (a lone surrogate, possible in JSON).
        """
        try:
            # The fast way keeps no offsets, which nobody asks for, and takes half the time.
            return self.backend.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
        except (TypeError, UnicodeError) as error:
            if not isinstance(text, str):
                raise
            raise RequestError(
                "the text holds a lone surrogate, which is not a Unicode character",
                remedy="send characters above U+FFFF whole or as a pair of escapes",
            ) from error

    def encode_pair(
        self, first: str, second: str, add_special: bool = True, most: int | None = None, left: bool = False
    ) -> tuple[list[int], int]:
        """(token ids of two texts in one prompt, as tokenizer.json joins them; where those of the second type begin, 0
        if none are).

        Args:
            most: tokens that may stand, special ones included; what is too much is taken from the longer text, as
                tokenizers' LongestFirst does, at its end, or with `left` at its beginning.

        Raises: RequestError when a text is no Unicode text.
        """
        for text in (first, second):
            self.encode(text, False)  # raises
        a, b = (self.backend.encode(text, add_special_tokens=False) for text in (first, second))
        special = self.backend.num_special_tokens_to_add(True) if add_special else 0
        if most is not None and len(a) + len(b) + special > most:
            room = max(most - special, 0)
            short = min(len(a), len(b), room // 2)
            sizes = (room - short, short) if len(a) > len(b) else (short, room - short)
            for encoding, n in zip((a, b), sizes, strict=True):
                encoding.truncate(n, direction="left" if left else "right")
        joined = self.backend.post_process(a, b, add_special)
        return joined.ids, next((i for i, t in enumerate(joined.type_ids) if t), 0)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The conversation as one string, for `encode(..., add_special=False)`: the template has written BOS itself.

        Args:
            template: the name of one of `templates` or a source; None takes the one made for such a request.
            kwargs: further variables of the template; `documents` too.

        Raises: RequestError with the template's message, or when there is no template.
        """
        source = choose(self.templates, tools) if template is None else self.templates.get(template, template)
        return render(
            source,
            messages,
            tools=tools,
            documents=kwargs.pop("documents", None),
            add_generation_prompt=add_generation_prompt,
            continue_final=continue_final,
            content_format=self.content_format,
            variables={**self.specials, **kwargs},
        )

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`. Ids outside the vocabulary have none; invalid UTF-8 becomes U+FFFD."""
        shown = [i for i in ids if self.shows(i, skip_special)]
        if self.decoding.kind == "window":
            return self.backend.decode(shown, skip_special_tokens=False)
        text = b"".join(map(self.token_bytes, shown)).decode("utf-8", "replace")
        spaces = len(text) - len(text.lstrip(" "))
        return text[min(self.decoding.strip, spaces) :]

    def shows(self, id: int, skip_special: bool) -> bool:
        """Whether the id takes part in decoding at all."""
        if id in self.special_ids:
            return not skip_special
        return bool(self.token_bytes(id)) if self.decoding.kind != "window" else self.token(id) is not None

    def token(self, id: int) -> str | None:
        """The vocabulary's own spelling (`Ġthe`, `▁the`, `<0xE4>`), or None outside the vocabulary."""
        return self.backend.id_to_token(id) if 0 <= id < MAX_ID else None

    def token_bytes(self, id: int) -> bytes:
        """The token's true bytes, which it adds to a text.

        A part of a character where it is one; special tokens as they are spelt; empty outside the vocabulary.
        """
        found = self._bytes.get(id)
        if found is None:
            token = self.token(id)
            if token is None:
                return b""  # not kept: callers may ask about any number
            found = self._bytes[id] = self._spell(id, token)
            if id not in self.special_ids:
                with contextlib.suppress(UnicodeDecodeError):
                    text = found.decode()
                    if text:
                        self.whole_texts[id] = text
        return found

    def _spell(self, id: int, token: str) -> bytes:
        if id in self.special_ids:
            return token.encode()
        if self.decoding.kind == "byte_level":
            alphabet = byte_alphabet()
            # A character outside the alphabet means that the token was added as plain text.
            return bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else token.encode()
        if self.decoding.kind == "byte_fallback":
            for old, new in self.decoding.replace:
                token = token.replace(old, new)
            return fallback_byte(token) or token.encode()
        if token.startswith("▁"):
            return token.replace("▁", " ").encode()
        return self.backend.decode([id], skip_special_tokens=False).encode()

    def token_text(self, id: int) -> str:
        """The token by itself as text, its leading space kept, U+FFFD for parts of a character."""
        return self.token_bytes(id).decode("utf-8", "replace")


@cache
def byte_alphabet() -> Mapping[str, int]:
    """Byte behind each character of byte-level BPE.

    Source: GPT-2's encoder: printable Latin-1 stands for itself, the other bytes for U+0100 onwards in order.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + n): b for n, b in enumerate(other)}}


def fallback_byte(token: str) -> bytes | None:
    """The byte that `<0xE4>` stands for, or None for any other token."""
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return bytes.fromhex(token[3:5])
    except ValueError:
        return None


def read_decoding(decoder: Mapping[str, Any] | None) -> Decoding:
    """The `Decoding` of a decoder as tokenizer.json writes it."""
    if decoder is None:
        return Decoding("window")
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if [s["type"] for s in steps] == ["ByteLevel"]:
        return Decoding("byte_level")
    replace: list[tuple[str, str]] = []
    rest = list(steps)
    while rest and rest[0]["type"] == "Replace" and "String" in rest[0]["pattern"]:
        replace.append((rest[0]["pattern"]["String"], rest.pop(0)["content"]))
    if [s["type"] for s in rest] == ["ByteFallback", "Fuse"]:
        return Decoding("byte_fallback", tuple(replace))
    if [s["type"] for s in rest] == ["ByteFallback", "Fuse", "Strip"]:
        strip = rest[-1]
        if strip["content"] == " " and strip["stop"] == 0:
            return Decoding("byte_fallback", tuple(replace), strip["start"])
    return Decoding("window")


def load(folder: Path) -> Tokenizer:
    """What `Tokenizer.load` returns."""
    if folder.suffix == ".gguf":
        return _of_gguf(folder)
    config = _read_json(folder / "tokenizer_config.json")
    declared = {**_read_json(folder / "special_tokens_map.json"), **{k: v for k, v in config.items() if v is not None}}
    backend = _read_backend(folder)
    notes: list[str] = []

    added = {int(i): t for i, t in (config.get("added_tokens_decoder") or {}).items()}
    for token, i in _read_json(folder / "added_tokens.json").items():
        added.setdefault(i, {"content": token})
    _add_missing(backend, added, folder, notes)

    specials = {name: text for name in NAMED if (text := _text_of(declared.get(name)))}
    extra = [declared.get(k) for k in ("additional_special_tokens", "extra_special_tokens")]
    listed = [_text_of(t) for group in extra for t in (group.values() if isinstance(group, dict) else group or ())]
    special_ids = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    for text in dict.fromkeys([*specials.values(), *filter(None, listed)]):
        i = backend.token_to_id(text)
        if i is None:
            notes.append(f"special token {text!r} is not in the vocabulary and was left out")
        elif i not in special_ids:
            backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])
            special_ids.add(i)
    specials = {name: text for name, text in specials.items() if backend.token_to_id(text) is not None}

    notes += _check_ends(backend, config, specials)
    backend.no_truncation()
    backend.no_padding()
    model = type(backend.model).__name__
    if config.get("clean_up_tokenization_spaces") and model != "BPE":
        notes.append(f"clean_up_tokenization_spaces is not applied to the text of this {model} tokenizer")
    decoder = backend.decoder
    return Tokenizer(
        backend=backend,
        # The pickled state of a decoder is its part of tokenizer.json; the whole file would cost a second to write.
        decoding=read_decoding(None if decoder is None else json.loads(decoder.__getstate__())),
        special_ids=frozenset(special_ids),
        specials=specials,
        templates=_read_templates(folder, config),
        notes=tuple(notes),
    )


def _of_gguf(file: Path) -> Tokenizer:
    """The tokenizer that a GGUF file describes: transformers writes it as the files that are read here."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            from transformers import AutoTokenizer

            AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)
        except Exception as error:  # transformers raises anything from OSError to KeyError here
            raise CheckpointError(
                f"the tokenizer in it cannot be read: {type(error).__name__}: {error}",
                where=str(file),
                remedy="name a folder that has the tokenizer's own files with --tokenizer",
            ) from error
        return load(Path(folder))


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for whatever is wrong with the file
            raise CheckpointError(
                f"not a readable tokenizer: {error}", where=str(path), remedy="download the file again"
            ) from error
    if not any((folder / name).is_file() for name in FILES):
        raise CheckpointError(
            "no tokenizer.json",
            where=str(folder),
            remedy="download the tokenizer's files beside the weights, or name a folder that has them with --tokenizer",
        )
    return _convert(folder)


def _convert(folder: Path) -> tokenizers.Tokenizer:
    """A tokenizer from an older vocabulary file, through transformers (seconds; only without tokenizer.json)."""
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
    except Exception as error:  # transformers raises anything from OSError to AttributeError here
        raise CheckpointError(
            f"no tokenizer.json, and the older vocabulary could not be converted: {error}",
            where=str(folder),
            remedy="save it once with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(folder)",
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"not readable JSON: {error}", where=str(path), remedy="download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError("a JSON object is expected", where=str(path), remedy="download it again")
    return value


def _text_of(token: Any) -> str | None:
    """The text of a token written as a string or as an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token if isinstance(token, str) else None


def _add_missing(backend: tokenizers.Tokenizer, added: Mapping[int, Any], folder: Path, notes: list[str]) -> None:
    """Adds declared tokens that tokenizer.json lacks, in the order of their ids."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for i, token in sorted(added.items()):
        text = _text_of(token)
        if not text or backend.token_to_id(text) is not None:
            continue
        if i != backend.get_vocab_size():
            # The backend numbers new tokens itself; a wrong number would decode to other text than was trained.
            notes.append(f"added token {text!r} should have id {i}, which tokenizer.json leaves no room for; left out")
            continue
        backend.add_tokens([tokenizers.AddedToken(text, **{k: bool(token[k]) for k in flags if k in token})])


def _check_ends(backend: tokenizers.Tokenizer, config: Mapping[str, Any], specials: Mapping[str, str]) -> list[str]:
    """Where add_bos_token and add_eos_token contradict tokenizer.json, which wins (as in transformers 5)."""
    added = backend.encode("", add_special_tokens=True).tokens
    return [
        f"add_{which}_token is {stated}, but tokenizer.json does otherwise and was followed"
        for which in ("bos", "eos")
        if (stated := config.get(f"add_{which}_token")) is not None
        and f"{which}_token" in specials
        and bool(stated) != (specials[f"{which}_token"] in added)
    ]


def _read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name. Files win over the config, as upstream."""
    found: dict[str, str] = {}
    for source in (config.get("chat_template"), _read_json(folder / "chat_template.json").get("chat_template")):
        if isinstance(source, str):
            found["default"] = source
        elif isinstance(source, list):
            found |= {
                t["name"]: t["template"] for t in source if isinstance(t, dict) and {"name", "template"} <= set(t)
            }
        elif isinstance(source, dict):
            found |= {name: text for name, text in source.items() if isinstance(text, str)}
    files = {"default": folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    for name, path in files.items():
        if path.is_file():
            try:
                found[name] = path.read_text(encoding="utf-8")
            except (OSError, UnicodeError) as error:
                raise CheckpointError(f"not readable text: {error}", where=str(path)) from error
    return found
