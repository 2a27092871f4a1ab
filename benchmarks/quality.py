"""What rounding costs in quality: whole weights beside each kind of rounding, on text that nobody was trained on.

    python -m benchmarks.quality [--model demo] [--kinds none,int8,...] [--stories 100] [--prompts 32] [--json FILE]

A kind is how weights are rounded, and with `+kv8` behind it KV has 8 bits, too: `none+kv8` rounds KV alone.

- *Perplexity* a token, over held-out stories of the corpus that made the bundled model (`examples/demo_model`), each
  from its second token to its end token.
- *Answers*: held-out questions of the same corpus (no stories), answered greedily; right as `evaluate.py` says.
- *Greedy agreement*: the share of the 64 tokens after each prompt that equal those of whole weights, and, because one
  differing token changes all that follow, how often the next token is the same after the same tokens.
- *Logit error*: the norm of the difference from whole weights' logits over their norm, on random weights in the shape
  of Qwen3-0.6B (`--layers` of them) and on the bundled model.

No network is needed. Figures do not depend on the machine beyond its arithmetic.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import torch

import fnengine as fn
from benchmarks import machine
from fnengine import leaves, tree
from fnengine.runtime import Runtime

ROOT = Path(__file__).parent.parent
SEED = 9001  # the stream of evaluate.py's perplexity
NEW = 64


def corpus() -> Any:
    """The corpus of the bundled model, whose modules are scripts beside one another."""
    folder = str(ROOT / "examples" / "demo_model")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import corpus

    return corpus


def held_out_stories(count: int) -> list[str]:
    """Plain stories that training never saw, with their end token's text."""
    source, found = corpus(), []
    stream = source.candidates(Random(SEED))
    while len(found) < count:
        made = next(stream)
        told = isinstance(made, source.Document) and made.keys and made.keys[0].startswith("story|")
        if told and source.held_out(made.keys):
            found.append(made.text + source.END)
    return found


