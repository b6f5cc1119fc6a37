"""Inside other people's programs: TRL's DPO and GRPO trainers, datasets.map, a FastAPI server,
PEFT's merged adapters."""

import importlib
import json
import math
import re
import statistics
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch

stage1 = importlib.import_module("01_extract")
stage3 = importlib.import_module("03_train_head")
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning")      # theirs


@pytest.fixture
def reward(finished):
    """The RewardModel of the finished run."""
    return stage3.RewardModel.load(finished / "reward_head.safetensors")


def chat(*texts):
    """Turns of user and assistant, one after the other."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def trainer_of(kind, folder, data, out, settings, **more):
    """TRL's DPO or GRPO trainer of the model in `folder`: one step, on the CPU, files in `out`."""
    trl = pytest.importorskip("trl")
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(out), max_steps=1, learning_rate=1e-3, use_cpu=True, bf16=False,
        logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True, **settings)
    trainer = getattr(trl, f"{kind}Trainer")
    return trainer(model=str(folder), args=config, train_dataset=data, **more)


def train(trainer):
    """One step, which must move the weights → what it logged."""
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert trainer.state.global_step == 1
    after = trainer.model.parameters()
    assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    return trainer.state.log_history[0]


# ---------------------------------------------------------------- DPO

CANDIDATES = [
    {"prompt": "Is water wet?", "candidates": ["It is.", "\n\nNo, ten. ", "surely green.", ""]},
    {"prompt": chat("One two?", "Three.", "Four five six?"),
     "candidates": ["One.", "  blue bile\n", "Yes – it is."]},
]
WITH_SYSTEM = {
    "prompt": [{"role": "system", "content": "Answer in one word."}, *chat("Is it blue?")],
    "candidates": ["Yes.", "No."],
}
DATED = "<|im_start|>system\n{{ strftime_now('%d %b %Y') }}<|im_end|>\n" + tiny.CHATML


def load_pairs(finished, rows, folder):
    """Candidates → `05_best_of_n.py pairs` → the rows that datasets reads from its file."""
    datasets = pytest.importorskip("datasets")
    candidates = tiny.save_rows(folder / "candidates.jsonl", rows)
    out = folder / "dpo.jsonl"
    tiny.succeed("05_best_of_n", "pairs", "--candidates", candidates, "--out", out,
                 "--reward", finished / "reward_head.safetensors")
    data = datasets.load_dataset("json", data_files=str(out), split="train",
                                 cache_dir=str(folder / "cache"))
    assert len(data) == len(rows)
    return data


def dpo(template, rows, finished, folder):
    """→ (TRL's DPO trainer on our pairs of these candidates, the policy's tokenizer, the pairs)."""
    data = load_pairs(finished, rows, folder)
    model = tiny.save_model(folder / "policy", template=template)
    trainer = trainer_of("DPO", model, data, folder, {"per_device_train_batch_size": len(rows)})
    return trainer, stage1.load_tokenizer(model), data


SETUPS = {
    "chatml": (tiny.CHATML, [*CANDIDATES, WITH_SYSTEM]),
    "like Gemma's": (tiny.NO_SYSTEM, CANDIDATES),
}


@pytest.mark.parametrize("template, rows", SETUPS.values(), ids=SETUPS)
def test_dpo_trains_on_our_pairs(template, rows, finished, tmp_path):
    trainer, _, _ = dpo(template, rows, finished, tmp_path)
    loss = train(trainer)["loss"]
    assert loss == pytest.approx(math.log(2), abs=1e-5)     # policy and reference are the same yet


@pytest.mark.parametrize("template, rows", SETUPS.values(), ids=SETUPS)
def test_the_token_ids_of_dpo_are_those_we_score(template, rows, finished, tmp_path):
    trainer, tokenizer, data = dpo(template, rows, finished, tmp_path)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for found, pair in zip(trainer.train_dataset, data, strict=True):
        for side in ("chosen", "rejected"):
            response = pair[side][0]["content"]
            text = stage1.render(tokenizer, pair["prompt"], response)
            answer = found[f"{side}_ids"]
            assert found["prompt_ids"] + answer == text.ids
            assert answer.count(end) == 1
            assert len(found["prompt_ids"]) + answer.index(end) == text.eot
            if response.strip():
                assert len(found["prompt_ids"]) == text.first


def test_a_template_that_writes_the_date_gives_dpo_the_same_completions(finished, tmp_path):
    trainer, tokenizer, data = dpo(DATED, CANDIDATES, finished, tmp_path)
    for found, pair in zip(trainer.train_dataset, data, strict=True):
        text = stage1.render(tokenizer, pair["prompt"], pair["chosen"][0]["content"])
        assert found["chosen_ids"] == text.ids[-len(found["chosen_ids"]):]


