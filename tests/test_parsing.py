"""Reasoning and tool calls out of text. Oracles: what each family's published chat format means, worked out by hand;
the law that cutting changes nothing; llguidance for grammars; mutants that must be caught.
"""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace

import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from fnengine.errors import ConfigError
from fnengine.serve.parsing import calls as parsing_calls
from fnengine.serve.parsing import formats, reasoning
from fnengine.serve.parsing import parser as parsing
from fnengine.serve.parsing.choose import BY_NAME, HARMONY, TAGS, choose, reasoning_format, tool_format, tool_names
from fnengine.serve.parsing.events import Event, Tools, joined
from fnengine.serve.parsing.grammar import grammar_for
from fnengine.serve.parsing.parser import Parsers, begin, call_id
from fnengine.serve.parsing.scan import Scan, scan_json

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "metric": {"type": "boolean"},
                "zone": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            },
            "required": ["city"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
TOOLS = Tools({t["function"]["name"]: t["function"]["parameters"] for t in (WEATHER, NOW)})
FORMATS = [*BY_NAME, HARMONY]


def parsers(tools=None, tags=None):
    return Parsers(HARMONY if tools == HARMONY else BY_NAME.get(tools), None if tags is None else TAGS[tags])


def read(parsers, pieces, *, prompt="", tools=TOOLS, going_on=None):
    """All events of a text that comes in pieces."""
    state, events = begin(parsers, prompt, tools, going_on), []
    if state is None:
        return joined(Event("content", p) for p in pieces)
    for piece in pieces:
        state, said = parsing.feed(state, piece)
        events += said
    return joined([*events, *parsing.finish(state)])


def whole(events):
    """(content, reasoning, [(name, arguments as JSON text)]): what a client has in the end."""
    text = {k: "".join(e.text for e in events if e.kind == k) for k in ("content", "reasoning")}
    found = []
    for e in events:
        if e.kind == "call":
            assert e.index == len(found)
            found.append((e.text, ""))
        elif e.kind == "arguments":
            assert e.index == len(found) - 1
            found[-1] = (found[-1][0], found[-1][1] + e.text)
    return text["content"], text["reasoning"], found


PARIS = ("get_weather", '{"city": "Paris"}')
ROME = ("get_weather", '{"city": "Rome", "days": 2}')
V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n%s\n```<｜tool▁call▁end｜>"
V31 = "<｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>%s<｜tool▁call▁end｜>"
AROUND = "<｜tool▁calls▁begin｜>%s<｜tool▁calls▁end｜>"
CODER = """<tool_call>
<function=get_weather>
<parameter=city>
%s
</parameter>
%s</function>
</tool_call>"""

WELL_FORMED = [
    # hermes, as Hermes 2 Pro's and Qwen3's templates write it
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>', "", [PARIS]),
    (
        "hermes",
        'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>',
        "Let me look.",
        [PARIS, ROME],
    ),
    ("hermes", '<tool_call>{"name": "now"}</tool_call>\n\n', "", [("now", "{}")]),
    ("hermes", '<tool_call>{"name": "now", "arguments": {}}', "", [("now", "{}")]),
    ("hermes", '<tool_call>{"name": "now"}\n<tool_call>{"name": "now"}</tool_', "", [("now", "{}")] * 2),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"x": "</tool_call> {\\"世\\" ü 😀"}}</tool_call>done',
        "done",
        [("f", '{"x": "</tool_call> {\\"世\\" ü 😀"}')],
    ),
    ("hermes", '<tool_call>{"arguments": "{\\"a\\": 1}", "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>', "", [("f", '{"a": "x\\ny"}')]),
    # Llama 3.1: parameters; `; ` between several; a python tag before
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    ("llama3_json", '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    (
        "llama3_json",
        '{"name": "get_weather", "parameters": {"city": "Paris"}}; '
        '{"name": "get_weather", "parameters": {"city": "Rome", "days": 2}}',
        "",
        [PARIS, ROME],
    ),
    # Mistral before and after tokenizer v11, and v13
    ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]', "", [PARIS]),
    (
        "mistral",
        '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Paris"}}, '
        '{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}]',
        "",
        [PARIS, ROME],
    ),
    (
        "mistral",
        'Sure.[TOOL_CALLS]get_weather{"city": "Paris"}[TOOL_CALLS]get_weather{"city": "Rome", "days": 2}',
        "Sure.",
        [PARIS, ROME],
    ),
    ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}', "", [PARIS]),
    ("mistral", '[TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]{"city": "Paris"}', "", [PARIS]),
    # Llama 3.2 and 4
    ("pythonic", "[get_weather(city='Paris'), get_weather(city=\"Rome\", days=2)]", "", [PARIS, ROME]),
    ("pythonic", "<|python_start|>[get_weather(city='Paris')]<|python_end|>", "", [PARIS]),
    (
        "pythonic",
        "[get_weather(city='a]\\'(\\d', days=-1, metric=true, zone=None)]",
        "",
        [("get_weather", '{"city": "a]\'(\\\\d", "days": -1, "metric": true, "zone": null}')],
    ),
    # Qwen3-Coder: values without quotes, their types from the schema
    ("qwen3_coder", CODER % ("Paris", ""), "", [PARIS]),
    ("qwen3_coder", "Hm.\n" + CODER % ("Rome", "<parameter=days>\n2\n</parameter>\n"), "Hm.", [ROME]),
    (
        "qwen3_coder",
        CODER % ("a\n\n<b>", "<parameter=metric>\nTrue\n</parameter>\n<parameter=zone>\nnull\n</parameter>\n"),
        "",
        [("get_weather", '{"city": "a\\n\\n<b>", "metric": true, "zone": null}')],
    ),
    ("qwen3_coder", "<tool_call>\n<function=now>\n</function>\n</tool_call>\n", "", [("now", "{}")]),
    # DeepSeek V3 and R1, V3.1
    ("deepseek_v3", AROUND % (V3 % '{"city": "Paris"}'), "", [PARIS]),
    (
        "deepseek_v3",
        "Ok" + AROUND % (V3 % '{"city": "Paris"}' + "\n" + V3 % '{"city": "Rome", "days": 2}'),
        "Ok",
        [PARIS, ROME],
    ),
    ("deepseek_v31", AROUND % (V31 % '{"city": "Paris"}' + V31 % '{"city": "Rome", "days": 2}'), "", [PARIS, ROME]),
    # harmony
    (
        HARMONY,
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        '<|constrain|>json<|message|>{"city":"Paris"}<|call|>',
        "",
        [("get_weather", '{"city":"Paris"}')],  # in the model's own words
    ),
    (
        HARMONY,
        "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant to=functions.get_weather<|channel|>"
        'commentary json<|message|>{"city": "Rome", "days": 2}',
        "I look.",
        [ROME],
    ),
    (
        HARMONY,
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Hi<|return|>",
        "Hi",
        [],
    ),
]


@pytest.mark.parametrize("name,text,content,expected", WELL_FORMED)
def test_well_formed_answers_by_hand(name, text, content, expected):
    got, thought, found = whole(read(parsers(name), [text]))
    assert (got, found) == (content, expected)
    assert thought == ("Hm" if name == HARMONY and "analysis" in text else "")
    assert all(isinstance(json.loads(arguments), dict) for _, arguments in found)


BROKEN = [
    ("hermes", "<tool_call>"),
    ("hermes", "a <tool_call> b"),
    ("hermes", '<tool_call>{"name": "f", "arguments": '),
    ("hermes", '<tool_call>{"name": "f", "arguments": {'),
    ("hermes", '<tool_call>{"name": "f", "arguments": {x: 1}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"x": NaN}, "name": "f"}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {"x": 1}, "name": "f"'),
    ("hermes", '<tool_call>{"name": 5}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f",}</tool_call>'),
    ("hermes", "<tool_call>" + "[" * 9999),
    ("hermes", '<tool_call>{"a":' + "[" * 9999),
    ("hermes", "x <tool_cal"),
    ("hermes", "</tool_call> <b> \n"),
    ("llama3_json", '{"name": "unknown", "parameters": {}}'),
    ("llama3_json", '{"name": "get_weather"}'),
    ("llama3_json", '{"city": "Paris", "of": ["France"]}; more'),
    ("llama3_json", '<|python_tag|>print({"name": 1})'),
    ("llama3_json", 'Here: {"name": "get_weather", "parameters": {}}'),
    ("mistral", "[TOOL_CALLS] nothing"),
    ("mistral", "[TOOL_CALLS][]"),
    ("mistral", "[TOOL_CALLS]" + "x" * 999 + "{}"),
    ("pythonic", "[1, 2, 3]"),
    ("pythonic", "[get_weather('Paris')]"),
    ("pythonic", "[get_weather(city=f(1))]"),
    ("pythonic", "[unknown(a=1)]"),
    ("pythonic", "[get_weather(days=0x" + "f" * 5000 + ")]"),
    ("pythonic", "[get_weather(city='Pa"),
    ("pythonic", "[" * 9999),
    ("qwen3_coder", '<tool_call>{"name": "now"}</tool_call>'),
    ("qwen3_coder", "<tool_call>\n<function=now>\n<parameter=a>\n5"),
    ("qwen3_coder", "<tool_call>\n<function=now>\nhm</function></tool_call>"),
    ("qwen3_coder", "<tool_call>\n<function=" + "x" * 999 + ">"),
    ("deepseek_v3", AROUND % "nothing"),
    ("deepseek_v3", "<｜tool▁calls▁begin｜>"),
    ("deepseek_v31", V31 % "[1]"),
    (HARMONY, "no header"),
    (HARMONY, "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{broken<|call|>"),
    (HARMONY, "<|channel|>commentary to=functions.f"),
    (HARMONY, "<|channel|>" + "x" * 999),
]


@pytest.mark.parametrize("name,text", BROKEN)
def test_what_is_no_call_is_content_word_for_word(name, text):
    assert whole(read(parsers(name), [text])) == (text, "", [])
    assert whole(read(parsers(name), list(text[:3000]))) == whole(read(parsers(name), [text[:3000]]))


F, G = '{"name": "f", "arguments": {"x": 1}}', '{"name": "g", "arguments": {"y": "z"}}'
GONE_WRONG = [
    # (format, text, content, calls): arguments that go wrong after they were told, and what follows them
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1', "", [("f", '{"x": 1')]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": "a\nb\\', "", [("f", '{"x": "a\\nb\\')]),
    ("hermes", f"<tool_call>{F} no</tool_call>", " no</tool_call>", [("f", '{"x": 1}')]),
    ("hermes", f"<tool_call>{F[:-1]}", "", [("f", '{"x": 1}')]),
    ("hermes", f"<tool_call>{F[:-1]}, 5}}</tool_call>", ", 5}</tool_call>", [("f", '{"x": 1}')]),
    ("hermes", f'<tool_call>{F[:-1]}, "id": "a"}}</tool_call>', "", [("f", '{"x": 1}')]),
    ("hermes", f"<tool_call>{F.replace('1', 'NaN')}</tool_call>", "", [("f", '{"x": NaN}')]),
    ("hermes", f"<tool_call>{F.replace('1', '1,')}</tool_call>x", "}}</tool_call>x", [("f", '{"x": 1,')]),
    (
        "hermes",  # the next call stands
        f"<tool_call>{F.replace('1', '1 2')}</tool_call><tool_call>{F}",
        "2}}</tool_call>",
        [("f", '{"x": 1 '), ("f", '{"x": 1}')],
    ),
    ("llama3_json", '{"name": "now", "parameters": {"a": [1', "", [("now", '{"a": [1')]),
    ("mistral", f"[TOOL_CALLS] [{F}", "", [("f", '{"x": 1}')]),
    ("mistral", f"[TOOL_CALLS] [{F}, {G}", "", [("f", '{"x": 1}'), ("g", '{"y": "z"}')]),
    ("mistral", f"[TOOL_CALLS] [{F}, {{}}, {G}]", f", {{}}, {G}]", [("f", '{"x": 1}')]),
    (
        "mistral",
        f'[TOOL_CALLS] [{F}, {{"arguments": {{"y": 2}}, "name": "g"}}]',
        "",
        [("f", '{"x": 1}'), ("g", '{"y": 2}')],
    ),
    ("mistral", f"[TOOL_CALLS] [{F} {G}]", f" {G}]", [("f", '{"x": 1}')]),
    ("qwen3_coder", CODER % ("Paris", "hm"), "\nhm</function>\n</tool_call>", [("get_weather", '{"city": "Paris"')]),
    (
        "qwen3_coder",
        CODER.partition("%s</f")[0] % "Paris" + "<parameter=days>\n2",
        "\n<parameter=days>\n2",
        [("get_weather", '{"city": "Paris"')],
    ),
    ("deepseek_v3", V3 % '{"city": ', "```<｜tool▁call▁end｜>", [("get_weather", '{"city": \n')]),
    (
        HARMONY,
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": [1}}<|call|>',
        "}}",
        [("f", '{"x": [1')],
    ),
]


