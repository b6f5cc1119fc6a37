"""Stage 3, against numbers worked by hand, plain loops, and the activations that stages 1 and 2 left."""

import importlib
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from safetensors import safe_open
from tiny import assert_one_line_error, command, succeed

from parts.files import read_meta
from parts.self_check import self_check

stage1 = importlib.import_module("01_extract")
stage3 = importlib.import_module("03_train_head")
TRAIN, DEV, TEST = range(3)


def accuracy_of(head, chosen, rejected):
    """Share of pairs with r_chosen > r_rejected."""
    return (stage3.apply_head(head, chosen) > stage3.apply_head(head, rejected)).float().mean().item()


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- the losses

def test_bradley_terry_is_the_mean_of_minus_log_sigmoid():
    chosen, rejected = torch.tensor([2.0, 0.5]), torch.tensor([2.0, -0.5])
    # Δ = 0: -log(1/2) = 0.693147 · Δ = 1: log(1 + e^-1) = 0.313262
    assert stage3.bradley_terry_loss(chosen, rejected) == pytest.approx((0.693147 + 0.313262) / 2, abs=1e-6)
    assert stage3.bradley_terry_loss(torch.tensor([-500.0]), torch.tensor([500.0])) == 1000      # no overflow


def test_the_margin_loss_is_zero_beyond_the_margin_and_linear_below():
    chosen, rejected = torch.tensor([2.0, 0.5, 1.0]), torch.tensor([0.0, 1.0, 0.5])     # Δ = 2, -0.5, 0.5
    assert stage3.margin_loss(chosen, rejected) == pytest.approx((0 + 1.5 + 0.5) / 3)
    assert stage3.margin_loss(chosen, rejected, 3.0) == pytest.approx((1 + 3.5 + 2.5) / 3)


def test_bce_takes_each_response_by_itself():
    # chosen at 0: log 2 = 0.693147 · rejected at 1: log(1 + e) = 1.313262
    assert stage3.bce_loss(torch.tensor([0.0]), torch.tensor([1.0])) == pytest.approx((0.693147 + 1.313262) / 2, abs=1e-6)


def test_the_gradient_of_bradley_terry_is_minus_sigmoid_of_minus_the_difference():
    chosen, rejected = draw(6, seed=0).requires_grad_(), draw(6, seed=1).requires_grad_()
    stage3.bradley_terry_loss(chosen, rejected).backward()
    expected = torch.tensor([-1 / (1 + math.exp(c - r)) for c, r in zip(chosen.tolist(), rejected.tolist())]) / 6
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)


# ---------------------------------------------------------------- the head

