"""Inside other people's programs: TRL's DPO and GRPO trainers, datasets.map, a FastAPI server, PEFT's merged adapters."""

import importlib
import json
import math
import re
import statistics
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch

stage1, stage3 = (importlib.import_module(n) for n in ("01_extract", "03_train_head"))
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def reward(finished):
    return stage3.RewardModel.load(finished / "reward_head.safetensors")


def chat(*texts, roles=("user", "assistant")):
    """Turns of two roles, one after the other."""
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def trainer_of(kind, folder, data, out, settings, **more):
    """TRL's DPO or GRPO trainer of the model in `folder`, for one step on the CPU that leaves nothing but `out`."""
    trl = pytest.importorskip("trl")
    args = getattr(trl, f"{kind}Config")(output_dir=str(out), max_steps=1, learning_rate=1e-3, use_cpu=True, bf16=False, logging_steps=1,
                                         report_to="none", save_strategy="no", disable_tqdm=True, **settings)
    return getattr(trl, f"{kind}Trainer")(model=str(folder), args=args, train_dataset=data, **more)


def train(trainer):
    """One step → what it logged. It must have moved the weights."""
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert trainer.state.global_step == 1
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
    return trainer.state.log_history[0]


# ---------------------------------------------------------------- DPO

CANDIDATES = [{"prompt": "Is water wet?", "candidates": ["It is.", "\n\nNo, ten. ", "surely green.", ""]},
              {"prompt": chat("One two?", "Three.", "Four five six?"), "candidates": ["One.", "  blue bile\n", "Yes – it is."]}]
WITH_SYSTEM = {"prompt": [{"role": "system", "content": "Answer in one word."}, *chat("Is it blue?")], "candidates": ["Yes.", "No."]}


def load_pairs(finished, rows, folder):
    """Candidates → `05_best_of_n.py pairs` → the rows that datasets reads from its file, and the lines of the file."""
    datasets, out = pytest.importorskip("datasets"), folder / "dpo.jsonl"
    tiny.succeed("05_best_of_n", "pairs", "--candidates", tiny.save_rows(folder / "candidates.jsonl", rows), "--out", out,
                 "--reward", finished / "reward_head.safetensors")
    lines = [json.loads(line) for line in open(out, encoding="utf-8")]
    assert len(lines) == len(rows)
    return datasets.load_dataset("json", data_files=str(out), split="train", cache_dir=str(folder / "cache")), lines


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.NO_SYSTEM], ids=["chatml", "like Gemma's"])
def test_dpo_trains_on_our_pairs_and_its_token_ids_are_those_we_score(template, finished, tmp_path):
    data, lines = load_pairs(finished, CANDIDATES + [WITH_SYSTEM] * (template == tiny.CHATML), tmp_path)
    folder = tiny.save_model(tmp_path / "policy", template=template)
    trainer = trainer_of("DPO", folder, data, tmp_path, {"per_device_train_batch_size": len(lines)})
    tokenizer = stage1.load_tokenizer(folder)
    for found, line in zip(trainer.train_dataset, lines, strict=True):
        for side in ("chosen", "rejected"):
            text = stage1.render(tokenizer, line["prompt"], line[side][0]["content"])
            assert found["prompt_ids"] + found[f"{side}_ids"] == text.ids
            assert tokenizer.convert_ids_to_tokens(found[f"{side}_ids"]).count("<|im_end|>") == 1
            assert len(found["prompt_ids"]) + found[f"{side}_ids"].index(tokenizer.convert_tokens_to_ids("<|im_end|>")) == text.eot
            if line[side][0]["content"].strip():
                assert len(found["prompt_ids"]) == text.first
    assert train(trainer)["loss"] == pytest.approx(math.log(2), abs=1e-5)           # policy and reference are still the same


