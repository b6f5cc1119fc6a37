"""benchmarks/align.py, rank_answers.py, best_of_n.py, sweeps.py and what all benchmarks share: what
their figures are made of."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from benchmarks import align, best_of_n, common, rank_answers, sweeps
from parts.files import UserError
from parts.statistics import bootstrap, summary

stage1, stage2, stage3, stage4 = common.stage1, common.stage2, common.stage3, common.stage4


# ---------------------------------------------------------------- what the benchmarks share

@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_log_likelihoods_are_those_of_each_text_alone(family, backbone_of):
    backbone = backbone_of(family)
    prompts = ["Is water wet?", "Is water wet?", "Is water blue?",
               [{"role": "user", "content": "One"}]]
    responses = ["Yes, it is.", "Yes, no.", "No", "two three four five six seven eight nine ten"]
    sums, counts = common.log_likelihoods(backbone, prompts, responses)
    for prompt, response, found, count in zip(prompts, responses, sums, counts, strict=True):
        text = stage1.render(backbone.tokenizer, prompt, response)
        with torch.inference_mode():
            logits = backbone.model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
        places = range(text.first, text.eot + 1)
        wanted = sum(float(logits[place - 1, text.ids[place]]) for place in places)
        assert found == pytest.approx(wanted, rel=1e-4)
        assert count == len(places)


def rows(n):
    """n pairs, two of each question."""
    found = []
    for i in range(n):
        question = f"q{i // 2}"
        found.append({"id": str(i), "question": question, "prompt": question,
                      "chosen": f"right {i}", "rejected": f"wrong {i}"})
    return found


def test_a_cut_never_puts_a_question_on_both_sides():
    first, rest = common.cut(rows(20), 7)
    assert len(first) == 8 and first + rest == rows(20)
    assert not {row["question"] for row in first} & {row["question"] for row in rest}


def test_a_cut_of_more_than_all_rows_leaves_none():
    assert common.cut(rows(4), 9) == (rows(4), [])


def test_a_script_that_ran_says_how_long_it_took_and_how_much_memory(tmp_path):
    script = tmp_path / "fine.py"
    script.write_text("print('nobody sees this')")
    found = common.run_script(script)
    assert found["seconds"] > 0 and 0.001 < found["peak_gib"] < 10


def test_a_script_that_failed_is_an_error_with_its_flags(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit(2)")
    with pytest.raises(UserError, match=r"fails\.py failed, exit 2 · --run here · "):
        common.run_script(script, "--run", "here")


def test_an_interval_is_written_without_the_zero_before_the_point():
    row = {"mean": -0.0126, "low": -1.0, "high": 0.2}
    assert common.printed_interval(row, sign="+") == "-0.013 [-1.000, +0.200]"
    assert common.difference(row) == "-.013 [-1.000, +.200]"


@pytest.mark.parametrize("words", [[], ["a=x", "y"]])
def test_sets_without_a_name_are_not_taken(words):
    assert common.named_sets(words) is None


def test_a_set_is_named_before_the_first_sign():
    assert common.named_sets(["a=x=1", "b=y"]) == {"a": "x=1", "b": "y"}


def test_a_difference_without_an_interval_says_so():
    row = {"mean": 0.5, "low": None, "high": None}
    assert common.difference(row) == "+.500 (cannot tell)"


def test_an_interval_over_one_seed_is_the_bootstrap_over_groups():
    rng = np.random.default_rng(0)
    groups = np.arange(60) // 2
    values = rng.integers(0, 2, 60).astype(float)
    found = common.mean_interval(values, groups)
    assert (found["mean"], found["low"], found["high"]) == pytest.approx(bootstrap(values, groups))


def test_an_interval_over_seeds_is_that_of_a_plain_loop_over_draws_of_both():
    rng = np.random.default_rng(0)
    groups = np.arange(40) // 2
    values = rng.normal(size=(3, 40))
    means = []
    for _ in range(4000):
        drawn = rng.integers(20, size=20)
        pairs = np.concatenate([2 * drawn, 2 * drawn + 1])
        means.append(values[rng.integers(3, size=3)][:, pairs].mean())
    found = common.mean_interval(values, groups)
    assert found["mean"] == pytest.approx(values.mean())
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(means, [0.025, 0.975]),
                                                          abs=0.05)


# ---------------------------------------------------------------- the dense head

@pytest.fixture
def telling_pairs():
    """40 pairs of 20 questions whose first column tells chosen from rejected, with noise."""
    generator = torch.Generator().manual_seed(0)
    z = [torch.randn(40, 6, generator=generator) for _ in range(2)]
    z[0][:, 0] += 3
    nothing = np.zeros(40)
    return stage4.Pairs(z, torch.zeros(40), np.arange(40) // 2, [nothing, nothing], [{}] * 40)


def test_the_dense_head_has_the_penalty_with_the_least_loss_out_of_fold(telling_pairs):
    losses = {}
    for l2 in stage3.PENALTIES:
        total = 0.0
        for fold in range(5):
            held = telling_pairs.fold == fold
            mean, std = stage2.standardisation(telling_pairs.z, ~held)
            chosen, rejected = [(z - mean) / std for z in telling_pairs.z]
            head = stage3.fit_linear(chosen[~held], rejected[~held], "bt", l2)
            difference = (chosen[held] - rejected[held]) @ head.w1
            total += float(-torch.nn.functional.logsigmoid(difference).sum())
        losses[l2] = total
    mean, std = stage2.standardisation(telling_pairs.z, torch.ones(40, dtype=torch.bool))
    chosen, rejected = [(z - mean) / std for z in telling_pairs.z]
    wanted = stage3.fit_linear(chosen, rejected, "bt", min(losses, key=losses.get))
    assert torch.allclose(common.fit_dense(telling_pairs).head.w1, wanted.w1, atol=1e-4)


def test_a_dense_head_out_of_fold_has_not_seen_what_it_judges(telling_pairs):
    before = common.dense_out_of_fold(telling_pairs).differences
    held = telling_pairs.fold == 0
    chosen, rejected = telling_pairs.z
    telling_pairs.z = [torch.where(held[:, None], rejected, chosen),
                       torch.where(held[:, None], chosen, rejected)]
    after = common.dense_out_of_fold(telling_pairs).differences
    assert after[held.numpy()] == pytest.approx(-before[held.numpy()], abs=1e-5)


# ---------------------------------------------------------------- align.py

def test_flipping_swaps_the_sides_of_the_asked_share_and_no_others():
    noisy = align.flipped(rows(20), 0.3, seed=1)
    assert sum(row["flipped"] for row in noisy) == 6
    for row in noisy:
        sides = row["chosen"], row["rejected"]
        right, wrong = f"right {row['id']}", f"wrong {row['id']}"
        assert sides == ((wrong, right) if row["flipped"] else (right, wrong))


def test_which_pairs_are_flipped_depends_on_the_seed_alone():
    assert align.flipped(rows(20), 0.3, 1) == align.flipped(rows(20), 0.3, 1)
    assert align.flipped(rows(20), 0.3, 1) != align.flipped(rows(20), 0.3, 2)


@pytest.fixture
def kept(tmp_path):
    """→ a function: name of a filter → ids that it keeps of ten pairs, three of them flipped."""
    noisy = align.flipped(rows(10), 0.3, 0)
    tiny.save_rows(tmp_path / "kept-0.jsonl", noisy[:6])        # what sparserm has kept
    dense = np.array([1.0, -1] * 5)
    length = np.array([0.0, -2, 3, 1, 1, 1, 1, 1, 1, 1])

    def of(name):
        return [row["id"] for row in align.kept_by(name, noisy, dense, length, tmp_path, 0)]
    return of


def test_no_filter_keeps_all_and_the_oracle_what_was_not_flipped(kept):
    assert kept("none") == [str(n) for n in range(10)]
    true = [row["id"] for row in align.flipped(rows(10), 0.3, 0) if not row["flipped"]]
    assert kept("oracle") == true and len(true) == 7


def test_the_filters_of_dense_and_length_keep_what_these_prefer(kept):
    assert kept("dense") == ["0", "2", "4", "6", "8"]
    assert kept("length") == ["0", "2", "3", "4", "5", "6", "7", "8", "9"]      # a tie is kept


def test_the_random_filter_keeps_as_many_as_sparserm_and_the_same_ones_again(kept):
    assert len(set(kept("random"))) == 6 and kept("random") == kept("random")


def test_what_a_policy_gets_right_is_read_as_written():
    base = {"chosen": [-5, -5, -5], "rejected": [-4, -6, -5]}
    found = {"chosen": [-4, -5, -6], "rejected": [-4, -7, -5], "mc1": [1, 0]}
    right = align.right(found, base)
    assert right["likelihood"].tolist() == [False, True, False]         # a tie is not right
    assert right["implicit"].tolist() == [True, True, False]    # log-ratios 1 > 0, 0 > -1, -1 < 0
    assert right["mc1"].tolist() == [1, 0]


def test_a_policy_is_read_on_both_sides_and_on_every_candidate(backbone_of):
    backbone = backbone_of("llama")
    pairs = [{"prompt": "One", "chosen": "two", "rejected": "ten"},
             {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."}]
    candidates = ["blue", "green", "a clear day"]
    question = {"prompt": "Which?", "candidates": candidates, "labels": ["b", "g", "d"]}
    found = align.read_policy(backbone, pairs, [question])

    def alone(prompt, response):
        return float(common.log_likelihoods(backbone, [prompt], [response])[0][0])
    for side in ("chosen", "rejected"):
        wanted = [alone(pair["prompt"], pair[side]) for pair in pairs]
        assert found[side] == pytest.approx(wanted, abs=1e-3)
    likeliest = max(range(3), key=lambda n: alone("Which?", candidates[n]))
    assert found["mc1"] == [question["labels"][likeliest]]


@pytest.mark.parametrize("tokens, wanted", [([9, 9, 2], [1, -1]), ([1, 1, 9], [-1, 1])])
def test_the_length_filter_has_the_sign_that_wins_on_the_reward_model_s_pairs(tokens, wanted):
    pairs = stage4.Pairs([torch.zeros(3, 1)] * 2, torch.zeros(3), np.arange(3),
                         [np.array(tokens), np.full(3, 5)], [{}] * 3)
    policy = [{"chosen": "one two", "rejected": "one"}, {"chosen": "one", "rejected": "one two"}]
    assert align.length_differences(pairs, policy).tolist() == wanted


def test_the_dense_filter_reads_the_policy_s_pairs_as_the_reward_model_does(finished):
    reward = stage3.RewardModel.load(finished / "reward_head.safetensors")
    paths, _ = stage2.shard_files(finished)
    pairs = stage4.Pairs(**stage4.read_pairs(finished, paths, reward.meta))
    found = align.dense_differences(pairs, reward, pairs.pairs)
    assert found == pytest.approx(common.fit_dense(pairs).differences(pairs.z).numpy(), abs=1e-3)


def answer(prompt, reward, text="An answer."):
    """A row of read_answers."""
    return {"prompt": prompt, "text": text, "reward": reward, "judge": 2 * reward,
            "outside": False, "cut": False, "words": 9}


def policy_of(*wins):
    """What `right` says of a policy that is right on these pairs, and as often on questions."""
    wins = np.array(wins, float)
    return {"likelihood": wins, "implicit": wins, "mc1": wins}


def rounds_of(*measured):
    """align.figures_of_rounds; each pair and question stands for itself."""
    names = [f"q{n}" for n in range(len(measured[0][0]["mc1"]))]
    return align.figures_of_rounds(measured, dict.fromkeys(align.METRICS, names))


def test_rewards_of_the_rounds_are_in_units_of_the_unaligned_policy_s_answers():
    before = [answer("q0", 1.0), answer("q0", 3.0), answer("q1", 5.0), answer("q1", 7.0)]
    after = [answer("q0", 4.0), answer("q1", 10.0)]
    first, second = rounds_of((policy_of(0, 1), before), (policy_of(1, 1), after))
    std = np.std([1.0, 3.0, 5.0, 7.0])
    assert first["reward"]["mean"] == 0
    # means of the prompts: 2 and 6 before, 4 and 10 after
    assert second["reward"]["mean"] == pytest.approx(3 / std)
    assert second["judge"]["mean"] == pytest.approx(3 / std)        # twice the size, in its own std
    assert second["likelihood"]["gain"]["mean"] == pytest.approx(0.5)
    assert second["answers"] == 2 and first["distinct"] == 0.25


def test_a_round_is_compared_with_the_one_before_and_its_reward_with_the_unaligned_policy():
    answers = [[answer(f"q{n}", n + gain) for n in range(30)] for gain in (0.0, 2.0, 3.0)]
    wins = policy_of(*(np.arange(30) % 2))
    _, second, third = rounds_of(*((wins, rows) for rows in answers))
    std = np.std(np.arange(30))
    assert second["reward"]["gain"]["mean"] == pytest.approx(2 / std)
    assert third["reward"]["gain"]["mean"] == pytest.approx(1 / std)
    assert third["reward"]["mean"] == pytest.approx(3 / std)
    # every prompt changed by the same: the interval is of the change, not of the prompts
    assert third["reward"]["high"] - third["reward"]["low"] == pytest.approx(0, abs=1e-6)


def test_a_prompt_without_an_answer_in_one_round_counts_in_none():
    before = [answer("q0", 1.0), answer("q1", 5.0)]
    after = [answer("q1", 6.0)]
    prompts, tables = align.by_prompt([before, after])
    assert prompts == ["q1"]
    assert [table["reward"].tolist() for table in tables] == [[5.0], [6.0]]


def test_a_round_in_which_nearly_nothing_changed_is_told_as_such():
    answers = [answer(f"q{n}", n) for n in range(30)]
    wins = policy_of(*(np.arange(30) % 2))
    found = {"rounds": rounds_of((wins, answers), (wins, answers))}
    assert found["rounds"][1]["mc1"]["gain"]["low"] is None
    assert "+.000 (cannot tell)" in align.rounds_table(found)
    assert align.rounds_claim(found).startswith("* Round 1: no measurable change: ")


def test_an_answer_that_was_cut_off_becomes_no_side_of_a_pair(folder_of):
    tokenizer = align.load_tokenizer(str(folder_of("llama")))
    long = "nine ten " * align.ANSWER_TOKENS
    row = {"prompt": "Which?", "candidates": ["One two.", long, "Three."], "scores": [1, 2, 3]}
    assert align.without_cut(row, tokenizer) == {"prompt": "Which?",
                                                 "candidates": ["One two.", "Three."]}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A stand-in of align.Experiment → (it, what was trained on what and sampled from whom)."""
    done = []
    source = [{"prompt": "to train on"}]
    work = SimpleNamespace(folder=tmp_path, source=source, test=[{"prompt": "to test on"}],
                           args=SimpleNamespace(rounds=3, answers=2, model="base"),
                           noisy=lambda seed: ["noisy", seed],
                           reward=SimpleNamespace(backbone=SimpleNamespace(tokenizer=None)))

    def train(rows, lr, seed, folder, args, start=None):
        done.append(("trained", rows, start))

    def sample(work, policy, rows, name):
        done.append(("sampled", rows, policy))
        return [{"prompt": "to train on", "candidates": ["a", "b"]}]

    def run_script(script, *flags):
        out = flags[flags.index("--out") + 1]
        tiny.save_rows(out, [{"pair": out.name}])

    def save_policy(model, tokenizer, folder):
        folder.mkdir()
    monkeypatch.setattr(align, "align", train)
    monkeypatch.setattr(align, "sample", sample)
    monkeypatch.setattr(align, "save_policy", save_policy)
    monkeypatch.setattr(align, "load_tokenizer", lambda name: None)
    monkeypatch.setattr(align, "is_cut", lambda text, tokenizer: False)
    monkeypatch.setattr(align, "kept_by_sparserm", lambda rows, folder, seed: rows)
    monkeypatch.setattr(align.common, "run_script", run_script)
    return work, done