@pytest.mark.parametrize("name,text,content,expected", GONE_WRONG)
def test_arguments_that_go_wrong_end_there_and_the_rest_is_content(name, text, content, expected):
    got, _, found = whole(read(parsers(name), [text]))
    assert (got, found) == (content, expected)
    assert whole(read(parsers(name), list(text))) == (content, "", expected)


STREAMED = [
    ("hermes", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}\n</tool_call>'),
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Paris", "days": 2}}'),
    ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}]'),
    ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "days": 2}'),
    ("deepseek_v3", AROUND % (V3 % '{"city": "Paris", "days": 2}')),
    ("deepseek_v31", AROUND % (V31 % '{"city": "Paris", "days": 2}')),
    (HARMONY, '<|channel|>commentary to=functions.get_weather<|message|>{"city": "Paris", "days": 2}<|call|>'),
]


@pytest.mark.parametrize("name,text", STREAMED)
def test_arguments_are_told_as_they_come(name, text):
    """Behind its opening, every character of the arguments is told with itself."""
    state, told = begin(parsers(name), "", TOOLS), ""
    at = text.index('{"city"')
    for i, c in enumerate(text):
        assert state is not None
        state, events = parsing.feed(state, c)
        assert not any(e.kind == "content" for e in events)
        told += "".join(e.text for e in events if e.kind == "arguments")
        if at < i < text.index("2}") + 2:
            assert told == text[at : i + 1]
    assert told == '{"city": "Paris", "days": 2}'


