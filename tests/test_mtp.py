"""Layers that checkpoints ship to predict further tokens, from a folder to drafts in an engine.

Oracles: transformers' own class for such a layer over its own model, on random weights that are saved under the names
that the families publish; Qwen2 for MiMo, which transformers has no class for; decoding without drafts.
"""

from __future__ import annotations

import copy
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fnengine as fn
from fnengine import checkpoint, cli
from fnengine.cli import drafts
from fnengine.config import resolve
from fnengine.decoding import mtp
from fnengine.decoding.certificate import equal_tokens
from fnengine.decoding.speculate import Drawing
from fnengine.errors import CheckpointError, ConfigError
from fnengine.host.request import Sampling
from tests.models import threads, tiny_folder, tiny_model, upstream
from tests.test_families import tokens

GREEDY = Sampling(temperature=0, seed=1)
AT = "model.layers.2."
QWEN = ("qwen3-next", "qwen3-5", "qwen3-5-moe")
"""Whose layer follows layers with states."""


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@cache
def further(name: str) -> Any:
    """transformers' layer over its tiny model, with random weights."""
    from transformers.modeling_layers import MtpLayer

    base = upstream(name).model
    config = copy.deepcopy(upstream(name).config)
    config.first_k_dense_replace = 0  # it has experts, whatever its number is
    if name in QWEN:
        config.layer_types = ["full_attention"]
    torch.manual_seed(77)
    layer: Any = MtpLayer(config, type(base.layers[-1]), type(base.norm), 0).eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(1 + 0.3 * torch.randn_like(p) if p.dim() == 1 else 0.2 * torch.randn_like(p))
        if name not in QWEN:
            layer.mtp_block.mlp.gate.e_score_correction_bias.copy_(0.2 * torch.randn(8))
    return layer


def published(layer: Any) -> dict[str, Tensor]:
    """The layer's tensors under the names that checkpoints give them, with copies of what is the model's."""
    if "Qwen" in type(layer.mtp_block).__name__:
        return published_by_qwen(layer)
    held = {}
    for name, x in layer.state_dict().items():
        name = name.removeprefix("mtp_block.").replace("post_norm.", "shared_head.norm.")
        if name == "mlp.experts.gate_up_proj":
            for e, (gate, up) in enumerate(y.chunk(2) for y in x):
                held[f"{AT}mlp.experts.{e}.gate_proj.weight"], held[f"{AT}mlp.experts.{e}.up_proj.weight"] = gate, up
        elif name == "mlp.experts.down_proj":
            held |= {f"{AT}mlp.experts.{e}.down_proj.weight": y for e, y in enumerate(x)}
        else:
            held[AT + name] = x
    copies = {f"{AT}embed_tokens.weight": torch.zeros(131, 64), f"{AT}shared_head.head.weight": torch.zeros(131, 64)}
    return {name: x.clone().contiguous() for name, x in {**held, **copies}.items()}


