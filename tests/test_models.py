"""Models as they come: half a checkpoint, adapters, towers, windows, few positions, retrained in
place."""

import importlib
import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import assert_one_line_error, command, save_model, save_pairs, save_rows, succeed
from transformers import AutoConfig, AutoModelForCausalLM

from parts import models, packing
from parts.chat import prompt_ids
from parts.files import UserError, read_meta

stage1 = importlib.import_module("01_extract")
stage3 = importlib.import_module("03_train_head")
latents = importlib.import_module("parts.latents")

TEXTS = [[7, 8, 9, 10, 11, 12], [7, 8, 9, 30], [40, 41, 42, 43, 44, 45, 46, 47, 48, 49]]


@pytest.fixture
def pairs(tmp_path):
    return save_pairs(tmp_path / "pairs.jsonl", 12)


def extract(model, pairs, run, *more):
    """Stage 1 of a model → what command() gives."""
    return command("01_extract", "--model", model, "--pairs", pairs, "--layer", 1, "--run", run,
                   *more)


def change_weights(folder, change):
    """Weights of a saved model → change(weights), written in their place."""
    path = Path(folder) / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def change_json(path, **values):
    """Set values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def states_of(backbone, layer=1):
    """Hidden states of TEXTS, one after the other."""
    found = {}
    for members, (hidden,) in backbone.hidden_rows(TEXTS, [layer]):
        for index, places in members:
            found[index] = hidden[torch.from_numpy(places)]
    return torch.cat([found[index] for index in range(len(TEXTS))])


# ---------------------------------------------------------------- weights that are not there

def as_bin(folder):
    """The weights as a PyTorch file, whose names begin with module."""
    path = Path(folder) / "model.safetensors"
    weights = {f"module.{name}": value for name, value in load_file(path).items()}
    torch.save(weights, path.with_name("pytorch_model.bin"))
    path.unlink()


def as_shards(folder):
    """The weights in several files."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (Path(folder) / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")


def without_one_shard(folder):
    """Shards whose index has lost the entries of one file."""
    as_shards(folder)
    path = Path(folder) / "model.safetensors.index.json"
    places = json.loads(path.read_text())["weight_map"]
    lost = places["model.layers.0.mlp.up_proj.weight"]
    change_json(path, weight_map={name: at for name, at in places.items() if at != lost})


def renamed(prefix):
    return lambda weights: {prefix + name: value for name, value in weights.items()}


def without(part):
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


def with_few_embeddings(weights):
    return weights | {"model.embed_tokens.weight": weights["model.embed_tokens.weight"][:390]}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_weights_under_the_names_of_a_wrapper_are_refused(prefix, pairs, tmp_path):
    model = save_model(tmp_path / "model")
    change_weights(model, renamed(prefix))
    assert_one_line_error(extract(model, pairs, tmp_path / "run"), "model.embed_tokens.weight",
                          f"begin with {prefix}", model)


@pytest.mark.parametrize("change, words", [
    (as_bin, ["model.embed_tokens.weight", "begin with module."]),
    (without_one_shard, ["model.layers.0."]),
    (lambda folder: change_weights(folder, without("layers.1.mlp.up")), ["layers.1.mlp.up_proj"]),
    (lambda folder: change_weights(folder, with_few_embeddings), ["[390, 32]", "[400, 32]"]),
])
def test_weights_lacking_up_to_the_layer_are_refused(change, words, pairs, tmp_path):
    model = save_model(tmp_path / "model")
    change(model)
    assert_one_line_error(extract(model, pairs, tmp_path / "run"), *words)
    assert_one_line_error(extract(model, pairs, tmp_path / "run", "--device-map", "auto"), *words)


def test_position_embeddings_that_are_lacking_are_refused(pairs, tmp_path):
    model = save_model(tmp_path / "model", "gpt2")
    change_weights(model, without("wpe"))
    assert_one_line_error(extract(model, pairs, tmp_path / "run"), "transformer.wpe.weight")


