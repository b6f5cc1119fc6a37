"""Data that is odd rather than wrong, and texts that must get one score however they are read."""

import builtins
import importlib
import io
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import assert_one_line_error, command, save_rows, succeed

from parts import files
from parts.files import load_stage, read_meta, save_stage, write_text
from parts.statistics import summary
from sae import load_sae

stage1 = importlib.import_module("01_extract")
stage2 = importlib.import_module("02_select_features")
stage3 = importlib.import_module("03_train_head")
SHARD = "activations/layer1-mean-00000-of-00001.safetensors"


@pytest.fixture
def run(finished, tmp_path):
    """A finished run that a test may change."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def sae(finished):
    """The SAE of the finished run → its path."""
    return finished.parent / "sae.safetensors"


# ---------------------------------------------------------------- NaN and Inf

@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pair_with_a_state_that_is_not_finite_is_named(value, tmp_path, folder_of, monkeypatch):
    pairs = tiny.save_pairs(tmp_path / "p.jsonl", 6)
    fill_residuals = stage1.fill_residuals

    def spoilt(out, *rest):
        fill_residuals(out, *rest)
        out[1, "mean"][7, 3] = value                # the rejected side of the fourth pair
        return out

    monkeypatch.setattr(stage1, "fill_residuals", spoilt)
    args = ["--model", folder_of("llama"), "--pairs", pairs, "--layer", 1]
    with tiny.argv(*args, "--run", tmp_path / "run"):
        with pytest.raises(stage1.UserError, match="NaN or Inf.* · pair p3 · "):
            stage1.main()
    assert not (tmp_path / "run/activations").exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("stage, read, made", [
    (2, SHARD, "features.safetensors"),
    (3, "features.safetensors", "reward_head.safetensors"),
], ids=["stage 2", "stage 3"])
def test_numbers_that_are_not_finite_are_never_trained_on(stage, read, made, value, run, sae):
    tensors, meta = load_stage(run / read)
    tensors["rejected"][5, 2] = value
    save_stage(run / read, tensors, meta)
    (run / made).unlink()
    if stage == 2:
        result = command("02_select_features", "--run", run, "--sae", sae)
    else:
        result = command("03_train_head", "--run", run)
    assert_one_line_error(result, "NaN or Inf in rejected, line 6 of pairs.jsonl", read)
    assert not (run / made).exists()


# ---------------------------------------------------------------- odd sets

def stages(folder, rows, *stage1_args, family="llama"):
    """Stages 1 to 3 on some rows → result of the first that fails, or of the last."""
    model = tiny.save_model(folder / "model", family)
    sae = tiny.save_sae(folder / "sae.safetensors", layer=1, model=model)
    pairs = save_rows(folder / "p.jsonl", rows)
    run = folder / "run"
    inputs = ["--model", model, "--pairs", pairs, "--layer", 1]
    commands = [
        ["01_extract", *inputs, "--run", run, *stage1_args],
        ["02_select_features", "--run", run, "--sae", sae, "--k", 8],
        ["03_train_head", "--run", run],
    ]
    for words in commands:
        result = command(*words)
        if result[0]:
            break
    return result


def test_one_pair_is_trained_on_without_a_search_and_that_is_said(tmp_path):
    code, out, err = stages(tmp_path, tiny.make_pairs(1), "--split", "1,0,0")
    assert code == 0, err
    assert "note: only 1 prompts to train on, fewer than 10: no search" in out
    head = load_file(tmp_path / "run/reward_head.safetensors")
    assert all(tensor.isfinite().all() for tensor in head.values())


def test_one_pair_of_test_is_extracted_and_then_refused(tmp_path):
    result = stages(tmp_path, tiny.make_pairs(1), "--split", "0,0,1")
    assert_one_line_error(result, "no pair", "split", "more pairs")
    assert (tmp_path / "run" / SHARD).exists()


def test_many_answers_to_one_question_fall_in_one_split_and_are_refused(tmp_path):
    rows = [row | {"prompt": "Is water wet?"} for row in tiny.make_pairs(20)]
    assert_one_line_error(stages(tmp_path, rows), "split", "more pairs")


def test_more_latents_asked_for_than_separate_keeps_those_that_do_and_says_so(run, sae):
    out = succeed("02_select_features", "--run", run, "--sae", sae, "--k", 5000)
    meta = read_meta(run / "features.safetensors")
    assert 0 < meta["k"] < 64
    assert meta["k_asked"] == 5000
    assert "only so many separate; 5000 asked" in out


def test_the_later_stages_go_on_with_the_latents_that_there_are(run, sae):
    succeed("02_select_features", "--run", run, "--sae", sae, "--k", 5000)
    succeed("03_train_head", "--run", run)
    succeed("04_evaluate", "--run", run, "--texts", 0, "--sweeps", "none", "--folds", 3)
    assert read_meta(run / "reward_head.safetensors")["k"] < 64


# ---------------------------------------------------------------- scores that do not change

@pytest.fixture
def constant(run, sae):
    """A run where every state has the same part, 3, along a direction → (run, it and another)."""
    decoder = load_sae(sae).W_dec
    first = decoder[int(load_file(run / "features.safetensors")["latents"][0])]
    tensors, meta = load_stage(run / SHARD)
    for side in ("chosen", "rejected"):
        missing = 3.0 - tensors[side] @ first
        tensors[side] += missing[:, None] * first
    save_stage(run / SHARD, tensors, meta)
    return run, torch.stack([first, decoder[1]])


def standardised(run, directions):
    """→ (chosen, rejected, mean, std) of a run's scores on some directions."""
    table, meta = load_stage(run / SHARD)
    record = {**meta, "normalise": "none"}
    sides = stage2.project([table], len(table["split"]), directions, record)
    mean, std = stage2.standardisation(sides, table["split"] != stage1.TEST)
    return (sides[0] - mean) / std, (sides[1] - mean) / std, mean, std


