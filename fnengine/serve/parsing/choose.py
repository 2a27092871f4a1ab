"""Which parsers read a model's text: those that are named, or those whose marks its chat template has."""

from __future__ import annotations

from collections.abc import Mapping

from fnengine.errors import ConfigError
from fnengine.serve.parsing.calls import Format
from fnengine.serve.parsing.derive import NAME as TEMPLATE
from fnengine.serve.parsing.derive import derive
from fnengine.serve.parsing.formats import FORMATS
from fnengine.serve.parsing.parser import Parsers
from fnengine.serve.parsing.reasoning import Tags

HARMONY = "gpt-oss"
BY_NAME: dict[str, Format] = {f.name: f for f in FORMATS}
TOOL_ALIASES = {
    "qwen3": "hermes",
    "qwen": "hermes",
    "qwen3_xml": "qwen3_coder",
    "llama3": "llama3_json",
    "llama4_pythonic": "pythonic",
    "openai": HARMONY,
    "gpt_oss": HARMONY,
    "deepseek_r1": "deepseek_v3",
}
"""Other names, mostly vLLM's."""
TAGS = {
    "deepseek_r1": Tags("<think>", "</think>", opens=True),
    "qwen3": Tags("<think>", "</think>"),
    "magistral": Tags("[THINK]", "[/THINK]"),
    "seed_oss": Tags("<seed:think>", "</seed:think>"),
}
TAG_ALIASES = {"openai_gptoss": HARMONY, "gpt_oss": HARMONY, "mistral": "magistral", "deepseek_v3": "qwen3"}
FOREIGN = ("<arg_key>", "<|tool_calls_section_begin|>", "<minimax:tool_call>", "<seed:tool_call>", "<|tool_call|>")
"""Marks of formats that are not read here: GLM, Kimi, MiniMax, Seed, Granite and Phi."""
MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (HARMONY, ("<|channel|>", "<|message|>")),
    ("mistral", ("[TOOL_CALLS]",)),
    ("deepseek_v3", ("<｜tool▁call▁begin｜>", "```json")),
    ("deepseek_v31", ("<｜tool▁call▁begin｜>",)),
    ("qwen3_coder", ("<tool_call>", "<function=", "<parameter=")),
    ("hermes", ("<tool_call>",)),
    ("pythonic", ("<|python_start|>",)),
    ("pythonic", ("[func_name1(",)),
    ("llama3_json", ('{"name": function name, "parameters":',)),
    ("llama3_json", ("<|python_tag|>",)),
)
"""(format, marks that a template of it has, all of them); the first that fits."""


def tool_names() -> tuple[str, ...]:
    """What --tool-call-parser takes."""
    return ("auto", "none", *BY_NAME, HARMONY, TEMPLATE, *TOOL_ALIASES)


def reasoning_names() -> tuple[str, ...]:
    """What --reasoning-parser takes, beside `tags:START,END`."""
    return ("auto", "none", *TAGS, HARMONY, *TAG_ALIASES)


def read_tool_name(text: str) -> str:
    """The name of a parser of tool calls. Raises ValueError with all names for another one."""
    if text not in tool_names():
        raise ValueError(f"there is no parser {text!r}; write one of {', '.join(tool_names())}")
    return TOOL_ALIASES.get(text, text)


def read_reasoning_name(text: str) -> str:
    """The name of a parser of reasoning, or `tags:START,END`. Raises ValueError with all names for another one."""
    if text.startswith("tags:"):
        start, _, end = text[5:].partition(",")
        if start and end and start != end:
            return text
        raise ValueError(f"{text!r} must be tags:START,END with two different marks")
    if text not in reasoning_names():
        raise ValueError(f"there is no parser {text!r}; write one of {', '.join(reasoning_names())}, tags:START,END")
    return TAG_ALIASES.get(text, text)


def choose(templates: Mapping[str, str], tool: str = "auto", reasoning: str = "auto") -> Parsers:
    """The parsers for a model with these chat templates, by name.

    Raises:
        ConfigError: there is no such parser; the message lists those that there are.
    """
    names = {"--tool-call-parser": tool, "--reasoning-parser": reasoning}
    for (flag, name), read in zip(names.items(), (read_tool_name, read_reasoning_name), strict=True):
        try:
            names[flag] = read(name)
        except ValueError as e:
            raise ConfigError(str(e), where=flag, remedy="or leave it out, then the chat template decides") from None
    default = templates.get("default", "")
    with_tools = templates.get("tool_use", default)
    tool, why_tool = _named(names["--tool-call-parser"], tool_format(with_tools))
    form = BY_NAME.get(tool)
    if tool == TEMPLATE or (tool == "none" and names["--tool-call-parser"] == "auto"):
        form = derive(with_tools)
        if form is not None:
            tool, why_tool = TEMPLATE, f"read off the chat template: {' ... '.join(form.marks or form.leading)}"
        elif tool == TEMPLATE:
            raise ConfigError(
                "the chat template shows no calls that can be read, which are JSON between marks",
                where="--tool-call-parser",
                remedy=f"write one of {', '.join(n for n in tool_names() if n != TEMPLATE)}",
            )
    reasoning, why_reasoning = _named(names["--reasoning-parser"], reasoning_format(default))
    if HARMONY in (tool, reasoning):
        other = {tool, reasoning} - {HARMONY, "none"}
        if other:
            raise ConfigError(
                f"{HARMONY} reads reasoning and tool calls, {other.pop()} cannot be beside it",
                where="--reasoning-parser" if tool == HARMONY else "--tool-call-parser",
                remedy="leave both flags out, or give both the same name",
            )
        tool = reasoning = HARMONY
    start, _, end = reasoning.removeprefix("tags:").partition(",")
    tags = Tags(start, end) if reasoning.startswith("tags:") else TAGS.get(reasoning)
    return Parsers(
        tools=HARMONY if tool == HARMONY else form,
        reasoning=tags,
        short_ids=tool == "mistral" or "length 9" in with_tools or "length != 9" in with_tools,
        notes=(f"tool calls: {tool} ({why_tool})", f"reasoning: {reasoning} ({why_reasoning})"),
    )


def _named(name: str, found: tuple[str, str]) -> tuple[str, str]:
    return found if name == "auto" else (name, "as asked for")


def tool_format(template: str) -> tuple[str, str]:
    """(name of the format of tool calls, why) that a chat template has the marks of; `none` where there is none."""
    if not template:
        return "none", "there is no chat template"
    foreign = next((m for m in FOREIGN if m in template), None)
    if foreign is not None:
        return "none", f"the chat template has {foreign}, of a format that is not read here"
    for name, marks in MARKS:
        if all(m in template for m in marks):
            return name, f"the chat template has {' and '.join(marks)}"
    return "none", "the chat template has the marks of no known format"


def reasoning_format(template: str) -> tuple[str, str]:
    """(name of the way of writing reasoning, why) that a chat template has the marks of; `none` where there is none."""
    if "<|channel|>" in template and "<|message|>" in template:
        return HARMONY, "the chat template has <|channel|>"
    for name, tags in TAGS.items():
        # Never one that opens by itself: templates that split old answers at the mark belong to models that do not
        # think, too (DeepSeek V3, V3.1 behind a tool's result), and would lose their whole answer. R1 writes the mark.
        if tags.end in template and not tags.opens:
            return name, f"the chat template has {tags.end}"
    return "none", "the chat template has the marks of no known one"
