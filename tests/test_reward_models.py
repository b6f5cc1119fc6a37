"""benchmarks/reward_models.py: every method sees the same pairs, and its rewards are those of the
model it says they are."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from benchmarks import common
from benchmarks import reward_models as bench
from benchmarks import reward_models_peers as peers
from benchmarks import reward_models_tables as tables
from parts.files import UserError

stage1, stage3 = common.stage1, common.stage3
TEXTS = [
    ("Is water wet?", "Yes, it is."),
    ("Is water wet?", "Yes, no."),
    ("Is water blue?", "No"),
    ([{"role": "user", "content": "One"}], "two three four five six seven eight nine ten"),
]
HEADS = ("sparserm", "paper", "dense", "mlp")


def run_here(script, *flags):
    """common.run_script within this process."""
    tiny.succeed(script.removesuffix(".py"), *flags)
    return {"seconds": 1.0, "peak_gib": 1.0}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A set of tiny pairs, cut and taken through stages 1 to 3 → (folder, run, its arguments)."""
    folder = tmp_path_factory.mktemp("prepared")
    args = SimpleNamespace(model=tiny.save_model(folder / "model"), layer=1, max_length=48,
                           sae=tiny.save_sae(folder / "sae.safetensors", 1),
                           dev_pairs=8, test_pairs=10)
    pairs = tiny.save_pairs(folder / "pairs.jsonl", 150)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "run_script", run_here)
        bench.prepare(pairs, folder / "set-20", 20, args)
    return folder, folder / "set-20", args


def job(prepared, method, **more):
    """A job on the prepared run, whose own pairs are another set too."""
    folder, run, args = prepared
    return {"model": args.model, "layer": 1, "max_length": 48, "epochs": 2,
            "out": str(folder / "out"), "other_pairs": 4, "set": "set", "n": 20, "run": str(run),
            "others": {"again": str(run)}, "method": method, **more}


# ---------------------------------------------------------------- the pairs

def test_a_cut_text_fits_and_keeps_its_beginning():
    tokenizer = tiny.make_tokenizer()
    long = " ".join(["seven eight nine"] * 40)
    cut = bench.cut_response(tokenizer, "Is water wet?", long, 60)
    assert long.startswith(cut)
    assert 50 <= len(stage1.render(tokenizer, "Is water wet?", cut).ids) <= 60


def test_of_a_cut_text_the_prompt_may_keep_half():
    tokenizer = tiny.make_tokenizer()
    long = " ".join(["seven eight nine"] * 40)
    cut = bench.cut_response(tokenizer, long, long, 60)
    assert len(stage1.render(tokenizer, long, cut, 60).ids) <= 60
    assert long.startswith(cut) and len(cut) > 20


def test_a_short_text_stays_as_it_is():
    assert bench.cut_response(tiny.make_tokenizer(), "Is water wet?", "Yes.", 60) == "Yes."


def test_some_rows_are_whole_questions_whatever_their_order():
    rows = [{"question": f"q{n // 3}", "id": str(n)} for n in range(30)]
    some = peers.some(rows, 10)
    assert len(some) == 12 and len({row["question"] for row in some}) == 4
    assert peers.some(rows[::-1], 10) == some
    assert peers.some(rows, 99) == peers.some(rows, 30)


def test_a_prepared_set_has_the_splits_of_stage_1_and_no_more_pairs_than_asked(prepared):
    _, run, _ = prepared
    pairs = peers.pairs_of_run(run)
    assert [len(pairs[split]) for split in stage1.SPLITS] == [20, 8, 10]
    for split, rows in pairs.items():
        assert {stage1.split_of(row["prompt"]) for row in rows} == {split}


def test_only_train_pairs_are_where_heads_are_fitted(prepared):
    _, run, _ = prepared
    assert [len(rows) for rows in common.pairs_by_split(run).values()] == [20, 0, 0]
    assert len(peers.activations(run, 1).pairs) == 20


# ---------------------------------------------------------------- the frozen methods

@pytest.fixture(scope="module")
def frozen(prepared):
    """The frozen job of the prepared run → (its results, rows by method)."""
    heads = peers.run_heads(job(prepared, "heads"))
    rows = bench.frozen_rows(heads, peers.pairs_of_run(prepared[1]))
    return heads, {name: row for name, (row,) in rows.items()}


