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
HEADS = ("sparserm", "searched", "dense", "dense_last", "mlp", "words")


def run_here(script, *flags):
    """common.run_script within this process."""
    tiny.succeed(script.removesuffix(".py"), *flags)
    return {"seconds": 1.0, "peak_gib": 1.0}


@pytest.fixture(scope="module", autouse=True)
def short_training():
    """Heads stop early: here it only matters which pairs they see."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(peers.SETTINGS, "epochs", 20)
        patch.setattr(peers, "PATIENCE", 5)
        yield


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
    pairs = common.pairs_by_split(run)
    assert [len(pairs[split]) for split in stage1.SPLITS] == [20, 8, 10]
    for split, rows in pairs.items():
        assert {stage1.split_of(row["prompt"]) for row in rows} == {split}


# ---------------------------------------------------------------- token states and likelihoods

@pytest.fixture(params=["llama", "gpt2"])
def tokens(request, backbone_of):
    """→ (backbone, texts, Tokens)."""
    backbone = backbone_of(request.param)
    texts = [stage1.render(backbone.tokenizer, *text) for text in TEXTS]
    return backbone, texts, peers.Tokens(backbone, texts, 1)


def states_of(tokens, n):
    """The token states of text n."""
    return tokens.z[tokens.first[n]:tokens.first[n + 1]]


def test_one_pass_gives_the_token_states_of_each_text_alone(tokens):
    backbone, texts, tokens = tokens
    for n, text in enumerate(texts):
        with torch.inference_mode():
            own = backbone.model(torch.tensor([text.ids]), output_hidden_states=True)
        z = own.hidden_states[2][0]
        assert torch.allclose(states_of(tokens, n), z[text.first:text.last], atol=1e-4)


def test_one_pass_gives_the_likelihoods_of_the_texts(tokens):
    backbone, _, tokens = tokens
    sums, counts = common.log_likelihoods(backbone, *zip(*TEXTS))
    assert tokens.sums == pytest.approx(sums, rel=1e-4)
    assert tokens.counts.tolist() == counts.tolist()


def test_some_of_the_texts_keep_their_tokens_and_likelihoods(tokens):
    _, _, tokens = tokens
    part = tokens.some(np.array([3, 1]))
    assert part.sums.tolist() == tokens.sums[[3, 1]].tolist()
    assert torch.equal(part.z, torch.cat([states_of(tokens, 3), states_of(tokens, 1)]))
    assert torch.equal(states_of(part, 1), states_of(tokens, 1))


# ---------------------------------------------------------------- the SWIFT-style head

def test_a_gated_reward_is_the_mean_of_token_rewards_weighted_by_their_gates():
    weights = {"w": torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "b": torch.tensor([0.0, -1.0])}
    z = torch.tensor([[0.0, 3.0], [1.0, 0.0], [2.0, 2.0]])
    owner = torch.tensor([0, 0, 1])
    gate = [1 / (1 + np.exp(-g)) for g in (0.0, 1.0)]
    wanted = [(gate[0] * 2 + gate[1] * 1) / sum(gate), 5.0]     # rewards 3 - 1, 2 - 1; 4 + 2 - 1
    found = peers.gated_rewards(weights, z, owner, 2)
    assert found.tolist() == pytest.approx(wanted)


@pytest.fixture
def telling_tokens():
    """40 pairs whose first token tells chosen from rejected → (Tokens, split, lengths of texts)."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5, 80)
    tokens = object.__new__(peers.Tokens)
    tokens.z = torch.from_numpy(rng.normal(size=(lengths.sum(), 3))).float()
    tokens.first = np.concatenate([[0], np.cumsum(lengths)])
    tokens.z[tokens.first[:-1], 0] = torch.tensor([5.0, -5.0] * 40)
    tokens.sums = tokens.counts = np.zeros(80)
    return tokens, torch.tensor(([0] * 6 + [1] + [2]) * 5), torch.from_numpy(lengths)


def test_swift_learns_which_token_tells(telling_tokens):
    tokens, split, _ = telling_tokens
    read, trained = peers.fit_swift(tokens, split)
    assert trained == 8
    assert (read(tokens)[split == 2] > 0).all()


def test_nothing_of_the_test_texts_is_in_a_swift_head(telling_tokens):
    tokens, split, lengths = telling_tokens
    other = tokens.some(np.arange(80))
    of_test = torch.repeat_interleave((split == 2).repeat_interleave(2), lengths)
    other.z = torch.where(of_test[:, None], 9.0, tokens.z)
    read, _ = peers.fit_swift(tokens, split)
    read_other, _ = peers.fit_swift(other, split)
    assert torch.equal(read_other(tokens), read(tokens))


