"""Data that is odd rather than wrong, and texts that must get one score however they are read."""

import builtins
import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny import assert_one_line_error, command, save_rows, succeed

from parts import files
from parts.files import read_meta, write_text

stage1, stage2, stage3, stage4 = (importlib.import_module(n) for n in ("01_extract", "02_select_features", "03_train_head", "04_evaluate"))


# ---------------------------------------------------------------- NaN and Inf

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pair_whose_activations_are_not_finite_is_named_and_no_shard_is_written(value, tmp_path, folder_of, monkeypatch):
    pairs, real = tiny.save_pairs(tmp_path / "p.jsonl", 6), stage1.fill_residuals

    def spoilt(out, *rest):
        real(out, *rest)[0, 7, 3] = value           # the rejected side of the fourth pair
        return out
    monkeypatch.setattr(stage1, "fill_residuals", spoilt)
    with tiny.argv("--model", folder_of("llama"), "--pairs", pairs, "--layer", 1, "--run", tmp_path / "run"), \
            pytest.raises(stage1.UserError, match="NaN or Inf.* · pair p3 · "):
        stage1.main()
    assert not (tmp_path / "run/activations").exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("file, script", [("activations/layer1-00000-of-00001.safetensors", "02_select_features"),
                                          ("features.safetensors", "03_train_head")])
def test_numbers_that_are_not_finite_are_never_trained_on(value, file, script, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    tensors, meta = stage1.load_stage(run / file)
    tensors["rejected"][5, 2] = value
    save_file(tensors, run / file, {"sparserm": json.dumps(meta, sort_keys=True)})
    made = {"02_select_features": "features.safetensors", "03_train_head": "reward_head.safetensors"}[script]
    (run / made).unlink()
    more = ["--sae", finished.parent / "sae.safetensors"] if script[1] == "2" else []
    assert_one_line_error(command(script, "--run", run, *more), "NaN or Inf in rejected, line 6 of pairs.jsonl", file)
    assert not (run / made).exists()


# ---------------------------------------------------------------- odd sets

def stages(folder, rows, *stage1_args, k=8):
    """Stages 1 to 4 on some rows → (exit code, stdout, stderr) of the first that fails, or of the last."""
    model, sae = tiny.save_model(folder / "model"), tiny.save_sae(folder / "sae.safetensors", layer=1)
    pairs, run = save_rows(folder / "p.jsonl", rows), folder / "run"
    for script, *words in (("01_extract", "--model", model, "--pairs", pairs, "--layer", 1, "--run", run, *stage1_args),
                           ("02_select_features", "--run", run, "--sae", sae, "--k", k), ("03_train_head", "--run", run, "--seeds", 1),
                           ("04_evaluate", "--run", run, "--texts", 0, "--seeds", 1, "--sweeps", "none")):
        result = command(script, *words)
        if result[0]:
            break
    return result


def test_one_pair_is_extracted_and_then_refused(tmp_path):
    code, out, err = stages(tmp_path, tiny.make_pairs(1), "--split", "1,0,0")
    assert_one_line_error((code, out, err))
    assert re.search("no latent|dev split", err) and (tmp_path / "run/activations/layer1-00000-of-00001.safetensors").exists()


def test_many_answers_to_one_question_fall_in_one_split_and_are_refused(tmp_path):
    assert_one_line_error(stages(tmp_path, [row | {"prompt": "Is water wet?"} for row in tiny.make_pairs(20)]), "split", "more pairs")


def test_more_latents_asked_for_than_separate_keeps_those_that_do_and_says_so(tmp_path):
    code, _, err = stages(tmp_path, tiny.make_pairs(60), k=5000)
    meta = read_meta(tmp_path / "run/features.safetensors")
    assert code == 0 and 0 < meta["k"] < 64 and meta["k_asked"] == 5000, err
    sae = tmp_path / "sae.safetensors"
    assert "only so many separate; 5000 asked" in succeed("02_select_features", "--run", tmp_path / "run", "--sae", sae, "--k", 5000)


def test_a_direction_whose_score_never_changes_keeps_std_1_and_adds_nothing(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    shard = next((run / "activations").iterdir())
    tensors, meta = load_file(shard), read_meta(shard)
    sae = importlib.import_module("sae").load_sae(finished.parent / "sae.safetensors")
    direction = sae.W_dec[int(load_file(run / "features.safetensors")["latents"][0])]
    for side in ("chosen", "rejected"):             # every z has the same part along it
        tensors[side] += (3.0 - tensors[side] @ direction)[:, None] * direction
    save_file(tensors, shard, {"sparserm": json.dumps(meta, sort_keys=True)})
    directions = torch.stack([direction, sae.W_dec[1]])
    table = stage2.project([shard], directions)
    mean, std = stage2.standardisation((table["chosen"], table["rejected"]), table["split"] == 0)
    assert std[0] == 1 and mean[0] == pytest.approx(3, abs=1e-4) and std[1] != 1
    x = [(table[side] - mean) / std for side in ("chosen", "rejected")]
    head, loss = stage3.fit_head(*x, table["split"], epochs=20)
    assert (x[0][:, 0] * head["w1"][0]).abs().max() < 1e-6 and loss == loss
    succeed("02_select_features", "--run", run, "--sae", finished.parent / "sae.safetensors", "--k", 8)
    succeed("03_train_head", "--run", run, "--seeds", 1)
    assert all(t.isfinite().all() for t in load_file(run / "reward_head.safetensors").values())


def test_scores_that_are_all_ties_give_accuracy_0_and_ties_1_and_no_crash(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    tensors, meta = stage1.load_stage(run / "features.safetensors")
    tensors["rejected"] = tensors["chosen"].clone()
    stage1.save_stage(run / "features.safetensors", tensors, meta)
    assert "train 0.000 · dev 0.000" in succeed("03_train_head", "--run", run, "--seeds", 1)
    head, _ = stage1.load_stage(run / "reward_head.safetensors")
    assert not head["w1"].any() and head["temperature"] == 1
    row = stage4.summary(torch.zeros(1, 9).numpy(), torch.arange(9).numpy())
    assert (row["accuracy"], row["ties"], row["ties_half"]) == (0, 1, 0.5)


# ---------------------------------------------------------------- same text, same score

@pytest.fixture(scope="module", params=["llama", "gemma2"])
def reward(request, tmp_path_factory):
    """A trained head on a family; gemma2 mixes sliding and full attention."""
    folder = tmp_path_factory.mktemp("same")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.save_model, "__defaults__", (request.param, *tiny.save_model.__defaults__[1:]))
        run = tiny.make_run(folder)
    model = stage3.RewardModel.load(run / "reward_head.safetensors")
    model.run = run
    return model


TEXTS = [(row["prompt"], row[side]) for row in tiny.make_pairs(40) for side in ("chosen", "rejected")]
ODD = [("Is water wet?", "It is. " * 40), ("a", "b"), ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"},
                                                       {"role": "user", "content": "s"}], "It is blue.")]


