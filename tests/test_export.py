"""05_best_of_n.py export: other people's programs read the rewards of the head."""

import argparse
import copy
import functools
import importlib
import json
import math
import re
import shlex
import statistics
from pathlib import Path

import pytest
import tiny
import torch
from test_models import save_vision_model
from test_templates import BRIEF, FAMILIES, LONG, tokenizer_of
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

import parts.export
from parts import models
from parts.files import UserError

stage1 = importlib.import_module("01_extract")
stage3 = importlib.import_module("03_train_head")
stage5 = importlib.import_module("05_best_of_n")
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning")      # theirs
NORMED = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"]
HEAD = Path("export", "reward_head.safetensors")


def make_head(folder, model, pairs=60, extract=(), train=(),
              select=("--token", "last", "--normalise", "rms")):
    """Stages 1 to 3 → the path of a head in folder/run/export."""
    run = folder / "run"
    rows = tiny.save_pairs(folder / "pairs.jsonl", pairs)
    sae = tiny.save_sae(folder / "sae.safetensors", layer=1, model=model)
    tiny.succeed("01_extract", "--model", model, "--pairs", rows, "--layer", 1, "--run", run,
                 "--token", "mean", "last", *extract)
    tiny.succeed("02_select_features", "--run", run, "--sae", sae, "--k", 8, "--name", "export",
                 *select)
    tiny.succeed("03_train_head", "--run", run, "--name", "export", *train)
    return run / HEAD


def train_norms(folder):
    """Give all norms of a model weights as training would: at first they change nothing."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data += 0.5 * tiny.draw(*weight.shape)
    model.save_pretrained(folder)


def refused_export(head, out, *flags):
    """(exit code, stdout, stderr) of an export that should fail."""
    return tiny.command("05_best_of_n", "export", "--reward", head, "--out", out, *flags)


def export(head, out, *flags):
    """Export a head → (the folder, its stdout)."""
    return out, tiny.succeed("05_best_of_n", "export", "--reward", head, "--out", out, *flags)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """family → (path of its head, its exported folder), made at the first use."""
    @functools.cache
    def get(family):
        folder = tmp_path_factory.mktemp("export") / family
        model = tiny.save_model(folder / "model", family)
        train_norms(model)
        head = make_head(folder, model)
        out, _ = export(head, folder / "out")
        return head, out
    return get


CHATS = [(row["prompt"], row[side]) for row in tiny.make_pairs(248)
         for side in ("chosen", "rejected")]
CHATS += [("One two?", "Three."), ("Four?", "x"), ("user assistant", "No, it is not. " * 20),
          ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"}], "green")]


def texts_of(tokenizer, chats):
    """Conversations rendered by a folder's own chat template → list of str."""
    return [tokenizer.apply_chat_template([*turns(prompt), said(answer)], tokenize=False)
            for prompt, answer in chats]


def turns(prompt):
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def said(answer):
    return {"role": "assistant", "content": answer}