def test_each_round_goes_on_from_the_one_before_on_its_own_answers(work):
    work, done = work
    one, two, three = align.train_rounds(work, 1e-3)
    assert done == [
        ("trained", ["noisy", 0], None),
        ("sampled", work.source, one),
        ("trained", [{"pair": f"{one.name}.candidates.pairs.jsonl"}], one),
        ("sampled", work.source, two),
        ("trained", [{"pair": f"{two.name}.candidates.pairs.jsonl"}], two),
    ]
    assert align.beside(three, ".pairs").read_text() == "1\n"


def test_a_round_that_is_there_is_not_trained_again_and_one_of_another_rate_is(work):
    work, done = work
    align.train_rounds(work, 1e-3)
    done.clear()
    align.train_rounds(work, 1e-3)
    assert not done
    align.train_rounds(work, 2e-3)
    assert [what for what, *_ in done].count("trained") == 3


def test_rounds_without_questions_are_refused_before_anything_is_done():
    with tiny.argv("--rounds", "2"), pytest.raises(UserError, match="pass --questions too"):
        align.main()


# ---------------------------------------------------------------- rank_answers.py

@pytest.mark.parametrize("scores, labels, wanted", [
    ([1, 3, 2], [0, 1, 0], 1),
    ([0, 0, 0, 0], [0, 1, 0, 0], 0.25),
    ([2, 2, 1], [1, 0, 0], 0.5),
])
def test_candidates_that_share_the_highest_score_share_the_label(scores, labels, wanted):
    assert rank_answers.label_of_best(scores, labels) == wanted


