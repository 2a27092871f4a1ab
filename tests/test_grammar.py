"""Grammars as values, and the tokens that they allow.

Oracles: masks worked out by hand on a small vocabulary; Python's json with a validator written here; `re.fullmatch`;
lists of choices. Text is always `Tokenizer.decode` of the tokens.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from fnengine.errors import ConfigError, RequestError
from fnengine.host import grammar as G
from fnengine.host import matcher as M
from fnengine.host.schema import LIMITS, Limits, check_schema, written_out
from fnengine.host.tokenizer import Decoding, Tokenizer, byte_alphabet, read_decoding

BUNDLED = Path(G.__file__).parent.parent / "bundled"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b\n", "é"]}, "minItems": 1, "maxItems": 3},
        "next": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "$defs": {"leaf": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
}
SHAPE = {
    "oneOf": [
        {"type": "object", "properties": {"kind": {"const": "dot"}}, "required": ["kind"]},
        {
            "type": "object",
            "properties": {"kind": {"const": "line"}, "to": {"type": "array", "prefixItems": [{"type": "boolean"}]}},
            "required": ["kind", "to"],
            "additionalProperties": {"type": "string", "pattern": "^[a-z]{2,4}$"},
        },
    ]
}


def byte_level() -> Tokenizer:
    """Every byte, a few merges, and special tokens: 0 ends a text, 1 does too, 2 is special, 3 is added in brackets."""
    letters = {v: k for k, v in byte_alphabet().items()}
    vocab = {"<|end|>": 0, "<|stop|>": 1, "<|x|>": 2, "<call>": 3}
    vocab |= {letters[b]: 4 + b for b in range(256)}
    merges = [("a", "b"), ('"', "a"), ('"', ":"), ("ab", "c"), ("1", "2"), ("{", '"')]
    vocab |= {"".join(m): 260 + i for i, m in enumerate(merges)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in ("<|end|>", "<|stop|>", "<|x|>")])
    backend.add_tokens([tokenizers.AddedToken("<call>", special=False)])
    return Tokenizer(backend, Decoding("byte_level"), frozenset({0, 1, 2}), {"eos_token": "<|end|>"})


def unigram() -> Tokenizer:
    """SentencePiece's kind, through transformers: a space goes before every text, and bytes stand in for characters."""
    from transformers import PreTrainedTokenizerFast

    words = ["▁", "▁{", "{", "}", '"', ":", ",", "a", "b", "ab", "1", "2", "12", "[", "]", "▁a", "true", "n", "e", "é"]
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)] + [(f"<0x{b:02X}>", -20.0) for b in range(256)]
    vocab += [(w, -float(i + 1)) for i, w in enumerate(words)]
    backend = tokenizers.Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    decoder = fast.backend_tokenizer.decoder
    assert decoder is not None
    return Tokenizer(
        fast.backend_tokenizer, read_decoding(json.loads(decoder.__getstate__())), frozenset({0, 1, 2}), {}
    )


TOKENIZERS = {"small": byte_level, "sentence": unigram, "real": lambda: Tokenizer.load(BUNDLED)}
EOS = {"small": [0, 1], "sentence": [2], "real": [2]}


@cache
def tokenizer_of(name: str) -> Tokenizer:
    return TOKENIZERS[name]()


@cache
def vocabulary_of(name: str) -> M.Vocabulary:
    """With 37 rows of logits that no token has."""
    return M.vocabulary(tokenizer_of(name), tokenizer_of(name).vocab_size + 37, EOS[name])


SMALL, V = tokenizer_of("small"), vocabulary_of("small")


def started(grammar: G.Grammar, vocab: M.Vocabulary = V, limits: Limits = LIMITS) -> M.Matcher:
    return M.start(M.compile(grammar, vocab, limits))


def ids(mask_W: np.ndarray) -> set[int]:
    """Tokens of a mask, read bit by bit as `apply_mask` does."""
    return {32 * w + b for w, word in enumerate(mask_W.tolist()) for b in range(32) if word >> b & 1}


def of(*texts: str) -> set[int]:
    """Ids of the small vocabulary's tokens with these texts."""
    return {i for i in range(SMALL.vocab_size) if SMALL.token_bytes(i).decode("latin-1") in texts}


