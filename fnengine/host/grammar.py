"""What an answer's text has to look like, as a value; read from the fields that requests say it with.

`matcher` turns a `Grammar` into masks of tokens. Here nothing is compiled: what a request asks for is checked as far as
that takes no vocabulary, and errors name its field.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from fnengine.errors import RequestError
from fnengine.host.schema import LIMITS, Limits, check_pattern, check_schema, places_of

Kind = Literal["json_object", "json_schema", "regex", "choice", "cfg", "structural_tag", "lark"]

WHITESPACE = r"[ \n\r\t]{1,64}"
"""Whitespace between the parts of JSON where a request does not say. It ends, because some models would not."""
MOST_CHOICES = 10_000
MOST_TAGS = 128


@dataclass(frozen=True)
class Grammar:
    """What texts are possible. Equal grammars allow the same texts, whatever field they came in."""

    kind: Kind
    text: str
    """json_schema: the schema. regex: the pattern, for the whole text; \\d and \\w mean ASCII as in ECMAScript.
    choice: a JSON list of strings. cfg: Lark or GBNF. structural_tag: JSON of triggers and tags. lark: as the library
    reads it, written by this program."""
    whitespace: str = WHITESPACE
    """A pattern for whitespace, which may come once between two parts of JSON; '' for none."""
    field: str = dataclasses.field(default="grammar", compare=False)
    """The request's field, for messages."""
    ignored: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    """What of a schema has no effect, as the answer should say."""


def json_object(field: str = "grammar", whitespace: str | None = None) -> Grammar:
    """Any JSON object."""
    return Grammar("json_object", '{"type": "object"}', _whitespace(whitespace, field), field)


def json_schema(
    schema: Any,
    field: str = "grammar",
    *,
    strict: bool = False,
    closed: bool = False,
    whitespace: str | None = None,
    limits: Limits = LIMITS,
) -> Grammar:
    """JSON that is valid under `schema`, an object or its text; properties come in the order that it lists them in.

    Args:
        strict: refuse unknown keywords, which otherwise are `ignored`.
        closed: objects that list properties and do not say otherwise have no others.
        whitespace: a pattern for whitespace between the parts of JSON, '' for none, None for at most 64 characters.

    Raises: RequestError naming the keyword that cannot be held to, and its place in the schema.
    """
    if isinstance(schema, str):
        schema = _read_json(schema, field, limits)
    checked, ignored = check_schema(schema, field, strict=strict, closed=closed, limits=limits)
    return Grammar(
        "json_schema", json.dumps(checked, ensure_ascii=False), _whitespace(whitespace, field), field, ignored
    )


def regex(pattern: Any, field: str = "grammar", limits: Limits = LIMITS) -> Grammar:
    """Texts that the pattern matches from end to end. Rust's syntax: no look-around, no references to groups."""
    check_pattern(pattern, field, limits)
    _check_text(pattern, field, limits)
    return Grammar("regex", pattern, field=field)


def choice(choices: Any, field: str = "grammar", limits: Limits = LIMITS) -> Grammar:
    """Exactly one of some strings."""
    if not isinstance(choices, list | tuple) or not choices or not all(isinstance(c, str) for c in choices):
        _refuse(field, "must be a list of at least one string")
    if len(choices) > MOST_CHOICES:
        _refuse(field, f"{len(choices)} choices, {MOST_CHOICES} are possible")
    text = json.dumps(list(dict.fromkeys(choices)), ensure_ascii=False)
    _check_text(text, field, limits)
    return Grammar("choice", text, field=field)


def cfg(text: Any, field: str = "grammar", limits: Limits = LIMITS) -> Grammar:
    """Texts of a context-free grammar in Lark's syntax (rule `start`) or, where it has `::=`, in GBNF (rule `root`)."""
    if not isinstance(text, str) or not text.strip():
        _refuse(field, "must be the text of a grammar")
    _check_text(text, field, limits)
    # Rules and brackets stand for how deep the library may have to go. Those in strings count too.
    levels = len(re.findall(r"[(\[{]|^\s*[?!]?[\w.-]+\s*(?:::=|:|\[|\{)", text, re.MULTILINE))
    if levels > limits.levels:
        _refuse(field, f"{levels} rules and brackets, {limits.levels} are possible")
    return Grammar("cfg", text, field=field)