def test_parameters_are_told_one_by_one():
    state, told = begin(parsers("qwen3_coder"), "", TOOLS), []
    for c in CODER % ("Paris", "<parameter=days>\n2\n</parameter>\n"):
        assert state is not None
        state, events = parsing.feed(state, c)
        told += [e.text for e in events]
    assert told == ["get_weather", '{"city": "Paris"', ', "days": 2', "}"]


def test_a_broken_call_does_not_hide_the_next_one():
    good = '<tool_call>{"name": "now"}</tool_call>'
    content, _, found = whole(read(parsers("hermes"), ['<tool_call>{"name": oh}</tool_call>' + good]))
    assert (content, found) == ('<tool_call>{"name": oh}</tool_call>', [("now", "{}")])


def test_at_most_one_call_where_calls_are_not_parallel():
    text = WELL_FORMED[1][1]
    alone = replace(TOOLS, parallel=False)
    assert whole(read(parsers("hermes"), [text], tools=alone)) == ("Let me look.", "", [PARIS])


def test_without_tools_nothing_is_a_call():
    text = WELL_FORMED[0][1]
    assert whole(read(parsers("hermes"), [text], tools=None)) == (text, "", [])


# --- reasoning --------------------------------------------------------------------------------------------------------

REASONED = [
    # (tags, prompt, text, content, reasoning)
    ("qwen3", "user\n", "<think>\nHm.\nSo.\n</think>\n\nHi", "Hi", "Hm.\nSo."),
    ("qwen3", "user\n", "Hi </think>", "Hi </think>", ""),
    ("qwen3", "<|im_start|>assistant\n<think>\n", "Hm</think>Hi", "Hi", "Hm"),
    ("qwen3", "<think>\n\n</think>\n\n", "<think>is a mark", "<think>is a mark", ""),
    ("qwen3", "<think>\n\n</think>\n\n", "Hi", "Hi", ""),
    ("qwen3", "", "<think>\n\n</think>\n\nHi", "Hi", ""),
    ("qwen3", "", "<think>cut off </th", "", "cut off </th"),
    ("qwen3", "", "  <thin", "  <thin", ""),
    ("qwen3", "", "\n <think>a\n</think>\n b <think>c</think>", " b <think>c</think>", "a"),
    ("deepseek_r1", "<｜Assistant｜>", "Hm\n</think>\n\nHi", "Hi", "Hm"),
    ("deepseek_r1", "<｜Assistant｜>", "<think>\nHm\n</think>\n\nHi", "Hi", "Hm"),
    ("deepseek_r1", "<｜Assistant｜>", "cut", "", "cut"),
    ("deepseek_r1", "<｜Assistant｜></think>", "Hi", "Hi", ""),
    ("magistral", "", "[THINK]Hm[/THINK]Hi", "Hi", "Hm"),
]