def published_by_qwen(layer: Any) -> dict[str, Tensor]:
    """The same of Qwen3-Next and Qwen3.5, which name what stands around the layer once for all of them."""
    around = {"enorm": "pre_fc_norm_embedding", "hnorm": "pre_fc_norm_hidden", "eh_proj": "fc", "post_norm": "norm"}
    held = {}
    for name, x in layer.state_dict().items():
        first, _, rest = name.partition(".")
        at = f"mtp.{around[first]}.{rest}" if first in around else f"mtp.layers.0.{rest}"
        if rest == "mlp.experts.gate_up_proj":
            for e, (gate, up) in enumerate(y.chunk(2) for y in x):
                held |= {at.replace("gate_up_proj", f"{e}.gate_proj.weight"): gate}
                held |= {at.replace("gate_up_proj", f"{e}.up_proj.weight"): up}
        elif rest == "mlp.experts.down_proj":
            held |= {at.replace("down_proj", f"{e}.down_proj.weight"): y for e, y in enumerate(x)}
        else:
            held[at] = x
    return {name: x.clone().contiguous() for name, x in held.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in ("deepseek-v3", "glm4-moe", *QWEN):
        folder = tmp_path_factory.mktemp(name) / "m"
        shutil.copytree(tiny_folder(name), folder)
        held = load_file(folder / "model.safetensors")
        save_file({**held, **published(further(name))}, folder / "model.safetensors")
        found[name] = folder
    return found


def expected(name: str, ids: list[int], k: int) -> list[int]:
    """A greedy draft after a text, everything computed anew for each token."""
    up, layer = upstream(name), further(name)
    said: list[int] = []
    with torch.no_grad():
        hidden, token = up.model(torch.tensor([ids])).last_hidden_state[:, :-1], torch.tensor([ids[1:]])
        for _ in range(k):
            position = torch.arange(1, token.shape[1] + 1)[None]
            embeds = up.model.embed_tokens(token)
            mask = torch.full((token.shape[1],) * 2, float("-inf")).triu(1)[None, None]
            turned = up.model.rotary_emb(embeds, position)
            y = layer(embeds, hidden, turned, mask, position, None)
            said.append(int(up.lm_head(y[0, -1]).argmax()))
            hidden, token = torch.cat([hidden, y[:, -1:]], 1), torch.cat([token, torch.tensor([said[-1:]])], 1)
    return said


@pytest.mark.parametrize("name", ["deepseek-v3", "glm4-moe", *QWEN])
def test_a_checkpoint_drafts_with_its_own_layer(folders: dict[str, Path], name: str):
    """Oracle: transformers' layer, from transformers' hidden states; for the model, its tree without that layer."""
    model = fn.load(folders[name], dtype="float32", device="cpu")
    assert len(model.params["layers"]) == upstream(name).config.num_hidden_layers
    head = mtp.load(model)
    ids = tokens(40, seed=4)
    with torch.no_grad():
        hidden = upstream(name).model(torch.tensor([ids])).last_hidden_state[0]
    at = 25
    state = head.start(ids[:at], Drawing(GREEDY, at), {"final": hidden[: at - 1]})
    for n in (1, 3, 11):
        draft = head.propose(state, 3)
        assert draft.tokens == tuple(expected(name, ids[:at], 3))
        state = head.advance(draft.state, ids[at : at + n], {"final": hidden[at - 1 : at + n - 1]})
        at += n


def test_tokens_are_those_of_decoding_one_by_one(folders: dict[str, Path]):
    model = fn.load(folders["deepseek-v3"], dtype="float32", device="cpu")
    rt = fn.Runtime(model, max_num_seqs=4, max_model_len=128, kv_cache_memory_bytes=1 << 20, enforce_eager=True)
    samplings = [GREEDY, Sampling(temperature=1.0, seed=4)]
    finding, _ = equal_tokens(rt, mtp.load(model), [[5, 9, 14, 3, 77, 5, 9], [60]], samplings, k=2, n=14)
    assert finding.passed, finding.said


def options(folder: Path, *more: str) -> Any:
    config = json.dumps({"method": "mtp", "num_speculative_tokens": 2, "adapt": False})
    sizes = ("--dtype", "float32", "--max-model-len", "96", "--max-num-seqs", "4", "--enforce-eager")
    words = ["serve", str(folder), *sizes, "--speculative-config", config, *more]
    return resolve(cli.parser().parse_args(words))


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3-next", "qwen3-5"])
def test_a_server_drafts_with_the_layer(folders: dict[str, Path], name: str):
    """Oracle: the functional loop without drafts."""
    from fnengine.engine import Engine
    from tests.text_models import byte_tokenizer

    folder = folders[name]
    model = fn.load(folder, dtype="float32", device="cpu")
    drafting = drafts.prepare({"method": "mtp", "k": 2, "adapt": False}, model, options(folder))
    assert drafting.about == "mtp head, up to 2 tokens"
    sizes: dict[str, Any] = dict(max_model_len=96, kv_cache_memory_bytes=1 << 20, enforce_eager=True)
    rt = fn.Runtime(model, **sizes)
    prompt, want = tokens(21, seed=2), []
    seq, new = rt.empty, prompt
    for _ in range(24):
        seq, token = rt.extend(seq, new, sample=GREEDY)
        want.append(token)
        new = [token]
    engine = Engine.build(
        model,
        tokenizer=byte_tokenizer(131),
        speculate=drafting.speculate,
        companion=drafting.companion,
        max_num_seqs=4,
        **sizes,
    )
    got: list[int] = []
    stop = fn.Stop(max_tokens=24, ignore_eos=True)
    engine.submit_to(fn.Request("a", np.array(prompt, np.int32), GREEDY, stop), lambda d: got.extend(d.tokens))
    while engine.turn():
        pass
    assert got == want and engine.drafting.counts.proposed > 0
    engine.check()


def test_what_cannot_draft_says_why(folders: dict[str, Path]):
    with pytest.raises(CheckpointError, match=r"a Qwen3ForCausalLM ships no layer that predicts further tokens.*MiMo"):
        mtp.load(tiny_model("qwen3"))
    with pytest.raises(CheckpointError, match=r"holds no layer that predicts further tokens.*conversions"):
        mtp.load(tiny_model("deepseek-v3"))
    model = fn.load(folders["deepseek-v3"], dtype="float32", device="cpu")
    with pytest.raises(CheckpointError, match=r"layers\.3\..*missing"):
        mtp.load(model, number=1)
    with pytest.raises(ConfigError, match="a model means nothing to mtp"):
        drafts.prepare({"method": "mtp", "model": "demo"}, model, options(folders["deepseek-v3"]))


def test_mimo_is_qwen2_with_such_a_layer(tmp_path: Path):
    """Oracle: transformers' Qwen2 on the same weights; test_heads.py writes the layer out in plain torch."""
    folder = Path(shutil.copytree(tiny_folder("qwen2"), tmp_path / "m"))
    config = checkpoint.read_json(folder / "config.json")
    own = {"architectures": ["MiMoForCausalLM"], "model_type": "mimo", "attention_bias": True}
    (folder / "config.json").write_text(json.dumps({**config, **own, "num_nextn_predict_layers": 1}))
    held, g = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(3)
    at = "model.mtp_layers.0."
    layer = {n.replace("model.layers.1.", at): x.clone() for n, x in held.items() if n.startswith("model.layers.1.")}
    layer |= {f"{at}{n}.weight": torch.rand(64, generator=g) for n in ("token_layernorm", "hidden_layernorm")}
    layer |= {f"{at}final_layernorm.weight": torch.rand(64, generator=g)}
    layer |= {f"{at}input_proj.weight": torch.randn(64, 128, generator=g)}
    save_file({**held, **layer}, folder / "model.safetensors")
    model = fn.load(folder, dtype="float32", device="cpu")
    assert model.spec.family == "mimo"
    rt = fn.Runtime(model, max_num_seqs=4, max_model_len=128, kv_cache_memory_bytes=1 << 20, enforce_eager=True)
    ids = tokens(30, seed=8)
    with torch.no_grad():
        want = upstream("qwen2")(torch.tensor([ids])).logits[0]
    assert float((rt.extend(rt.empty, ids, logits="all")[1] - want).abs().max()) < 1e-4
    same = mtp.read(layer, tiny_model("qwen2"))
    seen = {"final": torch.randn(29, 64, generator=g)}
    heads = [mtp.load(model), same]
    one, two = (h.propose(h.start(ids, Drawing(GREEDY, 30), seen), 3).tokens for h in heads)
    assert one == two
