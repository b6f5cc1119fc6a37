"""benchmarks/reward_models.py: every method sees the same pairs, and its rewards are those of the model it says they are."""

import importlib
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

sys.path.append(str(tiny.ROOT / "benchmarks"))
bench, likelihood = importlib.import_module("reward_models"), importlib.import_module("likelihood")
stage1 = bench.stage1
TEXTS = [("Is water wet?", "Yes, it is."), ("Is water wet?", "Yes, no."), ("Is water blue?", "No"),
         ([{"role": "user", "content": "One"}], "two three four five six seven eight nine ten")]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A set of tiny pairs, cut and taken through stages 1 to 3 → (folder, run, its arguments)."""
    folder = tmp_path_factory.mktemp("prepared")
    args = SimpleNamespace(model=tiny.save_model(folder / "model"), layer=1, sae=tiny.save_sae(folder / "sae.safetensors", 1),
                           max_length=48, dev_pairs=8, test_pairs=10)
    bench.prepare(tiny.save_pairs(folder / "pairs.jsonl", 150), folder / "set-20", 20, args)
    return folder, folder / "set-20", args


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_pass_gives_the_token_states_and_likelihoods_of_each_text_alone(family, backbone_of):
    backbone = backbone_of(family)
    texts = [stage1.render(backbone.tokenizer, *text) for text in TEXTS]
    tokens = bench.Tokens(backbone, texts, 1)
    for n, text in enumerate(texts):
        with torch.inference_mode():
            own = backbone.model(torch.tensor([text.ids]), output_hidden_states=True)
        z = own.hidden_states[2][0]
        assert torch.allclose(tokens.z[tokens.first[n]:tokens.first[n + 1]], z[text.first:text.last], atol=1e-4)
    sums, counts = likelihood.log_likelihoods(backbone, *zip(*TEXTS))
    assert tokens.sums == pytest.approx(sums, rel=1e-4) and tokens.counts.tolist() == counts.tolist()
    part = tokens.some(np.array([3, 1]))
    assert part.sums.tolist() == tokens.sums[[3, 1]].tolist()
    assert torch.equal(part.z, torch.cat([tokens.z[tokens.first[n]:tokens.first[n + 1]] for n in (3, 1)]))


def test_a_fine_tuned_models_packed_rewards_are_those_of_its_own_forward_pass(folder_of):
    from transformers import AutoModelForSequenceClassification
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder_of("llama"), num_labels=1, dtype=torch.float32)
    tokenizer = stage1.load_tokenizer(folder_of("llama"))
    backbone = stage1.make_backbone(model, tokenizer, {"model": "tiny"})
    texts = [stage1.render(tokenizer, *text) for text in TEXTS]
    found = bench.last_rewards(backbone, texts)
    with torch.inference_mode():
        alone = torch.cat([model(torch.tensor([text.ids])).logits[:, 0] for text in texts])
    assert torch.allclose(found, alone, atol=1e-4) and found.std() > 0.01


def test_a_gated_reward_is_the_mean_of_token_rewards_weighted_by_their_gates():
    weights = {"w": torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "b": torch.tensor([0.0, -1.0])}
    z, owner = torch.tensor([[0.0, 3.0], [1.0, 0.0], [2.0, 2.0]]), torch.tensor([0, 0, 1])
    gate = [1 / (1 + np.exp(-g)) for g in (0.0, 1.0)]
    wanted = [(gate[0] * 2 + gate[1] * 1) / sum(gate), 5.0]         # rewards 3 - 1, 2 - 1; 4 + 2 - 1
    assert bench.gated_rewards(weights, z, owner, 2).tolist() == pytest.approx(wanted)


def test_swift_learns_which_token_tells():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5, 80)
    z = torch.from_numpy(rng.normal(size=(lengths.sum(), 3))).float()
    first = np.concatenate([[0], np.cumsum(lengths)])
    z[first[:-1], 0] = torch.tensor([5.0, -5.0] * 40)                # the first token of chosen and of rejected
    tokens = object.__new__(bench.Tokens)
    tokens.z, tokens.first = z, first
    tokens.sums = tokens.counts = np.zeros(80)
    split = torch.tensor(([0] * 6 + [1] + [2]) * 5)
    read, trained = bench.fit_swift(tokens, split)
    found = read(tokens)
    assert trained == 8 and float((found[split == 2] > 0).float().mean()) == 1
    other = tokens.some(np.arange(80))
    other.z = torch.where(torch.repeat_interleave((split == 2).repeat_interleave(2), torch.from_numpy(lengths))[:, None], 9.0, z)
    assert torch.equal(bench.fit_swift(other, split)[0](tokens), found)         # nothing of the test texts is in it


def test_a_cut_text_fits_and_a_short_one_stays_as_it_is():
    tokenizer = tiny.make_tokenizer()
    long = " ".join(["seven eight nine"] * 40)
    cut = bench.cut_response(tokenizer, "Is water wet?", long, 60)
    assert long.startswith(cut) and 50 <= len(stage1.render(tokenizer, "Is water wet?", cut).ids) <= 60
    cut = bench.cut_response(tokenizer, long, long, 60)              # the prompt may keep half
    assert len(stage1.render(tokenizer, long, cut, 60).ids) <= 60 and long.startswith(cut) and len(cut) > 20
    assert bench.cut_response(tokenizer, "Is water wet?", "Yes.", 60) == "Yes."


def test_some_rows_are_whole_questions_whatever_their_order():
    rows = [{"question": f"q{n // 3}", "id": str(n)} for n in range(30)]
    some = bench.some(rows, 10)
    assert len(some) == 12 and len({r["question"] for r in some}) == 4
    assert bench.some(rows[::-1], 10) == some and bench.some(rows, 99) == bench.some(rows, 30)


def test_a_prepared_set_has_the_splits_of_stage_1_and_no_more_pairs_than_asked(prepared):
    _, run, _ = prepared
    pairs = bench.load_pairs(run)
    assert [len(pairs[s]) for s in stage1.SPLITS] == [20, 8, 10]
    assert all(stage1.split_of(r["prompt"]) == split for split, rows in pairs.items() for r in rows)


def job(prepared, method, **more):
    folder, run, args = prepared
    return {"model": args.model, "layer": 1, "max_length": 48, "epochs": 2, "out": str(folder / "out"), "other_pairs": 4, "set": "set",
            "n": 20, "run": str(run), "others": {"again": str(run)}, "method": method, **more}


def test_the_frozen_methods_judge_the_same_pairs_and_sparserm_is_that_of_the_run(prepared):
    folder, run, _ = prepared
    heads, tokens, pairs = bench.run_heads(job(prepared, "heads")), bench.run_tokens(job(prepared, "tokens")), bench.load_pairs(run)
    found = {name: row for name, (row,) in bench.frozen_rows(heads, tokens, pairs).items()}
    assert set(found) == set(bench.FROZEN)
    for name, row in found.items():
        assert len(row["dev"]) == len(pairs["dev"]) and len(row["test"]["set"]) == 10 and len(row["test"]["again"]) == 4, name
        assert row["test"]["again"] == pytest.approx(row["test"]["set"][:4], abs=1e-3), name
        assert (row["seconds"] > 0) == (name != "likelihood"), name
    reward = bench.stage3.RewardModel.load(run / "reward_head.safetensors")
    own = [a - b for a, b in zip(*(reward.score([r["prompt"] for r in pairs["test"]], [r[s] for r in pairs["test"]]) for s in bench.SIDES))]
    assert found["sparserm"]["test"]["set"] == pytest.approx(own, abs=1e-4)
    assert found["dense"]["trained"] == tiny.WIDTH + 1 and found["mlp"]["trained"] == 512 * (tiny.WIDTH + 2) + 1
    assert found["swift"]["trained"] == 2 * tiny.WIDTH + 2 and found["likelihood"]["trained"] == 0
    read = 2 * (20 + 8) / tokens["rate"]["to L"]                    # what it takes to read train and dev comes to the fit
    assert found["dense"]["seconds"] == pytest.approx(heads["dense"]["fit_seconds"] + read)
    assert found["sparserm"]["seconds_padded"] > found["sparserm"]["fit_seconds"] and "seconds_padded" not in found["dense"]
    assert found["words"]["seconds"] == heads["words"]["fit_seconds"] and found["words"]["texts_a_second"] is None


def test_the_head_on_the_last_block_reads_its_output(prepared, backbone_of):
    folder, run, args = prepared
    backbone, pairs = stage1.load_backbone(args.model), bench.load_pairs(run)["test"]
    found = bench.activations(run, 2, 10**9).z
    wanted = stage1.residuals(backbone, bench.rendered(backbone.tokenizer, pairs, 48), [2], "last")[0]
    assert torch.allclose(torch.stack(found, 1).flatten(0, 1), wanted, atol=1e-4)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_fine_tuned_peer_learns_its_train_pairs(method, prepared, monkeypatch):
    pytest.importorskip("trl")
    run, seen = prepared[1], {}
    real = bench.fine_tune
    monkeypatch.setattr(bench, "fine_tune", lambda *args: seen.setdefault("made", real(*args)))
    found = bench.run_peer(job(prepared, method, lr=0.01, seed=0, search=False) | {"epochs": 12})
    model, trained, _ = seen["made"]
    assert found["trained"] == trained and found["seconds"] > 0
    whole = sum(p.numel() for p in model.parameters())
    assert trained == whole if method == "full" else trained < whole
    backbone, pairs = stage1.make_backbone(model, stage1.load_tokenizer(prepared[2].model), {"model": "tiny"}), bench.load_pairs(run)
    rewards = bench.last_rewards(backbone, bench.rendered(backbone.tokenizer, pairs["train"], 48)).view(-1, 2)
    assert float((rewards[:, 0] > rewards[:, 1]).float().mean()) > 0.8
    assert len(found["dev"]) == len(pairs["dev"]) and [len(found["test"][n]) for n in ("set", "again")] == [10, 4]


@pytest.fixture
def asked(monkeypatch):
    """The jobs that would have run: do() is faked. The learning rates 3e-5 and 1e-3 are the good ones."""
    found = []

    def fake(job, _):
        found.append(job)
        dev = [2.0, 1.0, 3.0] if job.get("lr") in (3e-5, 1e-3) else [2.0, -1.0, 1.0]
        row = {"dev": dev, "test": {name: [1.0] * 9 + [-1.0] for name in (job["set"], *job["others"])}, "trained": 5, "seconds": 1.0,
               "peak_gib": None, "texts_a_second": 2.0, "k": 4, "way": "sum", "fit_seconds": 1.0, "place": "to L"}
        names = {"heads": bench.FROZEN[:-2], "tokens": bench.FROZEN[-2:]}.get(job["method"], [job["method"]])
        return {name: dict(row) for name in names} | ({"rate": {"to L": 2.0}} if job["method"] == "tokens" else {})
    monkeypatch.setattr(bench, "do", fake)
    return found


def finals(asked):
    return sorted((j["set"], j["method"], j["lr"], j["n"], j["seed"]) for j in asked if j.get("search") is False)


def test_the_rate_with_the_lowest_dev_nll_trains_on_all_and_every_seed(prepared, asked, capsys):
    folder, run, args = prepared
    source = f"set={folder / 'pairs.jsonl'}"
    with tiny.argv(source, "--out", folder, "--train-pairs", 20, "--search-pairs", 6, "--seeds", 2, "--curve"):
        bench.main()
    assert finals(asked) == sorted(("set", m, rate, 20, seed) for m, rate in (("full", 3e-5), ("lora", 1e-3)) for seed in (0, 1))
    assert [j["n"] for j in asked if j.get("search")] == [6] * 6
    out = capsys.readouterr().out
    assert "| full fine-tuning (TRL) (2 seeds) | .900 [" in out and "| set: 20 train, 10 test pairs, 0 of 76 texts cut |" in out
    assert "+.000 [+.000, +.000]" in out                             # all are right on the same pairs
    with tiny.argv(source, "--out", folder, "--train-pairs", 20, "--epochs", 3), \
            pytest.raises(bench.files.UserError, match="other settings"):
        bench.main()


def test_a_set_that_is_not_searched_takes_the_rate_of_the_first(prepared, asked, tmp_path, capsys):
    folder, run, args = prepared
    for name in ("a-20", "b-20", "a-10"):
        shutil.copytree(run, tmp_path / name)
    with tiny.argv(f"a={folder / 'pairs.jsonl'}", f"b={folder / 'pairs.jsonl'}", "--out", tmp_path, "--train-pairs", 20, "--search-pairs",
                   6, 0, "--seeds", 1, "--curve", 10):
        bench.main()
    assert {j["set"] for j in asked if j.get("search")} == {"a"}
    assert finals(asked) == sorted((name, m, rate, n, 0) for m, rate in (("full", 3e-5), ("lora", 1e-3))
                                   for name, n in (("a", 20), ("b", 20), ("a", 10)))
    out = capsys.readouterr().out
    assert "| a, train pairs (full and LoRA: first seed) | 20 | 20 |" in out            # the copy of 20 stands for 10
    with tiny.argv("a=x", "b=y", "--search-pairs", 0, 6), pytest.raises(SystemExit):
        bench.main()


def test_a_job_is_a_process_of_its_own_and_a_done_one_is_not_run_again(prepared, monkeypatch):
    args = SimpleNamespace(finished=False, threads=1)
    one = job(prepared, "heads", others={})
    found = bench.do(one, args)
    assert set(found) == set(bench.FROZEN) - {"swift", "likelihood"} and bench.job_path(one).exists()
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: pytest.fail("run again"))
    assert bench.do(one, args) == found
    assert bench.do(one | {"n": 7}, SimpleNamespace(finished=True)) is None