@pytest.mark.parametrize("tags,prompt,text,content,thought", REASONED)
def test_reasoning_by_hand(tags, prompt, text, content, thought):
    assert whole(read(parsers(tags=tags), [text], prompt=prompt)) == (content, thought, [])
    assert whole(read(parsers(tags=tags), list(text), prompt=prompt)) == (content, thought, [])


def test_an_answer_that_goes_on_stands_where_its_message_does():
    tags = parsers(tags="qwen3")
    assert whole(read(tags, ["m</think>x"], going_on="<think>h")) == ("x", "m", [])
    assert whole(read(tags, ["<think>x"], going_on="<think>h</think>a")) == ("<think>x", "", [])
    assert whole(read(tags, ["<think>x"], going_on="a")) == ("<think>x", "", [])


def test_a_call_within_reasoning_is_reasoning_and_one_behind_it_is_a_call():
    text = '<think>maybe <tool_call>{"name": "now"}</tool_call></think>\n\n<tool_call>{"name": "now"}</tool_call>'
    got = whole(read(parsers("hermes", "qwen3"), [text]))
    assert got == ("", 'maybe <tool_call>{"name": "now"}</tool_call>', [("now", "{}")])


# --- the law ----------------------------------------------------------------------------------------------------------


def cuts_of(text, at):
    at = sorted({0, len(text), *at})
    return [text[a:b] for a, b in itertools.pairwise(at)]