def walk(matcher: M.Matcher, draw: random.Random, most: int, mask=M.allowed) -> tuple[list[int], bool]:
    """Tokens drawn from masks, ends likelier than others, until the end (True) or `most` of them."""
    eos, out = matcher.compiled.vocabulary.eos, []
    while len(out) < most and not matcher.ended:
        can = np.flatnonzero(np.unpackbits(mask(matcher).view(np.uint8), bitorder="little"))
        ends = [i for i in eos if i in can]
        token = draw.choice(ends) if ends and draw.random() < 0.5 else int(can[draw.randrange(len(can))])
        matcher = M.advance(matcher, [token])
        out.append(token)
    return out, matcher.ended


def valid(schema, value, root) -> bool:
    """Whether a value is valid: the keywords that this file uses, as JSON Schema 2020-12 has them."""
    if isinstance(schema, bool):
        return schema
    s, number = schema, isinstance(value, int | float) and not isinstance(value, bool)
    kinds = {
        "object": isinstance(value, dict),
        "array": isinstance(value, list),
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "null": value is None,
        "number": number,
        "integer": number and float(value).is_integer(),
    }
    same = lambda a, b: a == b and isinstance(a, bool) == isinstance(b, bool)  # noqa: E731
    checks = [
        "type" not in s or any(kinds[t] for t in ([s["type"]] if isinstance(s["type"], str) else s["type"])),
        "enum" not in s or any(same(value, e) for e in s["enum"]),
        "const" not in s or same(value, s["const"]),
        "anyOf" not in s or any(valid(x, value, root) for x in s["anyOf"]),
        "oneOf" not in s or sum(valid(x, value, root) for x in s["oneOf"]) == 1,
        "allOf" not in s or all(valid(x, value, root) for x in s["allOf"]),
    ]
    if "$ref" in s:
        here = root
        for step in s["$ref"].split("/")[1:]:
            here = here[step]
        checks.append(valid(here, value, root))
    if isinstance(value, str):
        checks += [s.get("minLength", 0) <= len(value) <= s.get("maxLength", len(value))]
        checks += ["pattern" not in s or re.search(s["pattern"], value, re.ASCII) is not None]
    if number:
        checks += [s.get("minimum", value) <= value <= s.get("maximum", value)]
        checks += ["multipleOf" not in s or value % s["multipleOf"] == 0]
    if isinstance(value, list):
        first = s.get("prefixItems", [])
        checks += [s.get("minItems", 0) <= len(value) <= s.get("maxItems", len(value))]
        checks += [valid(x, v, root) for x, v in zip(first, value, strict=False)]
        checks += [valid(s.get("items", True), v, root) for v in value[len(first) :]]
    if isinstance(value, dict):
        listed, patterns = s.get("properties", {}), s.get("patternProperties", {})
        checks += [all(k in value for k in s.get("required", []))]
        checks += [s.get("minProperties", 0) <= len(value) <= s.get("maxProperties", len(value))]
        for k, v in value.items():
            found = [listed[k]] if k in listed else []
            found += [x for p, x in patterns.items() if re.search(p, k)]
            checks += [valid(x, v, root) for x in found or [s.get("additionalProperties", True)]]
    return all(checks)


# masks by hand


def test_masks_of_a_regular_expression_by_hand():
    """ab(c|12)?: the tokens are a, b, c, 1, 2, ab, abc, 12 and both ends."""
    at = started(G.regex("ab(c|12)?"))
    assert ids(M.allowed(at)) == of("a", "ab", "abc")
    after_a = M.advance(at, sorted(of("a")))
    assert ids(M.allowed(after_a)) == of("b") and M.forced(after_a) == tuple(of("b"))
    after_ab = M.advance(after_a, sorted(of("b")))
    assert ids(M.allowed(after_ab)) == of("c", "1", "12") | {0, 1}
    assert M.accepts_end(after_ab) and not M.done(after_ab) and M.forced(after_ab) == ()
    after_1 = M.advance(after_ab, sorted(of("1")))
    assert ids(M.allowed(after_1)) == of("2") and not M.accepts_end(after_1)
    whole = M.advance(after_1, sorted(of("2")))
    assert ids(M.allowed(whole)) == {0, 1} and M.done(whole) and not whole.ended
    end = M.advance(whole, [1])
    assert end.ended and ids(M.allowed(end)) == {0, 1} and M.accepts_end(end) and M.done(end)
    assert M.advance(end, [0, 1]).ended and M.forced(end) == () and M.can(end, [0]) == 0