def test_a_template_that_writes_the_date_gives_dpo_the_same_completions(finished, tmp_path):
    data, lines = load_pairs(finished, CANDIDATES, tmp_path)
    folder = tiny.save_model(tmp_path / "policy", template="<|im_start|>system\n{{ strftime_now('%d %b %Y') }}<|im_end|>\n" + tiny.CHATML)
    tokenizer = stage1.load_tokenizer(folder)
    for found, line in zip(trainer_of("DPO", folder, data, tmp_path, {}).train_dataset, lines, strict=True):
        text = stage1.render(tokenizer, line["prompt"], line["chosen"][0]["content"])
        assert found["chosen_ids"] == text.ids[-len(found["chosen_ids"]):] and "26 Jul 2024" in tokenizer.decode(text.ids)
        assert found["prompt_ids"] != text.ids[:len(found["prompt_ids"])]           # ours pins the date, so that scores do not age


# ---------------------------------------------------------------- GRPO

def grpo_step(reward, finished, prompts, out):
    """One GRPO step, four completions a prompt → (rows {prompt, completion, sparserm_reward, advantage} of TRL's own record, its log)."""
    datasets = pytest.importorskip("datasets")
    settings = {"num_generations": 4, "per_device_train_batch_size": 4 * len(prompts), "max_completion_length": 12, "log_completions": True}
    trainer = trainer_of("GRPO", finished.parent / "model", datasets.Dataset.from_list([{"prompt": p} for p in prompts]), out, settings,
                         reward_funcs=reward)
    log = train(trainer)
    rows = importlib.import_module("pyarrow.parquet").read_table(*(out / "completions").glob("*.parquet")).to_pylist()
    assert len(rows) == 4 * len(prompts)
    return rows, log


def said(row):
    """The text of a completion."""
    return row["completion"] if isinstance(row["completion"], str) else row["completion"][0]["content"]


def advantages(rewards):
    """(r - mean) / std over the group's rewards that are there, 0 for None: by hand."""
    there = [r for r in rewards if r is not None]
    mean, std = (statistics.mean(there), statistics.stdev(there)) if len(there) > 1 else (sum(there), 0.0)
    return [0.0 if r is None else (r - mean) / (std + 1e-4) for r in rewards]


@pytest.mark.parametrize("kind", ["strings", "messages"])
def test_grpo_trains_on_the_rewards_that_score_gives(kind, reward, finished, tmp_path):
    prompts = ["Is water wet?", "One two three?"] if kind == "strings" else [chat("Is water wet?"), chat("One two?", "Three.", "Four?")]
    rows, log = grpo_step(reward, finished, prompts, tmp_path)
    assert all(r["prompt"] in prompts for r in rows) and len({said(r) for r in rows}) > 4
    scores = reward.score([r["prompt"] for r in rows], [said(r) for r in rows])
    assert [r["sparserm_reward"] for r in rows] == pytest.approx(scores, abs=1e-4)
    assert [r["advantage"] for r in rows] == pytest.approx(advantages(scores[:4]) + advantages(scores[4:]), abs=1e-2)
    assert log["reward"] == log["rewards/sparserm_reward/mean"] == pytest.approx(statistics.mean(scores), abs=1e-4)


