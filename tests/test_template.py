"""Chat templates. Oracle: transformers.apply_chat_template on the same inputs."""

from __future__ import annotations

import copy
from datetime import datetime
from pathlib import Path

import pytest

import fnengine
from fnengine.errors import RequestError
from fnengine.host.template import choose, content_kind, render
from fnengine.host.tokenizer import Tokenizer

BUNDLED = Path(fnengine.__file__).parent / "bundled"

LLAMA2 = """{{ bos_token }}{% for message in messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate') }}
    {% endif %}
    {% if message['role'] == 'user' %}[INST] {{ message['content'].strip() }} [/INST]
    {% else %} {{ message['content'] | trim }} {{ eos_token }}{% endif %}
{% endfor %}"""
TOOLS = """{%- if tools %}{% for t in tools %}{{ t | tojson(indent=2) }}
{% endfor %}{% endif -%}
{%- set ns = namespace(last=-1, names=[]) -%}
{%- for m in messages -%}
{%- if m.role == 'skip' %}{% continue %}{% endif -%}
{%- set ns.last = loop.index0 -%}
<{{ m.role }}>{{ m.content if m.content is defined else '' }}
{%- if m.reasoning_content is defined %}<think>{{ m.reasoning_content }}</think>{% endif %}
{%- for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor -%}
{%- generation %}!{% endgeneration %}
{% endfor -%}
{{ ns.last }}{% if add_generation_prompt %}<assistant>{% endif %}{% if flag is defined %}{{ flag }}{% endif %}"""
LOOPS = "{% for m in messages %}{% for part in m['content'] %}[{{ part['text'] }}]{% endfor %}{% endfor %}"
EITHER = (
    "{% for m in messages %}{% set content = m.content %}{% if content is string %}s:{{ content }}"
    "{% else %}{% for part in content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}"
)

CHATS = [
    [{"role": "user", "content": " Hi <b>&'\"</b> 你好 "}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b "}, {"role": "user", "content": "c"}],
    [{"role": "user", "content": "a"}, {"role": "skip", "content": "b", "name": None}],
    [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "hm",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": "<é>", "n": [1, None]}}}],
        },
    ],
]
WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {"city": "Zürich <&>"}}}]


@pytest.fixture(scope="module")
def upstream():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    tokenizer.bos_token = "<|im_start|>"
    return tokenizer


def both(upstream, template, chat, tools=None, open=True, final=False, **variables):
    """(ours, transformers') text, or None where it refuses."""
    special = dict(upstream.special_tokens_map)
    try:
        ours = render(
            template,
            chat,
            tools=tools,
            add_generation_prompt=open,
            continue_final=final,
            variables={**special, **variables},
        )
    except RequestError:
        ours = None
    try:
        theirs = upstream.apply_chat_template(
            chat,
            tools=tools,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=open,
            continue_final_message=final,
            **variables,
        )
    except Exception:  # whatever it raises: the comparison is about whether it refuses
        theirs = None
    return ours, theirs


@pytest.mark.parametrize("template", [LLAMA2, TOOLS], ids=["llama2", "tools"])
@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
@pytest.mark.parametrize("tools", [None, WEATHER], ids=["plain", "with tools"])
def test_same_text_as_transformers(template, chat, tools, upstream):
    for open in (True, False):
        ours, theirs = both(upstream, template, chat, tools, open, flag=True)
        assert ours == theirs
    if template is TOOLS:
        assert ours is not None


@pytest.mark.parametrize("final", ["b ", " b", "b\n", "x"])
@pytest.mark.parametrize("template", [LLAMA2, TOOLS], ids=["trims", "keeps"])
def test_continuing_the_last_message_as_transformers(template, final, upstream):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": final}]
    ours, theirs = both(upstream, template, chat, open=False, final=True)
    assert ours == theirs is not None
    assert ours.endswith(final) or template is LLAMA2


def test_the_bundled_template(upstream):
    ours = Tokenizer.load(BUNDLED)
    chat = [{"role": "system", "content": "Be kind."}, *CHATS[1]]
    text = ours.render_chat(chat)
    assert text == upstream.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = upstream.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)["input_ids"]
    assert ours.encode(text, add_special=False) == list(ids)


def test_the_clock_is_an_argument():
    assert render("{{ strftime_now('%d %b %Y') }}", CHATS[0], now=datetime(2026, 11, 21)) == "21 Nov 2026"


PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]


def test_content_takes_the_form_the_template_expects():
    assert [content_kind(t) for t in (LLAMA2, TOOLS, LOOPS, EITHER)] == ["string", "string", "openai", "both"]
    plain = "{{ messages[0].content }}"
    assert render(plain, PARTS) == "a\nb"
    assert render(LOOPS, PARTS) == "[a][b]"
    assert render(LOOPS, CHATS[1]) == "[a][b ][c]"
    assert render(EITHER, PARTS) == "[a][b]"
    assert render(EITHER, PARTS, content_format="string") == "s:a\nb"
    assert render(EITHER, CHATS[1][:1]) == "s:a"
    assert render(EITHER, CHATS[1][:1], content_format="openai") == "[a]"


def test_tool_arguments_arrive_as_an_object():
    def call(arguments):
        chat = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
        return render("{{ messages[0].tool_calls[0].function.arguments | tojson }}", chat)

    assert [call('{"a": "é"}'), call(""), call("[1"), call({"b": 1})] == ['{"a": "é"}', "{}", '"[1"', '{"b": 1}']


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system turns') }}", "no system turns"),
        ("{{ messages[5].role }}", "undefined|no element"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{% for %}", r"no valid Jinja.*line 1"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ messages[0].update({'role': 'x'}) }}", "not safely callable|unsafe"),
        ("{{ 'x' * 10**12 }}", "repetition"),
        ("{{ 2 ** 1000000000 }}", "power"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "more than"),
        ("{% set n = namespace(__class__=1) %}", "namespace"),
        ("{% set s = strftime_now.__globals__ %}{{ s.x }}", "unsafe|undefined"),
    ],
)
def test_a_template_that_fails_is_a_400(template, message):
    chat = copy.deepcopy(CHATS[0])
    with pytest.raises(RequestError, match=message) as error:
        render(template, chat)
    assert error.value.code == 400 and error.value.param == "messages" and chat == CHATS[0]


@pytest.mark.parametrize(
    ("messages", "how", "message"),
    [
        ([], {}, "at least one"),
        (["hi"], {}, "must be an object"),
        ([{"role": "user", "content": 5}], {}, "must be a string"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], {}, "image_url"),
        (CHATS[0], {"continue_final": True}, "exclude"),
        ([{"role": "assistant"}], {"continue_final": True, "add_generation_prompt": False}, "no content"),
        (CHATS[0], {"continue_final": True, "add_generation_prompt": False, "template": "x"}, "cannot be continued"),
    ],
)
def test_bad_messages_are_a_400(messages, how, message):
    with pytest.raises(RequestError, match=message):
        render(how.pop("template", "{{ messages[0].content }}"), messages, **how)


def test_no_template_says_what_to_do():
    with pytest.raises(RequestError, match="no chat template") as error:
        choose({})
    assert "--chat-template" in error.value.remedy
    with pytest.raises(RequestError, match="it has rag, none named default"):
        choose({"rag": "x"})
    assert choose({"default": "a", "tool_use": "b"}, WEATHER) == "b"