def test_masks_of_json_by_hand():
    at = started(
        G.json_schema({"properties": {"ab": {"const": 12}}, "required": ["ab"], "type": "object"}, whitespace="")
    )
    assert ids(M.allowed(at)) == of('{"'), "no other text is possible: only as the tokenizer cuts it"
    assert SMALL.decode(M.forced(at)) == '{"ab":12'
    at = M.advance(at, SMALL.encode('{"'))
    assert ids(M.allowed(at)) == of("ab")
    at = M.advance(at, SMALL.encode('ab":'))
    assert ids(M.allowed(at)) == of("12")
    at = M.advance(at, SMALL.encode("12"))
    assert ids(M.allowed(at)) == of("}", ",") and M.forced(at) == ()


def test_a_mask_is_written_where_it_is_wanted():
    at = started(G.choice(["a"]))
    out_RW = np.full((3, V.words), 7, np.int32)
    assert M.allowed(at, out_RW[1]) is not None and ids(out_RW[1]) == of("a")
    assert (out_RW[[0, 2]] == 7).all() and V.words == -(-V.size // 32)


def test_padded_and_special_tokens_are_never_part_of_a_text():
    """`.` takes any character, `<[*]>` any token by number."""
    mask = ids(M.allowed(started(G.regex("(.|\n)+"))))
    assert not mask & {0, 1, 2, 3} and max(mask) < SMALL.vocab_size
    assert of("a", "ab", "\n", "<") <= mask
    mask = ids(M.allowed(started(G.cfg('start: <[*]> "x"'))))
    assert max(mask) < SMALL.vocab_size and not mask & {0, 1}, "neither padding nor an end before the end"
    inside = M.advance(started(G.json_object()), SMALL.encode('{"'))
    assert not ids(M.allowed(inside)) & {0, 1, 2, 3}


# walks

GRAMMARS = {
    "person": PERSON,
    "shape": SHAPE,
    "any": {},
    "counted": {"type": "array", "items": {"type": "integer", "multipleOf": 7}, "minItems": 2, "maxItems": 2},
    "map": {"type": "object", "patternProperties": {"^x": {"type": "null"}}, "additionalProperties": {"enum": [0]}},
    "joined": {"allOf": [{"required": ["b"]}, {"type": "object", "properties": {"a": {"type": "null"}}}]},
}  # fmt: skip


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", GRAMMARS)
def test_every_walk_is_valid_json(tokenizer, name):
    """Oracle: json, then `valid`. A walk that is not over is a prefix: the parser accepted each of its tokens."""
    text, schema = tokenizer_of(tokenizer), GRAMMARS[name]
    compiled = M.compile(G.json_schema(schema, strict=True), vocabulary_of(tokenizer))
    over = 0
    for seed in range(12):
        tokens, ended = walk(M.start(compiled), random.Random(seed), 250)
        if ended:
            value = json.loads(text.decode(tokens))
            assert valid(schema, value, schema), value
            over += 1
    assert over >= 2


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_walks_without_the_mask_are_not_valid(tokenizer):
    """The mutant: draws from all known tokens as if the mask was not applied."""
    vocab = vocabulary_of(tokenizer)
    compiled = M.compile(G.json_schema(PERSON), vocab)
    with pytest.raises(AssertionError, match=r"not allowed|cannot end"):
        for seed in range(5):
            walk(M.start(compiled), random.Random(seed), 50, mask=lambda matcher: vocab.known_W)


@pytest.mark.parametrize(
    "pattern",
    [
        "[a-c]{2,5}",
        "(a|bc)*d?",
        r"\d{3}-\d+",
        "é+|ü",
        r"[^a]b\\",
        "",
        r"\w+@\w+\.(com|org)",
        "^x|y$",
        "a/b",
        "q\nr",
        "~+",
    ],
)
def test_walks_of_a_pattern_match_it(pattern):
    grammar = G.regex(pattern)
    for name in ("small", "sentence"):
        compiled = M.compile(grammar, vocabulary_of(name))
        for seed in range(6):
            tokens, ended = walk(M.start(compiled), random.Random(seed), 60)
            if ended:
                text = tokenizer_of(name).decode(tokens)
                assert re.fullmatch(f"(?:{pattern})", text, re.ASCII), (pattern, text)


def test_digits_of_a_pattern_are_ascii():
    at = started(G.regex(r"\d+"))
    assert ids(M.allowed(at)) == of(*"0123456789", "12")


CHOICES = ["a", "ab", "abc", "12", 'say "hi"\\n', "<|x|>", "\x7f\x80\n\t\x00", "é😀", "/*", "a"]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_choice_gives_exactly_the_choices(tokenizer):
    compiled = M.compile(G.choice(CHOICES), vocabulary_of(tokenizer))
    texts = set()
    for seed in range(120):
        tokens, ended = walk(M.start(compiled), random.Random(seed), 40)
        assert ended
        texts.add(tokenizer_of(tokenizer).decode(tokens))
    assert texts == set(CHOICES)


def test_both_syntaxes_of_grammars():
    for text in ('start: "a" D+ "b"\nD: /[12]/', 'root ::= "a" d+ "b"\nd ::= [12]'):
        compiled = M.compile(G.cfg(text), V)
        done = [walk(M.start(compiled), random.Random(s), 30) for s in range(10)]
        assert all(re.fullmatch("a[12]+b", SMALL.decode(t)) for t, ended in done if ended) and done[0][1]


def test_a_structural_tag_holds_what_begins_like_one():
    tag = {"begin": "<f=a>", "schema": {"const": 12}, "end": "</f>"}
    at = started(G.structural_tag({"triggers": ["<f="], "structures": [tag]}))
    free = M.advance(at, SMALL.encode("any <text"))
    assert M.accepts_end(free) and of("a", "ab", "\n") <= ids(M.allowed(free))
    held = M.advance(at, SMALL.encode("any <f="))
    assert ids(M.allowed(held)) == of("a") and not M.accepts_end(held)
    assert SMALL.decode(M.forced(held)) == "a>12</f>"[: len(SMALL.decode(M.forced(held)))]
    assert M.accepts_end(M.advance(held, SMALL.encode("a>12</f> and on")))


def test_a_tag_that_is_a_token_is_that_token():
    """<call> is id 3, which no text may hold: it begins the tag."""
    made = {"type": "triggered_tags", "triggers": ["<call>"], "at_least_one": True, "stop_after_first": True}
    tag = {"begin": "<call>", "content": {"type": "json_schema", "json_schema": {"const": 12}}, "end": "!"}
    at = started(G.structural_tag({"type": "structural_tag", "format": {**made, "tags": [tag]}}))
    at = M.advance(at, SMALL.encode("so "))
    assert 3 in ids(M.allowed(at)) and 2 not in ids(M.allowed(at)) and not M.accepts_end(at)
    at = M.advance(at, [3])
    assert ids(M.allowed(at)) == of("12")
    assert M.done(M.advance(at, SMALL.encode("12!")))


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_grammars_of_bytes_alone_need_no_second_look(tokenizer):
    """Oracle: what a text can hold, and the parser's own word on where it may end."""
    vocab = vocabulary_of(tokenizer)
    known, eos = ids(vocab.known_W), set(vocab.eos)
    made = [G.json_schema(s) for s in (PERSON, SHAPE)]
    made += [G.json_object(), G.regex("(a|é+)*[0-9]?"), G.choice(["ab", "é"])]
    for grammar in made:
        compiled, draw = M.compile(grammar, vocab), random.Random(1)
        assert compiled.exact
        at, places = M.start(compiled), 0
        while not at.ended and places < 150:
            may, places = ids(M.allowed(at)), places + 1
            assert may <= known and may & eos == (eos if M.accepts_end(at) else set())
            at = at.after(draw.choice(sorted(may - eos) or sorted(may)))
        assert places >= 2
    assert not M.compile(G.cfg('start: "a"'), vocab).exact


def test_how_a_text_is_cut_is_remembered_of_few_and_short_ones():
    pieces = M._Pieces(SMALL, [SMALL.token_bytes(i) for i in range(SMALL.vocab_size)], frozenset({0, 1, 2, 3}), 0, None)
    for text in ('ab":', "é{", "c" * M.CUT, "c" * (M.CUT + 1), *map(str, range(M.MOST_CUT + 9))):
        assert pieces(text) == pieces(text) == SMALL.encode(text)
        assert len(pieces._cut) <= M.MOST_CUT and all(len(t) <= M.CUT for t in pieces._cut)


# values


def test_forced_tokens_are_what_the_masks_leave():
    """In any vocabulary."""
    for name in TOKENIZERS:
        text, vocab = tokenizer_of(name), vocabulary_of(name)
        compiled = M.compile(G.json_schema(PERSON, whitespace=""), vocab)
        total = 0
        for seed in range(4):
            matcher, draw = M.start(compiled), random.Random(seed)
            for _ in range(60):
                run = M.forced(matcher)
                total += len(run)
                assert M.can(matcher, run) == len(run)
                can = ids(M.allowed(matcher))
                # Along a forced run masks allow nothing else, so appending it changes no text that masks would give.
                along = [ids(m) for m in M.masks_along(matcher, run)[: len(run)]]
                assert along == [{t} for t in run], (text.decode(run), run, along)
                matcher = M.advance(matcher, [draw.choice(sorted(can))])
                if matcher.ended:
                    break
        assert total > 20


def test_older_values_and_forks_stay_what_they_are():
    """A value's mask is the same whatever was done with its line, forwards, backwards and aside."""
    compiled = M.compile(G.json_schema(SHAPE), V)
    draw = random.Random(3)
    values, masks = [M.start(compiled)], [ids(M.allowed(M.start(compiled)))]
    for _ in range(300):
        i = draw.randrange(len(values))
        here = values[i]
        assert ids(M.allowed(here)) == masks[i]
        if draw.random() < 0.3:
            here = M.fork(here)
        if not here.ended:
            values.append(M.advance(here, [draw.choice(sorted(masks[i]))]))
            # Oracle: a matcher that was never anywhere else.
            fresh, tokens, text = M.start(compiled), [], values[-1].text
            while text is not None:
                text, token = text
                tokens.append(token)
            fresh = M.advance(fresh, tokens[::-1])
            masks.append(ids(M.allowed(fresh)) if not values[-1].ended else {0, 1})
    assert len(values) > 200 and len({frozenset(m) for m in masks}) > 5


def test_forks_may_go_on_in_threads():
    compiled = M.compile(G.json_schema(PERSON), V)
    root = M.advance(M.start(compiled), SMALL.encode('{"name"'))
    wanted = [walk(M.fork(root), random.Random(seed), 80) for seed in range(4)]
    found: dict[int, tuple[list[int], bool]] = {}
    lines = [M.fork(root) for _ in range(4)]
    threads = [
        threading.Thread(target=lambda s=s: found.update({s: walk(lines[s], random.Random(s), 80)})) for s in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [found[s] for s in range(4)] == wanted


def test_drafts_are_counted_and_masked_along():
    at = started(G.regex("[ab]b(12c?|d)"))
    a, b, one, c = (sorted(of(x))[0] for x in "ab1c")
    assert M.can(at, []) == 0 and M.can(at, [c]) == 0 and M.can(at, [a, b, c]) == 2 and M.can(at, [a, b, one]) == 3
    masks_NW = M.masks_along(at, [a, b, c])
    assert [ids(m) for m in masks_NW] == [of("a", "b", "ab"), of("b"), of("1", "12", "d")]
    whole = SMALL.encode("ab12c")
    assert M.can(at, [*whole, 0]) == len(whole) + 1 and M.can(at, [*whole, 0, 0]) == len(whole) + 1
    assert ids(M.masks_along(at, [*whole, 0])[-1]) == {0, 1} and M.can(at, [a, 0]) == 1
    assert at.length == 0 and ids(M.allowed(at)) == of("a", "b", "ab"), "asking changes nothing"
    for wrong in ([c], [a, c]):
        with pytest.raises(AssertionError, match="not allowed"):
            M.advance(at, wrong)
        assert ids(M.allowed(at)) == of("a", "b", "ab"), "nor does a token that is not allowed"
    with pytest.raises(RequestError, match="no token is left"):
        at.after(c)
    assert ids(M.allowed(at.after(a))) == of("b")


def test_a_full_lexer_is_replaced():
    """[ab]*a[ab]{12} has 2^12 states: rows that share 500 of them go on when they are used up."""
    compiled = M.compile(G.regex("[ab]*a[ab]{12}"), V, Limits(states=500))
    first, letters = compiled.seed, sorted(of("a", "b", "ab"))
    rows = [M.start(compiled) for _ in range(3)]
    for seed in range(8):
        draw = random.Random(seed)
        for _ in range(30):
            i = draw.randrange(3)
            assert set(letters) <= ids(M.allowed(rows[i])) <= {*letters, 0, 1}
            rows[i] = M.advance(rows[i], [draw.choice(letters)])
    assert compiled.seed is not first, "nothing was used up: the test tests nothing"


def test_the_cache_is_bounded_and_looks_at_the_grammar():
    cache = M.Cache(2)
    one = cache.get(G.choice(["a"], "guided_choice"), V)
    assert cache.get(G.choice(["a"], "structured_outputs.choice"), V) is one
    assert cache.peek(G.choice(["b"]), V) is None and cache.get(G.choice(["b"]), V) is not one
    assert cache.get(G.choice(["a"]), vocabulary_of("real")) is not one
    assert len(cache) == 2 and cache.peek(G.choice(["a"]), V) is None, "the oldest has gone"


# requests


def test_the_fields_of_a_request():
    schema = {"type": "object", "properties": {"a": {}}}
    wanted = G.json_schema(schema)
    same = [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}},
        {"response_format": {"type": "json_object", "schema": schema}},
        {"guided_json": schema, "response_format": {"type": "text"}},
        {"guided_json": json.dumps(schema), "guided_regex": None},
        {"structured_outputs": {"json": schema, "regex": None}},
        {"json_schema": schema},
    ]
    assert all(G.from_fields(fields) == wanted for fields in same)
    assert G.from_fields({"response_format": {"type": "json_object"}}) == G.json_object()
    assert G.from_fields({"structured_outputs": {"json_object": True}}) == G.json_object()
    assert G.from_fields({"guided_regex": "a"}) == G.from_fields({"regex": "a"}) == G.regex("a")
    assert G.from_fields({"guided_choice": ["a", "b"]}) == G.choice(["a", "b"])
    assert G.from_fields({"guided_grammar": "start: A"}) == G.from_fields({"ebnf": "start: A"}) == G.cfg("start: A")
    assert all(G.from_fields(f) is None for f in ({}, {"response_format": None}, {"response_format": {"type": "text"}}))
    assert set(G.FIELDS) >= {"response_format", "structured_outputs", "guided_json", "guided_whitespace_pattern"}