@pytest.mark.parametrize("part", ["layers.2.", "lm_head", "model.norm"])
def test_weights_lacking_above_the_layer_do_not_matter_to_it(part, tmp_path):
    whole = save_model(tmp_path / "whole", tie_word_embeddings=False)
    model = shutil.copytree(whole, tmp_path / "model")
    change_weights(model, without(part))
    backbone = stage1.load_backbone(str(model))
    assert torch.equal(states_of(backbone), states_of(stage1.load_backbone(whole)))
    with pytest.raises(UserError, match=part):
        models.check_weights(backbone)


@pytest.mark.parametrize("part", ["layers.2.", "lm_head"])
def test_random_weights_above_the_layer_do_not_make_another_model(part, finished, tmp_path):
    copy = shutil.copytree(finished.parent / "model", tmp_path / "copy")
    change_weights(copy, without(part))
    head = finished / "reward_head.safetensors"
    found = stage3.RewardModel.load(head, model=str(copy)).score(["a"], ["b"])
    assert found == stage3.RewardModel.load(head).score(["a"], ["b"])


@pytest.mark.parametrize("change", [
    lambda folder: None,
    as_shards,
    lambda folder: change_weights(folder, lambda weights: {
        name.removeprefix("model."): value for name, value in weights.items()}),
])
@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_checkpoint_lacks_nothing(tied, change, tmp_path):
    model = save_model(tmp_path / "model", tie_word_embeddings=tied)
    change(model)
    assert stage1.load_backbone(model).lacking == {}


@pytest.mark.parametrize("part", ["layers.2.", "lm_head", "model.norm"])
def test_sampling_from_half_a_model_is_refused(part, finished, tmp_path):
    policy = save_model(tmp_path / "policy", tie_word_embeddings=False)
    change_weights(policy, without(part))
    prompts = save_rows(tmp_path / "prompts.jsonl", [{"prompt": "Is water wet?"}])
    result = command("05_best_of_n", "sample", "--prompts", prompts, "--policy", policy,
                     "--reward", finished / "reward_head.safetensors", "--n", 2)
    assert_one_line_error(result, part, policy)


@pytest.mark.parametrize("part", ["lm_head", "layers.2.", "model.norm"])
def test_there_is_no_lens_where_its_weights_lack_and_a_note(part, tmp_path, capsys):
    model = save_model(tmp_path / "model", tie_word_embeddings=False)
    change_weights(model, without(part))
    backbone = stage1.load_backbone(model)
    assert latents.top_tokens(backbone, torch.randn(4, tiny.WIDTH)) == [[], [], [], []]
    out = capsys.readouterr().out
    assert out.startswith("note: no tokens are shown") and part in out and out.count("\n") == 1


def test_the_report_is_made_without_a_lens_where_the_output_matrix_lacks(finished, tmp_path):
    """The run reads its model at the place that it recorded."""
    folder = tmp_path / "all"
    shutil.copytree(finished.parent, folder)
    run = folder / "run"
    change_weights(folder / "model", without("lm_head"))
    model, pairs = folder / "model", folder / "pairs.jsonl"
    succeed("01_extract", "--model", model, "--pairs", pairs, "--layer", 1, "--run", run,
            "--overwrite")
    succeed("02_select_features", "--run", run, "--sae", folder / "sae.safetensors", "--k", 4)
    succeed("03_train_head", "--run", run)
    out = succeed("04_evaluate", "--run", run, "--sweeps", "none", "--texts", 1, "--folds", 3)
    assert "note: no tokens are shown" in out and "lm_head.weight" in out
    found = json.loads((run / "evaluation.json").read_text())["latents"]
    assert found and all(row["tokens"] == [] for row in found)


# ---------------------------------------------------------------- adapters

ADAPTERS = {"LORA": "LoRA adapter of org/base", "IA3": "IA3 adapter of org/base",
            "PROMPT_TUNING": "PROMPT_TUNING adapter of org/base"}