def logits_of(folder, chats, side="right", rows=50):
    """Logits by transformers alone, in padded batches of `rows` → [n]."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    texts = texts_of(tokenizer, chats)
    found = []
    with torch.inference_mode():
        for start in range(0, len(texts), rows):
            batch = tokenizer(texts[start:start + rows], add_special_tokens=False, padding=True,
                              return_tensors="pt")
            found.append(model(**batch).logits[:, 0].float())
    return torch.cat(found)


def rewards_without_constant(head, chats):
    """reward - c of RewardModel → [n]."""
    reward = stage3.RewardModel.load(head)
    _, c = reward.vector()
    return torch.tensor(reward.score(*zip(*chats))) - c


def distance(found, wanted):
    """The largest difference, in std of what is wanted."""
    return float((found - wanted).abs().max() / wanted.std())


# ---------------------------------------------------------------- the same reward

@pytest.mark.parametrize("family", NORMED)
def test_the_logit_is_the_reward_without_its_constant_on_500_texts(family, exported):
    head, folder = exported(family)
    assert len(CHATS) == 500
    assert distance(logits_of(folder, CHATS), rewards_without_constant(head, CHATS)) < 1e-4


@pytest.mark.parametrize("family", NORMED)
def test_padding_on_the_left_and_a_batch_of_one_change_nothing(family, exported):
    _, folder = exported(family)
    chats = CHATS[-20:]
    right = logits_of(folder, chats)
    assert distance(logits_of(folder, chats, side="left"), right) < 1e-4
    assert distance(logits_of(folder, chats, rows=1), right) < 1e-4


def test_the_classifiers_vector_is_the_head_folded(exported):
    head, folder = exported("llama")
    reward = stage3.RewardModel.load(head)
    weight = torch.zeros(tiny.WIDTH, dtype=torch.float64)
    t = reward.tensors
    for j in range(len(t["latents"])):
        weight += t["w1"][j].double() / t["std"][j].double() * t["directions"][j].double()
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.allclose(model.score.weight[0].double(), weight, atol=1e-6)
    assert torch.equal(model.model.norm.weight, torch.ones(tiny.WIDTH))


def test_gemmas_neutral_norm_weight_is_0(exported):
    _, folder = exported("gemma2")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(model.model.norm.weight, torch.zeros(tiny.WIDTH))


def test_blocks_above_the_layer_are_cut_with_their_kinds(exported):
    _, folder = exported("qwen3")
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert config["layer_types"] == tiny.MIXED["layer_types"][:2]
    assert len(AutoModelForSequenceClassification.from_pretrained(folder).model.layers) == 2


def test_the_last_block_can_be_exported_too(tmp_path):
    model = tiny.save_model(tmp_path / "model")
    run = tmp_path / "run"
    sae = tiny.save_sae(tmp_path / "sae.safetensors", layer=tiny.LAYERS - 1, model=model)
    tiny.succeed("01_extract", "--model", model, "--pairs", tiny.save_pairs(tmp_path / "p.jsonl"),
                 "--layer", tiny.LAYERS - 1, "--run", run, "--token", "last")
    tiny.succeed("02_select_features", "--run", run, "--sae", sae, "--normalise", "rms")
    tiny.succeed("03_train_head", "--run", run)
    head = run / HEAD.name
    folder, _ = export(head, tmp_path / "out")
    chats = CHATS[-9:]
    assert distance(logits_of(folder, chats), rewards_without_constant(head, chats)) < 1e-4


def test_of_a_model_with_vision_the_language_model_is_exported(tmp_path):
    head = make_head(tmp_path, save_vision_model(tmp_path / "model"))
    folder, _ = export(head, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["Gemma3TextForSequenceClassification"]
    chats = CHATS[-9:]
    assert distance(logits_of(folder, chats), rewards_without_constant(head, chats)) < 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_saved_as_such_and_near(dtype, exported, tmp_path):
    head, whole = exported("llama")
    folder, printed = export(head, tmp_path / "out", "--dtype", dtype)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert model.dtype == getattr(torch, dtype) and dtype in printed
    apart = distance(logits_of(folder, CHATS[-20:]), logits_of(whole, CHATS[-20:]))
    assert 0 < apart < 0.5


# ---------------------------------------------------------------- the tokenizer

ENDS_IN_EOS = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}</s>"
               "{% endfor %}")


def tokenizer_with(template, pad=None, unk=None, reserved=(), eos="</s>"):
    """The tiny tokenizer with other tokens for padding, unknown, and for later."""
    tokenizer = copy.deepcopy(tiny.make_tokenizer(template))
    tokenizer.pad_token = pad
    tokenizer.unk_token = unk
    tokenizer.eos_token = eos
    if reserved:
        tokenizer.add_special_tokens({"additional_special_tokens": [*tiny.SPECIAL[3:], *reserved]})
    return tokenizer


PADS = {
    "there is one": (tokenizer_with(tiny.CHATML, "<pad>"), "<pad>"),
    "it ends the conversation": (tokenizer_with(ENDS_IN_EOS, "</s>", reserved=["<|reserved_1|>"]),
                                 "<|reserved_1|>"),
    "none, and one is reserved": (tokenizer_with(ENDS_IN_EOS, reserved=["<|python|>", "[unused3]"]),
                                  "[unused3]"),
    "none, and one is called pad": (
        tokenizer_with(ENDS_IN_EOS, reserved=["<|reserved_1|>", "<|finetune_right_pad_id|>"]),
        "<|finetune_right_pad_id|>"),
    "none, nothing reserved": (tokenizer_with(ENDS_IN_EOS, unk="<|im_end|>"), "<|im_end|>"),
}


@pytest.mark.parametrize("tokenizer, pad", PADS.values(), ids=PADS)
def test_no_conversation_ends_in_the_token_that_pads(tokenizer, pad, tmp_path):
    # the tiny tokenizer calls one token <pad>: hide it where it is not the one in use
    name = tokenizer.pad_token
    if name != "<pad>":
        tokenizer = without_the_name_pad(tokenizer)
    model = tiny.save_model(tmp_path / "model", tokenizer=tokenizer)
    head = make_head(tmp_path, model)
    folder, _ = export(head, tmp_path / "out")
    saved = AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert saved.pad_token == pad
    assert config["pad_token_id"] == saved.pad_token_id
    chats = CHATS[-12:]
    wanted = rewards_without_constant(head, chats)
    for side in ("left", "right"):
        assert distance(logits_of(folder, chats, side), wanted) < 1e-4


def without_the_name_pad(tokenizer):
    """The same tokenizer, <pad> renamed to <zero>."""
    text = tokenizer.backend_tokenizer.to_str().replace('"<pad>"', '"<zero>"')
    settings = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token",
                                                            "pad_token", "chat_template")}
    return type(tokenizer)(tokenizer_object=Tokenizer.from_str(text), **settings)


def test_without_any_token_to_pad_with_it_is_refused(tmp_path):
    tokenizer = without_the_name_pad(tokenizer_with(ENDS_IN_EOS))
    head = make_head(tmp_path, tiny.save_model(tmp_path / "model", tokenizer=tokenizer))
    refused = refused_export(head, tmp_path / "out")
    tiny.assert_one_line_error(refused, "pad", tmp_path / "model")
    assert not (tmp_path / "out").exists()


def test_a_pad_token_beyond_the_embedding_is_not_taken():
    tokenizer = tokenizer_with(ENDS_IN_EOS, unk="<|im_end|>", reserved=["<|reserved_1|>"])
    tokenizer = without_the_name_pad(tokenizer)
    number = tokenizer.convert_tokens_to_ids("<|reserved_1|>")
    assert parts.export.pad_token(tokenizer, number + 1, "m") == "<|reserved_1|>"
    assert parts.export.pad_token(tokenizer, number, "m") == "<|im_end|>"


DATED = ("<|im_start|>system\n{{ strftime_now('%d %b %Y') }}{% if date_string is defined %}"
         " {{ date_string }}{% endif %}<|im_end|>\n" + tiny.CHATML)


def test_the_saved_template_writes_the_day_of_training(tmp_path):
    model = tiny.save_model(tmp_path / "model", template=DATED)
    head = make_head(tmp_path, model)
    folder, _ = export(head, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    [text] = texts_of(tokenizer, [("One?", "Two.")])
    assert text.startswith("<|im_start|>system\n26 Jul 2024 26 Jul 2024<|im_end|>\n<|im_start|>u")
    ours = stage1.render(stage1.load_tokenizer(model), "One?", "Two.")
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ours.ids


@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_tokenizer_gives_the_ids_of_training(family, tmp_path):
    tokenizer = tokenizer_of(family)
    parts.export.exported_tokenizer(tokenizer, len(tokenizer), 100, "m").save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    for prompt in ("Is water wet?", LONG, [BRIEF, *LONG], [BRIEF, LONG[0]]):
        text = parts.export.chat_text(saved, prompt, "Yes, it is.")
        assert saved(text)["input_ids"] == stage1.render(tokenizer, prompt, "Yes, it is.").ids


def test_a_text_that_is_cut_keeps_its_end(exported):
    _, folder = exported("llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("One two three four five.", add_special_tokens=False)["input_ids"]
    cut = tokenizer("One two three four five.", add_special_tokens=False, truncation=True,
                    max_length=3)["input_ids"]
    assert cut == ids[-3:] != ids[:3]
    assert tokenizer.model_max_length == 2048


# ---------------------------------------------------------------- pipeline

@pytest.mark.parametrize("settings", [{}, {"function_to_apply": "none"}], ids=["default", "none"])
def test_pipeline_gives_the_reward_of_rendered_text(settings, exported):
    head, folder = exported("gemma2")
    chats = CHATS[-6:]
    pipe = pipeline("text-classification", model=str(folder), **settings)
    texts = texts_of(pipe.tokenizer, chats)
    found = pipe(texts, add_special_tokens=False, batch_size=3)
    assert {row["label"] for row in found} == {"reward"}
    scores = torch.tensor([row["score"] for row in found])
    assert distance(scores, rewards_without_constant(head, chats)) < 1e-4


def test_the_lines_of_the_docs_print_the_reward(exported, tmp_path, monkeypatch, capsys):
    head, folder = exported("llama")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/reward-model").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    text = (tiny.ROOT / "docs/formats.md").read_text("utf-8")
    [lines] = [block for block in re.findall(r"```python\n(.*?)```", text, re.S)
               if "pipeline(" in block]
    exec(compile(lines, "docs/formats.md", "exec"), {})
    [wanted] = rewards_without_constant(head, [("Is water wet?", "Yes.")])
    shown = float(re.search(r"'score': (-?[\d.]+)", capsys.readouterr().out)[1])
    assert shown == pytest.approx(float(wanted), abs=1e-4)


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "LlamaTokenizer", "GemmaTokenizer"])
def test_bos_is_written_once_whether_special_tokens_are_asked_for_or_not(kind, tmp_path):
    model = tiny.save_model(tmp_path / "model", template=tiny.NO_SYSTEM)
    settings = Path(model, "tokenizer_config.json")
    found = json.loads(settings.read_text())
    found |= {"tokenizer_class": kind, "add_bos_token": True, "unk_token": "<s>"}
    settings.write_text(json.dumps(found))
    assert AutoTokenizer.from_pretrained(model)("a")["input_ids"][0] == 1       # <s>
    head = make_head(tmp_path, model)
    folder, _ = export(head, tmp_path / "out")
    pipe = pipeline("text-classification", model=str(folder))
    chats = CHATS[-6:]
    texts = texts_of(pipe.tokenizer, chats)
    assert texts[0].startswith("<s>")
    wanted = rewards_without_constant(head, chats)
    for settings in ({}, {"add_special_tokens": False}, {"add_special_tokens": True}):
        scores = torch.tensor([row["score"] for row in pipe(texts, **settings)])
        assert distance(scores, wanted) < 1e-4
    before = stage1.load_tokenizer(model)
    assert before("a")["input_ids"][0] == 1                 # the backbone's own is as it was


LOSES_SYSTEM = ("{% for m in messages %}{% if m.role == 'system' and loop.last %}{{ m.content }}"
                "{% elif m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
                "{% endif %}{% endfor %}")


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.NO_SYSTEM, LOSES_SYSTEM],
                         ids=["printed", "refused", "lost"])
def test_a_system_turn_counts_as_in_training_whatever_the_template_does(template, tmp_path):
    head = make_head(tmp_path, tiny.save_model(tmp_path / "model", template=template))
    folder, _ = export(head, tmp_path / "out")
    talk = [{"role": "user", "content": "Is water wet?"}]
    chats = [([{"role": "system", "content": system}, *talk], "Yes.")
             for system in ("Answer in one short sentence.", "Be green.", "No, it is not.")]
    wanted = rewards_without_constant(head, chats)
    assert wanted.std() > 0.1
    assert distance(logits_of(folder, chats), wanted) < 1e-4


# ---------------------------------------------------------------- TRL

def grpo(folder, prompts, out):
    """One GRPO step with the folder as the reward → TRL's record of completions and rewards."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    config = trl.GRPOConfig(output_dir=str(out), max_steps=1, use_cpu=True, bf16=False,
                            report_to="none", save_strategy="no", disable_tqdm=True,
                            num_generations=4, per_device_train_batch_size=4 * len(prompts),
                            max_completion_length=12, log_completions=True, logging_steps=1)
    data = datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    trainer = trl.GRPOTrainer(model=str(folder.parent / "model"), reward_funcs=str(folder),
                              args=config, train_dataset=data)
    trainer.train()
    [file] = (out / "completions").glob("*.parquet")
    return parquet.read_table(file).to_pylist()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_grpo_takes_the_folder_as_its_reward(family, exported, tmp_path):
    head, folder = exported(family)
    prompts = [turns("Is water wet?"), turns("One two three four five?")]
    rows = grpo(folder, prompts, tmp_path)
    assert len(rows) == 8
    # RewardModel gives an empty answer no score, a classifier does
    rows = [row for row in rows if row["completion"][0]["content"].strip()]
    assert len(rows) > 4
    chats = [(row["prompt"], row["completion"][0]["content"]) for row in rows]
    found = torch.tensor([row[folder.name] for row in rows])
    assert distance(found, rewards_without_constant(head, chats)) < 1e-4


