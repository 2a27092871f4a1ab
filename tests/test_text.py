"""Text in and out: tokenizers, incremental text, stop strings.

Oracles: transformers on the same small tokenizers; whole decoding for incremental decoding; naive search in the whole
text for the stop scan. Mutants: decoding token by token, and a scan that forgets partial matches.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

import fnengine
from fnengine.errors import CheckpointError, RequestError
from fnengine.host.text import LOST, WINDOW, Detokenizer, Piece, StopScan, TextStream, offsets
from fnengine.host.tokenizer import Decoding, Tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog, the end",
    "héllo wörld 你好 hello world",
    "a b  c   d\n\tcode()",
] * 3
BUNDLED = Path(fnengine.__file__).parent / "bundled"


def byte_level(folder: Path) -> None:
    t = Backend(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>", "</s>", "<|user|>"], show_progress=False
        ),
    )
    t.add_tokens([AddedToken("<tool call>", normalized=False)])
    t.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "add_bos_token": True}
    write(folder, config)


def sentencepiece(folder: Path) -> None:
    """Llama-2's tokenizer.json in small: 256 byte tokens behind three special ones, then pieces."""
    t = Backend(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Metaspace()  # so that no piece spans two words
    t.train_from_iterator(CORPUS[:1] + CORPUS[2:3], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = json.loads(t.to_str())["model"]
    front = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    pieces = [*front, *learned["vocab"]]
    t = Backend(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=[tuple(m) for m in learned["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    t.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    t.add_special_tokens(["<unk>", "<s>", "</s>"])
    t.save(str(folder / "tokenizer.json"))
    write(folder, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def wordpiece(folder: Path) -> None:
    words = ["[UNK]", "the", "dog", "##s", "##gy", "run", ",", "a"]
    t = Backend(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.decoder = decoders.WordPiece(cleanup=False)
    t.save(str(folder / "tokenizer.json"))
    write(folder, {"unk_token": "[UNK]"})


def metaspace(folder: Path) -> None:
    words = ["<unk>", "</s>", "▁", "▁the", "▁dog", "s", "▁a", "x", "▁▁"]
    t = Backend(models.Unigram([(w, -float(i)) for i, w in enumerate(words)], unk_id=0))
    t.pre_tokenizer = pre_tokenizers.Metaspace()
    t.decoder = decoders.Metaspace()
    t.add_special_tokens(["</s>"])
    t.save(str(folder / "tokenizer.json"))
    write(folder, {"eos_token": "</s>"})


def word_ends(folder: Path) -> None:
    words = ["the</w>", "do", "g</w>", "s</w>", "a</w>", "b"]
    t = Backend(models.BPE({w: i for i, w in enumerate(words)}, []))
    t.decoder = decoders.BPEDecoder()
    t.save(str(folder / "tokenizer.json"))
    write(folder, {})


MAKERS = {f.__name__: f for f in (byte_level, sentencepiece, wordpiece, metaspace, word_ends)}
BYTES = ["byte_level", "sentencepiece"]


def write(folder: Path, config: dict) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for name, make in MAKERS.items():
        found[name] = tmp_path_factory.mktemp(name)
        make(found[name])
    return found


@pytest.fixture(scope="module")
def load(folders):
    return cache(lambda name: Tokenizer.load(folders[name]))


@pytest.fixture(scope="module")
def upstream(folders):
    from transformers import PreTrainedTokenizerFast

    return cache(lambda name: PreTrainedTokenizerFast.from_pretrained(folders[name]))


# --- the tokenizer -------------------------------------------------------------------------------------------------

TEXTS = [
    "",
    "the fox",
    " the fox ",
    "héllo 你好 🌶 x",
    "<s>the</s> dog",
    "a\n\n  b\tc",
    "<tool call> <|user|>",
    "fjord ✓",
]


@pytest.mark.parametrize("name", BYTES)
@pytest.mark.parametrize("text", TEXTS)
def test_same_ids_and_text_as_transformers(name, text, load, upstream):
    ours, theirs = load(name), upstream(name)
    for special in (True, False):
        ids = ours.encode(text, add_special=special)
        assert ids == theirs.encode(text, add_special_tokens=special)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (ours.bos, ours.eos) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.special_ids >= set(theirs.all_special_ids)
    assert ours.vocab_size == len(theirs)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_byte_level_decodes_any_ids_as_transformers(data, load, upstream):
    ours = load("byte_level")
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size + 3), max_size=30))
    skip = data.draw(st.booleans())
    assert ours.decode(ids, skip) == upstream("byte_level").decode(ids, skip_special_tokens=skip)


def test_sentencepiece_keeps_what_is_valid_in_a_broken_run(load):
    # Hand-worked: E4 is cut short, 41 is an A. The library's decoder would give U+FFFD for both.
    t = load("sentencepiece")
    assert t.decode([t.id_of("<0xE4>"), t.id_of("<0x41>")]) == LOST + "A"


@pytest.mark.parametrize("name", BYTES)
def test_token_bytes_are_the_bytes_of_the_text(name, load):
    t = load(name)
    space = " " if name == "sentencepiece" else ""  # the normaliser puts one before every stretch of text
    for text in TEXTS:
        ids = t.encode(text, add_special=False)
        if text and "<s>" not in text:
            assert b"".join(map(t.token_bytes, ids)).decode() == space + text
    assert t.token_bytes(10**9) == t.token_bytes(2**40) == t.token_bytes(-1) == b""


def test_token_bytes_by_hand(load):
    level, piece = load("byte_level"), load("sentencepiece")
    assert level.token_bytes(level.id_of("Ġthe")) == b" the"
    assert level.token_bytes(level.id_of("ä")) == b"\xe4"
    assert level.token_bytes(level.id_of("<|user|>")) == b"<|user|>"
    assert level.token_text(level.id_of("ä")) == LOST
    assert piece.token_bytes(piece.id_of("▁the")) == b" the"
    assert piece.token_bytes(piece.id_of("<0xE4>")) == b"\xe4"
    assert piece.token_bytes(piece.id_of("</s>")) == b"</s>"
    assert load("wordpiece").token_bytes(3) == b"##s"
    assert load("metaspace").token_bytes(3) == b" the"


@pytest.mark.parametrize(
    ("stated", "named"), [({}, 0), ({"add_bos_token": True}, 0), ({"add_bos_token": False, "add_eos_token": True}, 2)]
)
def test_tokenizer_json_decides_on_bos_and_eos_as_upstream(stated, named, tmp_path):
    from transformers import PreTrainedTokenizerFast

    sentencepiece(tmp_path)
    write(tmp_path, {"bos_token": "<s>", "eos_token": "</s>", **stated})
    t = Tokenizer.load(tmp_path)
    ids = t.encode("the")
    assert ids == PreTrainedTokenizerFast.from_pretrained(tmp_path).encode("the")
    assert ids[0] == t.bos and t.encode("the", add_special=False) == ids[1:]
    assert len(t.notes) == named


def test_declared_tokens_become_special_and_absent_ones_are_named(tmp_path):
    byte_level(tmp_path)
    size = Tokenizer.load(tmp_path).vocab_size
    added = {str(size): {"content": "<new>", "special": True}, str(size + 7): {"content": "<far>"}}
    write(tmp_path, {"added_tokens_decoder": added, "additional_special_tokens": ["<tool call>"]})
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "<pad>"}))
    t = Tokenizer.load(tmp_path)
    assert t.encode("<new>", add_special=False) == [size]
    assert {size, t.id_of("<tool call>")} <= t.special_ids
    assert t.eos == t.id_of("</s>") and "pad_token" not in t.specials
    assert any("<far>" in n for n in t.notes) and any("<pad>" in n for n in t.notes)


def test_templates_from_every_place(tmp_path):
    byte_level(tmp_path)
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    write(tmp_path, {"chat_template": named})
    assert Tokenizer.load(tmp_path).templates == {"default": "A", "tool_use": "B"}
    (tmp_path / "chat_template.json").write_text('{"chat_template": "C"}')
    assert Tokenizer.load(tmp_path).templates == {"default": "C", "tool_use": "B"}
    (tmp_path / "chat_template.jinja").write_text("D")
    t = Tokenizer.load(tmp_path)
    hello = [{"role": "user", "content": "x"}]
    assert [t.render_chat(hello), t.render_chat(hello, tools=[{}]), t.render_chat(hello, template="E")] == [
        "D",
        "B",
        "E",
    ]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["", "{", "[1]", '{"version": "1.0"'])