def held_out_questions(count: int) -> list[tuple[str, tuple[str, ...]]]:
    """(rendered prompt, right answers) of dialogues that training never saw, at most one in twelve of a skill."""
    source, found = corpus(), {}
    skills: dict[str, int] = {}
    stream = source.candidates(Random(SEED + 1))
    while len(found) < count:
        made = next(stream)
        if not isinstance(made, source.Dialogue) or made.mentions or not source.held_out(made.keys):
            continue
        ask = source.render(made.turns[:-1]) + f"{source.IM_START}assistant\n"
        if len(ask) < 2000 and ask not in found and skills.get(made.skill, 0) < max(1, count // 12):
            skills[made.skill] = skills.get(made.skill, 0) + 1
            found[ask] = made.answers
    return list(found.items())


def load(name: str, kind: str, **options: Any) -> tuple[fn.Model, Runtime]:
    """A model and its runtime, rounded as a kind says."""
    weights, _, kv = kind.partition("+")
    assert kv in ("", "kv8"), kind
    model = fn.load(name, quantization=weights, **options)
    return model, Runtime(model, kv_cache_dtype="int8" if kv else "auto")


def all_logits(rt: Runtime, prompts: list[list[int]]) -> list[torch.Tensor]:
    """[n, V] for each prompt."""
    out = []
    for ids in prompts:
        seq, logits = rt.extend(rt.empty, ids, logits="all")
        out.append(logits)
        seq.close()
    return out


def greedy(rt: Runtime, prompts: list[list[int]], new: int, ends: frozenset[int] = frozenset()) -> list[list[int]]:
    """Tokens after each prompt, up to `new` or the first of `ends`."""
    out = []
    for ids in prompts:
        seq, logits = rt.extend(rt.empty, ids)
        tokens: list[int] = []
        while len(tokens) < new and (token := int(logits.argmax())) not in ends:
            tokens.append(token)
            seq, logits = rt.extend(seq, [token])
        out.append(tokens)
        seq.close()
    return out


def perplexity(logits: list[torch.Tensor], prompts: list[list[int]]) -> float:
    """exp of the mean negative log-probability of every token but the first."""
    total, count = 0.0, 0
    for rows, ids in zip(logits, prompts, strict=True):
        total += float(torch.nn.functional.cross_entropy(rows[:-1], torch.tensor(ids[1:]), reduction="sum"))
        count += len(ids) - 1
    return math.exp(total / count)


def relative_error(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Norm of the difference over the norm, over all prompts."""
    difference = sum(float((a - b).square().sum()) for a, b in zip(got, want, strict=True))
    return math.sqrt(difference / sum(float(b.square().sum()) for b in want))


def share(got: list[list[int]], want: list[list[int]]) -> float:
    """Share of places with the same token."""
    pairs = [a == b for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(pairs) / len(pairs)


def weight_bytes(model: fn.Model) -> int:
    """Bytes of a model's weights as they are held."""
    held = tree.items(model.params, stop=leaves.KINDS)
    return sum(leaves.weight_bytes(x) if isinstance(x, leaves.KINDS) else x.nbytes for _, x in held)


def on_text(name: str, kinds: list[str], stories: int, questions: int, prompts: int) -> dict[str, dict[str, float]]:
    """Figures of a trained model with weights of each kind; the first kind is what the others are compared with."""
    out: dict[str, dict[str, float]] = {}
    asked = held_out_questions(questions)
    base: dict[str, Any] = {}
    for kind in kinds:
        model, rt = load(name, kind)
        texts = [model.encode(text) for text in held_out_stories(stories)]
        begun = [ids[:24] for ids in texts[:prompts]]
        logits = all_logits(rt, texts)
        tokens = greedy(rt, begun, NEW)
        said = greedy(rt, [model.encode(ask) for ask, _ in asked], 120, frozenset(model.spec.eos) | {0, 2})
        right = [model.decode(s) in answers for s, (_, answers) in zip(said, asked, strict=True)]
        base = base or {"logits": logits, "tokens": tokens}
        same = [a.argmax(1) == b.argmax(1) for a, b in zip(logits, base["logits"], strict=True)]
        out[kind] = {
            "weight bytes": weight_bytes(model),
            "perplexity": perplexity(logits, texts),
            "tokens scored": sum(len(ids) - 1 for ids in texts),
            "answers right": sum(right) / len(right),
            "greedy agreement": share(tokens, base["tokens"]),
            "same next token": float(torch.cat(same).float().mean()),
            "logit error": relative_error(logits, base["logits"]),
        }
    return out


def on_random(kinds: list[str], layers: int) -> dict[str, dict[str, float]]:
    """Relative logit error with random weights in the shape of Qwen3-0.6B cut to `layers`, and a smaller vocabulary."""
    config = json.loads((ROOT / "benchmarks" / "configs" / "qwen3-0.6b" / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "vocab_size": 8192, "max_window_layers": layers}
    config.pop("layer_types", None)
    out: dict[str, dict[str, float]] = {}
    base: list[torch.Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        ids = torch.randint(0, 8192, (4, 64), generator=torch.Generator().manual_seed(0)).tolist()
        for kind in kinds:
            model, rt = load(folder, kind, load_format="dummy")
            logits = all_logits(rt, ids)
            base = base or logits
            out[kind] = {"weight bytes": weight_bytes(model), "logit error": relative_error(logits, base)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--kinds", default=",".join(("none", *leaves.QUANTIZED)))
    parser.add_argument("--stories", type=int, default=100)
    parser.add_argument("--questions", type=int, default=120)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    kinds = given.kinds.split(",")
    began = time.monotonic()
    text = on_text(given.model, kinds, given.stories, given.questions, given.prompts)
    random = on_random(kinds, given.layers)
    names = list(text[kinds[0]])
    print(f"| {given.model} |", " | ".join(kinds), "|")
    print("| --- |" + " --- |" * len(kinds))
    for name in names:
        print(f"| {name} |", " | ".join(f"{text[k][name]:.6g}" for k in kinds), "|")
    for name in random[kinds[0]]:
        print(f"| random, {given.layers} layers: {name} |", " | ".join(f"{random[k][name]:.6g}" for k in kinds), "|")
    print(f"{time.monotonic() - began:.0f} s")
    if given.json:
        facts = machine.facts(torch.get_num_threads())
        Path(given.json).write_text(json.dumps({"facts": facts, "text": text, "random": random}, indent=1))


if __name__ == "__main__":
    main()