def test_switches():
    schema = {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "null"}}}}
    closed = G.from_fields({"structured_outputs": {"json": schema, "disable_additional_properties": True}})
    assert closed is not None and json.loads(closed.text)["items"]["additionalProperties"] is False
    spaced = {
        "none": G.from_fields({"structured_outputs": {"json": schema, "disable_any_whitespace": True}}),
        "one": G.from_fields({"guided_json": schema, "guided_whitespace_pattern": "[ ]?"}),
        "some": G.from_fields({"structured_outputs": {"json": schema, "whitespace_pattern": r"\s{1,2}"}}),
        "usual": G.from_fields({"guided_json": schema}),
    }
    takes = {"none": (0,), "one": (0, 1), "some": (0, 1, 2), "usual": (0, 1, 2, 64)}
    for name, grammar in spaced.items():
        assert grammar is not None
        at = started(grammar)
        for n in (0, 1, 2, 64, 65):
            draft = SMALL.encode("[" + " " * n + "]")
            assert (M.can(at, draft) == len(draft)) == (n in takes[name]), (name, n)


WRONG = {
    "response_format.type": {"response_format": {"type": "xml"}},
    "response_format.json_schema": {"response_format": {"type": "json_schema"}},
    "response_format.json_schema.schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
    "guided_choice": {"guided_choice": []},
    "guided_regex": {"guided_regex": 5},
    "guided_json": {"guided_json": "{"},
    "guided_grammar": {"guided_grammar": "  "},
    "structured_outputs": {"structured_outputs": {}},
    "structured_outputs.choices": {"structured_outputs": {"choices": ["a"]}},
    "structured_outputs.whitespace_pattern": {"structured_outputs": {"json": {}, "whitespace_pattern": "x"}},
    "structured_outputs.json": {"guided_regex": "a", "structured_outputs": {"json": {}}},
    "guided_json ": {"guided_json": {}, "response_format": {"type": "json_object"}},
    "structural_tag.structures.0.begin": {
        "structural_tag": {"triggers": ["<"], "structures": [{"begin": "x", "schema": {}, "end": ""}]}
    },
}