def test_trls_reward_trainer_evaluates_the_folder_to_our_accuracy_and_loss(exported, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    head, folder = exported("llama")
    pairs = [(row["prompt"], row["chosen"], row["rejected"]) for row in tiny.make_pairs(30)]
    data = datasets.Dataset.from_list([{"prompt": turns(prompt), "chosen": [said(chosen)],
                                        "rejected": [said(rejected)]}
                                       for prompt, chosen, rejected in pairs])
    config = trl.RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False,
                              report_to="none", disable_tqdm=True, per_device_eval_batch_size=7)
    trainer = trl.RewardTrainer(model=str(folder), args=config, train_dataset=data,
                                eval_dataset=data)
    found = trainer.evaluate()

    reward = stage3.RewardModel.load(head)
    prompts, chosen, rejected = zip(*pairs)
    gaps = [a - b for a, b in zip(reward.score(prompts, chosen), reward.score(prompts, rejected))]
    assert 0 < sum(gap > 0 for gap in gaps) < len(gaps)
    losses = [math.log1p(math.exp(-gap)) for gap in gaps]
    assert found["eval_loss"] == pytest.approx(statistics.mean(losses), abs=1e-4)
    # TRL averages over batches
    batches = [gaps[start:start + 7] for start in range(0, 30, 7)]
    accuracies = [sum(gap > 0 for gap in batch) / len(batch) for batch in batches]
    assert found["eval_accuracy"] == pytest.approx(statistics.mean(accuracies), abs=0.02)


