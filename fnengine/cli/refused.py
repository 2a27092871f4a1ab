"""Flags of vLLM without a meaning here yet: known by name, so that each is refused with a reason, never swallowed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fnengine.errors import ConfigError

_LATER = "leave it out; it is planned"
_GUIDES = ("auto", "guidance", "llguidance")
REFUSED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "--scheduling-policy": (
        "priorities are always honoured, and requests without one are served in order of arrival",
        "leave it out",
        ("priority",),
    ),
    "--async-scheduling": (
        "host and device overlap by themselves where the device is not the host's cores",
        "leave it out",
        (),
    ),
    "--tensor-parallel-size": ("one device computes each step", _LATER, ("1",)),
    "--pipeline-parallel-size": ("one device computes each step", _LATER, ("1",)),
    "--data-parallel-size": ("one engine runs in a process", "start several and balance in front", ("1",)),
    "--compilation-config": (
        "compilation has one policy",
        "--enforce-eager turns it off, --graph-mode says what is captured",
        (),
    ),
    "--optimization-level": ("compilation has one policy", "--enforce-eager turns it off", ()),
    "--cudagraph-capture-sizes": ("shapes have tokens and rows", "`fnengine tune` writes a file for --graphs", ()),
    "--max-seq-len-to-capture": ("graphs hold sequences of every length", "leave it out", ()),
    "--structured-outputs-config": (
        "grammars are followed by llguidance, always",
        "leave it out; whitespace is chosen by each request",
        tuple(f'{{"backend":{s}"{b}"}}' for b in _GUIDES for s in ("", " ")),
    ),
    "--guided-decoding-backend": ("grammars are followed by llguidance, always", "leave it out", _GUIDES),
    "--enable-lora": ("adapters are not served yet", _LATER, ()),
    "--lora-modules": ("adapters are not served yet", _LATER, ()),
    "--max-loras": ("adapters are not served yet", _LATER, ()),
    "--max-lora-rank": ("adapters are not served yet", _LATER, ()),
    "--logprobs-mode": ("log-probabilities are those of the raw logits", "leave it out", ("raw_logprobs",)),
    "--enable-prompt-tokens-details": ("cached tokens are always reported", "leave it out", ()),
    "--enable-per-request-metrics": ("that is chosen by each request", 'send "timing": true', ()),
    "--disable-log-stats": ("no statistics are logged; /metrics has them", "leave it out", ()),
    "--middleware": ("foreign middleware is not loaded", "put a proxy in front", ()),
    "--ssl-ca-certs": ("clients' certificates are not checked", "put a proxy in front", ()),
    "--otlp-traces-endpoint": ("no traces are exported yet", _LATER, ()),
    "--cpu-offload-gb": ("weights stay on one device", _LATER, ("0",)),
    "--tokenizer-mode": ("there is one kind of tokenizer", "leave it out", ("auto",)),
    "--hf-overrides": ("the config is used as it is", "edit config.json", ()),
    "--max-parallel-loading-workers": ("weights are read by one process", "leave it out", ()),
    "--limit-mm-per-prompt": ("there are no multimodal models yet", _LATER, ()),
    "--task": ("models generate text", "leave it out", ("auto", "generate")),
    "--runner": ("models generate text", "leave it out", ("auto", "generate")),
}
"""vLLM's flag -> (why it is not accepted, what to do, values that say what is done anyway and therefore pass)."""

SHORT = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-cc": "--compilation-config",
    "-O": "--optimization-level",
}


def refuse(argv: Sequence[str], known: Collection[str] = ()) -> list[str]:
    """The arguments without those of vLLM's flags whose value is what is done anyway.

    Flags in `known` may be spelt with underscores, as in vLLM.

    Raises:
        ConfigError: one of `REFUSED` with another value, naming it.
    """
    kept, rest = [], list(argv)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*kept, word, *rest]
        name, has_value, value = word.partition("=")
        name = SHORT.get(name, "--" + name[2:].replace("_", "-") if name.startswith("--") else name)
        if name not in REFUSED:
            kept.append(name + word[len(name) :] if name in known else word)
            continue
        why, remedy, harmless = REFUSED[name]
        if not has_value and harmless and rest and rest[0] in harmless:
            value = rest.pop(0)
        if value not in harmless or not value:
            raise ConfigError(f"is not implemented: {why}", where=word.partition("=")[0], remedy=remedy)
    return kept