@pytest.mark.parametrize("has_peft", [True, False])
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("is_alone", [True, False])
def test_an_adapter_is_refused_alone_and_beside_weights(is_alone, kind, has_peft, pairs, tmp_path,
                                                       monkeypatch):
    from transformers.models.auto import auto_factory
    monkeypatch.setattr(auto_factory, "is_peft_available", lambda: has_peft)
    model = save_model(tmp_path / "model")
    if is_alone:
        os.remove(Path(model) / "model.safetensors")
        os.remove(Path(model) / "config.json")
    adapter = {"peft_type": kind, "base_model_name_or_path": "org/base", "r": 4}
    (Path(model) / "adapter_config.json").write_text(json.dumps(adapter))
    assert_one_line_error(extract(model, pairs, tmp_path / "run"), ADAPTERS[kind], model, "merge")
    with pytest.raises(UserError, match="org/base"):
        stage1.load_backbone(model)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Function of (name, folder) that puts a model into a hub cache of its own → its commit."""
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(name, folder, commit):
        place = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / "main").write_text(commit)
    return put


def test_an_adapter_of_the_hub_is_refused(hub, tmp_path):
    folder = Path(save_model(tmp_path / "model"))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    hub("org/tuned", folder, "c" * 40)
    with pytest.raises(UserError, match="LoRA adapter of None · org/tuned"):
        stage1.load_backbone("org/tuned")


def test_a_hub_model_is_told_by_its_commit(hub, tmp_path):
    for seed, commit in enumerate(["a" * 40, "b" * 40]):
        hub("org/model", save_model(tmp_path / commit, seed=seed), commit)
        assert stage1.load_backbone("org/model").meta["files"] == commit


# ---------------------------------------------------------------- tokenizer and embedding

def grown_tokenizer(special=False):
    """The tiny tokenizer and a token that the tiny models have no embedding for."""
    import copy
    tokenizer = copy.deepcopy(tiny.make_tokenizer())
    tokenizer.add_tokens(["zebra"], special_tokens=special)
    return tokenizer


def test_an_added_token_without_an_embedding_is_refused(pairs, tmp_path):
    model = save_model(tmp_path / "model")
    grown_tokenizer().save_pretrained(model)
    assert_one_line_error(extract(model, pairs, tmp_path / "run"), "zebra", "id 400", model)


def test_a_control_token_of_the_template_without_an_embedding_is_refused(tmp_path):
    model = save_model(tmp_path / "model")
    tokenizer = grown_tokenizer(special=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "zebra")
    tokenizer.save_pretrained(model)
    with pytest.raises(UserError, match="zebra has id 400"):
        stage1.load_backbone(model)


def test_a_control_token_that_nothing_writes_needs_no_embedding(tmp_path):
    """As Gemma-3's <image_soft_token> in its smallest model, which reads no images."""
    model = save_model(tmp_path / "model")
    grown_tokenizer(special=True).save_pretrained(model)
    assert 400 not in prompt_ids(stage1.load_tokenizer(model), "A zebra?")
    stage1.load_backbone(model)


def test_more_embeddings_than_tokens_are_none_of_our_business(tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=512, **tiny.SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny.make_tokenizer().save_pretrained(tmp_path)
    assert states_of(stage1.load_backbone(str(tmp_path))).isfinite().all()


def test_a_head_refuses_its_backbone_with_another_vocabulary(finished, tmp_path):
    copy = shutil.copytree(finished.parent / "model", tmp_path / "copy")
    words = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (copy / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match="vocabulary"):
        stage3.RewardModel.load(finished / "reward_head.safetensors", model=str(copy))


# ---------------------------------------------------------------- the blocks

def save_vision_model(folder):
    """Gemma-3 with a vision tower of as many blocks as the language model → folder."""
    torch.manual_seed(0)
    text = tiny.FAMILIES["gemma3_text"] | {"vocab_size": 400, "model_type": "gemma3_text"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": tiny.LAYERS,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
              "model_type": "siglip_vision_model"}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision,
                                  mm_tokens_per_image=4)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return str(folder)


def test_the_blocks_are_the_language_models_not_the_vision_towers(tmp_path):
    backbone = stage1.load_backbone(save_vision_model(tmp_path / "model"))
    assert backbone.blocks is backbone.model.model.language_model.layers
    states = states_of(backbone)
    ids = torch.tensor([TEXTS[0]])
    own = backbone.model(ids, output_hidden_states=True).hidden_states[2][0]
    assert torch.allclose(states[:len(TEXTS[0])], own, atol=1e-5)


def stack_of(width):
    """Three blocks, each with three experts."""
    blocks = torch.nn.ModuleList(torch.nn.Module() for _ in range(3))
    for block in blocks:
        block.experts = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(3))
    return blocks