# ---------------------------------------------------------------- what does not fit

MISFITS = {
    "rule mean": (("--token", "mean", "--normalise", "rms"), (), ["rule mean"]),
    "z as it is": (("--token", "last"), (), ["z as it is"]),
    "an MLP": (("--token", "last", "--normalise", "rms"), ("--head", "mlp", "--hidden", 4),
               ["MLP"]),
}


@pytest.mark.parametrize("select, train, words", MISFITS.values(), ids=MISFITS)
def test_a_head_that_does_not_fit_is_refused_with_commands_that_make_one(select, train, words,
                                                                         tmp_path):
    head = make_head(tmp_path, tiny.save_model(tmp_path / "model"), select=select, train=train)
    out = tmp_path / "out"
    refused = refused_export(head, out)
    tiny.assert_one_line_error(refused, head, *words)
    assert not out.exists()

    before = head.read_bytes()
    commands = re.findall(r"python (\d\d_\w+)\.py (.*?)(?: &&|$)", refused[2], re.MULTILINE)
    assert [script for script, _ in commands] == ["02_select_features", "03_train_head"]
    for script, flags in commands:
        tiny.succeed(script, *shlex.split(flags))
    assert head.read_bytes() == before
    head = tmp_path / "run/export-rms/reward_head.safetensors"      # export is the name of this one
    export(head, out)
    chats = CHATS[-5:]
    assert distance(logits_of(out, chats), rewards_without_constant(head, chats)) < 1e-4


