"""Heads that read the target's activations (EAGLE-3, MTP), and the small models that are bundled to draft.

Oracles: the same layers written out in plain torch over whole sequences, decoding one by one, and measured acceptance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fnengine as fn
from fnengine.companions import check_pair
from fnengine.decoding import eagle, heads, mtp, trees
from fnengine.decoding.certificate import Remembered, equal_tokens, follows, small_model, values_hold
from fnengine.decoding.draft_model import DraftModel
from fnengine.decoding.heads import Head, Paired
from fnengine.decoding.speculate import Draft, Drawing, Seen, speculate
from fnengine.errors import CheckpointError, RequestError, SpecError
from fnengine.host.request import Sampling, Stop
from fnengine.sampling import prepared, sample
from fnengine.spec import Layer
from tests.models import tiny_model

V, D = 131, 64
GREEDY = Sampling(temperature=0, seed=1)
CONFIG = {
    "hidden_size": D,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "rope_theta": 5000.0,
    "taps": ["layers.0.residual", "embedding", "layers.1.residual"],
}


@cache
def runtime(name: str) -> fn.Runtime:
    return fn.Runtime(
        tiny_model(name), max_num_seqs=4, max_model_len=128, kv_cache_memory_bytes=1 << 20, enforce_eager=True
    )


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random tensors: norms about 1, matrices large enough to matter."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: 1 + 0.3 * torch.randn(s, generator=g)
        if len(s) == 1 and name.endswith("weight")
        else torch.randn(s, generator=g) * (0.3 if len(s) == 1 else 1.5 * s[1] ** -0.5)
        for name, s in shapes.items()
    }


def layer_shapes(at: str, kind: Layer, E: int) -> dict[str, tuple[int, ...]]:
    a, m = kind.mixer, kind.mlp
    rows = {"q": a.heads * a.width, "k": a.kv_heads * a.width, "v": a.kv_heads * a.width}
    shapes: dict[str, tuple[int, ...]] = {f"{at}self_attn.{x}_proj.weight": (n, E) for x, n in rows.items()}
    if a.qkv_bias:
        shapes |= {f"{at}self_attn.{x}_proj.bias": (n,) for x, n in rows.items()}
    if a.qk_norm:
        shapes |= {f"{at}self_attn.{x}_norm.weight": (a.width,) for x in "qk"}
    return shapes | {
        f"{at}self_attn.o_proj.weight": (D, rows["q"]),
        f"{at}input_layernorm.weight": (D,),
        f"{at}post_attention_layernorm.weight": (D,),
        f"{at}mlp.gate_proj.weight": (m.width, D),
        f"{at}mlp.up_proj.weight": (m.width, D),
        f"{at}mlp.down_proj.weight": (D, m.width),
    }


@dataclass(frozen=True)
class Case:
    """A head and its tensors, which the reference reads on its own."""

    head: Head
    tensors: dict[str, Tensor]
    form: str
    at: str


@cache
def case(form: str) -> Case:
    target = tiny_model("qwen2" if form == "mimo" else "qwen3")
    if form in ("eagle", "eagle-own-head"):
        kind = eagle._kind(CONFIG, "")
        shapes = layer_shapes("midlayer.", kind, 2 * D) | {
            "fc.weight": (D, 3 * D),
            "midlayer.hidden_norm.weight": (D,),
            "norm.weight": (D,),
        }
        if form == "eagle-own-head":
            shapes["lm_head.weight"] = (50, D)
        tensors = drawn(shapes)
        if form == "eagle-own-head":  # the even tokens from 20 on
            tensors["d2t"] = torch.arange(50) + 20
        return Case(eagle.read(CONFIG, tensors, target), tensors, form, "midlayer.")
    layout = {"mimo": mtp.MIMO, "deepseek": mtp.DEEPSEEK}[form]
    kind, at = target.spec.layers[-1], {"mimo": "model.mtp_layers.0.", "deepseek": "model.layers.2."}[form]
    shapes = layer_shapes(at, kind, D)
    if form == "mimo":
        shapes |= {f"{at}{x}.weight": (D,) for x in ("token_layernorm", "hidden_layernorm", "final_layernorm")}
        shapes[f"{at}input_proj.weight"] = (D, 2 * D)
    else:
        shapes |= {f"{at}{x}.weight": (D,) for x in ("enorm", "hnorm", "shared_head.norm")}
        shapes[f"{at}eh_proj.weight"] = (D, 2 * D)
    tensors = drawn(shapes)
    return Case(mtp.read(tensors, target, layout), tensors, form, at)


FORMS = ("eagle", "eagle-own-head", "mimo", "deepseek")


# ---------------------------------------------------------------- plain torch


def rms(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), w, eps)


def block(c: Case, x: Tensor, residual: Tensor) -> Tensor:
    """A decoder layer over all pairs [n, E], with its residual; the oracle of `Head._pass`."""
    t, at, kind = c.tensors, c.at, c.head.kind
    a, n = kind.mixer, len(x)

    def project(name: str, heads: int) -> Tensor:
        name = f"{at}self_attn.{name}_proj"
        return F.linear(x, t[f"{name}.weight"], t.get(f"{name}.bias")).view(n, heads, a.width).transpose(0, 1)

    def turned(y: Tensor) -> Tensor:
        frequency = a.rope.theta ** -(torch.arange(0, a.width, 2) / a.width)
        angle = torch.outer(torch.arange(n).float(), frequency).repeat(1, 2)
        left, right = y.chunk(2, -1)
        return y * angle.cos() + torch.cat((-right, left), -1) * angle.sin()

    q, k, v = project("q", a.heads), project("k", a.kv_heads), project("v", a.kv_heads)
    if a.qk_norm:
        q = rms(q, t[f"{at}self_attn.q_norm.weight"], kind.eps)
        k = rms(k, t[f"{at}self_attn.k_norm.weight"], kind.eps)
    group = a.heads // a.kv_heads
    k, v = turned(k).repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    o = F.scaled_dot_product_attention(turned(q), k, v, is_causal=True).transpose(0, 1).flatten(1)
    x = residual + F.linear(o, t[f"{at}self_attn.o_proj.weight"])
    y = rms(x, t[f"{at}post_attention_layernorm.weight"], kind.eps)
    inside = F.silu(F.linear(y, t[f"{at}mlp.gate_proj.weight"])) * F.linear(y, t[f"{at}mlp.up_proj.weight"])
    return x + F.linear(inside, t[f"{at}mlp.down_proj.weight"])


def outputs(c: Case, token: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden state for the pair after each, logits [n, V]) of pairs: tokens, and hidden states before them."""
    t, at, eps = c.tensors, c.at, c.head.kind.eps
    plain = tiny_weights("qwen2" if c.form == "mimo" else "qwen3")
    e, head = plain[token], plain
    if c.form.startswith("eagle"):
        both = rms(e, t[f"{at}input_layernorm.weight"], eps), rms(hidden, t[f"{at}hidden_norm.weight"], eps)
        x = block(c, torch.cat(both, -1), hidden)
        y = rms(x, t["norm.weight"], eps)
        if "d2t" in t:
            small = F.linear(y, t["lm_head.weight"])
            return x, torch.full((len(x), V), -torch.inf).index_copy(1, torch.arange(50) + t["d2t"], small)
        return x, F.linear(y, head)
    names = ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm")
    if c.form == "deepseek":
        names = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
    token_norm, hidden_norm, project, norm = (t[f"{at}{name}.weight"] for name in names)
    e, h = rms(e, token_norm, eps), rms(hidden, hidden_norm, eps)
    x = F.linear(torch.cat((h, e) if c.form == "mimo" else (e, h), -1), project)
    x = block(c, rms(x, t[f"{at}input_layernorm.weight"], eps), x)
    y = rms(x, norm, eps)
    return y, F.linear(y, head)