def test_the_frozen_methods_judge_the_same_pairs(frozen):
    _, found = frozen
    assert set(found) == set(HEADS)
    for name, row in found.items():
        sizes = len(row["dev"]), len(row["test"]["set"]), len(row["test"]["again"])
        assert sizes == (8, 10, 4), name
        assert row["test"]["again"] == pytest.approx(row["test"]["set"][:4], abs=1e-3), name


def scored(reward, pairs):
    """r_chosen - r_rejected of pairs, from their text."""
    prompts = [pair["prompt"] for pair in pairs]
    chosen, rejected = [reward.score(prompts, [pair[side] for pair in pairs])
                        for side in ("chosen", "rejected")]
    return np.subtract(chosen, rejected)


@pytest.mark.parametrize("split", ["dev", "test"])
def test_the_rewards_of_sparserm_are_those_of_the_run(split, prepared, frozen):
    _, run, _ = prepared
    reward = stage3.RewardModel.load(run / "reward_head.safetensors")
    row = frozen[1]["sparserm"]
    found = row["dev"] if split == "dev" else row["test"]["set"]
    assert found == pytest.approx(scored(reward, peers.pairs_of_run(run)[split]), abs=1e-4)


def test_the_paper_s_head_is_an_mlp_with_the_margin_loss(prepared, frozen, tmp_path):
    _, run, _ = prepared
    shutil.copytree(run, tmp_path / "run")
    tiny.succeed("03_train_head", "--run", tmp_path / "run", "--head", "mlp", "--loss", "margin")
    reward = stage3.RewardModel.load(tmp_path / "run/reward_head.safetensors")
    wanted = scored(reward, peers.pairs_of_run(run)["test"])
    assert frozen[1]["paper"]["test"]["set"] == pytest.approx(wanted, abs=1e-3)


def test_trained_parameters_are_counted(prepared, frozen):
    _, features = stage1.load_stage(prepared[1] / "features.safetensors")
    trained = {name: row["trained"] for name, row in frozen[1].items()}
    assert trained == {"sparserm": 2 * frozen[0]["sparserm"]["k"] + 1,
                       "paper": 512 * (2 * features["k"] + 2) + 1,
                       "dense": tiny.WIDTH + 1,
                       "mlp": 512 * (tiny.WIDTH + 2) + 1}


@pytest.mark.parametrize("fit", [peers.fit_dense, peers.fit_mlp])
def test_a_head_on_z_learns_its_train_pairs(fit, prepared):
    train = peers.activations(prepared[1], 1)
    read, _ = fit(train)
    assert (read(train.z) > 0).all()


def test_what_it_takes_to_read_train_comes_to_the_fit(frozen):
    heads, found = frozen
    read = 2 * 20 / heads["rate"]
    for name in HEADS:
        assert found[name]["seconds"] == pytest.approx(heads[name]["fit_seconds"] + read)
        assert found[name]["texts_a_second"] == heads["rate"]


def test_only_sparserm_says_what_padded_batches_would_take(frozen):
    _, found = frozen
    assert found["sparserm"]["seconds_padded"] > found["sparserm"]["fit_seconds"]
    assert [name for name, row in found.items() if "seconds_padded" in row] == ["sparserm"]


def test_z_is_the_mean_over_the_response_at_block_l(prepared):
    _, run, args = prepared
    backbone = stage1.load_backbone(args.model)
    texts = peers.rendered(backbone.tokenizer, peers.pairs_of_run(run)["test"], 48)
    means = []
    for text in texts:
        with torch.inference_mode():
            own = backbone.model(torch.tensor([text.ids]), output_hidden_states=True)
        means.append(own.hidden_states[2][0, text.first:text.stop].mean(0))
    found = peers.activations(run / peers.HELD, 1, stage1.TEST).z
    assert torch.allclose(torch.stack(found, 1).flatten(0, 1), torch.stack(means), atol=1e-4)


# ---------------------------------------------------------------- fine-tuned peers