CUT = [(n, t) for n, t, *_ in WELL_FORMED + GONE_WRONG] + [(n, t[:400]) for n, t in BROKEN]


@pytest.mark.parametrize("name,text", CUT)
def test_every_cut_into_two_and_every_character_alone(name, text):
    for tags in (None, "qwen3"):
        p = parsers(name, tags if name != HARMONY else None)
        expected = read(p, [text])
        assert read(p, list(text)) == expected
        for at in range(1, len(text)):
            assert read(p, [text[:at], text[at:]]) == expected, text[:at]


def test_all_cuts_of_short_texts():
    """2**(n-1) ways each, with marks cut short so that texts are."""
    short = replace(BY_NAME["hermes"], openers=("<a>",))
    tags = reasoning.Tags("<t>", "<e>")
    for text in ("<t>\nx<e>\n<a>{", "x\n<a><a>{}", "<t\n>\n<e><a", "<t><<e>\n <a"):
        p = Parsers(short, tags)
        expected = read(p, [text])
        for mask in range(1 << (len(text) - 1)):
            pieces = cuts_of(text, [i + 1 for i in range(len(text) - 1) if mask >> i & 1])
            assert read(p, pieces) == expected, pieces


JSONS = [
    '{"name": "now"}',
    '{"name": "get_weather", "arguments": {"city": "P"}}',
    '{"name": "now", "arguments": {"a": ',
    '"b\\n\n"',
    "{",
    "}",
    '"',
    "[",
    "]",
    "{}",
    ":",
    ",",
]
FRAGMENTS = {
    name: [
        *(() if name == HARMONY else BY_NAME[name].marks + BY_NAME[name].leading),
        *JSONS,
        *(" ", "\n", "\n\n", "ok", "é世", "</tool_call>", "<", "<think>", "</think>", "`", "now", "("),
        *{
            "mistral": ("[ARGS]", "[CALL_ID]", "now{}"),
            "pythonic": ("now()", ", ", "city='x'", "get_weather(city='a')", ")", "'"),
            "qwen3_coder": ("<function=now>", "</function>", "<parameter=a>", "</parameter>", "\n1\n"),
            "deepseek_v3": ("function<｜tool▁sep｜>now\n```json\n", "<｜tool▁call▁end｜>", "\n```"),
            "deepseek_v31": ("now<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
            "llama3_json": ('{"name": "now", "parameters": {}}', "; "),
            HARMONY: (
                *("<|channel|>", "<|message|>", "<|start|>assistant", "<|end|>", "<|call|>", "analysis", "final"),
                *("commentary to=functions.now ", "<|constrain|>json"),
            ),
        }.get(name, ()),
    ]
    for name in FORMATS
}


@st.composite
def cases(draw):
    """(parsers, prompt, pieces): a text made of what matters to a format, cut at random."""
    name = draw(st.sampled_from(FORMATS))
    tags = None if name == HARMONY else draw(st.sampled_from([None, "qwen3", "deepseek_r1"]))
    text = "".join(draw(st.lists(st.sampled_from(FRAGMENTS[name]), max_size=14)))
    cuts = draw(st.lists(st.integers(0, max(1, len(text))), max_size=12))
    return parsers(name, tags), draw(st.sampled_from(["", "<think>\n", "<think></think>"])), cuts_of(text, cuts)


def told(arguments):
    """Whether arguments are an object, or the begin of one that broke off."""
    scan = scan_json(Scan(), arguments, 0)
    return arguments[0] == "{" and scan.end != "wrong" and scan.at == len(arguments)


def law(case):
    p, prompt, pieces = case
    text = "".join(pieces)
    events = read(p, [text], prompt=prompt)
    assert read(p, pieces, prompt=prompt) == events
    assert read(p, list(text), prompt=prompt) == events
    content, thought, found = whole(events)
    for name, arguments in found:
        assert name in text and told(arguments)
    if not found and p.tools != HARMONY and p.reasoning is None:
        assert content == text  # nothing is lost where nothing was found
    assert len(content) + len(thought) <= len(text)


@settings(max_examples=600, deadline=None)
@given(cases())
def test_cutting_changes_nothing(case):
    law(case)


def test_cutting_changes_nothing_in_many_random_ways():
    """The same with whole answers one behind another; seeded, so that a failure comes again."""
    rng = random.Random(7)
    for _ in range(300):
        name = rng.choice(FORMATS)
        text = "".join(t for n, t, *_ in rng.sample(WELL_FORMED, len(WELL_FORMED)) if n == name)
        text = text[rng.randrange(len(text)) :] if rng.random() < 0.3 else text
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(1, 30)))
        law((parsers(name), "", cuts_of(text, cuts)))