def test_a_score_that_never_changes_keeps_std_1(constant):
    *_, mean, std = standardised(*constant)
    assert std[0] == 1 and mean[0] == pytest.approx(3, abs=1e-4)
    assert std[1] != 1


def test_a_score_that_never_changes_adds_nothing_to_a_reward(constant):
    chosen, rejected, _, _ = standardised(*constant)
    head = stage3.fit_linear(chosen, rejected)
    added = chosen[:, 0] * head.w1[0]
    assert added.abs().max() < 1e-6
    assert head.w1[1] != 0


def test_a_score_that_never_changes_leaves_the_head_finite(constant, sae):
    run, _ = constant
    succeed("02_select_features", "--run", run, "--sae", sae, "--k", 8)
    succeed("03_train_head", "--run", run)
    head = load_file(run / "reward_head.safetensors")
    assert all(tensor.isfinite().all() for tensor in head.values())


def test_two_sides_that_are_equal_give_a_head_of_zeros_and_accuracy_0(run):
    tensors, meta = load_stage(run / "features.safetensors")
    tensors["rejected"] = tensors["chosen"].clone()
    tensors["search_rejected"] = tensors["search_chosen"].clone()
    save_stage(run / "features.safetensors", tensors, meta)
    assert "out of fold  0.000" in succeed("03_train_head", "--run", run)
    head = load_file(run / "reward_head.safetensors")
    assert not head["w1"].any()
    assert head["temperature"] == 1


def test_differences_that_are_all_ties_are_no_hits_and_half_hits():
    row = summary(torch.zeros(1, 9).numpy(), torch.arange(9).numpy())
    assert (row["accuracy"], row["ties"], row["ties_half"]) == (0, 1, 0.5)


# ---------------------------------------------------------------- same text, same score

def texts_of(rows):
    """Rows → [(prompt, response)]."""
    return [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]


def user(content):
    return {"role": "user", "content": content}


TEXTS = texts_of(tiny.make_pairs(12))
ODD = [
    ("Is water wet?", "It is. " * 40),
    ("a", "b"),
    ([user("q"), {"role": "assistant", "content": "r"}, user("s")], "It is blue."),
]