def test_our_scores_do_not_age_with_a_template_that_writes_the_date(finished, tmp_path):
    trainer, tokenizer, data = dpo(DATED, CANDIDATES, finished, tmp_path)
    for found, pair in zip(trainer.train_dataset, data, strict=True):
        text = stage1.render(tokenizer, pair["prompt"], pair["chosen"][0]["content"])
        assert "26 Jul 2024" in tokenizer.decode(text.ids)
        assert found["prompt_ids"] != text.ids[:len(found["prompt_ids"])]       # TRL's has today


# ---------------------------------------------------------------- GRPO

def grpo_step(reward, finished, prompts, out):
    """One GRPO step, four completions a prompt → (TRL's own record of them, its log).

    A row of the record: prompt, completion, sparserm_reward, advantage.
    """
    datasets = pytest.importorskip("datasets")
    parquet = pytest.importorskip("pyarrow.parquet")
    data = datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    settings = {"num_generations": 4, "per_device_train_batch_size": 4 * len(prompts),
                "max_completion_length": 12, "log_completions": True}
    trainer = trainer_of("GRPO", finished.parent / "model", data, out, settings,
                         reward_funcs=reward)
    log = train(trainer)
    [file] = (out / "completions").glob("*.parquet")
    rows = parquet.read_table(file).to_pylist()
    assert len(rows) == 4 * len(prompts)
    return rows, log


def said(row):
    """The text of a completion."""
    completion = row["completion"]
    return completion if isinstance(completion, str) else completion[0]["content"]


def advantages(rewards):
    """(r - mean) / std over the rewards of one group that are there, 0 for None: by hand."""
    there = [reward for reward in rewards if reward is not None]
    mean = statistics.mean(there) if there else 0.0
    std = statistics.stdev(there) if len(there) > 1 else 0.0
    return [0.0 if reward is None else (reward - mean) / (std + 1e-4) for reward in rewards]


KINDS = {
    "strings": ["Is water wet?", "One two three?"],
    "messages": [chat("Is water wet?"), chat("One two?", "Three.", "Four?")],
}


@pytest.mark.parametrize("prompts", KINDS.values(), ids=KINDS)
def test_grpo_trains_on_the_rewards_that_score_gives(prompts, reward, finished, tmp_path):
    rows, log = grpo_step(reward, finished, prompts, tmp_path)
    assert len({said(row) for row in rows}) > 4
    scores = reward.score([row["prompt"] for row in rows], [said(row) for row in rows])
    assert [row["sparserm_reward"] for row in rows] == pytest.approx(scores, abs=1e-4)
    expected = advantages(scores[:4]) + advantages(scores[4:])
    assert [row["advantage"] for row in rows] == pytest.approx(expected, abs=1e-2)
    assert log["reward"] == pytest.approx(statistics.mean(scores), abs=1e-4)
    assert log["rewards/sparserm_reward/mean"] == log["reward"]


def none_for_nan(number):
    """How a reward of None stands in TRL's record."""
    return None if number is None or math.isnan(number) else number


def test_grpo_leaves_a_text_longer_than_max_length_out_of_its_group(reward, finished, tmp_path):
    prompts = ["a", "b"]                        # one token: nothing to cut
    free, _ = grpo_step(reward, finished, prompts, tmp_path / "free")
    lengths = [len(reward.render(row["prompt"], said(row)).ids) for row in free]
    limit = sorted(set(lengths))[len(set(lengths)) // 2 - 1]
    assert min(lengths) <= limit < max(lengths)

    reward.meta["max_length"] = limit
    rows, log = grpo_step(reward, finished, prompts, tmp_path / "limited")
    assert [said(row) for row in rows] == [said(row) for row in free]
    expected = [row["sparserm_reward"] if length <= limit else None
                for row, length in zip(free, lengths)]
    found = [none_for_nan(row["sparserm_reward"]) for row in rows]
    assert found == [number if number is None else pytest.approx(number, abs=1e-4)
                     for number in expected]
    of_groups = advantages(expected[:4]) + advantages(expected[4:])
    assert [row["advantage"] for row in rows] == pytest.approx(of_groups, abs=1e-2)
    there = [number for number in expected if number is not None]
    assert log["reward"] == pytest.approx(statistics.mean(there), abs=1e-4)


# ---------------------------------------------------------------- datasets, threads

@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("as_prompt", [str, chat], ids=["strings", "messages"])
def test_datasets_map_gives_the_same_scores_in_batches_of_any_size(size, as_prompt, reward):
    datasets = pytest.importorskip("datasets")
    rows = [row | {"prompt": as_prompt(row["prompt"])} for row in tiny.make_pairs(12)]
    names = [row["id"] for row in rows]
    scores = reward.score([row["prompt"] for row in rows], [row["chosen"] for row in rows])

    def scored(some):
        return {"reward": reward.score(some["prompt"], some["chosen"])}
    shuffled = datasets.Dataset.from_list(rows).shuffle(seed=size)
    found = shuffled.map(scored, batched=True, batch_size=size)
    assert found["id"][:] != names
    by_name = dict(zip(found["id"], found["reward"], strict=True))
    assert by_name == pytest.approx(dict(zip(names, scores)), abs=1e-4)


def test_threads_that_share_a_reward_model_get_the_scores_that_one_gets(reward):
    rows = tiny.make_pairs(20) * 5

    def score(row):
        return reward.score([row["prompt"]], [row["chosen"]])[0]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(score, rows))
    assert together == pytest.approx([score(row) for row in rows], abs=1e-4)