def test_tokens_of_a_real_byte_vocabulary_may_cut_characters():
    """Cuts within a character's bytes end where the detokenizer says; the parser sees whole characters only."""
    import codecs

    text = '<tool_call>{"name": "f", "arguments": {"x": "世界😀"}}</tool_call>世'
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pieces = [decoder.decode(bytes([b])) for b in text.encode()]
    assert read(parsers("hermes"), pieces) == read(parsers("hermes"), [text])
    assert whole(read(parsers("hermes"), [text])) == ("世", "", [("f", '{"x": "世界😀"}')])


def forgets_partial_marks(text, markers):
    return 0


def scans_from_the_start(state, text, start):
    return scan_json(Scan(), text, start + state.at)


@pytest.mark.parametrize(
    "where,name,mutant",
    [
        (parsing_calls, "begun", forgets_partial_marks),
        (reasoning, "begun", forgets_partial_marks),
        (formats, "scan_json", scans_from_the_start),
    ],
)
def test_mutants_of_the_law_are_caught(monkeypatch, where, name, mutant):
    def breaks(case):
        with monkeypatch.context() as m:
            m.setattr(where, name, mutant)
            try:
                law(case)
            except (AssertionError, ValueError, IndexError):
                return True
        return False

    phases = (Phase.generate,)  # that it is caught matters, not how small it can be made
    find(cases(), breaks, settings=settings(max_examples=2000, deadline=None, database=None, phases=phases))


# --- which parser -----------------------------------------------------------------------------------------------------

TEMPLATES = [
    # lines of the published templates that tell formats apart
    (
        "hermes",
        "qwen3",
        "{%- if tools %}<tools>...return a json object within <tool_call></tool_call>{% endif %} </think>",
    ),
    ("qwen3_coder", "none", "<tool_call>\\n<function=example>\\n<parameter=p>...</parameter></function></tool_call>"),
    ("mistral", "none", "{{- '[TOOL_CALLS] [' }}"),
    ("llama3_json", "none", '{"name": function name, "parameters": dictionary of argument name and its value}'),
    ("pythonic", "none", "Use exact format: [func_name1(param1=value1, param2=value2), func_name2(...)]"),
    ("pythonic", "none", "[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]"),
    ("deepseek_v3", "qwen3", "<｜Assistant｜><｜tool▁call▁begin｜>' + '\\n```json' </think>"),
    ("deepseek_v31", "qwen3", "<｜Assistant｜><｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' </think>"),
    (HARMONY, HARMONY, "<|start|>assistant<|channel|>analysis<|message|>"),
    ("none", "qwen3", "<tool_call>{{ name }}<arg_key>k</arg_key></tool_call></think>"),
    ("none", "seed_oss", "<seed:tool_call><function=f></seed:tool_call></seed:think>"),
    ("none", "magistral", "[THINK][/THINK]"),
    ("none", "none", "{% for m in messages %}{{ m.content }}{% endfor %}"),
    ("none", "none", ""),
]