@settings(max_examples=40)
@given(st.data())
def test_a_text_has_one_score_whatever_the_batch_the_order_the_packing_and_its_neighbours(reward, data):
    size, backbone = data.draw(st.integers(1, 64)), reward.backbone
    some = data.draw(st.permutations(TEXTS + ODD))[:size]
    target = data.draw(st.sampled_from(some))
    alone = reward.score([target[0]], [target[1]])[0]
    was = backbone.pack, backbone.budget, backbone.tokenizer.padding_side
    try:
        backbone.pack, backbone.budget = data.draw(st.sampled_from(["tree", "pad"])), data.draw(st.sampled_from([1, 64, 300, 5000]))
        backbone.tokenizer.padding_side = data.draw(st.sampled_from(["left", "right"]))
        scores = reward.score(*zip(*some))
    finally:
        backbone.pack, backbone.budget, backbone.tokenizer.padding_side = was
    spread = torch.tensor(reward.score(*zip(*TEXTS))).std()
    assert abs(scores[some.index(target)] - alone) <= 1e-3 * spread


def test_left_padded_batches_of_transformers_give_the_same_scores(reward):
    some, backbone = TEXTS[:6] + ODD, reward.backbone
    ids = [reward.render(*text).ids for text in some]
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(i)) + i for i in ids])
    mask = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i in ids])
    with torch.inference_mode():
        out = backbone.model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0), output_hidden_states=True)
    scores = reward.score(*zip(*some))
    theirs = reward.reward_of(out.hidden_states[reward.meta["layer"] + 1][:, -1].float())
    assert (theirs - torch.tensor(scores)).abs().max() <= 1e-3 * torch.tensor(scores).std()


def test_another_process_gives_the_same_scores(reward):
    code = ("import importlib, json; import test_odd_data as t; "
            f"model = t.stage3.RewardModel.load({str(reward.run / 'reward_head.safetensors')!r}); "
            "print(json.dumps(model.score(*zip(*t.TEXTS[:12]))))")
    path = os.pathsep.join(map(str, (tiny.ROOT, tiny.ROOT / "tests")))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "3"})
    here = reward.score(*zip(*TEXTS[:12]))
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(here, abs=1e-3 * float(torch.tensor(here).std()))


# ---------------------------------------------------------------- what is opened, and how often