class Assembled(torch.nn.Module):
    """An embedding and blocks at given places, behind a larger tower."""

    def __init__(self, tower, embedding, blocks):
        super().__init__()
        self.config = AutoConfig.for_model("llama", **tiny.SIZES)
        self.put(tower, stack_of(64))
        self.put(embedding, torch.nn.Embedding(4, 8))
        self.put(blocks, stack_of(8))

    def put(self, path, part):
        """Place a module, with what it lies in."""
        *owners, name = path.split(".")
        module = self
        for owner in owners:
            if not hasattr(module, owner):
                module.add_module(owner, torch.nn.Module())
            module = getattr(module, owner)
        module.add_module(name, part)

    def get_input_embeddings(self):
        return next(m for m in self.modules() if isinstance(m, torch.nn.Embedding))


@pytest.mark.parametrize("tower, embedding, blocks", [
    ("vision.encoder.layers", "text.words", "text.decoder"),
    ("model.audio.layers", "model.language_model.embed_tokens", "model.language_model.layers"),
    ("transformer.visual.transformer.blocks", "transformer.wte", "transformer.h"),
    ("model.projectors", "model.text.embeddings.word_embeddings", "model.text.encoder.layer"),
])
def test_of_lists_as_long_the_one_beside_the_embedding_is_taken(tower, embedding, blocks):
    model = Assembled(tower, embedding, blocks)
    assert models.find_blocks(model, "m") is model.get_submodule(blocks)


@pytest.mark.parametrize("family", ["t5", "bart", "pegasus"])
def test_an_encoder_decoder_model_is_refused(family, pairs, tmp_path):
    AutoConfig.for_model(family).save_pretrained(tmp_path / "model")
    tiny.make_tokenizer().save_pretrained(tmp_path / "model")
    assert_one_line_error(extract(tmp_path / "model", pairs, tmp_path / "run"),
                          "encoder-decoder", family)


# ---------------------------------------------------------------- attention of its own kind