def structural_tag(value: Any, field: str = "grammar", limits: Limits = LIMITS) -> Grammar:
    """Any text, in which what begins like a tag goes on like one: `begin`, JSON of a schema, `end`.

    Two shapes are read: `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}`, and `{"format": {"type":
    "triggered_tags", "triggers", "tags": [{"begin", "content": {"type": "json_schema", "json_schema"}, "end"}],
    "at_least_one", "stop_after_first"}}`.
    """
    if isinstance(value, str):
        value = _read_json(value, field, limits)
    if not isinstance(value, dict):
        _refuse(field, "must be an object")
    once = least = False
    if "format" in value:
        made = value["format"]
        if not isinstance(made, dict) or made.get("type") != "triggered_tags":
            _refuse(f"{field}.format", "only the type triggered_tags is supported")
        least, once = bool(made.get("at_least_one")), bool(made.get("stop_after_first"))
        triggers, listed, where = made.get("triggers"), made.get("tags"), f"{field}.format.tags"
    else:
        triggers, listed, where = value.get("triggers"), value.get("structures"), f"{field}.structures"
    if not isinstance(triggers, list) or not triggers or not all(isinstance(t, str) and t for t in triggers):
        _refuse(f"{field}.triggers", "must be a list of at least one string, none of them empty")
    if not isinstance(listed, list) or not 0 < len(listed) <= MOST_TAGS:
        _refuse(where, f"must be a list of 1 to {MOST_TAGS} tags")
    tags = [_tag(t, triggers, f"{where}.{i}", limits) for i, t in enumerate(listed)]
    text = json.dumps({"tags": [t for t, _ in tags], "least": least, "once": once}, ensure_ascii=False)
    _check_text(text, field, limits)
    return Grammar("structural_tag", text, field=field, ignored=tuple(note for _, notes in tags for note in notes))


def _tag(tag: Any, triggers: Sequence[str], field: str, limits: Limits) -> tuple[dict[str, Any], tuple[str, ...]]:
    """One tag as (trigger, rest of its begin, schema, end), and what of its schema has no effect."""
    if not isinstance(tag, dict):
        _refuse(field, "must be an object")
    begin, end, name, schema = tag.get("begin"), tag.get("end"), "schema", tag.get("schema")
    if "content" in tag:
        content = tag["content"]
        if not isinstance(content, dict) or content.get("type") != "json_schema":
            _refuse(f"{field}.content", "only the type json_schema is supported")
        name, schema = "content.json_schema", content.get("json_schema")
    if not isinstance(begin, str) or not isinstance(end, str):
        _refuse(field, "begin and end must be strings")
    trigger = next((t for t in triggers if begin.startswith(t)), None)
    if trigger is None:
        _refuse(f"{field}.begin", f"{begin[:80]!r} begins with none of the triggers")
    checked, ignored = check_schema({} if schema is None else schema, f"{field}.{name}", limits=limits)
    return {"trigger": trigger, "begin": begin[len(trigger) :], "schema": checked, "end": end}, ignored


def written(text: str, field: str, ignored: tuple[str, ...] = (), limits: Limits = LIMITS) -> Grammar:
    """A grammar that this program has written of a request's field, in the library's own syntax."""
    _check_text(text, field, limits)
    return Grammar("lark", text, field=field, ignored=ignored)


