"""Models that read texts whole. Oracle: transformers' own classes, one text at a time, float32; for the law of company
the model's own bits."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fnengine import checkpoint, encoder, leaves, params
from fnengine import model as fn_model
from fnengine.checkpoint import open_tensors, outline, read_spec
from fnengine.errors import CheckpointError, SpecError
from fnengine.families import FAMILIES, spec_from_config
from fnengine.model import Model
from fnengine.spec import Head
from tests.whole_models import TINY, config_of, folder_of, hidden, logits, whole_model

TEXTS = [np.random.default_rng(i).integers(3, 120, n).tolist() for i, n in enumerate((41, 1, 17, 90, 2))]


def batch(texts: list[list[int]], padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    start = torch.tensor([0, *(len(t) for t in texts)]).cumsum(0).int()
    return torch.tensor([*(i for t in texts for i in t), *[7] * padding], dtype=torch.int32), start


def encoded(model: Model, texts: list[list[int]], types: list[int] | None = None, padding: int = 0, **how) -> list:
    token, start = batch(texts, padding)
    of = None if types is None else torch.tensor([*types, *[0] * padding], dtype=torch.int32)
    with torch.inference_mode():
        x = encoder.encode(model.spec, model.params, token, start, of, **how)
    return [x[a:b] for a, b in itertools.pairwise(start)]


@pytest.mark.parametrize("name", TINY)
def test_hidden_states_and_labels_are_those_of_transformers(name):
    """All texts in one ragged batch with padding behind it."""
    model = whole_model(name)
    for tokens, got in zip(TEXTS, encoded(model, TEXTS, padding=3), strict=True):
        torch.testing.assert_close(got, hidden(name, tokens), rtol=1e-4, atol=1e-4)
    head = model.spec.whole.head if model.spec.whole else None
    assert (head is not None) == (len(logits_of := TINY[name][0].split("ForSequence")) == 2), logits_of
    if head is None:
        return
    token, start = batch(TEXTS)
    with torch.inference_mode():
        got = encoder.read(model.spec, model.params, token, start, None, ["labels"] * len(TEXTS))
    for tokens, numbers in zip(TEXTS, got, strict=True):
        torch.testing.assert_close(numbers, logits(name, tokens), rtol=1e-4, atol=1e-4)
    assert head.labels == (("calm", "glad", "sad") if len(head.labels) == 3 else ("LABEL_0",))


@pytest.mark.parametrize(
    "name", ["bert", "bert-one", "roberta", "modernbert", "qwen3-labels", "gemma3", "gemma2-labels"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_texts_bits_do_not_depend_on_its_company(name, dtype):
    """Alone, first, last, among others, with padding: the law of the whole module."""
    model = whole_model(name, dtype)
    alone = [encoded(model, [t])[0] for t in TEXTS]
    for order, padding in (((0, 1, 2, 3, 4), 0), ((4, 3, 0, 2, 1), 5), ((3, 3, 3), 1), ((2, 0), 13)):
        for i, got in zip(order, encoded(model, [TEXTS[i] for i in order], padding=padding), strict=True):
            assert torch.equal(got, alone[i]), (i, order)
    ask = ["labels"] if model.spec.whole and model.spec.whole.head else ["mean", "last", "cls"]
    for how in ask:
        with torch.inference_mode():
            one = encoder.read(model.spec, model.params, *batch([TEXTS[0]]), None, [how])[0]
            many = encoder.read(model.spec, model.params, *batch(TEXTS[::-1]), None, [how] * len(TEXTS))[-1]
        assert torch.equal(one, many), how


def test_a_mutant_that_attends_over_the_batch_breaks_the_law():
    model = whole_model("bert")
    honest = encoder.attention_for(model.spec, model.device, model.dtype)

    def across(q, k, v, start, *more):
        return honest(q, k, v, start[[0, -1]], *more)

    assert not torch.equal(encoded(model, TEXTS, attend=across)[0], encoded(model, TEXTS[:1], attend=across)[0])


@pytest.mark.parametrize("name", ["bert", "bert-labels"])
def test_the_second_text_of_a_pair_has_a_type_of_its_own(name):
    tokens, types = TEXTS[0], [0] * 20 + [1] * 21
    got = encoded(whole_model(name), [tokens], types)[0]
    torch.testing.assert_close(got, hidden(name, tokens, types), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, hidden(name, tokens), rtol=1e-2)


@pytest.mark.parametrize("name", ["modernbert", "gemma3", "qwen3"])
def test_the_plain_reference_attends_as_torch_does(name):
    """Two backends of one contract, over a whole model, with texts beyond their windows and tiles."""
    model = whole_model(name)
    texts = [TEXTS[3] * 2, TEXTS[0]]
    plain = encoder.attention_for(model.spec, model.device, model.dtype, "reference")
    for a, b in zip(encoded(model, texts), encoded(model, texts, attend=plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "int4", "int8-dynamic"])
def test_rounded_weights_give_nearly_the_same_vectors(kind):
    """Oracle: the model's own vectors in float32; the cosine of what rounding to so many bits leaves, measured."""
    folder = folder_of("modernbert-labels")
    rounded = fn_model.load(folder, dtype="float32", device="cpu", quantization=kind)
    token, start = batch(TEXTS)
    with torch.inference_mode():
        many = [
            torch.stack(encoder.read(m.spec, m.params, token, start, None, ["mean"] * len(TEXTS)))
            for m in (whole_model("modernbert-labels"), rounded)
        ]
    assert torch.nn.functional.cosine_similarity(many[0], many[1]).min() > (0.9 if kind == "int4" else 0.99)
    assert isinstance(rounded.params["label_out"], leaves.Quantized)