def test_a_fine_tuned_models_packed_rewards_are_those_of_its_own_forward_pass(folder_of):
    from transformers import AutoModelForSequenceClassification
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder_of("llama"), num_labels=1, dtype=torch.float32)
    tokenizer = stage1.load_tokenizer(folder_of("llama"))
    backbone = stage1.make_backbone(model, tokenizer, {"model": "tiny"})
    texts = [stage1.render(tokenizer, *text) for text in TEXTS]
    found = peers.last_rewards(backbone, texts)
    with torch.inference_mode():
        alone = [model(torch.tensor([text.ids])).logits[:, 0] for text in texts]
    assert torch.allclose(found, torch.cat(alone), atol=1e-4) and found.std() > 0.01


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_fine_tuned_peer_learns_its_train_pairs(method, prepared, monkeypatch):
    pytest.importorskip("trl")
    _, run, args = prepared
    made = []
    real = peers.fine_tune

    def remembered(*given):
        made.append(real(*given))
        return made[-1]
    monkeypatch.setattr(peers, "fine_tune", remembered)
    found = peers.run_peer(job(prepared, method, lr=0.01, seed=0, search=False, epochs=12))

    [(model, trained, _)] = made
    whole = sum(parameter.numel() for parameter in model.parameters())
    assert trained == whole if method == "full" else trained < whole
    assert found["trained"] == trained and found["seconds"] > 0

    tokenizer = stage1.load_tokenizer(args.model)
    backbone = stage1.make_backbone(model, tokenizer, {"model": "tiny"})
    train = peers.rendered(tokenizer, peers.pairs_of_run(run)["train"], 48)
    chosen, rejected = peers.last_rewards(backbone, train).view(-1, 2).T
    assert float((chosen > rejected).float().mean()) > 0.8
    assert len(found["dev"]) == 8
    assert {name: len(of) for name, of in found["test"].items()} == {"set": 10, "again": 4}


# ---------------------------------------------------------------- the plan

@pytest.fixture
def asked(monkeypatch):
    """The jobs that would have run: do() is faked. The rates 3e-5 and 1e-3 are the good ones."""
    found = []

    def fake(job, _):
        found.append(job)
        good = job.get("lr") in (3e-5, 1e-3)
        row = {"dev": [2.0, 1.0, 3.0] if good else [2.0, -1.0, 1.0],
               "test": {name: [1.0] * 9 + [-1.0] for name in (job["set"], *job["others"])},
               "trained": 5, "seconds": 1.0, "peak_gib": None, "texts_a_second": 2.0, "k": 4,
               "l2": 0.1, "fit_seconds": 1.0}
        names = HEADS if job["method"] == "heads" else (job["method"],)
        results = {name: dict(row) for name in names}
        return results | ({"rate": 2.0} if job["method"] == "heads" else {})
    monkeypatch.setattr(bench, "do", fake)
    return found


def finals(asked):
    """The fits of full and lora that are no search."""
    return sorted((job["set"], job["method"], job["lr"], job["n"], job["seed"])
                  for job in asked if job.get("search") is False)


def searched_with(asked):
    """(set, n) of every trial."""
    return [(job["set"], job["n"]) for job in asked if job.get("search")]


@pytest.fixture
def source(prepared):
    """NAME=FILE of the prepared set."""
    return f"set={prepared[0] / 'pairs.jsonl'}"


def test_the_rate_with_the_lowest_dev_nll_trains_on_all_and_every_seed(prepared, source, asked,
                                                                       capsys):
    with tiny.argv(source, "--out", prepared[0], "--train-pairs", 20, "--search-pairs", 6,
                   "--seeds", 2, "--curve"):
        bench.main()
    assert finals(asked) == [("set", "full", 3e-5, 20, 0), ("set", "full", 3e-5, 20, 1),
                             ("set", "lora", 1e-3, 20, 0), ("set", "lora", 1e-3, 20, 1)]
    assert searched_with(asked) == [("set", 6)] * 6
    out = capsys.readouterr().out
    assert "| full fine-tuning (TRL) (2 seeds) | .900 [" in out
    assert "| set: 20 train, 10 test pairs, 0 of 76 texts cut |" in out
    assert "+.000 (cannot tell)" in out                 # all are right on the same pairs


