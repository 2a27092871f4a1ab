"""Chat messages to the text of a prompt, through the checkpoint's Jinja template in a sandbox.

A template comes with a checkpoint from strangers. It runs in Jinja's immutable sandbox on copies made of plain JSON
values, with its output, its `range` and its repetitions bounded. Not bounded: the time of nested loops that print
nothing. Templates of people who can send requests must therefore not be rendered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fnengine.errors import RequestError

ContentFormat = Literal["auto", "string", "openai"]
"""How a message's content reaches the template: `string` joins text parts, `openai` makes every content a list of
parts, `auto` does what the template seems to expect."""
MAX_CHARS = 1 << 26
"""Characters that a rendered prompt, or one repeated string in it, may have."""
TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "thinking")
"""Types of content parts that are text."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which messages carry reasoning."""


def choose(templates: Mapping[str, str], tools: Sequence[Any] | None = None) -> str:
    """The source to render from templates by name: `tool_use` for a request with tools where there is one, else
    `default`.

    Raises: RequestError when there is none.
    """
    names = ("tool_use", "default") if tools else ("default",)
    for name in names:
        if name in templates:
            return templates[name]
    have = f" (it has {', '.join(sorted(templates))}, none named default)" if templates else ""
    raise RequestError(
        f"this model's tokenizer has no chat template{have}",
        remedy="start the server with --chat-template FILE, or use /v1/completions",
        param="messages",
    )


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final: bool = False,
    content_format: ContentFormat = "auto",
    variables: Mapping[str, Any] | None = None,
    now: datetime | None = None,
) -> str:
    """The prompt that `template` makes of `messages`.

    Args:
        continue_final: end the prompt inside the last message, so that the model goes on with it.
        variables: what else the template sees: `bos_token`, `eos_token`, `enable_thinking`, ...
        now: the time that `strftime_now` tells; None reads the clock when the template asks.

    Raises: RequestError (400) with the template's own message when it refuses or fails.
    """
    if continue_final and add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other",
            remedy="send add_generation_prompt: false",
            param="continue_final_message",
        )
    if not messages:
        raise RequestError("messages must hold at least one message", param="messages")
    try:
        compiled = compile_template(template)
        chat = [_message(m, content_format, template) for m in messages]
        marker = _mark_end(chat[-1]) if continue_final else ""
        text = _bounded(
            compiled.generate(
                **{
                    "strftime_now": lambda form: (now or datetime.now()).strftime(form),
                    **_plain(variables or {}),
                    "messages": chat,
                    "tools": None if tools is None else _plain(tools),
                    "documents": None if documents is None else _plain(documents),
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        )
    except RequestError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise RequestError(
            f"the chat template is no valid Jinja: {error.message} (line {error.lineno})",
            remedy="pass a correct one with --chat-template FILE",
            param="messages",
        ) from error
    except jinja2.TemplateError as error:
        raise RequestError(f"chat template: {error.message}", param="messages") from error
    except Exception as error:  # a template is a program: it can fail in any way
        raise RequestError(f"chat template: {type(error).__name__}: {error}", param="messages") from error
    return _cut(text, marker) if continue_final else text


@lru_cache(maxsize=32)
def compile_template(source: str) -> jinja2.Template:
    """The compiled template; equal sources share one."""
    return _environment().from_string(source)


@lru_cache(maxsize=32)
def content_kind(source: str) -> Literal["string", "openai", "both"]:
    """What the template seems to take a message's content for: it loops over content (`openai`), it does so and also
    asks whether something is a string (`both`), or it does not loop over it (`string`)."""
    tree = _environment().parse(source)

    def is_content(node: nodes.Node | None) -> bool:
        while isinstance(node, (nodes.Filter, nodes.Test)):
            node = node.node
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        return isinstance(node, nodes.Name) and node.name in aliases

    aliases: set[str] = set()
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and is_content(assign.node):
            aliases.add(assign.target.name)
    for macro in tree.find_all(nodes.Macro):
        aliases |= {arg.name for arg in macro.args if arg.name == "content"}
    if not any(is_content(loop.iter) for loop in tree.find_all(nodes.For)):
        return "string"
    return "both" if any(test.name == "string" for test in tree.find_all(nodes.Test)) else "openai"


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks the assistant's words for training, renders its body.

    A class because Jinja takes extensions in no other form.
    """

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration is a plain set)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["namespace"] = _namespace
    # `"x" * 10**12` would take all memory in one step, before any output could be counted.
    env.intercepted_binops = frozenset({"*", "**"})
    env.binop_table |= {"*": _times, "**": _power}
    return env


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as models saw it in training: without Jinja's HTML escapes."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(message))


def _namespace(*args: Any, **kwargs: Any) -> jinja2.utils.Namespace:
    names = dict(*args, **kwargs)
    for name in names:
        if str(name).startswith("_"):
            raise jinja2.TemplateError(f"a namespace cannot hold {name!r}")
    return jinja2.utils.Namespace(names)


def _times(a: Any, b: Any) -> Any:
    for many, times in ((a, b), (b, a)):
        if isinstance(many, (str, bytes, list, tuple)) and isinstance(times, int) and len(many) * times > MAX_CHARS:
            raise jinja2.TemplateError(f"a repetition of more than {MAX_CHARS} items")
    return a * b


def _power(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int) and a.bit_length() * b > 4096:
        raise jinja2.TemplateError("a power of more than 4096 bits")
    return a**b


def _bounded(pieces: Any) -> str:
    out, size = [], 0
    for piece in pieces:
        out.append(piece)
        size += len(piece)
        if size > MAX_CHARS:
            raise RequestError(f"the chat template makes more than {MAX_CHARS} characters", param="messages")
    return "".join(out)


def _plain(value: Any) -> Any:
    """A copy made of JSON types only: other objects have methods that the sandbox does not know to be dangerous."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return f"<{type(value).__name__}>"


def _message(message: Mapping[str, Any], content_format: ContentFormat, template: str) -> dict[str, Any]:
    """A message as templates expect it: no None, content in the right form, tool arguments as an object."""
    if not isinstance(message, Mapping):
        raise RequestError(f"a message must be an object, got {type(message).__name__}", param="messages")
    new = {k: _plain(v) for k, v in message.items() if v is not None}
    reasoning = next((new[name] for name in REASONING if name in new), None)
    if reasoning is not None:
        new = {"thinking": reasoning, **new, "reasoning_content": reasoning}
    if "content" in new:
        new["content"] = _content(new["content"], content_format, template)
    for call in new.get("tool_calls") or ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function["arguments"] = _arguments(function["arguments"])
    return new


def _arguments(text: str) -> Any:
    """The object that the API writes as a string and templates want as an object; the string where it is none."""
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


def _content(content: Any, content_format: ContentFormat, template: str) -> Any:
    if isinstance(content, list):
        parts = [_part(p) for p in content]
        flat = content_format == "string" or (content_format == "auto" and content_kind(template) == "string")
        return "\n".join(p["text"] for p in parts) if flat else parts
    if not isinstance(content, str):
        raise RequestError(
            f"content must be a string or a list of parts, got {type(content).__name__}", param="messages"
        )
    wrap = content_format == "openai" or (content_format == "auto" and content_kind(template) == "openai")
    return [{"type": "text", "text": content}] if wrap else content


def _part(part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    text = (part.get("text") if "text" in part else part.get(kind)) if isinstance(part, dict) else None
    if kind not in TEXT_PARTS or not isinstance(text, str):
        raise RequestError(
            f"content parts of type {kind!r} cannot be read",
            remedy='send {"type": "text", "text": "..."}',
            param="messages",
        )
    return {**part, "type": "text", "text": text}


_MARKER = "\ue000the end of the last message\ue000"


def _mark_end(message: dict[str, Any]) -> str:
    """Puts a marker behind the message's last text; returns that text.

    The space behind the marker shows whether the template trims content.
    """
    content = message.get("content")
    if isinstance(content, list) and content:
        text, content[-1]["text"] = content[-1]["text"], content[-1]["text"] + _MARKER + " "
        return text
    if not isinstance(content, str):
        raise RequestError("the last message has no content to continue", param="continue_final_message")
    message["content"] = content + _MARKER + " "
    return content


def _cut(text: str, final: str) -> str:
    """The rendered text up to the marker, trimmed where the template trims."""
    at = text.rfind(_MARKER)
    if at < 0 or final.strip() not in text:
        raise RequestError(
            "the chat template does not show the last message whole, so it cannot be continued",
            param="continue_final_message",
        )
    spaced = text.startswith(_MARKER + " ", at)
    return text[:at] if spaced else text[:at].rstrip()