@cache
def tiny_weights(name: str) -> Tensor:
    """[V, D] the embedding, which is the head, too."""
    from tests.models import upstream

    return upstream(name).get_input_embeddings().weight.detach()


def first_hidden(c: Case, seen: Seen) -> Tensor:
    if c.form.startswith("eagle"):
        return F.linear(torch.cat([seen[name] for name in CONFIG["taps"]], -1), c.tensors["fc.weight"])
    return seen["final"]


def expected_draft(c: Case, tokens: list[int], seen: Seen, k: int) -> tuple[list[int], list[Tensor]]:
    """(greedy draft, logits of each of its tokens), everything recomputed from the start for each token."""
    hidden, token, said, rows = first_hidden(c, seen), torch.tensor(tokens[1:]), [], []
    for _ in range(k):
        after, logits = outputs(c, token, hidden)
        rows.append(logits[-1])
        said.append(int(logits[-1].argmax()))
        hidden, token = torch.cat((hidden, after[-1:])), torch.cat((token, torch.tensor(said[-1:])))
    return said, rows


def some_text(n: int, taps: tuple[str, ...], seed: int = 3) -> tuple[list[int], dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (n,), generator=g).tolist()
    return tokens, {name: torch.randn(n - 1, D, generator=g) for name in taps}