@dataclass
class Trained:
    """A reward model, and what its scores are compared by."""
    reward: object
    head: Path
    spread: float           # standard deviation of the scores of TEXTS


def scores_of(reward, texts):
    """Scores of [(prompt, response)] in one call, [n]."""
    prompts, responses = zip(*texts)
    return torch.tensor(reward.score(prompts, responses))


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def trained(request, tmp_path_factory):
    """A head on a model of this family; gemma2 mixes sliding and full attention."""
    folder = tmp_path_factory.mktemp("same")
    code, _, err = stages(folder, tiny.make_pairs(60), family=request.param)
    assert code == 0, err
    head = folder / "run/reward_head.safetensors"
    reward = stage3.RewardModel.load(head)
    return Trained(reward, head, float(scores_of(reward, TEXTS).std()))


@settings(max_examples=40)
@given(st.data())
def test_a_text_has_one_score_whatever_it_is_read_with_and_how(trained, data):
    some = data.draw(st.permutations(TEXTS + ODD))[:data.draw(st.integers(1, len(TEXTS)))]
    target = data.draw(st.integers(0, len(some) - 1))
    alone = scores_of(trained.reward, [some[target]])[0]

    backbone = trained.reward.backbone
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "pack", data.draw(st.sampled_from(["tree", "pad"])))
        patch.setattr(backbone, "budget", data.draw(st.sampled_from([1, 64, 300, 5000])))
        side = data.draw(st.sampled_from(["left", "right"]))
        patch.setattr(backbone.tokenizer, "padding_side", side)
        together = scores_of(trained.reward, some)[target]
    assert abs(together - alone) <= 1e-3 * trained.spread


def test_left_padded_batches_of_transformers_give_the_same_scores(trained):
    reward = trained.reward
    some = TEXTS[:6] + ODD
    texts = [reward.render(prompt, response) for prompt, response in some]
    ids = [text.ids for text in texts]
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(i)) + i for i in ids])
    mask = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i in ids])
    positions = (mask.cumsum(1) - 1).clamp(0)
    with torch.inference_mode():
        out = reward.backbone.model(padded, attention_mask=mask, position_ids=positions,
                                    output_hidden_states=True)
    hidden = out.hidden_states[reward.meta["layer"] + 1]
    means = []
    for text, states in zip(texts, hidden, strict=True):
        padding = longest - len(text.ids)
        means.append(states[padding + text.first:padding + text.stop].mean(0))
    theirs = reward.reward_of(torch.stack(means))
    assert (theirs - scores_of(reward, some)).abs().max() <= 1e-3 * trained.spread


# ---------------------------------------------------------------- what is opened, and how often

@pytest.fixture
def hashed(monkeypatch):
    """The files that were hashed, in order."""
    found = []
    file_digest = files.hashlib.file_digest

    def noted(file, kind):
        found.append(os.path.realpath(file.name))
        return file_digest(file, kind)

    monkeypatch.setattr(files.hashlib, "file_digest", noted)
    return found


@pytest.fixture
def other(finished, tmp_path):
    """Stage 1 on other questions → its run."""
    rows = [row | {"prompt": row["prompt"] + " Surely?"} for row in tiny.make_pairs(40)]
    pairs = save_rows(tmp_path / "other.jsonl", rows)
    model = finished.parent / "model"
    args = ["--model", model, "--pairs", pairs, "--layer", 1, "--run", tmp_path / "other"]
    succeed("01_extract", *args)
    return tmp_path / "other"