@pytest.mark.parametrize("field", WRONG)
def test_errors_name_the_field(field):
    with pytest.raises(RequestError) as caught:
        G.from_fields(WRONG[field])
    assert caught.value.param == field.strip() and field.strip() in str(caught.value)


UNSUPPORTED = {
    "not": ({"properties": {"a/b": {"items": {"not": {}}}}}, "#/properties/a~1b/items"),
    "if": ({"allOf": [{}, {"if": {}, "then": {}}]}, "#/allOf/1"),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, "#"),
    "contains": ({"$ref": "#/$defs/x", "$defs": {"x": {"contains": {}}}}, "#/$defs/x"),
    "unevaluatedProperties": ({"additionalProperties": {"unevaluatedProperties": False}}, "#/additionalProperties"),
    "nullable": ({"prefixItems": [{"type": "string", "nullable": True}]}, "#/prefixItems/0"),
    "minLenght": ({"items": {"minLenght": 1}}, "#/items"),
    "'json-pointer'": ({"anyOf": [{"type": "string", "format": "json-pointer"}]}, "#/anyOf/0"),
    "minProperties": ({"items": {"minProperties": 2}}, "#/items"),
    "'other.json'": ({"items": {"$ref": "other.json"}}, "#/items"),
    "'#/$defs/y'": ({"items": {"$ref": "#/$defs/y"}}, "#/items"),
}