def from_response_format(value: Any, field: str = "response_format", limits: Limits = LIMITS) -> Grammar | None:
    """The grammar of a `response_format`; None for text, or none at all.

    `json_object` with a `schema` of its own is read like `json_schema`, as llama.cpp does.
    """
    if value is None:
        return None
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        schema = value.get("schema")
        return json_object(field) if schema is None else json_schema(schema, f"{field}.schema", limits=limits)
    if kind == "json_schema":
        inner = value.get("json_schema")
        if not isinstance(inner, dict):
            _refuse(f"{field}.json_schema", "is required and must be an object")
        if inner.get("schema") is None:
            _refuse(f"{field}.json_schema.schema", "is required")
        strict = inner.get("strict")
        if not isinstance(strict, bool | None):
            _refuse(f"{field}.json_schema.strict", "must be true or false")
        return json_schema(inner["schema"], f"{field}.json_schema.schema", strict=bool(strict), limits=limits)
    if kind == "structural_tag":
        return structural_tag(value, field, limits)
    _refuse(f"{field}.type", "must be text, json_object, json_schema or structural_tag")


def from_text_format(value: Any, field: str = "text.format", limits: Limits = LIMITS) -> Grammar | None:
    """The grammar of the `text.format` of a response, where a schema stands beside its name; None for text."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in ("text", "json_object"):
        return json_object(field) if kind == "json_object" else None
    if kind != "json_schema":
        _refuse(f"{field}.type", "must be text, json_object or json_schema")
    if value.get("schema") is None:
        _refuse(f"{field}.schema", "is required")
    strict = value.get("strict")
    if not isinstance(strict, bool | None):
        _refuse(f"{field}.strict", "must be true or false")
    return json_schema(value["schema"], f"{field}.schema", strict=bool(strict), limits=limits)


_PLAIN: Mapping[str, str] = {
    "guided_json": "json",
    "guided_json_object": "json_object",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "structural_tag": "structural_tag",
    "json_schema": "json",
    "regex": "regex",
    "ebnf": "grammar",
    "grammar": "grammar",
}
"""Fields at the top of a request, as vLLM once called them and as SGLang and llama.cpp do."""
_KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")
_SWITCHES = ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties")
FIELDS = frozenset({*_PLAIN, "structured_outputs", "response_format", "guided_whitespace_pattern"})
"""Fields of a request that `from_fields` reads."""


def fromguided(fields: Mapping[str, Any], limits: Limits = LIMITS) -> Grammar | None:
    """The grammar of `guided_*`, `structured_outputs` and their like; None where a request has none of them.

    Raises: RequestError where it has two, or one that is wrong.
    """
    found = [
        (name, kind, fields[name])
        for name, kind in _PLAIN.items()
        if fields.get(name) is not None and fields[name] is not False and (kind != "grammar" or fields[name] != "")
    ]
    outer = fields.get("structured_outputs")
    switches: Mapping[str, Any] = {}
    if outer is not None:
        if not isinstance(outer, Mapping):
            _refuse("structured_outputs", "must be an object")
        for name in outer:
            if name not in _KINDS and name not in _SWITCHES:
                _refuse(f"structured_outputs.{str(name)[:80]}", "unknown field", remedy="leave it out")
        switches = outer
        given = [(f"structured_outputs.{k}", k, outer[k]) for k in _KINDS if outer.get(k) not in (None, False)]
        if not given and not found:
            _refuse("structured_outputs", f"must have one of {', '.join(_KINDS)}")
        found += given
    if len(found) > 1:
        _refuse(found[1][0], f"only one constraint is possible, and {found[0][0]} is another", remedy="leave one out")
    if not found:
        return None
    name, kind, value = found[0]
    blanks, where = switches.get("whitespace_pattern"), "structured_outputs.whitespace_pattern"
    if blanks is None:
        blanks, where = fields.get("guided_whitespace_pattern"), "guided_whitespace_pattern"
    if blanks is not None:
        blanks = _whitespace(blanks, where)
    if _switch(switches, "disable_any_whitespace"):
        blanks = ""
    if kind == "json":
        closed = _switch(switches, "disable_additional_properties")
        return json_schema(value, name, closed=closed, whitespace=blanks, limits=limits)
    if kind == "json_object":
        if value is not True:
            _refuse(name, "must be true or false")
        return json_object(name, blanks)
    make = {"regex": regex, "choice": choice, "grammar": cfg, "structural_tag": structural_tag}[kind]
    return make(value, name, limits)


def from_fields(fields: Mapping[str, Any], limits: Limits = LIMITS) -> Grammar | None:
    """The grammar that a request's fields ask for, by whatever name; None where they ask for any text.

    Raises: RequestError where two of them do, or one is wrong.
    """
    guided = fromguided(fields, limits)
    made = from_response_format(fields.get("response_format"), limits=limits)
    if guided is not None and made is not None:
        _refuse(guided.field, "only one constraint is possible, and response_format is another", remedy="leave one out")
    return guided or made


def _library() -> Any:
    """The grammar library, which nobody loads who asks for no grammar."""
    import llguidance

    return llguidance


def lower(grammar: Grammar, controls: Mapping[str, int], limits: Limits = LIMITS) -> str:
    """The grammar as the library reads it.

    Args:
        controls: tokens that are not text, by their spelling; where a tag has one, the token is meant.
    """
    parser = _library().LLMatcher
    if grammar.kind in ("json_object", "json_schema"):
        return parser.grammar_from_json_schema(json.dumps(guided(json.loads(grammar.text), grammar.whitespace)))
    if grammar.kind == "regex":
        pattern = _library().regex_to_lark(grammar.text, "dw")
        return parser.grammar_from_lark(f"start: /{pattern}/" if pattern else 'start: ""')
    if grammar.kind == "choice":
        choices = " | ".join(map(_literal, json.loads(grammar.text)))
        return parser.grammar_from_lark(f"start: CHOICE\nCHOICE: {choices}")
    if grammar.kind == "structural_tag":
        return parser.grammar_from_lark(_tags_as_lark(json.loads(grammar.text), grammar.whitespace, controls))
    text = grammar.text
    if "::=" in text and grammar.kind == "cfg":
        from llguidance.gbnf_to_lark import any_to_lark

        try:
            text = any_to_lark(text)
        except (Exception, RecursionError) as error:  # whatever a parser of someone else's raises about a user's text
            _refuse(grammar.field, f"not readable as GBNF: {str(error)[:200]}")
    return parser.grammar_from_lark(text)


def as_rule(grammar: Grammar) -> str | None:
    """The grammar as Lark has it on the right of a rule, so that it can be a part of another one; None for those that
    are rules of their own."""
    if grammar.kind in ("json_object", "json_schema"):
        return f"%json {json.dumps(guided(json.loads(grammar.text), grammar.whitespace))}"
    if grammar.kind == "choice":
        return " | ".join(map(_literal, json.loads(grammar.text)))
    if grammar.kind == "regex":
        pattern = _library().regex_to_lark(grammar.text, "dw")
        return f"/{pattern}/" if pattern else '""'
    return None


def explain(grammar: Grammar, error: str) -> str:
    """The library's message, with the places in a schema that it can be about."""
    if grammar.kind != "json_schema":
        return error
    causes = {
        "oneOf": ("oneOf",),
        "Properties": ("minProperties", "maxProperties"),
        "patternProperty": ("patternProperties",),
        "regex": ("pattern", "patternProperties"),
        "multipleOf": ("multipleOf",),
        "range": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    }
    for cause, keywords in causes.items():
        if cause in error:
            places = places_of(json.loads(grammar.text), *keywords)
            return f"{error} ({', '.join(places)})" if places else error
    return error