def test_no_file_is_hashed_twice_in_one_command(finished, tmp_path, monkeypatch):
    other = shutil.copytree(finished, tmp_path / "other")
    rows = save_rows(tmp_path / "prompts.jsonl", [{"prompt": "Is water wet?"}])
    seen, read = [], stage1.hashlib.file_digest
    monkeypatch.setattr(stage1.hashlib, "file_digest", lambda file, kind: seen.append(os.path.realpath(file.name)) or read(file, kind))
    pairs, sae = finished.parent / "pairs.jsonl", finished.parent / "sae.safetensors"
    head = other / "reward_head.safetensors"
    save_rows(tmp_path / "other.jsonl", [row | {"prompt": row["prompt"] + " Surely?"} for row in tiny.make_pairs(40)])
    model = finished.parent / "model"
    succeed("01_extract", "--model", model, "--pairs", tmp_path / "other.jsonl", "--layer", 1, "--run", tmp_path / "third")
    for script, *words in (("01_extract", "--model", model, "--pairs", pairs, "--layer", 1, "--run", other),
                           ("02_select_features", "--run", other, "--sae", sae, "--k", 7), ("03_train_head", "--run", other, "--seeds", 1),
                           ("03_train_head", "--run", other, "--check"),
                           ("04_evaluate", "--run", other, "--seeds", 1, "--sweeps", "none", "--other", f"x={tmp_path / 'third'}"),
                           ("05_best_of_n", "sample", "--reward", head, "--prompts", rows, "--n", 2, "--max-new-tokens", 3)):
        files.hash_once.cache_clear()              # a command is a process of its own
        seen.clear()
        assert command(script, *words)[0] in (0, 1)
        assert seen and len(seen) == len(set(seen)), (script, seen)


def test_a_changed_file_is_hashed_anew(tmp_path):
    hashes = set()
    for text in ("a", "b", "cc"):
        write_text(tmp_path / "x", text)
        hashes.add(stage1.file_hash(tmp_path / "x"))
    assert len(hashes) == 3


def test_no_path_in_a_data_row_is_opened(tmp_path, folder_of, finished, monkeypatch):
    trap = tmp_path / "trap.txt"
    trap.write_text("secret")
    rows = [{**row, "id": str(trap), "prompt": f"{row['prompt']} {trap}", "source": str(trap), "image": str(trap), "file": f"file://{trap}",
             "category": str(trap)} for row in tiny.make_pairs(10)]
    opened, real = [], builtins.open
    monkeypatch.setattr(builtins, "open", lambda file, *a, **k: opened.append(str(file)) or real(file, *a, **k))
    pairs = save_rows(tmp_path / "p.jsonl", rows)
    succeed("01_extract", "--model", folder_of("llama"), "--pairs", pairs, "--layer", 1, "--run", tmp_path / "run")
    for command_, flag in (("rank", "--candidates"), ("sample", "--prompts")):
        rows = [{"prompt": str(trap), "candidates": [str(trap), f"@{trap}"], "id": str(trap)}]
        succeed("05_best_of_n", command_, flag, save_rows(tmp_path / "c.jsonl", rows), "--reward", finished / "reward_head.safetensors",
                "--out", tmp_path / "out.jsonl", *(["--n", 1, "--max-new-tokens", 2] if command_ == "sample" else []))
    assert opened and not [name for name in opened if "trap" in name]
    assert "secret" not in (tmp_path / "run/pairs.jsonl").read_text() + (tmp_path / "out.jsonl").read_text()


def test_no_script_unpickles_runs_remote_code_or_evaluates_text():
    sources = {p: p.read_text("utf-8") for p in [*tiny.ROOT.glob("*.py"), *(tiny.ROOT / "parts").glob("*.py")]}
    assert len(sources) >= 8
    for path, text in sources.items():
        calls = r"pickle\.(load|Unpickler)|trust_remote_code|allow_pickle=True|weights_only=False|\b(eval|exec)\(|os\.system|shell=True"
        assert not re.search(calls, text.replace("model.eval()", "")), path
        assert all("weights_only=True" in call for call in re.findall(r"torch\.load\(.*", text)), path


def test_a_model_with_code_of_its_own_is_refused_and_the_code_not_run(tmp_path, folder_of):
    shutil.copytree(folder_of("llama"), tmp_path / "model")
    (tmp_path / "model/modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config |= {"model_type": "own", "auto_map": {n: f"modeling_own.{n}" for n in ("AutoConfig", "AutoModelForCausalLM")}}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert_one_line_error(command("01_extract", "--model", tmp_path / "model", "--pairs", tiny.save_pairs(tmp_path / "p.jsonl", 4),
                                  "--layer", 1, "--run", tmp_path / "run"), tmp_path / "model")
    assert not (tmp_path / "ran").exists()