def noisy_scores(n=120, m=10, told=1.5, seed=2):
    """Few pairs, many columns, one of which tells something: a head overfits → chosen, rejected [n, m], split [n]."""
    chosen, rejected = draw(n, m, seed=seed), draw(n, m, seed=seed + 1)
    chosen[:, 0] += told
    return chosen, rejected, torch.tensor([TRAIN, DEV, TEST, DEV] * (n // 4))


def plain_descent(chosen, rejected, split, epochs, lr=0.05, decay=0.01):
    """Full-batch Adam written out, on w·(c - r) alone → the weights after 0, 1, … epochs."""
    d = (chosen - rejected)[split == TRAIN].double()
    w, m, v = (torch.zeros(d.shape[1], dtype=torch.float64) for _ in range(3))
    states = [w]
    for step in range(1, epochs + 1):
        g = -(torch.sigmoid(-d @ w)[:, None] * d).mean(0) + decay * w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        states.append(w)
    return states


def loss_on(w, chosen, rejected, split, which):
    d = (chosen - rejected)[split == which].double()
    return float(torch.log1p(torch.exp(-d @ w.double())).mean())


def test_training_returns_the_weights_of_the_best_epoch_on_dev():
    scores = noisy_scores()
    head, on_dev = stage3.fit_head(*scores, lr=0.05, weight_decay=0.01, epochs=120, patience=120)
    states = plain_descent(*scores, 120)
    losses = [loss_on(w, *scores, DEV) for w in states]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert 3 < best < 100 and losses[-1] > losses[best] + 0.01            # it did overfit after the best epoch
    torch.testing.assert_close(head["w1"].double(), states[best], rtol=1e-3, atol=1e-3)
    assert on_dev == pytest.approx(losses[best], abs=1e-5) == pytest.approx(loss_on(head["w1"], *scores, DEV), abs=1e-5)


def test_it_stops_when_dev_has_not_improved_for_as_many_epochs_as_patience_says(monkeypatch):
    scores, looked = noisy_scores(), []
    losses = [loss_on(w, *scores, DEV) for w in plain_descent(*scores, 120)]
    best, real = losses.index(min(losses)), stage3.bradley_terry_loss

    def loss(chosen, rejected):
        looked.append(torch.is_grad_enabled())
        return real(chosen, rejected)
    monkeypatch.setattr(stage3, "bradley_terry_loss", loss)
    stage3.fit_head(*scores, lr=0.05, weight_decay=0.01, epochs=120, patience=7)
    assert abs(sum(not grad for grad in looked) - (best + 1 + 7)) <= 1


def test_a_single_epoch_already_trains():
    scores = noisy_scores()
    head, on_dev = stage3.fit_head(*scores, lr=0.05, weight_decay=0.01, epochs=1)
    assert head["w1"].abs().sum() > 0 and on_dev < math.log(2)


def test_where_pairs_are_many_an_epoch_is_a_random_part_of_them_and_the_head_still_learns(monkeypatch):
    chosen, rejected, split = noisy_scores(400, told=2)
    monkeypatch.setattr(stage3, "EPOCH_PAIRS", 20)
    asked, real = [], stage3.bradley_terry_loss
    monkeypatch.setattr(stage3, "bradley_terry_loss", lambda c, r: asked.append((len(c), torch.is_grad_enabled())) or real(c, r))
    head, _ = stage3.fit_head(chosen, rejected, split, batch=8, lr=0.05)
    assert [n for n, grad in asked if grad][:6] == [8, 8, 4, 8, 8, 4]
    assert accuracy_of(head, chosen[split == TEST], rejected[split == TEST]) > 0.8


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("loss", ["bt", "margin", "bce"])
def test_every_head_learns_with_every_loss(kind, loss):
    chosen, rejected, split = noisy_scores(200, told=2)
    head, _ = stage3.fit_head(chosen, rejected, split, kind=kind, loss=loss, hidden=16)
    held = [(side[split == TEST]) for side in (chosen, rejected)]
    assert accuracy_of(head, *held) > 0.65


def test_test_pairs_never_touch_the_head():
    chosen, rejected, split = noisy_scores()
    before, _ = stage3.fit_head(chosen, rejected, split)
    other = torch.where((split == TEST)[:, None], torch.nan, chosen)
    after, _ = stage3.fit_head(other, rejected, split)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_dev_pairs_only_choose_among_the_epochs_of_one_and_the_same_training():
    chosen, rejected, split = noisy_scores()
    dev = (split == DEV)[:, None]
    like_train = chosen.clone()
    like_train[split == DEV] = rejected[split == DEV] + (chosen - rejected)[split == TRAIN].repeat(2, 1)    # keeps falling
    walk = [stage3.fit_head(like_train, rejected, split, lr=0.05, weight_decay=0.01, epochs=n, patience=99)[0]["w1"] for n in range(1, 40)]
    for change in (0.2, -0.3, 3.0):
        moved = torch.where(dev, chosen + change * draw(*chosen.shape, seed=5), chosen)
        head, _ = stage3.fit_head(moved, rejected, split, lr=0.05, weight_decay=0.01, epochs=38, patience=99)
        assert any(torch.equal(head["w1"], w) for w in [torch.zeros(10), *walk])


def test_swapping_chosen_and_rejected_everywhere_turns_accuracy_a_into_1_minus_a():
    chosen, rejected, split = noisy_scores()
    head, _ = stage3.fit_head(chosen, rejected, split)
    swapped, _ = stage3.fit_head(rejected, chosen, split)
    right = accuracy_of(head, chosen, rejected)
    assert 0.5 < right < 1 and accuracy_of(head, rejected, chosen) == pytest.approx(1 - right)
    assert accuracy_of(swapped, chosen, rejected) == pytest.approx(1 - right)
    torch.testing.assert_close(swapped["w1"], -head["w1"])


def test_the_mlp_of_the_paper_has_132097_parameters():
    assert sum(p.numel() for p in stage3.start_head(256, "mlp").values()) == 256 * 512 + 512 + 512 + 1 == 132_097


def test_the_temperature_has_the_least_loss_on_dev():
    difference = 4 * draw(300, seed=3) + 3
    nll = lambda t: sum(math.log1p(math.exp(-float(d) / t)) for d in difference) / 300
    low, high = 0.05, 50.0
    while high / low > 1.0001:      # thirds of an interval, on a log scale
        a, b = low * (high / low) ** (1 / 3), low * (high / low) ** (2 / 3)
        low, high = (low, b) if nll(a) < nll(b) else (a, high)
    assert stage3.fit_temperature(difference) == pytest.approx(low, rel=0.03)


# ---------------------------------------------------------------- the stage

@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, its head still to be trained."""
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/reward_head.safetensors").unlink()
    return tmp_path / "run"


def train(run, *args):
    """Run stage 3 → (tensors, metadata)."""
    succeed("03_train_head", "--run", run, "--seeds", 2, "--epochs", 60, *args)
    return stage1.load_stage(run / "reward_head.safetensors")


def change_features(run, split, factor):
    """Multiply the scores of the pairs in one split."""
    t, meta = stage1.load_stage(run / "features.safetensors")
    for side in ("chosen", "rejected"):
        t[side][t["split"] == split] *= factor
    stage1.save_stage(run / "features.safetensors", t, meta)


def test_other_test_scores_give_the_same_head_file_apart_from_its_parents(run):
    before, meta = train(run)
    change_features(run, TEST, -9)
    after, other = train(run)
    assert all(torch.equal(before[n], after[n]) for n in before) and meta.pop("parent") != other.pop("parent") and meta == other


def test_dev_sets_the_temperature_and_the_rewards_stay_centred_on_train(run):
    before, _ = train(run, "--k", 8)
    change_features(run, DEV, -3)
    after, _ = train(run, "--k", 8)
    assert before["temperature"] != after["temperature"]
    t, _ = stage1.load_stage(run / "features.safetensors")
    x = torch.cat([(t[side][t["split"] == TRAIN] - t["mean"]) / t["std"] for side in ("chosen", "rejected")])
    for head in (before, after):
        assert abs(stage3.apply_head(head, x).mean()) < 1e-5


def test_k_auto_takes_the_k_with_the_lowest_loss_on_dev(run):
    t, meta = stage1.load_stage(run / "features.safetensors")
    x = [(t[side] - t["mean"]) / t["std"] for side in ("chosen", "rejected")]
    assert meta["k"] == 8
    losses = {}
    for k in (1, 2, 4, 8):
        columns = [*range(k), *range(8, 8 + k)]
        losses[k] = stage3.fit_head(x[0][:, columns], x[1][:, columns], t["split"], epochs=60)[1]
    head, record = train(run)
    best = min(losses, key=losses.get)
    assert record["k"] == best and record["k_curve"] == {str(k): pytest.approx(v) for k, v in losses.items()}
    columns = [*range(best), *range(8, 8 + best)]
    for name in ("latents", "directions", "mean", "std"):
        assert torch.equal(head[name], t[name][columns])


def test_the_file_holds_what_scoring_needs_and_one_metadata_key_of_sorted_json(run):
    t, meta = train(run, "--k", 3, "--head", "mlp", "--hidden", 5)
    assert {n: tuple(v.shape) for n, v in t.items()} == {
        "latents": (6,), "directions": (6, tiny.WIDTH), "mean": (6,), "std": (6,), "w1": (5, 6), "b1": (5,), "w2": (5,), "b2": (1,),
        "temperature": (1,)}
    with safe_open(run / "reward_head.safetensors", "pt") as file:
        assert file.metadata() == {"sparserm": json.dumps(meta, sort_keys=True)}
    assert {"model", "layer", "token", "template", "max_length", "sae", "settings", "parent", "backbone"} <= set(meta)
    assert meta["parent"] == {"features": stage1.file_hash(run / "features.safetensors"), "pairs": stage1.file_hash(run / "pairs.jsonl"),
                              "sae": stage1.file_hash(meta["sae"])}


def test_the_same_inputs_give_the_same_bytes_in_another_process(run, tmp_path):
    shutil.copytree(run, tmp_path / "other/run")
    sae = read_meta(run / "features.safetensors")["sae"]
    train(run, "--head", "mlp", "--hidden", 8)
    commands = ("import tiny; "
                f"tiny.succeed('02_select_features', '--run', 'run', '--sae', {sae!r}, '--k', 8); "
                "tiny.succeed('03_train_head', '--run', 'run', '--seeds', 2, '--epochs', 60, '--head', 'mlp', '--hidden', 8)")
    subprocess.run([sys.executable, "-c", commands], check=True, cwd=tmp_path / "other",
                   env={**os.environ, "PYTHONHASHSEED": "5", "PYTHONPATH": f"{tiny.ROOT}{os.pathsep}{tiny.ROOT / 'tests'}"})
    for name in ("features.safetensors", "reward_head.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "other/run" / name).read_bytes()


def test_check_passes_on_a_finished_run_and_fails_on_a_head_that_does_not_belong_to_it(run):
    head, meta = train(run)
    before = (run / "reward_head.safetensors").read_bytes()
    assert command("03_train_head", "--run", run, "--check")[0] == 0
    assert (run / "reward_head.safetensors").read_bytes() == before       # it checks the head, it trains none
    stage1.save_stage(run / "reward_head.safetensors", {**head, "directions": head["directions"].flip(0)}, meta)
    code, _, err = command("03_train_head", "--run", run, "--check")
    assert code == 1 and "Traceback" not in err
    (run / "pairs.jsonl").write_text("{}\n")
    code, out, _ = command("03_train_head", "--run", run, "--check")
    assert code == 1 and "pairs.jsonl has changed since 02_select_features.py read it: run the stages again" in out


def in_order(real):
    """A score that also tells a text's place in the list."""
    return lambda self, prompts, responses: [s + 0.01 * n for n, s in enumerate(real(self, prompts, responses))]


def second_bos(real):
    return lambda tokenizer, *rest: (text := real(tokenizer, *rest)) and stage1.Text([1, 1, *text.ids], *(x + 2 for x in (
        text.first, text.last, text.eot)))


CHECK = importlib.import_module("parts.self_check")
BROKEN = {"no second BOS": (CHECK, "render", second_bos), "backwards as forwards": (stage3.RewardModel, "score", in_order),
          "padded as packed": (stage1, "hidden_rows", lambda real: lambda backbone, ids, layers: real(
              backbone, [i[:-3] + i[-1:] * 3 for i in ids] if backbone.pack == "pad" else ids, layers)),
          "an end-of-turn token": (CHECK, "control_tokens", lambda real: lambda tokenizer: (real(tokenizer)[0], set())),
          "read again from disk": (stage3.RewardModel, "load", lambda real: lambda path, model=None: (
              found := real(path, model)) and (model and found.head["w1"].mul_(1.5), found)[1]),
          "prefer(a, b)": (stage3.RewardModel, "prefer", lambda real: lambda *args: 0.1 + real(*args))}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_a_cross_in_the_self_check(what, run, monkeypatch):
    train(run)
    place, name, breaks = BROKEN[what]
    monkeypatch.setattr(place, name, breaks(getattr(place, name)))
    found = self_check(run)
    assert [holds for label, holds, _ in found if label.startswith(what)] == [False], found
    monkeypatch.undo()
    assert len(found) == 9 and all(holds for _, holds, _ in self_check(run))


# ---------------------------------------------------------------- the reward model

@pytest.fixture(scope="module", params=["linear", "mlp"])
def reward(request, finished, tmp_path_factory):
    run = tmp_path_factory.mktemp("head") / "run"
    shutil.copytree(finished, run)
    train(run, "--head", request.param, "--hidden", 8, "--k", 6)
    model = stage3.RewardModel.load(run / "reward_head.safetensors")
    model.run = run
    return model


def pairs_of(run):
    return [json.loads(line) for line in open(run / "pairs.jsonl", encoding="utf-8")]


def spread(scores):
    return float(torch.tensor(scores).std())


def test_a_loaded_head_gives_each_text_the_reward_its_stored_scores_get_and_0_on_average(reward):
    t, _ = stage1.load_stage(reward.run / "features.safetensors")
    columns, rows = [*range(6), *range(8, 14)], pairs_of(reward.run)
    of_train = []
    for side in ("chosen", "rejected"):
        stored = stage3.apply_head(reward.head, ((t[side] - t["mean"]) / t["std"])[:, columns])
        scored = torch.tensor(reward.score([r["prompt"] for r in rows], [r[side] for r in rows]))
        assert (scored - stored).abs().max() < 1e-3 * stored.std()
        of_train += scored[t["split"] == TRAIN].tolist()
    assert abs(sum(of_train) / len(of_train)) < 1e-3 * spread(of_train)


def test_a_score_does_not_depend_on_batch_and_order(reward):
    rows = pairs_of(reward.run)[:12]
    prompts, responses = [r["prompt"] for r in rows], [r["chosen"] for r in rows]
    together = reward.score(prompts, responses)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = reward.score([prompts[i] for i in order] * 2, [responses[i] for i in order] * 2)
    for place, i in enumerate(order):
        alone = reward.score([prompts[i]], [responses[i]])[0]
        for other in (together[i], shuffled[place], shuffled[12 + place]):
            assert abs(alone - other) < 1e-3 * spread(together)


def test_contributions_of_a_linear_head_add_up_and_those_of_an_mlp_are_ablations(reward):
    row = pairs_of(reward.run)[0]
    found = reward.explain(row["prompt"], row["chosen"])
    assert found["reward"] == pytest.approx(reward.score([row["prompt"]], [row["chosen"]])[0], abs=1e-4)
    parts = {c["latent"]: c for c in found["contributions"]}
    assert [parts[j]["side"] for j in reward.tensors["latents"].tolist()] == ["chosen"] * 6 + ["rejected"] * 6
    sizes = [abs(c["contribution"]) for c in found["contributions"]]
    assert (found["bias"] is None) == ("w2" in reward.head) and sizes == sorted(sizes, reverse=True)
    if "w2" not in reward.head:
        assert sum(c["contribution"] for c in parts.values()) + found["bias"] == pytest.approx(found["reward"], abs=1e-5)
        return
    x = torch.tensor([[parts[j]["score"] for j in reward.tensors["latents"].tolist()]])
    for n, j in enumerate(reward.tensors["latents"].tolist()):
        without = x.clone()
        without[0, n] = 0           # the mean of a standardised score
        by_hand = stage3.apply_head(reward.head, x) - stage3.apply_head(reward.head, without)
        assert parts[j]["contribution"] == pytest.approx(float(by_hand), abs=1e-5)


def test_contributions_of_many_responses_add_up_or_are_those_of_a_loop_that_sets_one_score_to_its_mean(reward):
    z = draw(9, tiny.WIDTH, seed=6) * 3
    found, rewards = reward.contributions(z), reward.reward_of(z)
    assert found.shape == (9, 12) and (found.std(0) > 0).any()
    if "w2" not in reward.head:
        torch.testing.assert_close(found.sum(1) + reward.head["b1"], rewards, rtol=1e-4, atol=1e-4)
    for n in range(9):
        scores = [float(z[n] @ reward.directions[j]) for j in range(12)]
        for j in range(12):
            mean = scores[:j] + [float(reward.mean[j])] + scores[j + 1:]            # as if response n had the mean score on j
            without = stage3.apply_head(reward.head, ((torch.tensor([mean]) - reward.mean) / reward.std))
            assert float(found[n, j]) == pytest.approx(float(rewards[n] - without[0]), abs=2e-4)


def test_an_mlp_that_computes_a_linear_head_has_the_contributions_of_that_head():
    w, z = draw(4, seed=1), draw(7, 5, seed=2)
    common = {"directions": draw(4, 5, seed=3), "mean": draw(4, seed=4), "std": draw(4, seed=5).abs() + 0.5, "temperature": torch.ones(1)}
    pair = torch.cat([torch.eye(4), -torch.eye(4)])                                 # relu(x) - relu(-x) = x
    linear, mlp = (stage3.RewardModel(common | head, {}, None) for head in (
        {"w1": w, "b1": torch.ones(1)}, {"w1": pair, "b1": torch.zeros(8), "w2": torch.cat([w, -w]), "b2": torch.ones(1)}))
    torch.testing.assert_close(linear.reward_of(z), mlp.reward_of(z))
    torch.testing.assert_close(linear.contributions(z), mlp.contributions(z))
    by_hand = [[float(w[j] * (z[n] @ common["directions"][j] - common["mean"][j]) / common["std"][j]) for j in range(4)] for n in range(7)]
    torch.testing.assert_close(linear.contributions(z), torch.tensor(by_hand))


def test_a_linear_head_folded_to_one_vector_gives_the_same_rewards(reward):
    if "w2" in reward.head:
        pytest.skip("an MLP does not fold")
    u, c = reward.vector()
    z = draw(20, tiny.WIDTH, seed=8)
    by_hand = [sum(float(reward.head["w1"][j]) * (float(z[n] @ reward.directions[j]) - float(reward.mean[j])) / float(reward.std[j])
                   for j in range(12)) + float(reward.head["b1"]) for n in range(20)]
    torch.testing.assert_close(z @ u + c, torch.tensor(by_hand), rtol=1e-4, atol=1e-4)


def test_prefer_is_the_sigmoid_of_the_difference_over_the_temperature(reward):
    row = pairs_of(reward.run)[0]
    a, b = reward.score([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
    expected = 1 / (1 + math.exp(-(a - b) / float(reward.tensors["temperature"])))
    assert reward.prefer(row["prompt"], row["chosen"], row["rejected"]) == pytest.approx(expected, abs=1e-3)
    assert reward.prefer(row["prompt"], row["rejected"], row["chosen"]) == pytest.approx(1 - expected, abs=1e-3)


def test_as_a_trl_reward_function_it_takes_strings_and_messages_and_gives_none_for_what_is_too_long(reward):
    rows, limit = pairs_of(reward.run)[:3], reward.meta["max_length"]
    prompts, responses = [r["prompt"] for r in rows], [rows[0]["chosen"], "wet " * 3 * limit, ""]
    found = reward(prompts=prompts, completions=responses, completion_ids=None, trainer_state=None)
    assert found[1] is None and isinstance(found[2], float)
    assert found[0] == pytest.approx(reward.score(prompts[:1], responses[:1])[0], abs=1e-3)
    chats = [[{"role": "user", "content": p}] for p in prompts], [[{"role": "assistant", "content": r}] for r in responses]
    assert [reward(*chats)[0], reward(*chats)[2]] == pytest.approx([found[0], found[2]], abs=1e-3)
    assert reward([], []) == [] and reward(prompts[:1], responses[1:2]) == [None]
    assert reward.__name__ and not isinstance(reward, torch.nn.Module)


def test_score_refuses_a_single_string_unequal_lists_and_what_is_too_long(reward):
    for prompts, responses in (("a", ["b"]), (["a"], "b"), (["a"], ["b", "c"]), (["a"], ["wet " * 3 * reward.meta["max_length"]])):
        with pytest.raises(stage1.UserError):
            reward.score(prompts, responses)
    assert reward.score([], []) == []


def test_a_copy_of_the_backbone_elsewhere_gives_the_same_scores(reward, tmp_path):
    shutil.copytree(reward.meta["model"], tmp_path / "copy")
    other = stage3.RewardModel.load(reward.run / "reward_head.safetensors", model=str(tmp_path / "copy"))
    assert other.score(["Is water wet?"], ["It is."]) == reward.score(["Is water wet?"], ["It is."])


@pytest.mark.parametrize("change", [{"num_hidden_layers": 4}, {"template": tiny.NO_SYSTEM}, {"seed": 1}, {"family": "mistral"}])
def test_another_backbone_or_template_is_refused_with_one_line_that_names_both(change, reward, tmp_path):
    other = tiny.save_model(tmp_path / "other", **change)
    with pytest.raises(stage1.UserError) as refusal:
        stage3.RewardModel.load(reward.run / "reward_head.safetensors", model=other)
    assert other in str(refusal.value) and reward.meta["model"] in str(refusal.value) and "\n" not in str(refusal.value)


# ---------------------------------------------------------------- bad input

def refused(run, *words, args=()):
    assert_one_line_error(command("03_train_head", "--run", run, *args), *words)
    assert not (run / "reward_head.safetensors").exists()


def test_stage_3_before_stage_2_names_what_to_run(run):
    (run / "features.safetensors").unlink()
    refused(run, "features.safetensors", "02_select_features.py")


def test_features_that_are_cut_short_or_of_another_stage_are_refused(run):
    path = run / "features.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    refused(run, "features.safetensors", "02_select_features.py")
    shutil.copy(next((run / "activations").iterdir()), path)
    refused(run, "features.safetensors", "stage 2")


@pytest.mark.parametrize("split", [TRAIN, DEV])
def test_an_empty_split_is_named(split, run):
    t, meta = stage1.load_stage(run / "features.safetensors")
    stage1.save_stage(run / "features.safetensors", {**t, "split": t["split"].masked_fill(t["split"] == split, TEST)}, meta)
    refused(run, ("train", "dev")[split] + " split")


@pytest.mark.parametrize("flag, value", [("--k", "0"), ("--k", "9"), ("--k", "some"), ("--seeds", "0"), ("--epochs", "0"), ("--lr", "nan"),
                                         ("--lr", "-1"), ("--margin", "nan"), ("--weight-decay", "-1"), ("--hidden", "0")])
def test_a_setting_that_cannot_train_is_one_line_that_names_it(flag, value, run):
    refused(run, flag, args=[flag, value, "--loss", "margin", *(["--head", "mlp"] if flag == "--hidden" else [])])


def test_a_file_that_is_no_reward_head_is_refused(finished):
    with pytest.raises(stage1.UserError, match="not a reward head"):
        stage3.RewardModel.load(finished / "features.safetensors")
    with pytest.raises(stage1.UserError, match="03_train_head.py"):
        stage3.RewardModel.load(finished / "no_head.safetensors")