def test_a_broken_file_is_named(name, content, tmp_path):
    byte_level(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError) as error:
        Tokenizer.load(tmp_path)
    assert error.value.where == str(tmp_path / name) and error.value.remedy


def test_a_folder_without_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json") as error:
        Tokenizer.load(tmp_path)
    assert "--tokenizer" in error.value.remedy
    (tmp_path / "tokenizer.model").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="could not be converted"):
        Tokenizer.load(tmp_path)


def test_an_older_vocabulary_goes_through_transformers(tmp_path, load, folders):
    made = json.loads((folders["byte_level"] / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(made["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in made["merges"]))
    write(tmp_path, {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"})
    t = Tokenizer.load(tmp_path)
    assert t.decoding == Decoding("byte_level")
    assert t.encode("the fox", add_special=False) == load("byte_level").encode("the fox", add_special=False)


def test_a_lone_surrogate_is_the_users_error(load):
    with pytest.raises(RequestError, match="surrogate"):
        load("byte_level").encode("a\ud800")


def test_neither_torch_nor_transformers_is_imported():
    code = (
        "import sys; from pathlib import Path; from fnengine.host.text import TextStream;"
        "from fnengine.host.tokenizer import Tokenizer; t = Tokenizer.load(Path(sys.argv[1]));"
        "t.render_chat([{'role': 'user', 'content': 'hi'}], template='{{ messages[0].content }}');"
        "sys.exit(' '.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(BUNDLED)], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


def test_the_bundled_tokenizer_is_the_same_as_upstream():
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.load(BUNDLED), AutoTokenizer.from_pretrained(BUNDLED)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert ours.eos == theirs.eos_token_id


# --- incremental text ----------------------------------------------------------------------------------------------


def stream(t: Tokenizer, ids, prompt=(), skip=True) -> list[str]:
    detok = Detokenizer.start(t, prompt, skip)
    return [*map(detok.push, ids), detok.finish()]


def after(t: Tokenizer, prompt: list[int], ids: list[int], skip: bool) -> str:
    """The law: what `prompt + ids` shows beyond `prompt`, whose broken end counts as shown unless it gets completed."""
    whole, shown = t.decode(prompt + ids, skip), t.decode(prompt, skip)
    return whole[len(shown) :] if whole.startswith(shown) else whole[len(shown) - 1 :]


def some_ids(t: Tokenizer):
    """Ids that are often bytes of broken characters: most tests of text die there."""
    raw = [i for i in range(t.vocab_size) if len(t.token_bytes(i)) == 1 and t.token_bytes(i) >= b"\x80"]
    anything = st.integers(0, t.vocab_size + 2)
    character = st.characters(min_codepoint=0x80, exclude_categories=["Cs"])
    whole = character.map(lambda c: [by_byte(t)[b] for b in c.encode()])
    single = st.one_of(anything, st.sampled_from(raw or [0])).map(lambda i: [i])
    return st.lists(st.one_of(single, whole) if raw else single, max_size=12).map(
        lambda parts: [i for part in parts for i in part]
    )


@cache
def by_byte(t: Tokenizer) -> dict[int, int]:
    return {t.token_bytes(i)[0]: i for i in reversed(range(t.vocab_size)) if len(t.token_bytes(i)) == 1}


@pytest.mark.parametrize("name", BYTES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_whole(name, data, load):
    t = load(name)
    prompt, ids = data.draw(some_ids(t)), data.draw(some_ids(t))
    skip = data.draw(st.booleans())
    assert "".join(stream(t, ids, skip=skip)) == t.decode(ids, skip)
    assert "".join(stream(t, ids, np.array(prompt, np.int32), skip)) == after(t, prompt, ids, skip)


@pytest.mark.parametrize("name", ["wordpiece", "metaspace", "word_ends"])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_whole_in_a_window(name, data, load):
    t = load(name)
    assert t.decoding.kind == "window"
    ids = data.draw(st.lists(st.integers(0, t.vocab_size + 1), max_size=20))
    cut = data.draw(st.integers(0, len(ids)))
    assert "".join(stream(t, ids)) == t.decode(ids)
    if name != "word_ends":  # whose last word gains its space only with the next
        assert "".join(stream(t, ids[cut:], ids[:cut])) == t.decode(ids)[len(t.decode(ids[:cut])) :]


def test_mutant_decoding_each_token_alone_is_caught(load):
    for name in BYTES:
        t = load(name)
        ids = t.encode("the 🌶", add_special=False)
        assert "".join(stream(t, ids)) == t.decode(ids)
        assert "".join(t.decode([i]) for i in ids) != t.decode(ids)


@pytest.mark.parametrize("name", BYTES)
def test_no_part_of_a_character_is_shown(name, load):
    t = load(name)
    pepper = [by_byte(t)[b] for b in "🌶".encode()]
    assert stream(t, pepper) == ["", "", "", "🌶", ""]
    assert stream(t, pepper[:3]) == ["", "", "", LOST]
    assert stream(t, pepper[2:], pepper[:2]) == ["", "🌶", ""]  # the prompt began it
    x = t.encode("x", add_special=False)[-1]
    assert "".join(stream(t, [x], pepper[:2])) == "x"  # the prompt's own U+FFFD is not repeated
    assert stream(t, [], pepper[:2]) == [""]


def test_leading_space(load):
    t = load("sentencepiece")
    the = t.id_of("▁the")
    assert stream(t, [the, the]) == ["the", " the", ""]
    assert stream(t, [the], [t.bos]) == ["the", ""]
    assert stream(t, [the], [t.bos], skip=False) == [" the", ""]
    assert stream(t, [the], [t.bos, the]) == [" the", ""]


class Counting:
    """A backend whose every token is U+FFFD, and which counts the ids it has to decode."""

    def __init__(self):
        self.work = 0

    def id_to_token(self, id):
        return LOST

    def decode(self, ids, skip_special_tokens):
        self.work += len(ids)
        return LOST * len(ids)


def test_an_endless_broken_stream_costs_the_same_for_every_token(load):
    backend = Counting()
    detok = Detokenizer.start(Tokenizer(backend, Decoding("window"), frozenset()))
    shown = "".join(detok.push(1) for _ in range(4000)) + detok.finish()
    assert backend.work <= 4000 * 3 * WINDOW and shown.rstrip(LOST) == ""
    for name in BYTES:
        t = load(name)
        detok = Detokenizer.start(t)
        for _ in range(4000):
            detok.push(by_byte(t)[0xF0])
            assert len(detok._source.decoder.getstate()[0]) <= 3


# --- stop strings --------------------------------------------------------------------------------------------------


def naive(text: str, stops: tuple[str, ...], include: bool = False, from_: int = 0) -> tuple[str, str | None]:
    """What is shown of a text and the string that stopped it, by looking at every prefix of the text."""
    for end in range(from_ + 1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


def scanned(scan: StopScan, pieces: list[str]) -> tuple[str, str | None]:
    shown, given_ = "", ""
    for piece in pieces:
        given_ += piece
        new, stop = scan.feed(piece)
        shown += new
        if stop is not None:
            return shown, stop
        assert len(given_) - len(shown) <= max(map(len, scan.stops), default=1) - 1
    return shown + scan.flush()[0], None


few = st.text("ab", max_size=6)


@settings(max_examples=300, deadline=None)
@given(st.lists(few, max_size=8), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3), st.booleans())
def test_scan_is_search_in_the_whole_text(pieces, stops, include):
    assert scanned(StopScan(tuple(stops), include), pieces) == naive("".join(pieces), tuple(stops), include)


def test_mutant_forgetting_partial_matches_is_caught():
    pieces = ["aa", "ab"]
    good, mutant = StopScan(("aab",)), StopScan(("aab",))
    mutant._border = tuple((0,) * len(b) for b in mutant._border)
    expected = naive("aaab", ("aab",))
    assert scanned(good, pieces) == expected and scanned(mutant, pieces) != expected


def test_scan_by_hand():
    assert StopScan(("xyz", "y")).feed("axyz") == ("ax", "y")  # completes first
    assert StopScan(("xy", "y")).feed("axyz") == ("a", "xy")  # ties: list order
    assert StopScan(("y", "xy")).feed("axyz") == ("ax", "y")
    scan = StopScan(("\n\nUser:",))
    assert [scan.feed(p) for p in ("hi", "\n", "\nUs", "e", "d")] == [
        ("hi", None),
        ("", None),
        ("", None),
        ("", None),
        ("\n\nUsed", None),
    ]


def test_scan_work_does_not_grow_with_the_stop_string():
    # Every c breaks a match of 500 characters; comparing anew at each start would take 500 * 500 steps a round.
    class Counted(tuple):
        reads = 0

        def __getitem__(self, n):
            Counted.reads += 1
            return tuple.__getitem__(self, n)

    text, stop = ("a" * 500 + "c") * 20, "a" * 500 + "b"
    scan = StopScan((stop,))
    scan._border = (Counted(scan._border[0]),)
    shown = "".join(scan.feed(c)[0] for c in text)
    assert 0 < Counted.reads <= len(text)  # each step back undoes one step forward
    assert shown == text and scan.feed(stop) == ("", stop)


# --- streams of one choice -------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_stream_keeps_tokens_beside_their_text(data, load):
    t = load(data.draw(st.sampled_from(BYTES)))
    ids = data.draw(some_ids(t))
    stops = tuple(data.draw(st.lists(st.text("the fo\ufffd", min_size=1, max_size=3), max_size=2)))
    include, first = data.draw(st.booleans()), data.draw(st.integers(0, 3))
    parts = stream(t, ids)
    # Stop strings count where they end in the text of a token that counts; the end counts if any token does.
    early = sum(map(len, parts[:first])) + (len(parts[-1]) if len(ids) <= first else 0)
    text, stop = naive("".join(parts), stops, include, early)

    s = TextStream.start(t, (), stops, include_stop=include, from_token=first)
    pieces, pushed = [], 0
    for i, id in enumerate(ids):
        pieces.append(s.push(id, i))
        pushed = i + 1
        if pieces[-1].stop is not None:
            break
        shown = sum(len(p.text) for p in pieces)
        out = [k for p in pieces for k in p.logprobs]
        # A token needs as much text as decoding up to it shows (a begun character counts as one).
        ready = [k for k in range(pushed) if len(t.decode(ids[: k + 1])) <= shown]
        assert out == ready if pieces[-1].text else len(out) <= len(ready)
    if not pieces or pieces[-1].stop is None:
        pieces.append(s.finish())
    whole = sum(pieces, Piece())
    assert (whole.text, whole.stop) == (text, stop)
    assert whole.tokens == tuple(ids[:pushed]) and whole.logprobs == tuple(range(pushed))


def test_held_text_and_token_leave_together(load):
    t = load("byte_level")
    a, b, c, user = (t.encode(x, add_special=False)[0] for x in ("x", "y", "z", "<|user|>"))
    s = TextStream.start(t, (), ("yq",))
    assert s.push(a, -1.0) == Piece("x", (a,), (-1.0,))
    assert s.push(b, -2.0) == Piece()
    assert s.push(user, -3.0) == Piece()
    assert s.push(c, -4.0) == Piece("yz", (b, user, c), (-2.0, -3.0, -4.0))
    assert s.push(b, -5.0) == Piece()
    assert s.push(t.eos, -6.0, silent=True) + s.finish() == Piece("y", (b, t.eos), (-5.0, -6.0))


def test_a_token_waits_for_the_rest_of_its_character(load):
    t = load("byte_level")
    b1, b2 = (by_byte(t)[b] for b in "é".encode())
    s = TextStream.start(t)
    assert [s.push(b1), s.push(b2)] == [Piece(), Piece("é", (b1, b2), (None, None))]


def test_min_tokens(load):
    t = load("byte_level")
    x = t.encode("x", add_special=False)[0]
    s = TextStream.start(t, (), ("xx",), from_token=3)
    assert [s.push(x).stop for _ in range(4)] == [None, None, None, "xx"]


def test_offsets_by_hand(load):
    t = load("byte_level")
    pepper = [by_byte(t)[b] for b in "🌶".encode()]
    ids = [by_byte(t)[ord("a")], t.eos, *pepper, by_byte(t)[ord("b")]]
    assert offsets(t, ids, 5) == [5, 6, 6, 6, 6, 6, 7]
    assert offsets(t, ids, 0, skip_special=False) == [0, 1, 5, 5, 5, 5, 6]
    assert offsets(t, pepper[2:] + ids[:1], 3, prompt=pepper[:2]) == [3, 3, 4]


def test_a_broken_pair_of_prompt_bytes_leaks_nothing(load):
    """ED A0 waits as a whole and becomes two U+FFFD, both of them the prompt's."""
    for name in BYTES:
        t = load(name)
        assert "".join(stream(t, [], np.array([by_byte(t)[0xED], by_byte(t)[0xA0]], np.int32), False)) == ""


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_short_way_of_whole_tokens_gives_what_the_long_way_gives(data, load):
    """`TextStream.whole` against a stream that never has any."""
    t = load(data.draw(st.sampled_from(BYTES)))
    prompt, ids, skip = data.draw(some_ids(t)), data.draw(some_ids(t)), data.draw(st.booleans())
    for id in range(t.vocab_size):
        t.token_bytes(id)  # fills the memo
    short, long = (TextStream.start(t, prompt, skip_special=skip) for _ in range(2))
    for i, id in enumerate(ids):
        long.whole = {}
        piece = long.push(id, i)
        if (text := short.whole.get(id)) is not None:
            assert piece == (text, (id,), (i,), None)
        else:
            assert short.push(id, i) == piece
    long.whole = {}
    assert short.finish() == long.finish()


def test_plain_letters_take_the_short_way(load):
    t = load("byte_level")
    x = t.id_of("x")
    s = TextStream.start(t, t.encode("the"))
    assert s.push(x) == Piece("x", (x,), (None,)) and s.whole[x] == "x"
    assert x not in TextStream.start(t, (), ("stop",)).whole
