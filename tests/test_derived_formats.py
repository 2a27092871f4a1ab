"""Formats of tool calls that are read off chat templates. Oracles: the template itself, whose own text of calls must be
read back; the law that cutting changes nothing; llguidance for grammars."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fnengine.errors import ConfigError
from fnengine.host.template import render
from fnengine.serve.parsing.choose import choose
from fnengine.serve.parsing.derive import derive
from fnengine.serve.parsing.grammar import grammar_for
from tests.test_parsing import NOW, TOOLS, WEATHER, cuts_of, follows, read, whole

HEAD = """{%- for m in messages %}{{ '<|' + m.role + '|>' }}
{%- if m.content %}{{ m.content }}{% endif %}{% if m.tool_calls %}"""
TAIL = "{% endif %}{{ '<|end|>\n' }}{% endfor %}"
EACH = "{% for c in m.tool_calls %}{% set f = c.function %}"
TEMPLATES = {
    "marks": EACH + "<call>\n{{ {'name': f.name, 'arguments': f.arguments} | tojson }}\n</call>\n{% endfor %}",
    "other keys": EACH + "<|call|>{{ {'tool': f.name, 'args': f.arguments} | tojson }}{% endfor %}",
    "nested": EACH + "<call>{{ {'type': 'function', 'function': f} | tojson }}</call>{% endfor %}",
    "a list": "<|tool_call|>[" + EACH + "{{ {'name': f.name, 'arguments': f.arguments} | tojson }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}]",
    "a list with an end": "<calls>[" + EACH + "{{ {'name': f.name, 'arguments': f.arguments} | tojson }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}]</calls>",
    "names before": EACH + "<function={{ f.name }}>{{ f.arguments | tojson }}</function>{% endfor %}",
    "names, around": "<|calls|>"
    + EACH
    + "<|call|>{{ f.name }}<|arg|>{{ f.arguments | tojson }}<|done|>{% endfor %}<|/calls|>",
    "text of arguments": EACH
    + "<call>{{ {'name': f.name, 'arguments': f.arguments | tojson} | tojson }}</call>{% endfor %}",
    "bare": EACH
    + "{{ {'name': f.name, 'parameters': f.arguments} | tojson }}{% if not loop.last %}; {% endif %}{% endfor %}",
}
CALLS = [("get_weather", {"city": 'Pa</call>r"is', "days": 2}), ("now", {})]


def shown(template, calls=CALLS, content=""):
    """The model's turn as the template shows it."""
    turn: dict[str, Any] = {"role": "assistant", "content": content}
    turn["tool_calls"] = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]
    text = render(template, [{"role": "user", "content": "q"}, turn], add_generation_prompt=False)
    return text.split("<|assistant|>")[1].removesuffix("<|end|>\n")


@pytest.fixture(params=TEMPLATES)
def template(request):
    return HEAD + TEMPLATES[request.param] + TAIL


def test_what_a_template_shows_is_read_back_however_it_is_cut(template):
    parsers = choose({"default": template})
    assert "template (read off" in parsers.notes[0] and parsers.tools is not None
    text = shown(template)
    events = read(parsers, [text])
    content, _, found = whole(events)
    assert content == "" and [(n, json.loads(a)) for n, a in found] == CALLS
    assert read(parsers, list(text)) == events
    for at in range(1, len(text)):
        assert read(parsers, cuts_of(text, (at,))) == events
    if parsers.tools.openers:
        said = "Let me see. "
        content, _, found = whole(read(parsers, [said + text]))
        assert content.strip() == said.strip() and len(found) == 2
    text = shown(template, CALLS[:1])
    for broken in (text[: len(text) // 3], text.replace("{", "", 1)):
        assert whole(read(parsers, list(broken)))[::2] == (broken, []), "what is no call is content, word for word"
    full = whole(read(parsers, [text]))[2]
    for at in range(1, len(text)):  # broken off: content, or arguments as far as they came
        content, _, found = whole(read(parsers, list(text[:at])))
        assert (text[:at].endswith if found else text[:at].startswith)(content)  # behind a call half a mark
        assert [name for name, _ in found] in ([], ["get_weather"])
        assert all(given and full[0][1].startswith(given) for _, given in found)


def test_grammars_take_what_the_template_shows(template):
    made = derive(template)
    assert made is not None
    form: dict[str, Any] = dict(parser=made.name, shape=made.shape)
    for calls in (CALLS, CALLS[:1]):
        text = shown(template, calls)
        if "| tojson} | tojson" in template:  # as text, arguments are no JSON of the schema
            return
        assert follows(grammar_for([WEATHER, NOW], "required", **form), text.strip())
        free = grammar_for([WEATHER, NOW], "auto", **form)
        assert follows(free, text) or follows(free, text.strip())
        assert not follows(free, text.strip().replace("city", "town"))
        one = grammar_for([WEATHER, NOW], "required", **form, parallel=False)
        assert follows(one, text.strip()) == (len(calls) == 1)
    assert follows(free, "any text")


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{{ raise_exception('no') }}",
        HEAD
        + EACH
        + "<call>{{ f.name }}{% for k, v in f.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}</call>{% endfor %}"
        + TAIL,
        HEAD + EACH + "Call {{ f.name }} with {{ f.arguments | tojson }}{% endfor %}" + TAIL,
        HEAD + EACH + "<call>{{ f.name }}:{{ loop.index }}{{ f.arguments | tojson }}</call>{% endfor %}" + TAIL,
        "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}",
    ],
)
def test_what_cannot_be_read_off_is_not_guessed(template):
    assert derive(template) is None and choose({"default": template}).tools is None
    with pytest.raises(ConfigError, match="shows no calls"):
        choose({"default": template}, "template")


def test_formats_with_names_go_first():
    hermes = HEAD + TEMPLATES["marks"].replace("call>", "tool_call>") + TAIL
    assert choose({"default": hermes}).tools.name == "hermes"  # pyright: ignore
    asked = choose({"default": hermes}, "template").tools
    assert asked.name == "template" and asked.openers == ("<tool_call>",)  # pyright: ignore
    assert TOOLS.schemas