@pytest.mark.parametrize("tool,thinks,template", TEMPLATES)
def test_the_template_chooses_and_it_is_said(tool, thinks, template):
    assert (tool_format(template)[0], reasoning_format(template)[0]) == (tool, thinks)
    p = choose({"default": template})
    assert p.tools == (HARMONY if tool == HARMONY else BY_NAME.get(tool))
    assert p.thinks == (thinks != "none")
    assert f"tool calls: {tool} (" in p.notes[0] and f"reasoning: {thinks} (" in p.notes[1]


def test_parsers_by_name():
    for name in set(tool_names()) - {"template"}:
        p = choose({}, name, "none")
        assert (p.tools is None) == (name in ("auto", "none"))
    assert choose({}, "hermes", "tags:<a>,</a>").reasoning == reasoning.Tags("<a>", "</a>")
    assert choose({"default": "x", "tool_use": "<tool_call>"}).tools is BY_NAME["hermes"]
    assert choose({"default": "raise('ids ... with length 9!')"}, "hermes").short_ids


@pytest.mark.parametrize(
    "tool,thinks,flag",
    [
        ("herms", "auto", "--tool-call-parser"),
        ("auto", "tags:a", "--reasoning-parser"),
        ("auto", "x", "--reasoning-parser"),
        ("hermes", HARMONY, "--tool-call-parser"),
        (HARMONY, "qwen3", "--reasoning-parser"),
    ],
)
def test_names_that_are_none_are_errors_that_list_them(tool, thinks, flag):
    with pytest.raises(ConfigError) as e:
        choose({}, tool, thinks)
    assert e.value.where == flag and e.value.remedy
    if tool == "herms":
        assert all(name in str(e.value) for name in tool_names())


def test_ids_are_unique_and_as_long_as_they_must_be():
    ids = [call_id(s, c, i, short) for s in "ab" for c in range(3) for i in range(3) for short in (False, True)]
    assert len(set(ids)) == len(ids) and call_id("a", 0, 0, False) == ids[0]
    assert all(len(i) == 9 and i.isalnum() for i in ids[1::2]) and all(i.startswith("call_") for i in ids[::2])


# --- grammars ---------------------------------------------------------------------------------------------------------


def follows(grammar, text):
    """Whether the grammar engine takes all of the text and may then end."""
    llguidance = pytest.importorskip("llguidance")
    assert grammar["type"] == "lark"
    compiled = llguidance.grammar_from("lark", grammar["grammar"])
    assert not llguidance.LLMatcher.validate_grammar(compiled)
    tokens = llguidance.LLTokenizer("byte")
    matcher, ids = llguidance.LLMatcher(tokens, compiled), tokens.tokenize_str(text)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


HERMES_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
GRAMMATICAL = [
    ("hermes", HERMES_CALL),
    ("hermes", HERMES_CALL + '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'),
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "now", "parameters": {}}'),
    ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]'),
    ("pythonic", '[get_weather(city="Paris", days=2), now()]'),
    ("qwen3_coder", CODER % ("Pa\n<r>is", "<parameter=days>\n2\n</parameter>\n")),
    ("deepseek_v3", AROUND % (V3 % '{"city": "Paris"}')),
    ("deepseek_v31", AROUND % (V31 % '{"city": "Paris"}')),
    (
        HARMONY,
        '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>',
    ),
]


@pytest.mark.parametrize("name,text", GRAMMATICAL)
def test_grammars_take_what_the_parser_reads_and_nothing_else(name, text):
    content, _, found = whole(read(parsers(name), [text]))
    assert content == "" and found[0][0] == "get_weather", "the parser reads it"
    tools = [WEATHER, NOW]
    required = grammar_for(tools, "required", name)
    assert follows(required, text)
    for other in ("", "Sure. " + text, text[:-1], text.replace("get_weather", "other"), text.replace("city", "town")):
        assert not follows(required, other)
    now, weather = ({"type": "function", "function": {"name": f}} for f in ("now", "get_weather"))
    assert not follows(grammar_for(tools, now, name), text)
    assert follows(grammar_for(tools, weather, name), text) == (len(found) == 1)