def test_jobs_of_other_settings_in_the_same_folder_are_refused(prepared, source, asked, tmp_path):
    shutil.copytree(prepared[1], tmp_path / "set-20")
    flags = (source, "--out", tmp_path, "--train-pairs", 20, "--frozen-only", "--curve")
    with tiny.argv(*flags):
        bench.main()
    with tiny.argv(*flags, "--epochs", 3), pytest.raises(UserError, match="other settings"):
        bench.main()


def test_a_set_that_is_not_searched_takes_the_rate_of_the_first(prepared, asked, tmp_path, capsys):
    folder, run, _ = prepared
    for name in ("a-20", "b-20", "a-10"):
        shutil.copytree(run, tmp_path / name)
    pairs = folder / "pairs.jsonl"
    with tiny.argv(f"a={pairs}", f"b={pairs}", "--out", tmp_path, "--train-pairs", 20,
                   "--search-pairs", 6, 0, "--seeds", 1, "--curve", 10):
        bench.main()
    assert set(searched_with(asked)) == {("a", 6)}
    assert finals(asked) == sorted((name, method, rate, n, 0)
                                   for method, rate in (("full", 3e-5), ("lora", 1e-3))
                                   for name, n in (("a", 20), ("b", 20), ("a", 10)))
    out = capsys.readouterr().out
    assert "| a, train pairs (full and LoRA: first seed) | 20 | 20 |" in out    # a copy, for 10


def test_the_other_sets_are_read_by_the_jobs_with_all_train_pairs(prepared):
    pairs = prepared[0] / "pairs.jsonl"
    with tiny.argv(f"a={pairs}", f"b={pairs}", "--train-pairs", 20, "--curve", 10):
        plan = bench.Plan(bench.parse_args())
    others = {key: plan.job(*key, "heads")["others"] for key in plan.runs}
    assert others == {("a", 10): {}, ("a", 20): {"b": str(plan.runs["b", 20])},
                      ("b", 20): {"a": str(plan.runs["a", 20])}}


def test_the_first_set_must_be_searched_where_any_is():
    with tiny.argv("a=x", "b=y", "--search-pairs", 0, 6), pytest.raises(SystemExit):
        bench.main()


def test_with_finished_nothing_is_run_and_missing_jobs_are_left_out(prepared):
    args = SimpleNamespace(finished=True)
    assert bench.do(job(prepared, "heads", n=7), args) is None


def test_a_job_is_a_process_of_its_own_and_a_done_one_is_not_run_again(prepared, monkeypatch):
    args = SimpleNamespace(finished=False, threads=1)
    one = job(prepared, "heads", others={})
    found = bench.do(one, args)
    assert set(found) == {*HEADS, "rate"} and bench.job_path(one).exists()
    monkeypatch.setattr(bench.subprocess, "run", lambda *_, **__: pytest.fail("run again"))
    assert bench.do(one, args) == found


# ---------------------------------------------------------------- figures

def test_the_nll_is_that_of_the_preferences_at_a_temperature():
    wanted = -np.mean(np.log(1 / (1 + np.exp(-np.array([2.0, -1.0]) / 4))))
    assert tables.nll([2.0, -1.0], 4.0) == pytest.approx(wanted)


def test_the_other_sets_count_together_in_the_first_seed():
    ours = {"test": {"b": [1.0, 1.0], "c": [1.0]}}
    theirs = {"test": {"b": [1.0, -1.0], "c": [-1.0]}}
    groups = {"b": np.array([1, 2, 3]), "c": np.array([7])}     # one of b's pairs was not read
    row = tables.on_other_sets(theirs, ours, groups)
    assert row["accuracy"] == pytest.approx(1 / 3) and row["n"] == 3
    assert row["behind"]["mean"] == pytest.approx(2 / 3) and row["names"] == ["b", "c"]
    assert row["behind"]["low"] is None                 # of three questions nothing can be told


