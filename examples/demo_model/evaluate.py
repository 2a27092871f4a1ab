"""The scores of a trained demo model on held-out prompts, and its model card.

`python examples/demo_model/evaluate.py fnengine/bundled --sampled --card`

Oracle: the corpus' own answers. A prompt is right when the greedy answer equals one of them (or, for stories,
contains what was asked for and ends by itself). All prompts come from the held-out part of the corpus, which training
never sees.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import card
import corpus
import network
import talk
import torch
from dialogues import Dialogue, Turn
from transformers import AutoModelForCausalLM, AutoTokenizer

SEED = 9000  # of the evaluation's own stream of candidates
LONG = ("story", "continue")
GREEDY = {"do_sample": False, "temperature": None, "top_p": None}


def prompts(each: int, seed: int = SEED) -> dict[str, list[Dialogue]]:
    """Up to `each` held-out dialogues of every skill, no question twice."""
    found: dict[str, list[Dialogue]] = {}
    seen: set[str] = set()
    stream = corpus.candidates(Random(seed))
    for _ in range(400_000):
        made = next(stream)
        if isinstance(made, Dialogue) and corpus.held_out(made.keys):
            ask = corpus.render(made.turns[:-1])
            some = found.setdefault(made.skill, [])
            if len(some) < each and ask not in seen and len(ask) < 2500:
                some.append(made)
                seen.add(ask)
        if len(found) > 30 and all(len(v) >= each for v in found.values()):
            break
    return dict(sorted(found.items()))


def usual() -> list[Dialogue]:
    """The usual wording of every question about itself, which is trained on."""
    return [
        Dialogue("usual questions", (Turn("user", forms[0]), Turn("assistant", answers[0])), answers, (), ())
        for forms, answers in talk.FAQ.values()
    ]


def one_digit() -> list[Dialogue]:
    """All sums of two digits, which are trained on."""
    sums = [(f"What is {x} + {y}?", f"{x} + {y} = {x + y}") for x in range(10) for y in range(10)]
    return [Dialogue("sums", (Turn("user", ask), Turn("assistant", said)), (said,), (), ()) for ask, said in sums]


def batches(items: list[Dialogue], size: int = 50) -> Iterator[list[Dialogue]]:
    """The dialogues in groups of similar length."""
    by_length = sorted(items, key=lambda d: len(corpus.render(d.turns[:-1])))
    for at in range(0, len(by_length), size):
        yield by_length[at : at + size]


def answer(model, tokenizer, dialogues: list[Dialogue], new_tokens: int, **how) -> list[tuple[str, bool]]:
    """For each dialogue the model's last turn, and whether it ended by itself."""
    text = [
        tokenizer.apply_chat_template(
            [{"role": t.role, "content": t.text} for t in d.turns[:-1]], tokenize=False, add_generation_prompt=True
        )
        for d in dialogues
    ]
    for d, rendered in zip(dialogues, text, strict=True):
        assert rendered == corpus.render(d.turns[:-1]) + f"{corpus.IM_START}assistant\n", (
            "the template and corpus.render differ"
        )
    ids = tokenizer(text, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    out = model.generate(input_ids=ids.input_ids, attention_mask=ids.attention_mask, max_new_tokens=new_tokens, **how)
    made = out[:, ids.input_ids.shape[1] :].tolist()
    ends = {2, 0}
    cut = [next((i for i, token in enumerate(row) if token in ends), None) for row in made]
    return [(tokenizer.decode(row[:end]), end is not None) for row, end in zip(made, cut, strict=True)]


def right(d: Dialogue, said: str, ended: bool) -> bool:
    """Whether an answer counts."""
    if d.mentions:
        return ended and all(m in said for m in d.mentions)
    return said in d.answers


def score(model, tokenizer, groups: dict[str, list[Dialogue]], show: int, **how) -> dict[str, tuple[int, int]]:
    """(right, asked) of every skill; prints `show` wrong answers of each."""
    result = {}
    for skill, items in groups.items():
        good, shown = 0, 0
        for group in batches(items):
            for d, (said, ended) in zip(
                group, answer(model, tokenizer, group, 320 if skill in LONG else 120, **how), strict=True
            ):
                ok = right(d, said, ended)
                good += ok
                if not ok and shown < show:
                    shown += 1
                    print(f"    {d.turns[-2].text!r}\n      said {said!r}\n      not  {d.answers[0]!r}")
        result[skill] = (good, len(items))
        print(f"{skill:28} {good}/{len(items)}", flush=True)
    return result


@torch.no_grad()
def perplexity(model, tokenizer, count: int) -> tuple[float, int]:
    """(perplexity per token, tokens) on held-out plain stories, each from its second token to its end token."""
    total, tokens = 0.0, 0
    stream = corpus.candidates(Random(SEED + 1))
    while count:
        made = next(stream)
        if (
            isinstance(made, corpus.Document)
            and made.keys
            and made.keys[0].startswith("story|")
            and corpus.held_out(made.keys)
        ):
            ids = tokenizer(made.text + corpus.END, return_tensors="pt").input_ids
            logits = model(ids).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            tokens += ids.shape[1] - 1
            count -= 1
    return math.exp(total / tokens), tokens


@torch.no_grad()
def same_as_transformers(folder: Path, tokenizer) -> float:
    """The largest difference between network.py's logits and transformers', both in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(corpus.plain_story(Random(1)).text, return_tensors="pt").input_ids
    params = {name: p for name, p in model.state_dict().items() if name != "lm_head.weight"}
    states = network.hidden(params, network.Shape(), ids, None, torch.float32)
    return float((states @ params["model.embed_tokens.weight"].T - model(ids).logits).abs().max())


def main() -> None:
    """Reads the command line, scores, and writes the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--each", type=int, default=100, help="held-out prompts of every skill")
    parser.add_argument("--show", type=int, default=0, help="wrong answers of every skill to print")
    parser.add_argument("--sampled", action="store_true", help="score the default sampling too")
    parser.add_argument("--card", action="store_true", help="write README.md into the folder")
    given = parser.parse_args()
    torch.set_num_threads(2)
    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    model = AutoModelForCausalLM.from_pretrained(given.folder).eval()
    difference = same_as_transformers(given.folder, tokenizer)
    print(f"largest difference of float32 logits, network.py to transformers: {difference:.1e}")
    assert difference < 1e-3
    groups = {
        **prompts(given.each),
        "usual questions (trained on)": usual(),
        "one-digit sums (trained on)": one_digit(),
    }
    greedy = score(model, tokenizer, groups, given.show, **GREEDY)
    sampled = None
    if given.sampled:
        torch.manual_seed(0)
        sampled = score(model, tokenizer, {k: v for k, v in groups.items() if k not in LONG}, 0)
    ppl = perplexity(model, tokenizer, 100)
    print(f"held-out stories: perplexity {ppl[0]:.3f} a token over {ppl[1]} tokens")
    print(f"scored in {(time.monotonic() - started) / 60:.1f} min")
    if given.card:
        talks = [(card.asked(d), answer(model, tokenizer, [d], 320, **GREEDY)[0][0]) for d in card.EXAMPLES]
        training = json.loads((given.folder / "training.json").read_text())
        (given.folder / "README.md").write_text(card.write(given.folder, training, greedy, sampled, ppl, talks))


if __name__ == "__main__":
    main()