def test_where_last_was_not_extracted_stage_1_is_named_first(finished, tmp_path):
    refused = refused_export(finished / HEAD.name, tmp_path / "out")
    tiny.assert_one_line_error(refused, "stage 1 again with --token mean last, then python 02_")


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "phi"])
def test_a_model_that_ends_in_another_norm_is_refused(family, tmp_path):
    head = make_head(tmp_path, tiny.save_model(tmp_path / "model", family))
    refused = refused_export(head, tmp_path / "out")
    tiny.assert_one_line_error(refused, tmp_path / "model", "norm")
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_a_family_without_a_classifier_is_refused(folder_of, monkeypatch):
    backbone = stage1.load_backbone(folder_of("llama"))
    backbone.model.config.__class__ = type("OtherConfig", (type(backbone.model.config),), {})
    with pytest.raises(UserError, match="no sequence classifier for llama"):
        parts.export.class_and_config(backbone, 1, torch.float32)


OTHERS = {"twice u": 2.0, "no number": math.nan}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("factor", OTHERS.values(), ids=OTHERS)
def test_a_folder_that_gives_other_rewards_is_not_left_there(factor, dtype, exported, tmp_path,
                                                             monkeypatch):
    head, _ = exported("llama")

    def of_another_vector(backbone, layer, u, *args, make=parts.export.sequence_classifier):
        return make(backbone, layer, factor * u, *args)
    monkeypatch.setattr(parts.export, "sequence_classifier", of_another_vector)
    refused = refused_export(head, tmp_path / "new/out", "--dtype", dtype)
    tiny.assert_one_line_error(refused, "other rewards")
    assert list(tmp_path.iterdir()) == []


