"""Flags as one table: names, meaning, and how a word becomes a value."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fnengine.serve.parsing.choose import read_reasoning_name, read_tool_name, reasoning_names, tool_names


@dataclass(frozen=True)
class Flag:
    """One flag: its names, where its value goes, and how it is read."""

    names: tuple[str, ...]
    to: str
    """`model.x`, `engine.x`, `serve.x`; `-` for one that is checked and then of no further use."""
    help: str
    group: str
    read: Callable[[str], Any] | None = None
    """Text -> value; None is a switch with a --no- form."""
    choices: tuple[str, ...] = ()
    metavar: str | None = None
    many: bool = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def dest(self) -> str:
        return self.name.lstrip("-").replace("-", "_")


_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {u.upper(): 1024**i for i, u in enumerate("kmgt", 1)}
_UNITS |= {f"{u.upper()}iB": 1024**i for i, u in enumerate("kmgt", 1)}
_UNITS |= {f"{u.upper()}B": 1000**i for i, u in enumerate("kmgt", 1)}
_NUMBER = re.compile(r"([0-9]+(?:\.[0-9]+)?)([a-zA-Z]*)")


def read_size(text: str) -> int:
    """A whole number: 4096, 32K (1024s), 32k (1000s), 8GiB, 8GB, 25.6k.

    Raises:
        ValueError: anything else, or not whole.
    """
    match = _NUMBER.fullmatch(text.strip())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no whole number; write 32768, 32K (1024s), 32k (1000s) or 8GiB")
    value = float(match[1]) * _UNITS[match[2]] if "." in match[1] else int(match[1]) * _UNITS[match[2]]
    if value != int(value):
        raise ValueError(f"{text!r} is {value}, not a whole number")
    return int(value)


def read_length(text: str) -> int | None:
    """A number of tokens, or None for `auto` and -1: the longest that fits."""
    return None if text in ("auto", "-1") else read_size(text)


def read_signed(text: str) -> int:
    """A whole number that may be -1, which means no limit."""
    return -1 if text == "-1" else read_size(text)


def read_block(text: str) -> int:
    """16, the only block size there is."""
    if text != "16":
        raise ValueError("blocks hold 16 tokens; only --block-size 16 is implemented")
    return 16


def read_threads(text: str) -> int:
    """A positive number of threads."""
    if (n := read_size(text)) < 1:
        raise ValueError(f"must be at least 1, got {text}")
    return n


QUANTIZATIONS = ("none", "int8", "int4", "int8-dynamic", "int4-dynamic", "fp8")
"""What `leaves.ROUNDED` knows, spelled out because flags are read before torch is imported."""


def read_quantization(text: str) -> str:
    """How weights are rounded when they are read."""
    if text not in QUANTIZATIONS:
        raise ValueError(
            f"{text!r} is not implemented: weights of any unquantized checkpoint are rounded as they are read, "
            f"and none are read in a quantized form; write {', '.join(QUANTIZATIONS[:-1])} or {QUANTIZATIONS[-1]}"
        )
    return text


def read_words(text: str) -> list[str]:
    """A JSON list of strings (vLLM's form), or one word as it stands."""
    if not text.startswith("["):
        return [text]
    words = json.loads(text)
    if not all(isinstance(w, str) for w in words):
        raise ValueError(f"{text!r} is no list of strings")
    return words


def read_names(text: str) -> list[str]:
    """Names with commas between them."""
    return [name.strip() for name in text.split(",")]


def read_object(text: str) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{text[:80]!r} is no JSON object")
    return value


def _flags() -> tuple[Flag, ...]:
    model, memory, steps, server, tls = "model", "memory", "scheduling", "server", "server security"
    return (
        Flag(
            ("--config",),
            "-",
            "YAML of flags and their values; what the command line says goes before",
            model,
            str,
            (),
            "FILE",
        ),
        Flag(("--tokenizer",), "model.tokenizer", "folder or name, if not the model's", model, str),
        Flag(("--served-model-name",), "model.served_model_name", "names clients may use", model, str, many=True),
        Flag(
            ("--dtype",),
            "model.dtype",
            "of weights and KV; auto is the checkpoint's own where the device is fast at it",
            model,
            str,
            ("auto", "bfloat16", "float16", "float32", "half", "float"),
        ),
        Flag(("--device",), "model.device", "auto is cuda where there is one", model, str, ("auto", "cpu", "cuda")),
        Flag(
            ("--load-format",),
            "model.load_format",
            "pt reads pickled .bin files, tensors alone; dummy draws random weights for a config.json",
            model,
            str,
            ("auto", "safetensors", "pt", "gguf", "dummy"),
        ),
        Flag(
            ("--model-impl",),
            "model.model_impl",
            "who computes the forward: native is a family of this engine, transformers the fallback, which runs "
            "transformers' own module; auto takes a family where one knows the architecture",
            model,
            str,
            ("auto", "native", "transformers"),
        ),
        Flag(
            ("--trust-remote-code",),
            "model.trust_remote_code",
            "run the Python files of a repository that define its model, by the fallback",
            model,
        ),
        Flag(
            ("--family",),
            "model.family",
            "module or .py file with families of your own, in FAMILY or FAMILIES",
            model,
            str,
            (),
            "MODULE",
            many=True,
        ),
        Flag(
            ("--quantization", "-q"),
            "model.quantization",
            "round weights to so many bits as they are read: half or a quarter of the memory and of its traffic; "
            "-dynamic rounds what they are multiplied by to 8 bits, too, and so does fp8 (GPUs only)",
            model,
            read_quantization,
            QUANTIZATIONS,
        ),
        Flag(("--revision",), "model.revision", "branch, tag or commit of the repository", model, str),
        Flag(("--download-dir",), "model.download_dir", "where downloads are kept", model, str, metavar="DIR"),
        Flag(("--chat-template",), "model.chat_template", "a jinja2 file, if not the model's", model, str, (), "FILE"),
        Flag(
            ("--chat-template-content-format",),
            "model.chat_template_content_format",
            "how contents of messages reach the template",
            model,
            str,
            ("auto", "string", "openai"),
        ),
        Flag(
            ("--generation-config",),
            "model.generation_config",
            "auto: the model's generation_config.json gives sampling defaults; vllm: it does not",
            model,
            str,
            ("auto", "vllm"),
        ),
        Flag(
            ("--override-generation-config",),
            "model.override_generation_config",
            'sampling defaults that go before the model\'s: {"temperature": 0.6}',
            model,
            read_object,
            metavar="JSON",
        ),
        Flag(("--max-model-len",), "engine.max_model_len", "longest sequence, or auto", memory, read_length, (), "N"),
        Flag(
            ("--gpu-memory-utilization",),
            "engine.gpu_memory_utilization",
            "share of the card's memory for everything",
            memory,
            float,
        ),
        Flag(
            ("--memory",),
            "engine.memory",
            "most that this process may hold, such as 8GiB (CPU); the KV pool is what `fnengine plan` leaves of it",
            memory,
            read_size,
            metavar="BYTES",
        ),
        Flag(
            ("--answer-memory",),
            "engine.answer_bytes",
            "most that one answer may take before it is sent; twice this for all, once more for unread streams",
            memory,
            read_size,
            metavar="BYTES",
        ),
        Flag(
            ("--kv-cache-memory-bytes",),
            "engine.kv_cache_memory_bytes",
            "size of the KV pool, such as 8GiB; overrides what is derived from memory",
            memory,
            read_size,
            metavar="BYTES",
        ),
        Flag(
            ("--kv-cache-dtype",),
            "engine.kv_cache_dtype",
            "int8 rounds KV to 8 bits, fp8 to 8-bit floats (GPUs): half of bfloat16's memory and traffic",
            memory,
            str,
            ("auto", "int8", "fp8"),
        ),
        Flag(
            ("--attention-backend",),
            "engine.attention_backend",
            "torch takes its varlen_attn (FlashAttention 3 or 4), whose bits depend on company; doctor says what fits",
            memory,
            str,
            ("auto", "cpu", "torch", "triton", "reference"),
        ),
        Flag(("--block-size",), "-", "tokens of a KV block: 16", memory, read_block, (), "16"),
        Flag(("--swap-space",), "engine.swap_space", "GiB of host memory for preempted KV", memory, float, (), "GiB"),
        Flag(
            ("--window-blocks",),
            "engine.window_blocks",
            "KV blocks of layers with a window, which let go of what they see no more; 0 keeps it whole",
            memory,
            int,
            (),
            "N",
        ),
        Flag(
            ("--kept-states",),
            "engine.kept_states",
            "states of recurrent layers kept of beginnings; by default as many as sequences in a step",
            memory,
            int,
            (),
            "N",
        ),
        Flag(
            ("--enable-prefix-caching",),
            "engine.enable_prefix_caching",
            "share KV of equal beginnings between requests",
            memory,
        ),
        Flag(
            ("--performance-mode",),
            "engine.performance_mode",
            "sets rows and tokens of a step together",
            steps,
            str,
            ("interactivity", "balanced", "throughput"),
        ),
        Flag(("--max-num-seqs",), "engine.max_num_seqs", "most sequences in a step", steps, read_size, (), "N"),
        Flag(
            ("--max-num-batched-tokens",),
            "engine.max_num_batched_tokens",
            "most new tokens in a step",
            steps,
            read_size,
            (),
            "N",
        ),
        Flag(
            ("--enable-chunked-prefill",),
            "engine.enable_chunked_prefill",
            "let a prompt be computed over several steps",
            steps,
        ),
        Flag(("--max-queue",), "engine.max_queue", "most waiting sequences; more are a 429", steps, read_size, (), "N"),
        Flag(
            ("--max-queue-tokens",),
            "engine.max_queue_tokens",
            "most prompt tokens of waiting sequences; more are a 429",
            steps,
            read_size,
            (),
            "N",
        ),
        Flag(
            ("--steer",),
            "engine.steer",
            "layers after which requests may add a vector, such as layers.3,layers.5",
            steps,
            read_names,
            (),
            "LAYERS",
            many=True,
        ),
        Flag(("--enforce-eager",), "engine.enforce_eager", "do not compile", steps),
        Flag(
            ("--graph-mode",),
            "engine.graph_mode",
            "steps that are captured in CUDA graphs: FULL all of them whole, PIECEWISE without attention, "
            "FULL_DECODE_ONLY and FULL_AND_PIECEWISE treat decode and mixed steps apart",
            steps,
            str.upper,
            ("NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"),
        ),
        Flag(
            ("--graphs",),
            "engine.graphs",
            "shapes to capture, as `fnengine tune` saves them",
            steps,
            str,
            (),
            "FILE",
        ),
        Flag(
            ("--graph-capture",),
            "engine.graph_capture",
            "eager captures all at the start, lazy each when it is met for the second time",
            steps,
            str,
            ("eager", "lazy"),
        ),
        Flag(
            ("--graph-twin",),
            "engine.graph_twin",
            "on CPU, run steps as CUDA graphs would, padded and one ahead: slower, for trying ladders",
            steps,
        ),
        Flag(
            ("--threads",),
            "threads",
            "threads of a step on CPU (default: physical cores this process may run on, within its CPU quota)",
            steps,
            read_threads,
            (),
            "N",
        ),
        Flag(("--pin-threads",), "engine.pin_threads", "keep each helper of a step on one core", steps),
        Flag(("--seed",), "engine.seed", "root of seeds for requests that bring none", steps, read_size, (), "N"),
        Flag(
            ("--max-logprobs",),
            "engine.max_logprobs",
            "most log-probabilities a request may ask for; -1 is the vocabulary",
            steps,
            read_signed,
            (),
            "N",
        ),
        Flag(("--host",), "serve.host", "address to listen on; 0.0.0.0 for all", server, str),
        Flag(("--port",), "serve.port", "0 picks a free one", server, int),
        Flag(("--uds",), "serve.uds", "Unix socket to listen on instead", server, str, (), "PATH"),
        Flag(("--root-path",), "serve.root_path", "prefix that a proxy strips", server, str),
        Flag(("--response-role",), "serve.response_role", "role of answers", server, str),
        Flag(("--stream-interval",), "serve.stream_interval", "tokens in a chunk", server, read_size, (), "N"),
        Flag(
            ("--tool-call-parser",),
            "serve.tool_call_parser",
            f"how tool calls are read: {', '.join(tool_names())}; auto: what the chat template has the marks of",
            server,
            read_tool_name,
            metavar="NAME",
        ),
        Flag(
            ("--reasoning-parser",),
            "serve.reasoning_parser",
            f"how reasoning is read: {', '.join(reasoning_names())}, tags:START,END",
            server,
            read_reasoning_name,
            metavar="NAME",
        ),
        Flag(
            ("--enable-auto-tool-choice",),
            "serve.enable_auto_tool_choice",
            "models may choose tools by themselves (they may unless --no- is said)",
            server,
        ),
        Flag(
            ("--logits-processors",),
            "serve.logits_processors",
            "functions of logits that requests may ask for by name, as module:function (docs/api.md, Choosing tokens)",
            server,
            str,
            metavar="NAME",
            many=True,
        ),
        Flag(
            ("--strategy",),
            "serve.strategy",
            "strategies that requests may ask for: beam, best_of, ... as docs/decoding.md has them, or module:function",
            server,
            str,
            metavar="NAME",
            many=True,
        ),
        Flag(
            ("--speculative-config",),
            "serve.speculative_config",
            'drafts for requests that say nothing: {"method": "ngram", "num_speculative_tokens": 4}; suffix; '
            'draft_model or eagle, with "model"; module:Class of your own',
            server,
            read_object,
            metavar="JSON",
        ),
        Flag(("--strict",), "serve.strict", "unknown fields of a request are a 400", server),
        Flag(
            ("--return-tokens-as-token-ids",),
            "serve.return_tokens_as_token_ids",
            "tokens of log-probabilities are named token_id:<n> in answers to requests that do not say",
            server,
        ),
        Flag(
            ("--enable-force-include-usage",),
            "serve.enable_force_include_usage",
            "every stream ends with usage",
            server,
        ),
        Flag(
            ("--metrics-compat",), "serve.metrics_compat", "metrics under vLLM's names as well", server, str, ("vllm",)
        ),
        Flag(("--metrics-open",), "serve.metrics_open", "/metrics needs no key", server),
        Flag(("--enable-log-requests",), "serve.enable_log_requests", "a line for each request", server),
        Flag(
            ("--access-log",),
            "serve.access_log",
            "a line of JSON for each request that was answered goes here, - is stderr; never a prompt or a key",
            server,
            str,
            (),
            "FILE",
        ),
        Flag(
            ("--profile-dir",),
            "serve.profile_dir",
            "lets /start_profile and /stop_profile leave torch's traces here",
            server,
            str,
            (),
            "DIR",
        ),
        Flag(
            ("--stuck-after",),
            "serve.stuck_after",
            "seconds without a step, while there is work, from which on /health/decode is a 503",
            server,
            float,
            (),
            "S",
        ),
        Flag(
            ("--request-timeout",),
            "serve.request_timeout",
            "seconds from a request to the end of its answer, where it names none in `timeout`; 0: no limit",
            server,
            float,
            (),
            "S",
        ),
        Flag(("--disable-log-requests",), "-", "as without --enable-log-requests", server),
        Flag(
            ("--uvicorn-log-level",),
            "serve.uvicorn_log_level",
            "of the HTTP server",
            server,
            str,
            ("critical", "error", "warning", "info", "debug", "trace"),
        ),
        Flag(
            ("--shutdown-timeout",),
            "serve.shutdown_timeout",
            "seconds that requests in progress get after a signal",
            server,
            float,
            (),
            "S",
        ),
        Flag(("--api-key",), "serve.api_key", "keys clients may use", tls, str, (), "KEY", many=True),
        Flag(("--allowed-origins",), "serve.allowed_origins", "for browsers (CORS)", tls, read_words, many=True),
        Flag(("--ssl-keyfile",), "serve.ssl_keyfile", "private key", tls, str, (), "FILE"),
        Flag(("--ssl-certfile",), "serve.ssl_certfile", "certificate chain", tls, str, (), "FILE"),
    )


FLAGS = _flags()


def add_flags(parser: argparse.ArgumentParser, *parts: str) -> None:
    """Adds the flags of the named parts (`model`, `engine`, `serve`), and single ones by their names, in their
    groups."""
    groups: dict[str, Any] = {}
    for f in FLAGS:
        part = f.to.split(".")[0]
        if f.name not in parts and (part if part in ("model", "serve") else "engine") not in parts:
            continue
        group = groups.get(f.group) or groups.setdefault(f.group, parser.add_argument_group(f.group))
        if f.read is None:
            group.add_argument(
                *f.names, dest=f.dest, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=f.help
            )
            continue
        group.add_argument(
            *f.names,
            dest=f.dest,
            type=_reading(f.read),
            choices=f.choices or None,
            metavar=f.metavar or ("{" + ",".join(f.choices) + "}" if f.choices else f.dest.split("_")[-1].upper()),
            nargs="+" if f.many else None,
            action="extend" if f.many else "store",
            default=argparse.SUPPRESS,
            help=f.help,
        )


def _reading(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """`read` with its own words in argparse's message."""
    if read in (int, float, str):
        return read

    def checked(text: str) -> Any:
        try:
            return read(text)
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e)) from None

    return checked