def test_several_seeds_of_a_method_count_together():
    groups = np.arange(40)
    ours = np.ones((1, 40))
    theirs = np.ones((2, 40))
    theirs[1, :20] = -1                                 # the second seed gets half of them right
    row = tables.summary(theirs, groups)
    assert row["accuracy"] == 0.75 and row["seeds"] == [1.0, 0.5]
    gap = tables.behind(ours, theirs, groups)
    assert gap["mean"] == 0.25 and gap["low"] == 0.0    # a draw may hold the first seed alone
    assert gap["high"] > 0.5


# ---------------------------------------------------------------- rows of the results file

def test_the_difference_of_two_accuracies_has_both_intervals_in_it():
    ours = {"ties_half": 0.8, "half_low": 0.77, "half_high": 0.83}
    theirs = {"ties_half": 0.7, "half_low": 0.66, "half_high": 0.74}
    found = tables.not_paired(ours, theirs)
    assert [found[key] for key in ("mean", "low", "high")] == pytest.approx([0.1, 0.05, 0.15])


def test_the_limits_that_face_each_other_count_for_a_difference():
    ours = {"ties_half": 0.8, "half_low": 0.5, "half_high": 0.8}
    theirs = {"ties_half": 0.7, "half_low": 0.7, "half_high": 1.0}
    found = tables.not_paired(ours, theirs)
    assert found["high"] == pytest.approx(0.1)
    assert found["low"] == pytest.approx(0.1 - 0.3 * 2 ** 0.5)


def stored_row(accuracy):
    """A row as the results file has it."""
    return {"ties_half": accuracy, "half_low": accuracy - 0.03, "half_high": accuracy + 0.03,
            "accuracy": accuracy, "behind": {"mean": 9.0}}


@pytest.fixture
def both():
    """→ (figures of --frozen-only, a results file with the same pairs)."""
    settings = {name: 1 for name in tables.DECIDE}
    pairs = {"train": 20, "dev": 8, "test": 10}
    now = {"settings": dict(settings), "rates": {},
           "sets": {"set": {"20": {"pairs": pairs, "methods": {"sparserm": stored_row(0.8)}}}}}
    methods = {name: stored_row(0.7) for name in ("full", "lora", "dense")}
    stored = {"settings": {**settings, "torch": "2"}, "rates": {"set": {"full": 1e-5}},
              "sets": {"set": {"20": {"pairs": dict(pairs), "methods": methods}}}}
    return now, stored


def test_fine_tuned_rows_are_taken_from_a_results_file_with_the_same_pairs(both):
    now, stored = both
    tables.add_fine_tuned(now, stored)
    methods = now["sets"]["set"]["20"]["methods"]
    assert set(methods) == {"sparserm", "full", "lora"}
    assert methods["full"]["behind"]["mean"] == pytest.approx(0.1)
    assert now["rates"] == stored["rates"]
    assert now["settings"]["fine_tuned"] == stored["settings"]


def test_the_settings_of_fine_tuned_rows_stay_those_of_their_own_run(both):
    now, stored = both
    own = dict(stored["settings"], torch="1")
    stored["settings"]["fine_tuned"] = own
    tables.add_fine_tuned(now, stored)
    assert now["settings"]["fine_tuned"] == own


def test_fine_tuned_rows_of_other_pairs_are_not_taken(both):
    now, stored = both
    stored["sets"]["set"]["20"]["pairs"]["test"] = 11
    tables.add_fine_tuned(now, stored)
    assert set(now["sets"]["set"]["20"]["methods"]) == {"sparserm"}


def test_fine_tuned_rows_of_other_settings_are_not_taken_and_a_note_says_so(both, capsys):
    now, stored = both
    stored["settings"]["max_length"] = 2
    tables.add_fine_tuned(now, stored)
    assert set(now["sets"]["set"]["20"]["methods"]) == {"sparserm"}
    assert "another max_length" in capsys.readouterr().err


def test_with_frozen_only_no_fine_tuned_model_is_trained(prepared, source, asked):
    with tiny.argv(source, "--out", prepared[0] / "only", "--train-pairs", 20, "--frozen-only",
                   "--curve", "--finished"):
        plan = bench.Plan(bench.parse_args())
    plan.runs["set", 20] = prepared[1]
    found, rates = bench.all_jobs(plan)
    assert [job["method"] for job in asked] == ["heads"] and rates == {}
    assert set(found["set", 20]) == set(HEADS)