# ---------------------------------------------------------------- best_of_n.py

@pytest.fixture(scope="module")
def reward(finished):
    """The reward model of the finished run."""
    return stage3.RewardModel.load(finished / "reward_head.safetensors")


def test_all_ways_sample_as_many_answers_and_all_scores_agree(reward):
    args = SimpleNamespace(n=3, batch_rows=6, max_new_tokens=6)
    prompts = ["Is water wet?", "Which colour has the sky?", "One"]
    found = best_of_n.measure(reward, prompts, args)
    assert set(found.tokens) == {best_of_n.SEVERAL, best_of_n.ONE, best_of_n.GENERATE}
    assert found.tokens[best_of_n.ONE] == found.tokens[best_of_n.SEVERAL]      # the same texts
    assert 9 <= found.tokens[best_of_n.GENERATE] <= 9 * 6
    for way in ("off the sampling", "packed", "padded"):
        assert found.scores[way] == pytest.approx(found.scores["packed"], abs=1e-3)
        assert len(found.scores[way]) == 9


def test_the_tokens_of_generate_count_up_to_the_first_end():
    output = torch.tensor([[5, 6, 2, 2], [5, 6, 7, 8], [2, 2, 2, 2]])
    assert best_of_n.tokens_generated(output, {2}) == 3 + 4 + 1