@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_an_unsupported_keyword_is_named_with_its_place(keyword):
    schema, place = UNSUPPORTED[keyword]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    with pytest.raises(RequestError) as caught:
        G.from_fields({"response_format": form})
    message, field = str(caught.value), "response_format.json_schema.schema"
    assert keyword in message and message.startswith(f"{field} at {place}: ") and caught.value.param == field


def test_what_has_no_effect_is_said():
    schema = {
        "title": "T", "x-order": 1, "colour": 1, "format": "int32", "items": {"type": "string", "format": "password"},
        "uniqueItems": False, "$defs": {"unused": {"not": {}}},
    }  # fmt: skip
    made = G.json_schema(schema)
    assert set(made.ignored) == {"colour at #", "format int32 at #", "format password at #/items"}
    M.compile(made, V)


def test_what_the_library_refuses_is_the_requests_fault():
    """Each is a RequestError with the field, and where the library says what, with the places it can be about."""
    cases = {
        "oneOf at #/items": {"items": {"oneOf": [{"type": "integer"}, {"type": "number"}]}},
        "pattern at #": {"type": "string", "pattern": "(?=a)b"},
        "minimum": {"type": "integer", "minimum": 3, "maximum": 2},
        "no text satisfies": {"$ref": "#"},
        "nsatisfiable": False,
    }
    for what, schema in cases.items():
        with pytest.raises(RequestError, match=what) as caught:
            M.compile(G.json_schema(schema, "guided_json"), V)
        assert caught.value.param == "guided_json" and "<state>" not in str(caught.value)
    for made in (G.regex("(", "f"), G.regex(r"(a)\1", "f"), G.cfg("start: missing", "f"), G.cfg("root ::= (", "f")):
        with pytest.raises(RequestError) as caught:
            M.compile(made, V)
        assert caught.value.param == "f"