def test_grpo_leaves_a_text_longer_than_max_length_out_of_its_group_and_goes_on(reward, finished, tmp_path):
    prompts = ["a", "b"]                        # one token: nothing to cut
    free, _ = grpo_step(reward, finished, prompts, tmp_path / "free")
    lengths = [len(reward.render(r["prompt"], said(r)).ids) for r in free]
    reward.meta["max_length"] = limit = sorted(set(lengths))[len(set(lengths)) // 2 - 1]
    rows, log = grpo_step(reward, finished, prompts, tmp_path / "limited")
    assert [said(r) for r in rows] == [said(r) for r in free] and min(lengths) <= limit < max(lengths)
    expected = [r["sparserm_reward"] if n <= limit else None for r, n in zip(free, lengths)]
    found = [None if r["sparserm_reward"] is None or math.isnan(r["sparserm_reward"]) else r["sparserm_reward"] for r in rows]
    assert found == [None if e is None else pytest.approx(e, abs=1e-4) for e in expected]
    assert [r["advantage"] for r in rows] == pytest.approx(advantages(expected[:4]) + advantages(expected[4:]), abs=1e-2)
    assert log["reward"] == pytest.approx(statistics.mean(e for e in expected if e is not None), abs=1e-4)


# ---------------------------------------------------------------- datasets, FastAPI, PEFT

@pytest.mark.parametrize("kind", ["strings", "messages"])
def test_datasets_map_gives_the_same_scores_in_batches_of_any_size_and_order(kind, reward):
    datasets = pytest.importorskip("datasets")
    rows = [{**r, "prompt": r["prompt"] if kind == "strings" else chat(r["prompt"])} for r in tiny.make_pairs(20)]
    expected = dict(zip([r["id"] for r in rows], reward.score([r["prompt"] for r in rows], [r["chosen"] for r in rows])))
    for size in (1, 7, 1000):
        data = datasets.Dataset.from_list(rows).shuffle(seed=size)
        scored = data.map(lambda some: {"reward": reward.score(some["prompt"], some["chosen"])}, batched=True, batch_size=size)
        assert scored["id"][:] != list(expected) and dict(zip(scored["id"], scored["reward"])) == pytest.approx(expected, abs=1e-4)


def test_the_server_of_the_readme_answers_with_the_rewards_of_score(reward, finished, tmp_path, monkeypatch):
    pytest.importorskip("fastapi")
    client = pytest.importorskip("fastapi.testclient").TestClient
    found = [b for b in re.findall(r"```python\n(.*?)```", (tiny.ROOT / "README.md").read_text(encoding="utf-8"), re.S) if "FastAPI" in b]
    if not found:
        pytest.skip("README.md has no server")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/demo").symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    serve = {"__name__": "serve"}
    exec(compile(found[0], "serve.py", "exec"), serve)
    prompts, responses = ["Is water wet?", chat("One two?", "Three.", "Four?"), "a"], ["It is.", "No, ten.", "wet " * 3 * 2048]
    with client(serve["app"], raise_server_exceptions=False) as http:
        (path,) = serve["app"].openapi()["paths"]
        post = lambda **body: http.post(path, json=body)
        assert post(prompts=prompts[:2], responses=responses[:2]).json() == {
            "rewards": pytest.approx(reward.score(prompts[:2], responses[:2]), abs=1e-4)}
        assert post(prompts=prompts, responses=responses).json()["rewards"][2] is None
        assert post(prompts=[], responses=[]).json() == {"rewards": []}
        assert post(prompts=["a"]).status_code == post(prompts="a", responses=["b"]).status_code == 422
        assert post(prompts=["a"], responses=[]).status_code == 500


def test_threads_that_share_a_reward_model_get_the_scores_that_one_gets(reward):
    rows = tiny.make_pairs(20) * 5
    one = lambda row: reward.score([row["prompt"]], [row["chosen"]])[0]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, rows)) == pytest.approx([one(row) for row in rows], abs=1e-4)


@pytest.mark.parametrize("modules", [["q_proj"], ["v_proj"], ["up_proj", "down_proj"]], ids=" ".join)
def test_a_merged_lora_is_refused_as_the_rewards_backbone_and_taken_as_a_policy(modules, finished, tmp_path):
    peft, transformers = pytest.importorskip("peft"), importlib.import_module("transformers")
    source, head, folder = str(finished.parent / "model"), finished / "reward_head.safetensors", str(tmp_path / "merged")
    settings = peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(source), settings)
    adapted.merge_and_unload().save_pretrained(folder)
    stage1.load_tokenizer(source).save_pretrained(folder)
    with pytest.raises(stage1.UserError, match=f"the weights of {folder} are not those of {source}"):
        stage3.RewardModel.load(head, model=folder)
    tiny.succeed("05_best_of_n", "sample", "--prompts", tiny.save_rows(tmp_path / "prompts.jsonl", [{"prompt": "Is water wet?"}]),
                 "--reward", head, "--policy", folder, "--n", 2, "--max-new-tokens", 4, "--out", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["policy"] == folder