# ---------------------------------------------------------------- sweeps.py

def test_a_loss_and_head_is_the_method_of_stage_4_with_those_settings(finished, tmp_path):
    args = SimpleNamespace(run=finished, name=None, sae=None)
    found = sweeps.heads(args)
    assert list(found) == ["linear bt", "linear margin", "linear bce",
                           "mlp bt", "mlp margin", "mlp bce"]
    data = stage4.Data(finished)
    for name, method in {"linear bt": stage4.sparserm, "mlp margin": stage4.paper}.items():
        outcome = method(data)
        wanted = summary(outcome.differences, data.group)
        assert {key: found[name][key] for key in wanted} == wanted
        assert found[name]["choices"] == outcome.choices


def test_layers_and_token_rules_are_compared_without_the_test_split(finished, tmp_path,
                                                                    monkeypatch):
    args = SimpleNamespace(model=str(finished.parent / "model"), layers=[0, 1],
                           tokens=["last", "mean"], pairs=str(finished.parent / "pairs.jsonl"),
                           out=str(tmp_path / "run"))

    def run_here(script, *flags):
        tiny.succeed(script.removesuffix(".py"), *flags)
    monkeypatch.setattr(common, "run_script", run_here)
    found = sweeps.layers(args)
    assert list(found) == ["last", "mean"] and list(found["mean"]) == ["0", "1"]
    splits = common.pairs_by_split(tmp_path / "run")
    assert found["mean"]["1"]["n"] == len(splits["train"]) + len(splits["dev"]) < 60