# ---------------------------------------------------------------- the server of docs/formats.md

@pytest.fixture
def ask(finished, tmp_path, monkeypatch):
    """A function that posts a body to the server of docs/formats.md, of the finished run."""
    client = pytest.importorskip("fastapi.testclient").TestClient
    text = (tiny.ROOT / "docs/formats.md").read_text(encoding="utf-8")
    [code] = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
              if "FastAPI" in block]
    [run] = re.findall(r'"(runs/[^/"]*)/reward_head.safetensors"', code)
    (tmp_path / "runs").mkdir()
    (tmp_path / run).symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    serve = {"__name__": "serve"}
    exec(compile(code, "serve.py", "exec"), serve)
    [path] = serve["app"].openapi()["paths"]
    with client(serve["app"], raise_server_exceptions=False) as http:
        def post(**body):
            return http.post(path, json=body)
        yield post


def test_the_server_answers_with_the_rewards_of_score(ask, reward):
    prompts = ["Is water wet?", chat("One two?", "Three.", "Four?")]
    responses = ["It is.", "No, ten."]
    rewards = reward.score(prompts, responses)
    found = ask(prompts=prompts, responses=responses).json()
    assert found == {"rewards": pytest.approx(rewards, abs=1e-4)}


def test_the_server_answers_null_for_what_is_too_long(ask):
    found = ask(prompts=["a", "a"], responses=["b", "wet " * 3 * 2048]).json()["rewards"]
    assert isinstance(found[0], float) and found[1] is None


def test_the_server_answers_an_empty_request(ask):
    assert ask(prompts=[], responses=[]).json() == {"rewards": []}


@pytest.mark.parametrize("body, status", [
    ({"prompts": ["a"]}, 422),
    ({"prompts": "a", "responses": ["b"]}, 422),
    ({"prompts": ["a"], "responses": []}, 500),
])
def test_the_server_refuses_what_is_no_list_for_each_side(body, status, ask):
    assert ask(**body).status_code == status


# ---------------------------------------------------------------- PEFT

MODULES = [["q_proj"], ["v_proj"], ["up_proj", "down_proj"]]


@pytest.fixture
def merged(finished, tmp_path):
    """modules → folder of the run's backbone with a random LoRA on them merged in."""
    peft = pytest.importorskip("peft")
    transformers = importlib.import_module("transformers")
    source, folder = str(finished.parent / "model"), str(tmp_path / "merged")

    def merge(modules):
        torch.manual_seed(0)
        settings = peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(source)
        peft.get_peft_model(model, settings).merge_and_unload().save_pretrained(folder)
        stage1.load_tokenizer(source).save_pretrained(folder)
        return folder
    return merge


@pytest.mark.parametrize("modules", MODULES, ids=" ".join)
def test_a_merged_lora_is_refused_as_the_backbone_of_the_reward(modules, merged, finished):
    folder, source = merged(modules), finished.parent / "model"
    line = f"the weights of {folder} are not those of {source}"
    with pytest.raises(stage1.UserError, match=re.escape(line)):
        stage3.RewardModel.load(finished / "reward_head.safetensors", model=folder)


def test_a_merged_lora_is_taken_as_a_policy(merged, finished, tmp_path):
    folder = merged(["q_proj"])
    prompts = tiny.save_rows(tmp_path / "prompts.jsonl", [{"prompt": "Is water wet?"}])
    out = tmp_path / "out.jsonl"
    tiny.succeed("05_best_of_n", "sample", "--prompts", prompts, "--policy", folder, "--out", out,
                 "--reward", finished / "reward_head.safetensors", "--n", 2, "--max-new-tokens", 4)
    assert json.loads(out.read_text(encoding="utf-8"))["policy"] == folder