@pytest.mark.parametrize("name", TINY)
def test_weights_are_planned_as_they_are_loaded(name):
    model = whole_model(name)
    kinds = {type(leaf) for leaf in (model.params["layers"][0]["qkv"], model.params["layers"][0]["o"])}
    assert len(kinds) == 1
    from fnengine import tree

    held = sum(x.nbytes for x in tree.leaves(model.params))
    planned = params.memory_plan(model.spec, model.dtype, model.how)
    assert planned.weights == held
    like = outline(model.spec, model.dtype, model.how)
    assert [(p, x.shape) for p, x in tree.items(like)] == [(p, x.shape) for p, x in tree.items(model.params)]


def test_dummy_weights_need_only_a_config(tmp_path):
    shutil.copy(folder_of("bert-labels") / "config.json", tmp_path)
    model = fn_model.load(tmp_path, load_format="dummy", dtype="float32", device="cpu")
    assert encoded(model, TEXTS)[0].isfinite().all()


def test_old_names_of_norms_are_read(tmp_path):
    """As google-bert/bert-base-uncased spells them."""
    shutil.copytree(folder_of("bert-fills"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in load_file(file).items()
    }
    assert any(k.endswith("gamma") for k in old)
    save_file(old, file, {"format": "pt"})
    model = fn_model.load(tmp_path, dtype="float32", device="cpu")
    assert torch.equal(encoded(model, TEXTS)[0], encoded(whole_model("bert-fills"), TEXTS)[0])


# --- configs ----------------------------------------------------------------------------------------------------------


def changed(name: str, **more) -> dict:
    return {**config_of(name), **more}


def test_what_a_config_says_of_labels():
    def head(name, **more) -> Head:
        whole = spec_from_config(changed(name, **more)).whole
        assert whole is not None and whole.head is not None
        return whole.head

    assert (head("bert-labels").spread, head("bert-labels").pooling) == ("softmax", "cls")
    assert (head("bert-one").spread, head("bert-one").judged) == ("sigmoid", "sigmoid")
    assert head("bert-labels", problem_type="multi_label_classification").spread == "sigmoid"
    assert head("bert-one", problem_type="regression").spread == "identity"
    identity = "torch.nn.modules.linear.Identity"
    assert head("bert-one", sentence_transformers={"activation_fn": identity}).judged == "identity"
    assert head("qwen2-one", sbert_ce_default_activation_function=identity).judged == "identity"
    assert head("modernbert-mean").pooling == "mean" and head("llama-labels").pooling == "last"
    assert head("bert-labels", id2label=None).labels == ("LABEL_0", "LABEL_1")
    for more in (
        {"id2label": {"1": "a", "2": "b"}},
        {"id2label": ["a"]},
        {"sentence_transformers": {"activation_fn": "my.Function"}},
        {"id2label": None, "num_labels": 0},
    ):
        with pytest.raises(SpecError):
            head("bert-labels", **more)


@pytest.mark.parametrize(
    "name,more,param",
    [
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("bert", {"num_attention_heads": 5}, "num_attention_heads"),
        ("modernbert", {"classifier_pooling": "max"}, "classifier_pooling"),
        ("modernbert", {"layer_types": ["full_attention"]}, "layer_types"),
        ("roberta", {"brand_new_key": 3}, "brand_new_key"),
        ("gemma3", {"architectures": ["Gemma3ForCausalLM"]}, "use_bidirectional_attention"),
    ],
)
def test_configs_that_cannot_be_built_say_why(name, more, param):
    with pytest.raises(SpecError) as e:
        spec_from_config(changed(name, **more))
    assert e.value.param == param


def test_positions_of_roberta_begin_after_the_padding_token():
    spec = read_spec(folder_of("roberta"))
    assert (spec.ends.first_position, spec.max_len, spec.ends.positions) == (2, 158, 160)
    assert read_spec(folder_of("bert")).max_len == 160


def test_windows_reach_to_both_sides():
    """ModernBERT's 12 are 6 on each side; so are Gemma's 8, 4 and 4: with the token itself 7 and 5."""
    windows = [layer.mixer.window for layer in read_spec(folder_of("modernbert")).layers]
    assert windows == [None, 7, 7, None]
    assert [layer.mixer.window for layer in read_spec(folder_of("gemma3")).layers] == [5, None, 5]


def test_every_decoder_family_has_its_two_other_names():
    from fnengine.families.whole import architectures

    names = [name for family in FAMILIES.values() for name in architectures(family)]
    assert len(names) == len(set(names))
    assert {"Qwen3Model", "LlamaForSequenceClassification", "GPT2Model", "Gemma3TextModel"} <= set(names)


PUBLISHED = {  # transformers' class, and which of its modules are not loaded
    "bert-base-uncased": ("BertForMaskedLM", ("cls.",)),
    "bge-reranker-v2-m3": ("XLMRobertaForSequenceClassification", ()),
    "ModernBERT-base": ("ModernBertForMaskedLM", ("head.", "decoder.")),
    "embeddinggemma-300m": ("Gemma3TextModel", ()),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_as_many_parameters_as_upstream(name):
    """Oracle: transformers' own model of the same config, on the meta device."""
    import transformers

    config = json.loads((Path(__file__).parent / "configs" / f"{name}.json").read_text())
    cls = getattr(transformers, PUBLISHED[name][0])
    with torch.device("meta"):
        upstream = cls(cls.config_class.from_dict(dict(config)))
    left_out = [p.numel() for k, p in upstream.named_parameters() if k.startswith(PUBLISHED[name][1])]
    spec = spec_from_config(config)
    assert params.count(spec) == sum(p.numel() for p in upstream.parameters()) - sum(left_out)
    how = leaves.packing(torch.device("cpu"), torch.bfloat16)
    assert params.memory_plan(spec, torch.bfloat16, how).weights >= 2 * params.count(spec)


# --- sentence-transformers --------------------------------------------------------------------------------------------


def with_modules(tmp_path, name="gemma3", widths=(32, 24), bias=(False, True)):
    """A folder as sentence-transformers saves EmbeddingGemma: two layers after the mean."""
    shutil.copytree(folder_of(name), tmp_path, dirs_exist_ok=True)
    kinds = ["Transformer", "Pooling", *["Dense"] * len(widths), "Normalize"]
    paths = ["", "1_Pooling", *(f"{i + 2}_Dense" for i in range(len(widths))), f"{len(widths) + 2}_Normalize"]
    listed = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{k}"}
        for i, (k, p) in enumerate(zip(kinds, paths, strict=True))
    ]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    g, reads, made = torch.Generator().manual_seed(3), 48, []
    for path, width, biased in zip(paths[2:-1], widths, bias, strict=True):
        (tmp_path / path).mkdir()
        act = "torch.nn.modules.activation.Tanh" if biased else "torch.nn.modules.linear.Identity"
        config = {"in_features": reads, "out_features": width, "bias": biased, "activation_function": act}
        (tmp_path / path / "config.json").write_text(json.dumps(config))
        w = {"linear.weight": torch.randn(width, reads, generator=g) * 0.2}
        if biased:
            w["linear.bias"] = torch.randn(width, generator=g)
        save_file(w, tmp_path / path / "model.safetensors", {"format": "pt"})
        made.append(w)
        reads = width
    return made


def test_layers_after_pooling_are_read_and_run(tmp_path):
    """By hand: the mean of transformers' hidden states, through both layers, the second with a bias and tanh."""
    first, second = with_modules(tmp_path)
    model = fn_model.load(tmp_path, dtype="float32", device="cpu")
    assert model.spec.vector == 24 and model.spec.whole is not None and model.spec.whole.pooling == "mean"
    with torch.inference_mode():
        got = encoder.read(model.spec, model.params, *batch(TEXTS), None, ["mean"] * len(TEXTS))
    for tokens, vector in zip(TEXTS, got, strict=True):
        want = hidden("gemma3", tokens).mean(0) @ first["linear.weight"].T
        want = torch.tanh(want @ second["linear.weight"].T + second["linear.bias"])
        torch.testing.assert_close(vector, want, rtol=1e-4, atol=1e-4)


def test_kept_weights_hold_the_layers_after_pooling_too(tmp_path, monkeypatch):
    """The second load reads the packed file, in which both folders' weights are; a changed layer is another file."""
    with_modules(tmp_path / "model")
    monkeypatch.setenv("FNENGINE_CACHE", str(tmp_path / "cache"))
    spec, device = read_spec(tmp_path / "model"), torch.device("cpu")
    kept = checkpoint.keep(tmp_path / "model", spec, torch.float32, device)
    if isinstance(kept, str):
        pytest.skip(kept)
    assert kept[1]
    model = fn_model.load(tmp_path / "model", dtype="float32", device="cpu")
    assert any("were kept in this form" in note for note in model.notes)
    with torch.inference_mode():
        again = encoder.read(model.spec, model.params, *batch(TEXTS), None, ["mean"] * len(TEXTS))
        params = checkpoint.load(tmp_path / "model", spec, torch.float32, device, model.how)
        fresh = encoder.read(spec, params, *batch(TEXTS), None, ["mean"] * len(TEXTS))
    assert all(map(torch.equal, again, fresh))
    file = tmp_path / "model" / "3_Dense" / "model.safetensors"
    save_file({k: v * 2 for k, v in load_file(file).items()}, file, {"format": "pt"})
    assert checkpoint.packed_key(tmp_path / "model", spec, torch.float32, device, model.how) is not None
    changed = fn_model.load(tmp_path / "model", dtype="float32", device="cpu")
    assert not any("were kept in this form" in note for note in changed.notes)


def test_what_sentence_transformers_says_otherwise(tmp_path):
    with_modules(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    assert read_spec(tmp_path).max_len == 64
    config = tmp_path / "3_Dense" / "config.json"
    said = json.loads(config.read_text())
    for more, word in (
        ({"in_features": 31}, "is given 32"),
        ({"activation_function": "my.Function"}, "my.Function"),
        ({"out_features": None}, "out_features"),
    ):
        config.write_text(json.dumps({**said, **more}))
        with pytest.raises(CheckpointError, match=word):
            read_spec(tmp_path)
    config.write_text(json.dumps(said))
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.LSTM", "path": "1_LSTM"}]')
    with pytest.raises(CheckpointError, match="LSTM"):
        read_spec(tmp_path)


def test_an_embedder_saved_without_its_head_is_one(tmp_path):
    """As Qwen3-Embedding-8B is: the architecture of a language model, an untied head, and no head in the files."""
    shutil.copytree(folder_of("qwen3"), tmp_path, dirs_exist_ok=True)
    config = changed("qwen3", architectures=["Qwen3ForCausalLM"], tie_word_embeddings=False)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        fn_model.load(tmp_path, device="cpu")
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Transformer", "path": ""}]')
    model = fn_model.load(tmp_path, dtype="float32", device="cpu")
    assert model.spec.whole is not None
    assert torch.equal(encoded(model, TEXTS)[0], encoded(whole_model("qwen3"), TEXTS)[0])
    with open_tensors(tmp_path) as files:  # as large ones are told by their index, which a plan has and no weights
        index = {"weight_map": dict.fromkeys(files, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_spec(tmp_path) == model.spec
    (tmp_path / "model.safetensors").unlink()
    assert read_spec(tmp_path) == model.spec


def test_a_tied_embedder_without_prefix_is_a_language_model(tmp_path):
    """As Qwen3-Embedding-0.6B is: its names lack `model.`, and its embedding is its head."""
    shutil.copytree(folder_of("qwen3"), tmp_path, dirs_exist_ok=True)
    config = changed("qwen3", architectures=["Qwen3ForCausalLM"], tie_word_embeddings=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = fn_model.load(tmp_path, dtype="float32", device="cpu")
    assert model.spec.whole is None and "head" in model.params
    assert dataclasses.replace(model.spec, whole=None) == model.spec