# what a family is opened with, and whether it honours a tree
EAGER = {
    "bloom": ({"hidden_size": 32, "n_layer": 3, "n_head": 4}, "pad"),
    "mpt": ({"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 512}, "pad"),
    "gpt_neo": ({"hidden_size": 32, "num_layers": 4, "num_heads": 4, "window_size": 100,
                 "attention_types": [[["global", "local"], 2]]}, "pad"),
    "xglm": ({"d_model": 32, "num_layers": 3, "attention_heads": 4, "ffn_dim": 64}, "tree"),
    "gpt_oss": (tiny.MIXED | tiny.SIZES | {"sliding_window": 60, "num_local_experts": 3,
                                           "num_experts_per_tok": 2}, "tree"),
}


def long_texts():
    """Beginnings that are shared, shorter and longer than the windows above."""
    generator = torch.Generator().manual_seed(1)
    stem = torch.randint(10, 390, (180,), generator=generator).tolist()
    lengths = [(5, 3), (5, 90), (50, 4), (50, 9), (180, 20), (180, 6)]
    return [stem[:n] + torch.randint(10, 390, (m,), generator=generator).tolist()
            for n, m in lengths]


@pytest.mark.parametrize("family", EAGER)
def test_a_family_without_sdpa_reads_a_text_of_any_length_as_alone(family, tmp_path, monkeypatch):
    changes, pack = EAGER[family]
    monkeypatch.setitem(tiny.FAMILIES, family, changes)
    folder = save_model(tmp_path / "model", family)
    described = models.describe(folder, stage1.load_config(folder), stage1.load_tokenizer(folder))
    backbone = stage1.load_backbone(folder)
    assert described["attention"] == backbone.model.config._attn_implementation == "eager"
    assert backbone.pack == pack
    texts = long_texts()
    for members, (hidden,) in backbone.hidden_rows(texts, [1]):
        for index, places in members:
            with torch.inference_mode():
                alone = backbone.model(torch.tensor([texts[index]]), output_hidden_states=True)
            wanted = alone.hidden_states[2][0]
            assert (hidden[torch.from_numpy(places)] - wanted).norm() < 1e-4 * wanted.norm()


def test_an_sdpa_family_is_still_opened_with_sdpa(folder_of):
    for family, attention in (("llama", "sdpa"), ("gpt2", "sdpa"), ("gemma2", "eager")):
        assert stage1.load_backbone(folder_of(family)).meta["attention"] == attention


@pytest.mark.parametrize("name, window", [("sliding_window", 30), ("window_size", 25),
                                          ("attention_chunk_size", 40)])
def test_a_window_is_found_whatever_it_is_called(name, window):
    config = AutoConfig.for_model("llama", **{name: window}, use_window=True)
    assert packing.windows(config).count(window) == 1
    assert True not in [type(value) is bool for value in packing.windows(config)]


@pytest.mark.parametrize("budget, pack", [(101, "pad"), (100, "tree")])
def test_a_window_that_no_shared_row_reaches_beyond_is_not_tried(budget, pack, tmp_path,
                                                                monkeypatch):
    """Then what is right for short rows is right for all of them."""
    monkeypatch.setitem(tiny.FAMILIES, "gpt_neo", EAGER["gpt_neo"][0])
    folder = save_model(tmp_path / "model", "gpt_neo")
    backbone = stage1.load_backbone(folder, budget=budget)
    assert backbone.pack == pack
    texts = long_texts()
    for members, (hidden,) in backbone.hidden_rows(texts, [1]):
        for index, places in members:
            alone = stage1.forward_to(backbone.model, backbone.blocks, [1],
                                      input_ids=torch.tensor([texts[index]]))[0][0]
            assert (hidden[torch.from_numpy(places)] - alone).norm() < 1e-4 * alone.norm()


# ---------------------------------------------------------------- positions

@pytest.mark.parametrize("family, changes, wanted", [
    ("llama", {"max_position_embeddings": 77}, 77),
    ("gpt2", {"n_positions": 33}, 33),
    ("mpt", {"max_seq_len": 55}, 55),
    ("bloom", {}, None),
    ("xlnet", {}, None),                        # -1
    ("qwen2", {"max_position_embeddings": 100, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 100}}, 400),
    ("llama", {"max_position_embeddings": 900, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 100}}, 900),
])
def test_the_positions_of_a_model_are_those_of_its_configuration(family, changes, wanted):
    assert models.most_tokens(AutoConfig.for_model(family, **changes)) == wanted


@pytest.mark.parametrize("family, positions", [
    ("llama", {"max_position_embeddings": 48}),
    ("gpt2", {"n_positions": 48}),
    ("phi", {"max_position_embeddings": 48}),
])
def test_max_length_is_lowered_to_the_positions_and_recorded(family, positions, tmp_path):
    model = save_model(tmp_path / "model", family, **positions)
    rows = tiny.make_pairs(8)
    for row in rows:
        row["prompt"] = "Tell me, please, once more: " * 9 + row["prompt"]
    pairs = save_rows(tmp_path / "pairs.jsonl", rows)
    code, out, err = extract(model, pairs, tmp_path / "run")
    assert code == 0, err
    assert f"note: {model} has 48 positions: --max-length is 48 instead of 2048" in out
    shard = tmp_path / "run/activations/layer1-mean-00000-of-00001.safetensors"
    assert read_meta(shard)["max_length"] == 48
    out = succeed("01_extract", "--model", model, "--pairs", pairs, "--layer", 1,
                  "--run", tmp_path / "run", "--max-length", 48)
    assert "0 computed, 1 found complete" in out and "positions" not in out


def test_a_text_beyond_the_positions_is_not_read(tmp_path):
    backbone = stage1.load_backbone(save_model(tmp_path / "model", max_position_embeddings=20))
    list(backbone.hidden_rows([[9] * 20], [1]))
    with pytest.raises(UserError, match="21 tokens, the model has 20 positions"):
        list(backbone.hidden_rows([[9] * 20, [9] * 21], [1]))