def test_an_escaped_name_is_no_way_around_a_property():
    r"""Free names exclude listed ones; {"\u0061": ...} would be another spelling of a."""
    at = started(G.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}}, whitespace=""))
    assert M.can(at, SMALL.encode('{"\\u0061"')) < len(SMALL.encode('{"\\u0061"'))
    assert M.can(at, SMALL.encode('{"b\\n":1}')) == len(SMALL.encode('{"b\\n":1}'))


def test_vocabularies_that_cannot_be_held_to_a_grammar():
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ConfigError, match="bytes"):
        M.vocabulary(Tokenizer(words, Decoding("window"), frozenset()), 1, [0])
    with pytest.raises(ConfigError, match="end-of-sequence"):
        M.vocabulary(SMALL, SMALL.vocab_size, [])


# hostile inputs


def chain(n: int, deep: bool = False) -> dict:
    """n definitions, each naming the next."""
    link = lambda i: {"$ref": f"#/$defs/d{i}"}  # noqa: E731
    if deep:
        defs = {f"d{i}": {"properties": {"a": {"allOf": [link(i + 1), {"minLength": 1}]}}} for i in range(n)}
    else:
        defs = {f"d{i}": link(i + 1) for i in range(n)}
    return {**link(0), "$defs": {**defs, f"d{n}": {}}}


def nested(n: int) -> dict:
    return {"items": nested(n - 1)} if n else {}