def test_no_file_is_hashed_twice_in_one_command(finished, run, sae, other, tmp_path, hashed):
    inputs = ["--model", finished.parent / "model", "--pairs", finished.parent / "pairs.jsonl"]
    prompts = save_rows(tmp_path / "prompts.jsonl", [{"prompt": "Is water wet?"}])
    sampling = ["--prompts", prompts, "--n", 2, "--max-new-tokens", 3]
    commands = [
        ["01_extract", *inputs, "--layer", 1, "--run", run],
        ["02_select_features", "--run", run, "--sae", sae, "--k", 7],
        ["03_train_head", "--run", run],
        ["tools/self_check", "--run", run],
        ["04_evaluate", "--run", run, "--sweeps", "none", "--folds", 3, "--other", f"x={other}"],
        ["05_best_of_n", "sample", "--reward", run / "reward_head.safetensors", *sampling],
    ]
    for words in commands:
        files.hash_once.cache_clear()               # a command is a process of its own
        hashed.clear()
        succeed(*words)
        assert hashed, words[0]
        assert sorted(hashed) == sorted(set(hashed)), words[0]


def test_a_changed_file_is_hashed_anew(tmp_path):
    hashes = set()
    for text in ("a", "b", "cc"):
        write_text(tmp_path / "x", text)
        hashes.add(stage1.file_hash(tmp_path / "x"))
    assert len(hashes) == 3


@pytest.fixture
def opened(monkeypatch):
    """The files that Python opened, in order."""
    found = []
    real = builtins.open

    def noted(file, *args, **options):
        found.append(str(file))
        return real(file, *args, **options)

    monkeypatch.setattr(builtins, "open", noted)
    monkeypatch.setattr(io, "open", noted)          # what pathlib calls
    return found


@pytest.fixture
def trap(tmp_path):
    """A file whose name stands in the data and whose text must come out nowhere → its path."""
    path = tmp_path / "trap.txt"
    path.write_text("secret")
    return path


def test_no_path_in_a_preference_pair_is_opened(trap, tmp_path, folder_of, opened):
    named = {name: str(trap) for name in ("id", "source", "image", "category")}
    rows = []
    for row in tiny.make_pairs(10):
        rows.append({**row, **named, "prompt": f"{row['prompt']} {trap}", "file": f"file://{trap}"})
    pairs = save_rows(tmp_path / "p.jsonl", rows)
    args = ["--model", folder_of("llama"), "--pairs", pairs, "--layer", 1]
    succeed("01_extract", *args, "--run", tmp_path / "run")
    assert pairs in opened
    assert not [name for name in opened if "trap" in name]
    assert "secret" not in (tmp_path / "run/pairs.jsonl").read_text()


@pytest.mark.parametrize("words", [
    ["rank", "--candidates"],
    ["sample", "--n", 1, "--max-new-tokens", 2, "--prompts"],
], ids=["rank", "sample"])
def test_no_path_in_a_prompt_or_candidate_is_opened(words, trap, tmp_path, finished, opened):
    row = {"prompt": str(trap), "candidates": [str(trap), f"@{trap}"], "id": str(trap)}
    rows = save_rows(tmp_path / "c.jsonl", [row])
    out = tmp_path / "out.jsonl"
    reward = finished / "reward_head.safetensors"
    succeed("05_best_of_n", *words, rows, "--reward", reward, "--out", out)
    assert rows in opened
    assert not [name for name in opened if "trap" in name]
    assert "secret" not in out.read_text()


# ---------------------------------------------------------------- nothing foreign is run

SOURCES = [path for folder in (".", "parts", "tools") for path in (tiny.ROOT / folder).glob("*.py")]
DANGEROUS = [
    r"pickle\.(load|Unpickler)",
    "trust_remote_code",
    "allow_pickle=True",
    "weights_only=False",
    r"(?<!model\.)\b(eval|exec)\(",                # model.eval() is another one
    r"os\.system",
    "shell=True",
]


@pytest.mark.parametrize("call", DANGEROUS)
def test_no_script_unpickles_runs_remote_code_or_evaluates_text(call):
    assert len(SOURCES) >= 15
    for path in SOURCES:
        assert not re.search(call, path.read_text("utf-8")), path


def test_torch_load_is_called_for_weights_only():
    calls = []
    for path in SOURCES:
        calls += re.findall(r"torch\.load\(.*", path.read_text("utf-8"))
    assert calls
    assert all("weights_only=True" in call for call in calls), calls