@pytest.mark.parametrize("family, positions", [
    ("llama", {"max_position_embeddings": 60}), ("gpt2", {"n_positions": 60}),
    ("mistral", {"max_position_embeddings": 60}),
])
def test_sampling_beyond_the_positions_is_refused_first(family, positions, finished, tmp_path):
    policy = save_model(tmp_path / "policy", family, **positions)
    prompts = save_rows(tmp_path / "p.jsonl", [{"prompt": "Wet?"}, {"prompt": "Is it wet? " * 8}])
    args = ["--prompts", prompts, "--policy", policy, "--n", 2, "--batch-rows", 2,
            "--reward", finished / "reward_head.safetensors", "--out", tmp_path / "c.jsonl"]
    result = command("05_best_of_n", "sample", *args, "--max-new-tokens", 30)
    assert_one_line_error(result, "60 positions", policy)
    assert not list(tmp_path.glob("c.jsonl*"))


# ---------------------------------------------------------------- chat templates

def save_with_template(folder, template):
    """A tiny model whose tokenizer has this chat template, text or {name: text}."""
    import copy
    tokenizer = copy.deepcopy(tiny.make_tokenizer())
    tokenizer.chat_template = template
    return save_model(folder, tokenizer=tokenizer)


@pytest.mark.parametrize("template, words", [
    ({"plain": tiny.CHATML, "search": tiny.CHATML}, ["chat templates plain, search", "no default"]),
    ({"tools": tiny.CHATML}, ["chat templates tools", "no default"]),
    ("{% for m in messages %}{{ m['content'] }}", ["chat template fails"]),
    ("{{ nothing.at.all }}", ["chat template fails", "nothing"]),
    ("{{ raise_exception('not today') }}", ["chat template fails", "not today"]),
    ("{{ 1 / 0 }}", ["chat template fails", "division"]),
])
def test_a_chat_template_that_cannot_be_used_is_one_line(template, words, pairs, tmp_path):
    model = save_with_template(tmp_path / "model", template)
    assert_one_line_error(extract(model, pairs, tmp_path / "run"), *words, model)


def test_of_several_chat_templates_the_default_is_taken(tmp_path):
    templates = {"default": tiny.CHATML, "search": "{{ 1 / 0 }}"}
    several = stage1.load_backbone(save_with_template(tmp_path / "several", templates))
    one = stage1.load_backbone(save_with_template(tmp_path / "one", tiny.CHATML))
    assert several.meta["template"] == one.meta["template"]


# ---------------------------------------------------------------- changed, and found complete

def one_matrix(weights):
    """One matrix changes, as by a merged LoRA; no file changes its size."""
    weights["model.layers.1.mlp.up_proj.weight"] += 1
    return weights


CHANGES = {
    "weights": lambda folder: change_weights(folder, one_matrix),
    "tokenizer": lambda folder: change_json(folder / "tokenizer_config.json", eos_token="<pad>"),
    "config": lambda folder: change_json(folder / "config.json", hidden_act="relu"),
    "generation": lambda folder: change_json(folder / "generation_config.json", eos_token_id=9),
}


@pytest.mark.parametrize("what", ["weights", "tokenizer", "config"])
def test_activations_of_a_model_changed_in_place_are_not_found_complete(what, pairs, tmp_path):
    model = Path(save_model(tmp_path / "model", intermediate_size=4096))
    assert extract(model, pairs, tmp_path / "run")[0] == 0
    CHANGES[what](model)
    key = {"weights": "files"}.get(what, what)
    assert_one_line_error(extract(model, pairs, tmp_path / "run"), f"made with {key}",
                          "--overwrite")


@pytest.fixture
def sampling(finished, tmp_path):
    """A policy, and the command that samples from it → (folder, words, file that it writes)."""
    policy = Path(save_model(tmp_path / "policy", seed=3))
    prompts = save_rows(tmp_path / "prompts.jsonl", [{"prompt": "Is water wet?"}])
    out = tmp_path / "c.jsonl"
    return policy, ["sample", "--prompts", prompts, "--policy", policy, "--n", 3, "--out", out,
                    "--reward", finished / "reward_head.safetensors",
                    "--max-new-tokens", 9], out


@pytest.mark.parametrize("what", CHANGES)
def test_a_policy_changed_in_place_is_sampled_anew(what, sampling):
    policy, words, out = sampling
    succeed("05_best_of_n", *words)
    before = json.loads(out.read_text())
    CHANGES[what](policy)
    assert f"note: {out} is replaced" in succeed("05_best_of_n", *words)
    after = json.loads(out.read_text())
    assert after["models"] != before["models"]
    if what in ("weights", "config"):
        assert after["candidates"] != before["candidates"]