def test_every_format_has_a_grammar():
    assert {name for name, _ in GRAMMATICAL} == set(FORMATS)


def test_a_grammar_of_one_call_takes_one_and_schemas_are_kept():
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    assert follows(grammar_for([NOW], "required", "hermes"), call + call)
    assert not follows(grammar_for([NOW], "required", "hermes", parallel=False), call + call)
    bad = '<tool_call>{"name": "get_weather", "arguments": {"city": "P", "days": "two"}}</tool_call>'
    assert not follows(grammar_for([WEATHER], "required", "hermes"), bad)
    assert follows(grammar_for([WEATHER], "required", "hermes"), bad.replace('"two"', "2"))
    assert "<[7]>" in grammar_for([NOW], "required", "mistral", special={"[TOOL_CALLS]": 7})["grammar"]


LEADING = ("llama3_json", "pythonic")
"""Formats whose calls begin a text without a mark."""


@pytest.mark.parametrize("name,text", GRAMMATICAL)
def test_where_a_model_is_free_its_text_is_and_its_calls_are_held(name, text):
    """Oracle: the parser. Whatever it reads as a call of a text that the grammar takes has arguments of the schema."""
    free = grammar_for([WEATHER, NOW], "auto", name)
    said = "Sure, é <b> {2} [3]."
    before = f"<|channel|>commentary<|message|>{said}<|end|><|start|>assistant" if name == HARMONY else said
    answer = f"<|channel|>final<|message|>{said}" if name == HARMONY else said
    assert follows(free, text) and follows(free, answer) and follows(free, "") == (name != HARMONY)
    if name not in LEADING:
        content, _, found = whole(read(parsers(name), [before + text]))
        assert follows(free, before + text) and content == said and found
        if name != HARMONY:
            assert follows(free, text + text + said) and follows(free, answer + text + answer + text)
    for bad in (text.replace("get_weather", "other"), text.replace("city", "town")):
        assert whole(read(parsers(name), [before + bad]))[2] or name in LEADING, "the parser would take it"
        assert not follows(free, bad) and (name in LEADING or not follows(free, before + bad))
    one = grammar_for([WEATHER, NOW], "auto", name, parallel=False)
    several = len(whole(read(parsers(name), [text]))[2]) > 1
    assert follows(one, answer) and follows(one, text) == (not several)
    assert name == HARMONY or not follows(one, text + text)


@pytest.mark.parametrize("name,text", GRAMMATICAL)
def test_a_call_or_an_answer_of_a_form(name, text):
    made = grammar_for([WEATHER, NOW], "auto", name, answer='"yes" | "no"')
    answer = "<|channel|>final<|message|>%s" if name == HARMONY else "%s"
    assert follows(made, text) and follows(made, answer % "yes") and follows(made, answer % "no")
    for bad in ("maybe", "yes.", "so yes"):
        assert not follows(made, answer % bad)
    assert not follows(made, text.replace("city", "town"))


def test_marks_that_begin_calls_without_a_schema_and_newer_forms():
    python_tag = '<|python_tag|>{"name": "now", "parameters": {}}'
    free = grammar_for([WEATHER, NOW], "auto", "llama3_json")
    assert follows(free, python_tag) and follows(free, "So: " + python_tag)
    assert not follows(free, "So: " + python_tag.replace("now", "then"))
    assert follows(grammar_for([NOW], "auto", "pythonic"), 'So:<|python_start|>[now(x=1, y_2="a")]<|python_end|>')
    assert follows(grammar_for([NOW], "auto", "qwen3_coder"), CODER.replace("get_weather", "now") % ("x", ""))
    newer = grammar_for([NOW], "required", "mistral", special={"[ARGS]": 7, "[TOOL_CALLS]": 8})["grammar"]
    assert '"now" <[7]>' in newer and "<[8]>" in newer
    role = " to=functions.now<|channel|>commentary <|constrain|>json<|message|>{}<|call|>"
    assert follows(grammar_for([NOW], "auto", HARMONY), role) and whole(read(parsers(HARMONY), [role]))[2]
    assert follows(grammar_for([NOW], "required", HARMONY), role.removesuffix("<|call|>")), "an end may be that token"