def guided(schema: Any, whitespace: str = WHITESPACE) -> Any:
    """The schema with the library's options in it."""
    if schema is True:
        schema = {}
    elif schema is False:
        schema = {"enum": []}
    options = {
        "whitespace_flexible": bool(whitespace),
        "whitespace_pattern": whitespace or None,
        # Without \uXXXX: with it, {"\u0061": ...} passes for another property than "a" and escapes a's schema.
        "json_allowed_escapes": 'nrbtf\\"',
        "coerce_one_of": False,
        "lenient": False,
    }
    return {"x-guidance": options, **schema}


def _tags_as_lark(value: Mapping[str, Any], whitespace: str, controls: Mapping[str, int]) -> str:
    """Free text with tags in it, as Lark: the text before a trigger is lazy, so that a trigger is no text."""
    tags = value["tags"]
    any_tag = "(" + " | ".join(f"tag_{i}" for i in range(len(tags))) + ")"
    rules = [
        f"start: {any_tag}" if value["least"] and value["once"] else
        f"start: {any_tag} | rest" if value["once"] else
        f"start: {any_tag}{'+' if value['least'] else '*'} rest",
        "rest: TEXT",
        r"TEXT: /(.|\n)*/",
    ]  # fmt: skip
    for i, tag in enumerate(tags):
        trigger = tag["trigger"]
        body = f"{_spelled(tag['begin'], controls)} %json {json.dumps(guided(tag['schema'], whitespace))}"
        body = f"{body} {_spelled(tag['end'], controls)}"
        pieces = _split(trigger, controls)
        if any(p in controls for p in pieces):
            before = "" if pieces[0] in controls else _literal(pieces.pop(0))
            rules.append(f"tag_{i}_head[lazy]: TEXT {before}" if before else f"tag_{i}_head: TEXT")
            rules.append(f"tag_{i}: tag_{i}_head {_spelled(''.join(pieces), controls)} {body}")
        else:
            rules.append(f"tag_{i}_head[lazy]: TEXT {_literal(trigger)}")
            rules.append(f"tag_{i}: tag_{i}_head {body}")
    return "\n".join(rules)