def test_candidates_are_scored_anew_with_another_copy_of_the_backbone(sampling, finished, tmp_path):
    _, words, out = sampling
    copy = shutil.copytree(finished.parent / "model", tmp_path / "copy")
    succeed("05_best_of_n", *words, "--model", copy)
    before = json.loads(out.read_text())
    change_weights(copy, lambda weights: {name: value * (1 + 1e-3) for name, value
                                          in weights.items()})
    succeed("05_best_of_n", *words, "--model", copy)
    after = json.loads(out.read_text())
    assert (after["candidates"], after["policy"]) == (before["candidates"], before["policy"])
    assert after["scores"] != before["scores"]


def test_candidates_of_an_unchanged_policy_are_kept(sampling, monkeypatch):
    policy, words, out = sampling
    succeed("05_best_of_n", *words)
    before = out.read_bytes()
    (policy / "trainer_state.json").write_text("{}")            # nothing that is read
    monkeypatch.setattr(models, "load_model", None)             # is not opened
    assert "is replaced" not in succeed("05_best_of_n", *words)
    assert out.read_bytes() == before


@pytest.mark.parametrize("place", [0, 0.3, 0.5, 0.77, 1])
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin",
                                  "model-00002-of-00002.safetensors"])
def test_the_fingerprint_of_a_model_hangs_on_every_byte(name, place, tmp_path):
    content = bytearray(os.urandom(700_000))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"first")
    (tmp_path / name).write_bytes(content)
    before = models.fingerprints(str(tmp_path), None, ["files"])
    content[round(place * (len(content) - 1))] ^= 1
    (tmp_path / name).write_bytes(content)
    assert models.fingerprints(str(tmp_path), None, ["files"]) != before


# ---------------------------------------------------------------- gone is not changed

@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished.parent, tmp_path / "all")
    return tmp_path / "all" / "run"


@pytest.mark.parametrize("stage, gone", [
    (["02_select_features", "--sae", "SAE"], "pairs.jsonl"),
    (["02_select_features", "--sae", "SAE"], "activations/layer1-mean-00000-of-00001.safetensors"),
    (["02_select_features", "--sae", "SAE"], "SAE"),
    (["03_train_head"], "features.safetensors"),
    (["04_evaluate", "--sae", "SAE"], "pairs.jsonl"),
    (["04_evaluate", "--sae", "SAE"], "features.safetensors"),
    (["04_evaluate", "--sae", "SAE"], "reward_head.safetensors"),
    (["04_evaluate", "--sae", "SAE"], "SAE"),
    (["tools/self_check"], "pairs.jsonl"),
    (["tools/self_check"], "reward_head.safetensors"),
])
def test_a_deleted_file_is_called_missing_not_another(stage, gone, run):
    sae = str(run.parent / "sae.safetensors")
    path = Path(sae) if gone == "SAE" else run / gone
    path.unlink()
    words = [sae if word == "SAE" else word for word in stage]
    code, _, err = command(*words, "--run", run)
    assert code == 2 and err.count("\n") == 1, err
    assert any(word in err for word in ("not found", "No such file", "no activations")), err
    assert "another" not in err and "not the" not in err


@pytest.mark.parametrize("again", [
    [["01_extract", "--layer", 1, "--token", "mean", "--max-length", 50, "--overwrite"]],
    [["02_select_features", "--k", 5]],
    [["01_extract", "--layer", 1, "--max-length", 50, "--overwrite"],
     ["02_select_features", "--k", 8]],
])
def test_stage_4_refuses_a_head_that_its_run_left_behind(again, run):
    folder = run.parent
    for script, *words in again:
        if script == "01_extract":
            words += ["--model", folder / "model", "--pairs", folder / "pairs.jsonl"]
        else:
            words += ["--sae", folder / "sae.safetensors"]
        succeed(script, "--run", run, *words)
    assert_one_line_error(command("04_evaluate", "--run", run, "--sae",
                                  folder / "sae.safetensors"), "again")