HOSTILE = {
    "deep": lambda: G.json_schema(nested(900)),
    "deep text": lambda: G.json_schema('{"items":' * 20000 + "{}" + "}" * 20000),
    "long chain": lambda: G.json_schema(chain(4000)),
    "long deep chain": lambda: G.json_schema(chain(600, deep=True)),
    "longest chain": lambda: G.json_schema(chain(498)),
    "longest deep chain": lambda: G.json_schema(chain(198, deep=True)),
    "products": lambda: G.json_schema(
        {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(4)]} for i in range(12)]}
    ),
    "patterns together": lambda: G.json_schema({"allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(10, 60)]}),
    "most patterns together": lambda: G.json_schema({"allOf": [{"pattern": f"a.{{{i}}}b"} for i in range(10, 26)]}),
    "many properties": lambda: G.json_schema({"properties": {f"p{i}": {} for i in range(5000)}}),
    "optional properties": lambda: G.json_schema({"properties": {f"p{i}": {"type": "null"} for i in range(1000)}}),
    "huge numbers": lambda: G.json_schema({"minimum": 10**40, "maxLength": 10**40, "multipleOf": 1e-300}),
    "slow multiple": lambda: G.json_schema({"type": "integer", "multipleOf": 999999937}),
    "nested repeats": lambda: G.regex("(a{1000}){1000}"),
    "nested repeats in a schema": lambda: G.json_schema({"pattern": "((a{99}b){99}c){99}"}),
    "optional letters": lambda: G.regex("a?" * 1300 + "a" * 1300),
    "parentheses": lambda: G.regex("(" * 2000 + "a" + ")" * 2000),
    "long pattern": lambda: G.regex("ab" * 100_000),
    "many choices": lambda: G.choice([f"number {i * 7919 % 100003}" for i in range(4000)]),
    "rules in rules": lambda: G.cfg("start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(5000)) + '\nr5000: "a"'),
    "most rules": lambda: G.cfg("start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(990)) + '\nr990: "a"'),
    "doubling": lambda: G.cfg("start: T0\n" + "\n".join(f"T{i}: T{i + 1} T{i + 1}" for i in range(40)) + '\nT40: "a"'),
    "brackets": lambda: G.cfg("start: " + "(" * 5000 + '"a"' + ")" * 5000),
    "endless rule": lambda: G.cfg("start: a\na: b\nb: a"),
    "bad GBNF": lambda: G.cfg("root ::= " + "(" * 900 + '"a"' + ")" * 900),
}
BOUND = 2.0
"""Seconds of the processor for one hostile grammar, from its field to its answer; the slowest here takes about 0.3."""


def hold(name: str) -> str:
    """Compiles a hostile grammar and walks along it: 'refused' or 'held'."""
    try:
        compiled = M.compile(HOSTILE[name](), V)
        walk(M.start(compiled), random.Random(0), 30)
        return "held"
    except RequestError as error:
        assert len(str(error)) < 1000
        return "refused"


def test_hostile_grammars_end_in_time():
    """In a process of its own: a stack that overflows would end it."""
    code = (
        "import importlib.util, sys, time, threading, resource, json\n"
        f"spec = importlib.util.spec_from_file_location('t', {__file__!r})\n"
        "t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t)\n"
        "def go():\n"
        "    for name in t.HOSTILE:\n"
        "        at = time.thread_time()\n"
        "        print(json.dumps([name, t.hold(name), time.thread_time() - at]), flush=True)\n"
        "    print(json.dumps(['memory', '', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))\n"
        "thread = threading.Thread(target=go); thread.start(); thread.join()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(lines) == len(HOSTILE) + 1, (lines[-1:], done.stderr[-500:])
    *results, (_, _, memory) = lines
    assert all(seconds < BOUND for _, _, seconds in results), sorted(results, key=lambda r: -r[2])[:3]
    held = {name for name, what, _ in results if what == "held"}
    assert {"longest chain", "longest deep chain", "most rules", "many choices"} <= held
    assert not held & {"deep", "long chain", "long deep chain", "nested repeats", "rules in rules", "brackets"}
    assert memory < 3 << 19, f"{memory} kB"


def test_patterns_are_measured_as_they_would_be_written_out():
    sizes = {
        "abc": 3,
        "a{1000}": 1,
        "(ab){3}": 6,
        "(a{10}b){10}": 110,
        "((a{3}){3}){3}": 27,
        "[a-z]{5}x": 2,
        r"\{2}": 3,
    }
    sizes |= {"(a{2,})": 2, "a{,3}b": 2, "x{y}": 4, "(a|bc){2}": 6, "[)(]{3}": 1, "(a)*": 1}
    assert {p: written_out(p) for p in sizes} == sizes


def test_a_schema_is_not_changed():
    schema = {"uniqueItems": False, "items": {"format": "password"}}
    before = json.dumps(schema)
    assert check_schema(schema, "f", closed=True)[0] == {"items": {}} and json.dumps(schema) == before


def test_compiling_leaves_other_threads_running():
    """The event loop's thread gets its turns while a grammar takes its time (here at least 50 ms) to compile."""
    turns, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            turns.append(time.perf_counter())
            time.sleep(0.001)

    ticking = threading.Thread(target=tick)
    ticking.start()
    at = time.perf_counter()
    with pytest.raises(RequestError):
        M.compile(HOSTILE["products"](), V)
    lasted = time.perf_counter() - at
    stop.set()
    ticking.join()
    during = [t for t in turns if at <= t <= at + lasted]
    assert len(during) >= 3, (len(during), lasted)