# ---------------------------------------------------------------- the frozen methods

@pytest.fixture(scope="module")
def frozen(prepared):
    """The two frozen jobs of the prepared run → (results of heads, of tokens, rows by method)."""
    heads = peers.run_heads(job(prepared, "heads"))
    tokens = peers.run_tokens(job(prepared, "tokens"))
    rows = bench.frozen_rows(heads, tokens, common.pairs_by_split(prepared[1]))
    return heads, tokens, {name: row for name, (row,) in rows.items()}


def test_the_frozen_methods_judge_the_same_pairs(frozen):
    _, _, found = frozen
    assert set(found) == {*HEADS, "swift", "likelihood"}
    for name, row in found.items():
        sizes = len(row["dev"]), len(row["test"]["set"]), len(row["test"]["again"])
        assert sizes == (8, 10, 4), name
        assert row["test"]["again"] == pytest.approx(row["test"]["set"][:4], abs=1e-3), name


def test_the_rewards_of_sparserm_are_those_of_the_run(prepared, frozen):
    _, run, _ = prepared
    reward = stage3.RewardModel.load(run / "reward_head.safetensors")
    pairs = common.pairs_by_split(run)["test"]
    prompts = [pair["prompt"] for pair in pairs]
    chosen, rejected = [reward.score(prompts, [pair[side] for pair in pairs])
                        for side in ("chosen", "rejected")]
    assert frozen[2]["sparserm"]["test"]["set"] == pytest.approx(np.subtract(chosen, rejected),
                                                                 abs=1e-4)


def test_a_run_whose_head_comes_out_otherwise_is_refused(prepared):
    _, run, _ = prepared
    reward = stage3.RewardModel(*stage1.load_stage(run / "reward_head.safetensors"), None)
    reward.tensors["w1"] = reward.tensors["w1"] + 1
    with pytest.raises(UserError, match="trained again"):
        peers.sparserm(reward, run, 1)


def test_trained_parameters_are_counted(frozen):
    trained = {name: row["trained"] for name, row in frozen[2].items()}
    assert trained["dense"] == tiny.WIDTH + 1
    assert trained["mlp"] == 512 * (tiny.WIDTH + 2) + 1
    assert trained["swift"] == 2 * tiny.WIDTH + 2
    assert trained["likelihood"] == 0


def test_what_it_takes_to_read_train_and_dev_comes_to_the_fit(frozen):
    heads, tokens, found = frozen
    read = 2 * (20 + 8) / tokens["rate"]["to L"]
    assert found["dense"]["seconds"] == pytest.approx(heads["dense"]["fit_seconds"] + read)
    assert found["words"]["seconds"] == heads["words"]["fit_seconds"]
    assert found["words"]["texts_a_second"] is None
    assert found["likelihood"]["seconds"] == 0


def test_only_sparserm_says_what_padded_batches_would_take(frozen):
    _, _, found = frozen
    assert found["sparserm"]["seconds_padded"] > found["sparserm"]["fit_seconds"]
    assert [name for name, row in found.items() if "seconds_padded" in row] == ["sparserm"]


def test_the_head_on_the_last_block_reads_its_output(prepared):
    _, run, args = prepared
    backbone = stage1.load_backbone(args.model)
    texts = peers.rendered(backbone.tokenizer, common.pairs_by_split(run)["test"], 48)
    wanted = stage1.residuals(backbone, texts, [2], "last")[0]
    found = peers.activations(run, 2, peers.FULL).z
    assert torch.allclose(torch.stack(found, 1).flatten(0, 1), wanted, atol=1e-4)


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
    train = peers.rendered(tokenizer, common.pairs_by_split(run)["train"], 48)
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
               "way": "sum", "fit_seconds": 1.0, "place": "to L"}
        names = {"heads": HEADS, "tokens": ("swift", "likelihood")}
        results = {name: dict(row) for name in names.get(job["method"], (job["method"],))}
        return results | ({"rate": {"to L": 2.0}} if job["method"] == "tokens" else {})
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
    assert "+.000 [+.000, +.000]" in out                # all are right on the same pairs


def test_jobs_of_other_settings_in_the_same_folder_are_refused(prepared, source, asked, tmp_path):
    shutil.copytree(prepared[1], tmp_path / "set-20")
    flags = (source, "--out", tmp_path, "--train-pairs", 20, "--frozen", "--curve")
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
    one = job(prepared, "tokens", others={})
    found = bench.do(one, args)
    assert set(found) == {"swift", "likelihood", "rate"} and bench.job_path(one).exists()
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