def part(seen: Mapping[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    return {name: x[begin:end] for name, x in seen.items()}


@pytest.mark.parametrize("form", FORMS)
def test_drafts_are_those_of_the_form_written_out(form: str):
    """A prompt, then tokens one, two and three at a time, with drafts between them that come to nothing."""
    c, k = case(form), 5
    tokens, seen = some_text(90, c.head.taps)
    at = 15
    state = c.head.start(tokens[:at], Drawing(GREEDY, at), part(seen, 0, at - 1))
    for n in (1, 2, 3, 1, 60):
        draft = c.head.propose(state, k)
        want, rows = expected_draft(c, tokens[:at], part(seen, 0, at - 1), k)
        assert draft.tokens == tuple(want)
        torch.testing.assert_close(draft.state.outcome[1][0], rows[0], atol=2e-4, rtol=1e-4)
        state = c.head.advance(draft.state, tokens[at : at + n], part(seen, at - 1, at + n - 1))
        at += n
    assert c.head.propose(state, k).tokens == tuple(expected_draft(c, tokens[:at], part(seen, 0, at - 1), k)[0])


@pytest.mark.parametrize("form", ["eagle", "mimo"])
def test_claims_are_what_tokens_are_drawn_from(form: str):
    c, s = case(form), Sampling(temperature=0.7, seed=9, frequency_penalty=0.3)
    head = replace(c.head, claims=True)
    tokens, seen = some_text(12, head.taps)
    draft = head.propose(head.start(tokens, Drawing(s, 12), seen), 1)
    _, rows = expected_draft(c, tokens, seen, 1)
    assert draft.claims is not None  # all tokens are the prompt, so the penalty counts none
    torch.testing.assert_close(draft.claims[0], (rows[0].double() / 0.7).softmax(-1), atol=1e-5, rtol=1e-3)
    assert draft.tokens[0] == sample(rows[0], position=12, seed=9, temperature=0.7)


@pytest.mark.parametrize("form", ["eagle", "deepseek"])
def test_work_that_waits_is_bounded_and_changes_nothing(form: str, monkeypatch: pytest.MonkeyPatch):
    c = case(form)
    tokens, seen = some_text(60, c.head.taps)

    def drafted() -> tuple[Paired, tuple[int, ...]]:
        state = c.head.start(tokens[:5], Drawing(GREEDY, 5), part(seen, 0, 4))
        for i in range(5, 60):
            state = c.head.advance(state, tokens[i : i + 1], part(seen, i - 1, i))
        return state, c.head.propose(state, 3).tokens

    idle, want = drafted()
    assert idle.known == 0
    monkeypatch.setattr(heads, "MOST_WAITING", 8)
    busy, said = drafted()
    assert busy.known >= 48 and said == want


# ---------------------------------------------------------------- with a target


@dataclass(frozen=True)
class Blind:
    """Mutant: a head that is given what the target computed of other tokens."""

    head: Head

    @property
    def taps(self) -> tuple[str, ...]:
        return self.head.taps

    def start(self, tokens: Any, how: Drawing, seen: Seen) -> Any:
        return self.head.start(tokens, how, {name: x.flip(0) for name, x in seen.items()})

    def propose(self, state: Any, k: int) -> Any:
        return self.head.propose(state, k)

    def advance(self, state: Any, tokens: Any, seen: Seen) -> Any:
        return self.head.advance(state, tokens, {name: x.flip(1) for name, x in seen.items()})


@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_those_of_decoding_one_by_one(form: str):
    c = case(form)
    rt = runtime("qwen2" if form == "mimo" else "qwen3")
    samplings = [GREEDY, Sampling(temperature=1.0, seed=4), Sampling(temperature=0.8, repetition_penalty=1.3, seed=2)]
    prompts = [[5, 9, 14, 3, 77, 5, 9], [60]]
    finding, _ = equal_tokens(rt, c.head, prompts, samplings, k=3, n=14)
    assert finding.passed, finding.said
    rt.check()


@pytest.mark.parametrize("form", FORMS)
def test_states_are_values(form: str):
    rt = runtime("qwen2" if form == "mimo" else "qwen3")
    prompts = [[5, 9, 14, 3, 77, 5, 9], [4, 4, 4, 8]]
    finding = values_hold(case(form).head, prompts, Sampling(seed=5), k=3, target=rt)
    assert finding.passed, finding.said


def crossed(head: Head) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(a draft after the state went on two ways and both were asked, the draft of the same text by itself)."""
    tokens, seen = some_text(30, head.taps)

    def on(state: Any, begin: int, end: int, line: list[int]) -> Any:
        return head.propose(head.advance(state, line[begin:end], part(seen, begin - 1, end - 1)), 3).state

    other = [*tokens[:20], *reversed(tokens[20:])]
    fork = on(head.start(tokens[:10], Drawing(GREEDY, 10), part(seen, 0, 9)), 10, 20, tokens)
    one = on(fork, 20, 24, tokens)
    on(fork, 20, 28, other)
    fresh = head.start(tokens[:25], Drawing(GREEDY, 10), part(seen, 0, 24))
    state = head.advance(one, tokens[24:25], part(seen, 23, 24))
    return head.propose(state, 4).tokens, head.propose(fresh, 4).tokens


def test_two_lines_of_growth_do_not_write_over_each_other(monkeypatch: pytest.MonkeyPatch):
    """Mutant: KV is never copied."""
    for form in FORMS:
        got, want = crossed(case(form).head)
        assert got == want
    monkeypatch.setattr(heads.Line, "room", lambda self, kind, at, n: self)
    assert any(got != want for got, want in (crossed(case(form).head) for form in FORMS))


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_what_is_seen_is_what_was_computed_of_the_tokens_that_stay(tree: bool):
    """Oracle: one extend of the whole text. Of a tree, the right way is neither the first nor the last."""
    rt, head, told = runtime("qwen3"), case("eagle").head, []

    @dataclass(frozen=True)
    class Told:
        taps = ("layers.0.residual",)

        def start(self, tokens: Any, how: Drawing, seen: Seen) -> list[int]:
            told.append((0, seen["layers.0.residual"]))
            return list(tokens)

        def propose(self, state: list[int], k: int) -> Draft | list[int]:
            at = len(state) - 7
            right = [*want[at : at + 2], (want[at + 2] + 1) % V][:k]  # two are right, the third is not
            if not tree:
                return right
            tokens, parents = trees.merged([[(right[0] + 1) % V, *right[1:]], right, [right[0], 0][: len(right)]])
            return Draft(tokens, parents=parents)

        def advance(self, state: list[int], tokens: Any, seen: Seen) -> list[int]:
            assert len(tokens) == len(seen["layers.0.residual"])
            told.append((len(state) - 1, seen["layers.0.residual"]))
            return [*state, *tokens]

    assert head.taps
    prompt, s = [5, 9, 14, 3, 77, 5, 9], Sampling(temperature=0.9, seed=3)
    stop = Stop(max_tokens=16, ignore_eos=True)
    want = list(speculate(rt, prompt, head, k=0, sampling=s, stop=Stop(max_tokens=24, ignore_eos=True)).tokens)
    got = speculate(rt, prompt, Told(), k=3, sampling=s, stop=stop, adapt=False)
    assert list(got.tokens) == want[:16] and got.tally.accepted == 10
    whole = rt.extend(rt.empty, [*prompt, *want], logits=None, taps=Told.taps)[-1]["layers.0.residual"]
    at = 0
    for begin, x in told:
        assert begin == at
        torch.testing.assert_close(x, whole[begin : begin + len(x)], atol=1e-5, rtol=1e-5)
        at += len(x)
    assert at == len(prompt) + 15


def test_rejection_follows_the_distribution_with_a_head_that_claims():
    """Chi-square, false alarm 1e-6."""
    head = replace(case("eagle").head, claims=True)
    target = Remembered(runtime("qwen3"), head.taps)
    prompt, s = small_model(target, [5], 1, length=8)
    finding = follows(target, head, "rejection", prompt, replace(s, temperature=1.5), k=2, draws=250, alpha=1e-6)
    assert finding.passed, finding.said


# ---------------------------------------------------------------- what is bundled

HELD_OUT = (
    "Once upon a time, a curious turtle named Luca lived in a hou",
    "Ruth was a kind elephant who lived in a house by the garden.",
    "There once was a clever pig called Jack, who lived in a hous",
    "<|im_start|>system\nSpeak in capital letters.<|im_end|>\n<|im_start|>user\nHow can I start the server?<|im_end|>\n"
    "<|im_start|>assistant\n",
)
"""The first of `examples/demo_model/acceptance.py`: none of them was trained on."""


@cache
def demo() -> fn.Runtime:
    return fn.Runtime(fn.load("demo"), max_num_seqs=2, max_model_len=256, kv_cache_memory_bytes=1 << 22)


def bundled(name: str) -> Any:
    if name == "demo-eagle":
        return eagle.load(name, demo().model)
    draft = fn.load(name)
    check_pair(demo().model, draft)
    return DraftModel(fn.Runtime(draft, max_num_seqs=2, max_model_len=256, kv_cache_memory_bytes=1 << 22))


def accepted(proposer: Any) -> float:
    """The share of draft tokens that are accepted, of those whose forerunners were. The tokens are those of decoding
    one by one, or this fails."""
    prompts = [demo().model.encode(text) for text in HELD_OUT]
    samplings = [GREEDY, Sampling(temperature=1.0, seed=1)]
    finding, tally = equal_tokens(demo(), proposer, prompts, samplings, k=3, n=32)
    assert finding.passed, finding.said
    return sum(tally.taken) / sum(tally.tried)


@pytest.mark.parametrize(("name", "least"), [("demo-draft", 0.55), ("demo-eagle", 0.55)])
def test_what_is_bundled_drafts_well(name: str, least: float):
    """0.656 and 0.665 were measured. Texts go on after the model would have ended them, which costs acceptance."""
    assert accepted(bundled(name)) > least


def test_the_activations_matter():
    """Mutant: those of other tokens, and other channels. 0.03 was measured, and the tokens are the same."""
    head = bundled("demo-eagle")
    assert accepted(Blind(head)) < 0.5 * accepted(head)


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 0.0},
        {"seed": 2**64 - 3},
        {"top_k": 5, "top_p": 0.8, "min_p": 0.01},
        {"typical_p": 0.7},
        {"logit_bias": ((3, 4.0), (7, -2.0))},
        {"allowed_token_ids": (1, 2, 30)},
    ],
    ids=str,
)
def test_a_prepared_draw_is_sample(parameters: dict[str, Any]):
    s = Sampling(**{"seed": 5, **parameters})
    draw, how = prepared(s, 40, torch.device("cpu")), Drawing(s, 0)
    for position in range(0, 40, 3):
        logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(position)) * 2
        want = sample(logits, position=[position, position + 1, position + 2], **how.parameters(None))
        assert draw(logits, position) == want and draw(logits[:1], position) == want[:1]
        assert draw(logits[[2, 0, 2]], [position + 2, position, position + 2]) == [want[2], want[0], want[2]]


def test_a_prepared_draw_refuses_what_looks_back():
    with pytest.raises(RequestError, match="need the sequence"):
        prepared(Sampling(frequency_penalty=0.5, seed=1), 40, torch.device("cpu"))


# ---------------------------------------------------------------- weights that do not fit


def test_weights_that_do_not_fit_are_named():
    c, target = case("mimo"), tiny_model("qwen2")
    name = "model.mtp_layers.0.self_attn.k_proj.bias"
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        mtp.read({n: t for n, t in c.tensors.items() if n != name}, target)
    with pytest.raises(CheckpointError, match="input_proj"):
        mtp.read({**c.tensors, "model.mtp_layers.0.input_proj.weight": torch.zeros(D, D)}, target)
    with pytest.raises(CheckpointError, match=r"model\.mtp_layers\.1\."):
        mtp.read(c.tensors, target, number=1)
    e = case("eagle")
    with pytest.raises(SpecError, match="rope_scaling"):
        eagle.read({**CONFIG, "rope_scaling": {"factor": 2}}, e.tensors, tiny_model("qwen3"))
    with pytest.raises(SpecError, match="intermediate_size is missing"):
        eagle.read({n: v for n, v in CONFIG.items() if n != "intermediate_size"}, e.tensors, tiny_model("qwen3"))
    with pytest.raises(CheckpointError, match="belongs to another model"):
        eagle.load("demo-eagle", tiny_model("qwen3"))