def test_quantised_weights_are_refused(folder_of):
    backbone = stage1.load_backbone(folder_of("llama"))
    matrix = backbone.blocks[0].mlp.down_proj
    matrix.weight = torch.nn.Parameter(matrix.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UserError, match="layers.0.mlp.down_proj.weight .quantised"):
        parts.export.sequence_classifier(backbone, 1, torch.zeros(tiny.WIDTH),
                                         backbone.meta["norm_eps"], torch.float32)


@pytest.mark.parametrize("family", ["olmo2", "mixtral", "smollm3"])
def test_other_families_of_that_form_are_exported_too(family, tmp_path, monkeypatch):
    monkeypatch.setitem(tiny.FAMILIES, family, tiny.SIZES | {"num_local_experts": 4})
    head = make_head(tmp_path, tiny.save_model(tmp_path / "model", family))
    folder, _ = export(head, tmp_path / "out")
    chats = CHATS[-9:]
    assert distance(logits_of(folder, chats), rewards_without_constant(head, chats)) < 1e-4


def test_a_head_of_short_texts_is_exported(tmp_path):
    model = tiny.save_model(tmp_path / "model")
    head = make_head(tmp_path, model, extract=("--max-length", "40"))
    folder, _ = export(head, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(folder).model_max_length == 40


def test_what_a_killed_export_left_goes_with_the_next(exported, tmp_path):
    head, _ = exported("llama")
    (tmp_path / ".out.0123abcd.part").mkdir()
    (tmp_path / ".out.0123abcd.part/model.safetensors").write_text("half")
    others = {".other.0123abcd.part", ".out.v2.0123abcd.part"}
    for name in others:
        (tmp_path / name).mkdir()
    export(head, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", *others}


def test_a_place_that_cannot_be_written_is_named_by_its_own_name(exported, tmp_path):
    head, _ = exported("llama")
    (tmp_path / "file").write_text("")
    refused = refused_export(head, tmp_path / "file/out")
    tiny.assert_one_line_error(refused, f"{tmp_path}/file/out · ")


def test_a_folder_that_exists_is_not_replaced(exported):
    head, folder = exported("llama")
    before = (folder / "config.json").read_bytes()
    refused = refused_export(head, folder)
    tiny.assert_one_line_error(refused, "exists", folder)
    assert (folder / "config.json").read_bytes() == before


def test_a_folder_in_the_place_of_the_head_is_named_as_such(exported, tmp_path):
    head, _ = exported("llama")
    refused = refused_export(head.parent, tmp_path / "out")
    tiny.assert_one_line_error(refused, "a folder", head.parent)


def test_files_are_readable_by_all_whom_the_umask_lets(exported, tmp_path):
    _, folder = exported("llama")
    (tmp_path / "any").touch()
    mode = (tmp_path / "any").stat().st_mode
    assert {path.stat().st_mode for path in folder.iterdir()} == {mode}


# ---------------------------------------------------------------- the model card

def card_of(folder):
    return (folder / "README.md").read_text("utf-8")


def test_the_card_says_how_it_was_made(exported):
    from huggingface_hub import ModelCard
    head, folder = exported("llama")
    card = card_of(folder)
    reward = stage3.RewardModel.load(head)
    _, c = reward.vector()
    assert f"the constant {c:.6g}" in card
    assert reward.meta["parent"]["pairs"] in card and "| 2048 (" in card
    assert "stands '<|im_end|>\\n'" in card
    for words in ("up to block 1", "| sae.safetensors |", "not stated", "`<pad>`"):
        assert words in card
    assert str(folder.parent) not in card
    found = ModelCard(card).data
    assert found.pipeline_tag == "text-classification" and found.get("license") is None


@pytest.mark.parametrize("files, is_named", [("ab" * 20, True), ("ab" * 8, False)])
def test_the_base_model_is_named_where_it_is_of_the_hub(files, is_named, exported):
    head, _ = exported("llama")
    reward = stage3.RewardModel.load(head)
    reward.meta = {**reward.meta, "model": "org/name", "files": files}      # a commit, or a hash
    facts = stage5.facts_of(argparse.Namespace(model=None, reward=head), reward, 1.0)
    card = parts.export.model_card(facts, reward.backbone.tokenizer)
    assert ("base_model: org/name\n" in card) == is_named
    assert ("| org/name, up to" in card) == is_named


def evaluate(folder):
    """Stage 4 on the head of make_head(), by three folds."""
    tiny.succeed("04_evaluate", "--run", folder / "run", "--name", "export", "--texts", 0,
                 "--folds", 3)


def test_the_card_has_the_test_accuracy_of_stage_4_and_the_licence(tmp_path):
    model = tiny.save_model(tmp_path / "model")
    Path(model, "README.md").write_text("---\nlicense: mit\n---\n")
    head = make_head(tmp_path, model)
    evaluate(tmp_path)
    evaluation = json.loads((head.parent / "evaluation.json").read_text())
    test = evaluation["test"]
    folder, _ = export(head, tmp_path / "out")
    wanted = f"{test['accuracy']:.3f} [{test['low']:.3f}, {test['high']:.3f}] of {test['n']} test"
    assert wanted in card_of(folder)
    assert all(f"\n* {sentence}\n" in card_of(folder) for sentence in evaluation["verdict"])
    assert "By 3 folds over all pairs" in card_of(folder)
    assert "on pairs.jsonl: pairs with" in card_of(folder)
    assert "license: mit" in card_of(folder) and "| mit |" in card_of(folder)


def test_the_accuracy_of_another_head_is_not_told(tmp_path):
    head = make_head(tmp_path, tiny.save_model(tmp_path / "model"))
    evaluate(tmp_path)
    tiny.succeed("03_train_head", "--run", tmp_path / "run", "--name", "export", "--k", 2)
    folder, _ = export(head, tmp_path / "out")
    assert "of the training pairs, cross-validated" in card_of(folder)
    assert "It was not evaluated" in card_of(folder)


CARDS = {"no YAML": "---\nlicense: [mit\n---\n", "no head": "Hello", "a list": "---\n- a\n---\n"}


@pytest.mark.parametrize("text", CARDS.values(), ids=CARDS)
def test_a_readme_that_states_no_licence_stops_nothing(text, tmp_path):
    model = tiny.save_model(tmp_path / "model")
    Path(model, "README.md").write_text(text)
    assert models.licence_of(model) is None


def test_the_licence_of_a_gguf_is_that_of_its_metadata(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert models.licence_of(str(tmp_path / "m.gguf")) == "apache-2.0"


def test_the_card_tells_no_path_of_a_model_that_was_moved(tmp_path):
    model = tiny.save_model(tmp_path / "secret/model")
    head = make_head(tmp_path, model)
    (tmp_path / "secret").rename(tmp_path / "elsewhere")
    folder, _ = export(head, tmp_path / "out", "--model", tmp_path / "elsewhere/model")
    assert "secret" not in card_of(folder) and "base_model" not in card_of(folder)


def test_a_damaged_evaluation_is_not_told(tmp_path):
    head = make_head(tmp_path, tiny.save_model(tmp_path / "model"))
    evaluate(tmp_path)
    whole = (head.parent / "evaluation.json").read_text()
    other = json.loads(whole)
    other["test"]["accuracy"] = 0.99
    for n, text in enumerate(["[1]", whole[:-9], json.dumps(other)]):
        (head.parent / "evaluation.json").write_text(text)
        folder, _ = export(head, tmp_path / f"out{n}")
        assert "It was not evaluated" in card_of(folder)