def test_a_model_with_code_of_its_own_is_refused_and_the_code_not_run(tmp_path, folder_of):
    model = shutil.copytree(folder_of("llama"), tmp_path / "model")
    ran = tmp_path / "ran"
    (model / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    own = {name: f"modeling_own.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": own}
    (model / "config.json").write_text(json.dumps(config))

    pairs = tiny.save_pairs(tmp_path / "p.jsonl", 4)
    args = ["--model", model, "--pairs", pairs, "--layer", 1, "--run", tmp_path / "run"]
    assert_one_line_error(command("01_extract", *args), model)
    assert not ran.exists()


# ---------------------------------------------------------------- two processes, one file

def stage_file(path, number, names="abc"):
    """A stage file whose tensors and settings all hold one number."""
    tensors = {name: torch.full((3,), number) for name in names}
    files.save_stage(path, tensors, {"stage": "other", "number": number})
    return path


def moving(monkeypatch, path, others):
    """Other processes put one after the other in the place of `path`, one in each reading of it:
    the header and the first of three tensors come from the file that was there."""
    opened = []

    def open_and_move(name, framework, safe_open=files.safe_open):
        opened.append(name)
        if len(opened) % 4 == 3 and others:
            os.replace(others.pop(0), path)
        return safe_open(name, framework)
    monkeypatch.setattr(files, "safe_open", open_and_move)


@pytest.mark.parametrize("names", ["abc", "ax"])
def test_a_file_that_is_replaced_while_it_is_read_is_read_anew(names, tmp_path, monkeypatch):
    """It is never mixed with the other."""
    old = stage_file(tmp_path / "old.safetensors", 1.0)
    new = stage_file(tmp_path / "new.safetensors", 2.0, names)
    moving(monkeypatch, old, [new])
    tensors, meta = files.load_stage(old)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        name: [2.0] * 3 for name in names}
    assert meta["number"] == 2.0 and sorted(meta.tensors) == sorted(names)


def test_a_file_that_never_rests_is_one_line(tmp_path, monkeypatch):
    old = stage_file(tmp_path / "old.safetensors", 1.0)
    others = [stage_file(tmp_path / f"{n}.safetensors", 2.0) for n in range(20)]
    moving(monkeypatch, old, others)
    with pytest.raises(files.UserError, match="replaced while it was read .*old.safetensors"):
        files.load_stage(old)
    assert len(others) == 20 - files.READINGS


def test_ctrl_c_while_a_file_is_replaced_stops_the_command(tmp_path, monkeypatch):
    old = stage_file(tmp_path / "old.safetensors", 1.0)
    new = stage_file(tmp_path / "new.safetensors", 2.0)

    def move_and_stop(name, framework):
        os.replace(new, old)
        raise KeyboardInterrupt
    monkeypatch.setattr(files, "safe_open", move_and_stop)
    with pytest.raises(KeyboardInterrupt):
        files.load_stage(old)


def test_a_file_that_goes_while_it_is_opened_is_not_up_to_date(tmp_path, monkeypatch):
    """What torch says then, which opens a file a second time by its name."""
    path = tmp_path / "x.safetensors"
    files.save_stage(path, {"a": torch.zeros(1)}, {"stage": "other"})
    assert files.up_to_date(path, {"stage": "other"})

    def gone(name, framework):
        raise RuntimeError(f"unable to open file <{name}> in read-only mode: No such file (2)")
    monkeypatch.setattr(files, "safe_open", gone)
    assert not files.up_to_date(path, {"stage": "other"})
    with pytest.raises(files.UserError, match="gone or replaced"):
        files.load_stage(path)


def test_other_errors_of_torch_are_not_taken_for_that(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    files.save_stage(path, {"a": torch.zeros(1)}, {"stage": "other"})

    def full(name, framework):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(files, "safe_open", full)
    with pytest.raises(RuntimeError, match="allocate"):
        files.load_stage(path)