def _split(text: str, controls: Mapping[str, int]) -> list[str]:
    """The text in pieces, each of them one control token or none."""
    here = [c for c in controls if c in text]
    pattern = "|".join(re.escape(c) for c in sorted(here, key=len, reverse=True))
    return [p for p in (re.split(f"({pattern})", text) if here else [text]) if p]


def _spelled(text: str, controls: Mapping[str, int]) -> str:
    """A text as Lark, control tokens by number."""
    return " ".join(f"<[{controls[p]}]>" if p in controls else _literal(p) for p in _split(text, controls))


def _literal(text: str) -> str:
    """A string of Lark."""
    quoted = json.dumps(text, ensure_ascii=False)
    return re.sub("[\x7f-\xa0]", lambda m: f"\\u{ord(m[0]):04x}", quoted)


_BLANKS = re.compile(r"(?:\\[nrts]|\\x20|\\x0[9aAdD]|[ \n\r\t\[\]()*+?|]|\(\?:|\{\d{1,4}(?:,\d{0,4})?\})*")


def _whitespace(pattern: Any, field: str) -> str:
    """A pattern that matches nothing but JSON's whitespace; the usual one for None."""
    if pattern is None:
        return WHITESPACE
    if not isinstance(pattern, str) or len(pattern) > 200 or not _BLANKS.fullmatch(pattern):
        _refuse(field, "must be a pattern of spaces, \\n, \\r, \\t and \\s only, of at most 200 characters")
    # \s would be Unicode's whitespace, which JSON does not have.
    inside = re.sub(r"\[[^\]]*\]", lambda m: m[0].replace(r"\s", r" \n\r\t"), pattern)
    pattern = inside.replace(r"\s", r"[ \n\r\t]")
    try:
        empty = not pattern or not any(re.fullmatch(pattern, blank) for blank in (" ", "\n", "\t", "\r", "  ", "\n "))
    except re.error as error:
        _refuse(field, f"not a pattern: {str(error)[:100]}")
    return "" if empty else pattern


def _switch(switches: Mapping[str, Any], name: str) -> bool:
    value = switches.get(name)
    if not isinstance(value, bool | None):
        _refuse(f"structured_outputs.{name}", "must be true or false")
    return bool(value)


def _check_text(text: str, field: str, limits: Limits) -> None:
    if len(text) > limits.text:
        _refuse(field, f"{len(text)} characters, {limits.text} are possible")
    try:
        text.encode()
    except UnicodeEncodeError:
        _refuse(field, "holds half of a surrogate pair")


def _read_json(text: str, field: str, limits: Limits) -> Any:
    _check_text(text, field, limits)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        _refuse(field, f"not readable as JSON: {str(error)[:100]}")


def _refuse(field: str, what: str, remedy: str | None = None) -> NoReturn:
    raise RequestError(what, where=field, param=field, remedy=remedy)
