"""Stage 2, on activations made up here, against naive loops over responses and latents."""

import importlib
import json

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tiny import assert_one_line_error, command, succeed

import sae as sae_module
from parts.files import write_text
from tools.train_sae import save_sae as write_sae

stage1 = importlib.import_module("01_extract")
stage2 = importlib.import_module("02_select_features")
TRAIN, DEV, TEST = range(3)
N, WIDTH, D_SAE = 30, 12, 20
SPLIT = torch.tensor(([TRAIN] * 7 + [DEV] + [TEST] * 2) * 3, dtype=torch.uint8)
# 20 prompts, not in order; the last ten pairs have those of the first ten
GROUP = torch.tensor([n % 20 * 7 % 20 for n in range(N)])
EPS = 0.25                  # of the model's norm: large enough to be seen


def draw(*shape, seed):
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


CHOSEN = draw(N, WIDTH, seed=10) + 0.3
REJECTED = draw(N, WIDTH, seed=11)
SIDES = [("chosen", CHOSEN), ("rejected", REJECTED)]


def save_activations(run, chosen, rejected, split=SPLIT, layer=1, token="mean", shard=18):
    """A run as stage 1 leaves it, with these vectors, in shards of `shard` pairs → the run."""
    n = len(split)
    number = torch.arange(n)
    rows = [json.dumps({"id": str(i)}) + "\n" for i in range(n)]
    write_text(run / "pairs.jsonl", "".join(rows))
    columns = {
        "chosen": chosen, "rejected": rejected, "pair": number, "group": GROUP,
        "split": split, "chosen_tokens": number.int() + 2, "rejected_tokens": number.int() + 3,
    }
    parent = {"pairs": stage1.file_hash(run / "pairs.jsonl")}
    meta = {"stage": "extract", "model": "m", "layer": layer, "token": token, "norm_eps": EPS,
            "parent": parent}

    starts = range(0, n, shard)
    for place, start in enumerate(starts):
        part = {name: column[start:start + shard] for name, column in columns.items()}
        path = stage1.shard_path(run, layer, token, place, len(starts))
        stage1.save_stage(path, part, meta)
    return run


def save_sae(path, decoder=None, **info):
    """A ReLU SAE whose encoder is not its decoder, with every bias in use → its path."""
    b_dec = draw(WIDTH, seed=3) / 2
    sae = sae_module.SAE(
        W_enc=draw(WIDTH, D_SAE, seed=0),
        b_enc=draw(D_SAE, seed=2) - 1,
        W_dec=draw(D_SAE, WIDTH, seed=1) if decoder is None else decoder,
        b_dec=b_dec,
        b_in=b_dec,
        activation="relu",
        info={"layer": 1, "model": "m", **info},
    )
    write_sae(sae, path)
    return path


@pytest.fixture
def run(tmp_path):
    """Activations of stage 1, and an SAE beside them."""
    save_sae(tmp_path / "sae.safetensors")
    return save_activations(tmp_path / "run", CHOSEN, REJECTED)


@pytest.fixture
def sae(run):
    """The SAE beside the run."""
    return sae_module.load_sae(run.parent / "sae.safetensors")


def select(run, *args, sae="sae.safetensors"):
    """Run stage 2 → (tensors, metadata, what it printed)."""
    out = succeed("02_select_features", "--run", run, "--sae", run.parent / sae, *args)
    tensors, meta = stage1.load_stage(run / "features.safetensors")
    return tensors, meta, out


# ---------------------------------------------------------------- folds

def test_groups_are_dealt_to_the_folds_in_turn_in_sorted_order():
    group = torch.tensor([50, 20, 90, 20, 70, 10, 99])
    usable = torch.tensor([True, True, True, True, True, False, True])
    # sorted, without 10: 20, 50, 70, 90, 99
    assert stage2.folds_of(group, usable, folds=3).tolist() == [1, 0, 0, 0, 2, -1, 1]


GROUPS = st.lists(st.tuples(st.integers(0, 2**48), st.booleans()), min_size=1, max_size=40)


@given(GROUPS, st.data())
def test_the_pairs_of_one_prompt_are_in_one_fold(pairs, data):
    again = data.draw(st.lists(st.sampled_from(pairs), max_size=40))
    group, usable = (torch.tensor(column) for column in zip(*pairs, *again))
    folds = {}
    for number, fold in zip(group[usable].tolist(), stage2.folds_of(group, usable)[usable]):
        folds.setdefault(number, set()).add(int(fold))
    assert all(len(found) == 1 for found in folds.values())


def test_the_file_deals_the_prompts_of_train_and_dev_to_five_folds(run):
    t, _, _ = select(run)
    prompts = sorted({int(GROUP[n]) for n in range(N) if SPLIT[n] != TEST})
    wanted = [prompts.index(GROUP[n]) % 5 if SPLIT[n] != TEST else -1 for n in range(N)]
    assert t["fold"].tolist() == wanted


# ---------------------------------------------------------------- selection

def fires(sae, z, j):
    """Does latent j of a ReLU SAE fire for one vector? Coordinate by coordinate."""
    total = float(sae.b_enc[j])
    for i in range(WIDTH):
        total += (float(z[i]) - float(sae.b_in[i])) * float(sae.W_enc[i, j])
    return total > 0


USABLE = [n for n in range(N) if SPLIT[n] != TEST]


def naive_counts(sae, side, rows):
    """In how many of these rows of one side each latent fires → list of d_sae ints."""
    return [sum(fires(sae, side[n], j) for n in rows) for j in range(D_SAE)]


@pytest.mark.parametrize("side, z", SIDES)
def test_frequencies_are_those_of_a_naive_double_loop(side, z, run, sae):
    t, _, _ = select(run)
    wanted = [count / len(USABLE) for count in naive_counts(sae, z, USABLE)]
    assert t[f"frequency_{side}"].tolist() == pytest.approx(wanted)


def test_latents_are_the_k_that_separate_most_on_each_side(run, sae):
    t, meta, _ = select(run, "--k", 3)
    sides = naive_counts(sae, CHOSEN, USABLE), naive_counts(sae, REJECTED, USABLE)
    difference = [chosen - rejected for chosen, rejected in zip(*sides)]
    falling = sorted(range(D_SAE), key=lambda j: (-difference[j], j))
    rising = sorted(range(D_SAE), key=lambda j: (difference[j], j))
    assert t["latents"].tolist() == falling[:3] + rising[:3]
    assert meta["k"] == 3


@pytest.mark.parametrize("left_out", [(), (1,), (0, 3)])
def test_frequencies_without_some_folds_are_those_of_a_naive_loop(left_out, run, sae):
    t, _, _ = select(run)
    paths, _ = stage2.shard_files(run)
    counts = stage2.firing_counts(sae, stage2.read_chunks(paths, 7), t["fold"])
    found = stage2.frequencies(counts, t["fold"], left_out)
    rows = [n for n in USABLE if int(t["fold"][n]) not in left_out]
    for side, z in zip(found, (CHOSEN, REJECTED), strict=True):
        wanted = [count / len(rows) for count in naive_counts(sae, z, rows)]
        assert side.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("k", [3, 1000])
def test_a_fold_has_the_latents_that_are_selected_without_its_pairs(k, run, sae):
    t, meta, _ = select(run, "--k", k)
    sides = []
    for fold in range(5):
        rows = [n for n in USABLE if t["fold"][n] != fold]
        counts = [torch.tensor(naive_counts(sae, z, rows)) for z in (CHOSEN, REJECTED)]
        latents = stage2.select_latents(counts[0] / len(rows), counts[1] / len(rows), k)
        sides.append(latents.view(2, -1))
    kept = min(latents.shape[1] for latents in sides)       # as many as separate in all five
    assert meta["search_k"] == kept
    for latents, found in zip(sides, t["search_latents"], strict=True):
        assert found.tolist() == latents[:, :kept].flatten().tolist()


COUNTS = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=30)


@given(COUNTS, st.integers(1, 40))
def test_only_latents_that_separate_in_the_right_direction_are_kept(counts, k):
    chosen, rejected = (torch.tensor(side) / 8 for side in zip(*counts))
    for_chosen = [(r - c, j) for j, (c, r) in enumerate(counts) if c > r]
    for_rejected = [(c - r, j) for j, (c, r) in enumerate(counts) if c < r]
    kept = min(k, len(for_chosen), len(for_rejected))
    clearest = sorted(for_chosen)[:kept] + sorted(for_rejected)[:kept]
    assert stage2.select_latents(chosen, rejected, k).tolist() == [j for _, j in clearest]


def test_where_k_is_larger_than_what_separates_fewer_latents_are_kept(run):
    t, meta, _ = select(run, "--k", 1000)
    difference = t["frequency_chosen"] - t["frequency_rejected"]
    k = min(int((difference > 0).sum()), int((difference < 0).sum()))
    assert (difference[t["latents"][:k]] > 0).all()
    assert (difference[t["latents"][k:]] < 0).all()
    assert meta["k"] == k < meta["k_asked"] == 1000
    assert t["chosen"].shape == (N, 2 * k)
    assert t["mean"].shape == t["std"].shape == (2 * k,)


def test_that_fewer_latents_were_kept_than_asked_for_is_said(run):
    _, meta, out = select(run, "--k", 1000)
    assert f"{meta['k']} + {meta['k']}" in out
    assert "1000 asked" in out


# ---------------------------------------------------------------- projection

def dot(a, b):
    """Coordinate by coordinate."""
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def by_root_mean_square(z):
    """z, divided by the root of the mean of its squares and eps."""
    return [float(x) / (dot(z, z) / len(z) + EPS) ** 0.5 for x in z]


HOW = {"none": list, "rms": by_root_mean_square}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("side, z", SIDES)
def test_scores_project_the_hidden_state_and_not_the_activation(side, z, how, run, sae):
    t, _, _ = select(run, "--k", 4, "--normalise", how)
    read = [HOW[how](z[n]) for n in range(N)]
    by_hand = [[dot(read[n], sae.W_dec[j]) for j in t["latents"]] for n in range(N)]
    torch.testing.assert_close(t[side], torch.tensor(by_hand), rtol=1e-4, atol=1e-4)
    assert (t[side] < 0).any()          # no activation of a ReLU is


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("side, z", SIDES)
def test_the_scores_to_search_on_are_those_of_all_that_a_fold_has(side, z, how, run, sae):
    t, _, _ = select(run, "--k", 3, "--normalise", how)
    union = sorted({int(j) for latents in t["search_latents"] for j in latents})
    assert t["search_union"].tolist() == union
    assert t["search_pair"].tolist() == USABLE
    read = [HOW[how](z[n]) for n in USABLE]
    by_hand = [[dot(row, sae.W_dec[j]) for j in union] for row in read]
    found = t[f"search_{side}"]
    torch.testing.assert_close(found, torch.tensor(by_hand), rtol=1e-4, atol=1e-4)


def test_normalised_scores_are_of_the_same_latents(run):
    plain, _, _ = select(run, "--k", 4)
    scaled, meta, _ = select(run, "--k", 4, "--normalise", "rms")
    for name in ("latents", "search_latents", "frequency_chosen", "frequency_rejected"):
        assert torch.equal(plain[name], scaled[name]), name
    assert (meta["normalise"], meta["norm_eps"]) == ("rms", EPS)


def test_of_many_pairs_those_of_the_first_prompts_by_hash_are_searched_on(run, monkeypatch):
    whole, _, _ = select(run, "--k", 3)
    monkeypatch.setattr(stage2, "SEARCH_PAIRS", 9)
    (run / "features.safetensors").unlink()
    with tiny.argv("--run", run, "--sae", run.parent / "sae.safetensors", "--k", 3):
        stage2.main()
    t, _ = stage1.load_stage(run / "features.safetensors")

    by_hash = sorted(USABLE, key=lambda n: (int(GROUP[n]), n))
    assert t["search_pair"].tolist() == sorted(by_hash[:9])
    rows = [USABLE.index(n) for n in t["search_pair"]]
    for side in ("search_chosen", "search_rejected"):
        torch.testing.assert_close(t[side], whole[side][rows])


def of_few_prompts(count):
    """A split with so many prompts to train on: all others are of test."""
    return torch.where(torch.arange(N) % 20 < count, TRAIN, TEST).to(torch.uint8)


@pytest.mark.parametrize("prompts, searched", [(9, False), (10, True)])
def test_there_is_something_to_search_on_from_ten_prompts_on(prompts, searched, run):
    split = of_few_prompts(prompts)
    t, meta, _ = select(save_activations(run, CHOSEN, REJECTED, split=split), "--k", 3)
    assert ({name for name in t if name.startswith("search")} == set()) is not searched
    assert (meta["search_k"] > 0) is searched


def test_directions_are_the_decoder_rows_of_the_latents(run, sae):
    t, _, _ = select(run, "--k", 4)
    assert torch.equal(t["directions"], sae.W_dec[t["latents"]])


def test_mean_and_std_are_those_of_both_sides_of_the_train_and_dev_pairs(run):
    t, _, _ = select(run, "--k", 4)
    scores = np.concatenate([t[side].numpy()[USABLE] for side in ("chosen", "rejected")])
    np.testing.assert_allclose(t["mean"], scores.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(t["std"], scores.std(0), rtol=1e-4)


def test_standardisation_sees_the_rows_that_are_named():
    side = torch.arange(50.0)[:, None]
    mean, std = stage2.standardisation((side, side + 1), torch.arange(50) < 40)
    train = np.concatenate([np.arange(40), np.arange(1, 41)])
    assert float(mean) == pytest.approx(train.mean()) == pytest.approx(20)
    assert float(std) == pytest.approx(train.std())


def test_a_score_that_never_changes_has_std_1():
    side = torch.stack([torch.full((50,), 1234.567), torch.zeros(50)], 1)
    _, std = stage2.standardisation((side, side), torch.arange(50) < 40)
    assert std.tolist() == [1, 1]


def test_a_constant_that_differs_between_the_sides_has_its_own_std():
    side = torch.zeros(50, 1)
    _, std = stage2.standardisation((side, side + 1), torch.arange(50) < 40)
    assert float(std) == pytest.approx(0.5)


def test_a_decoder_of_zeros_gives_scores_of_0_and_stds_of_1(run):
    save_sae(run.parent / "zeros.safetensors", decoder=torch.zeros(D_SAE, WIDTH))
    t, _, _ = select(run, "--k", 2, sae="zeros.safetensors")
    assert t["std"].tolist() == [1] * 4
    assert not t["chosen"].any()


def test_bfloat16_activations_are_projected_in_float32(run, sae):
    z = CHOSEN.bfloat16()
    t, _, _ = select(save_activations(run, z, REJECTED.bfloat16()), "--k", 4)
    exact = z.double() @ sae.W_dec[t["latents"]].double().T
    torch.testing.assert_close(t["chosen"], exact.float(), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- what may be looked at

def test_test_pairs_touch_nothing_but_their_own_scores(run):
    before, meta, _ = select(run, "--k", 5)
    of_test = (SPLIT == TEST)[:, None]
    chosen = torch.where(of_test, 1e4 * draw(N, WIDTH, seed=20), CHOSEN)
    rejected = torch.where(of_test, 1e4 * draw(N, WIDTH, seed=21), REJECTED)
    after, corrupted, _ = select(save_activations(run, chosen, rejected), "--k", 5)

    assert meta["health"] == corrupted["health"]
    for name, tensor in before.items():
        rows = slice(None)
        if name in ("chosen", "rejected"):
            rows = USABLE
            assert not torch.equal(tensor, after[name])
        assert torch.equal(tensor[rows], after[name][rows]), name


@pytest.mark.parametrize("split", [TRAIN, DEV])
def test_pairs_of_train_and_dev_are_both_learnt_from(split, run):
    before, meta, _ = select(run, "--k", 5)
    rejected = torch.where((SPLIT == split)[:, None], draw(N, WIDTH, seed=21), REJECTED)
    after, changed, _ = select(save_activations(run, CHOSEN, rejected), "--k", 5)
    for name in ("frequency_rejected", "mean", "std"):
        assert not torch.equal(before[name], after[name]), name
    assert meta["health"] != changed["health"]


def test_chunks_have_the_rows_asked_for_and_end_with_their_shard(run):
    paths, _ = stage2.shard_files(run)
    sizes = [len(chunk["pair"]) for chunk in stage2.read_chunks(paths, 5)]
    assert sizes == [5, 5, 5, 3, 5, 5, 2]


def test_how_the_pairs_are_cut_into_shards_does_not_matter(run, tmp_path):
    before, _, _ = select(run, "--k", 5)
    other = save_activations(tmp_path / "in small shards", CHOSEN, REJECTED, shard=4)
    after, _, _ = select(other, "--k", 5)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor)


# ---------------------------------------------------------------- the file

def test_the_file_holds_the_tensors_of_the_contract(run):
    t, meta, _ = select(run, "--k", 3)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in t.items()}
    m, union = len(USABLE), len(t["search_union"])
    assert found == {
        "latents": ((6,), torch.int64),
        "directions": ((6, WIDTH), torch.float32),
        "mean": ((6,), torch.float32),
        "std": ((6,), torch.float32),
        "frequency_chosen": ((D_SAE,), torch.float32),
        "frequency_rejected": ((D_SAE,), torch.float32),
        "chosen": ((N, 6), torch.float32),
        "rejected": ((N, 6), torch.float32),
        "fold": ((N,), torch.int8),
        "pair": ((N,), torch.int64),
        "group": ((N,), torch.int64),
        "split": ((N,), torch.uint8),
        "chosen_tokens": ((N,), torch.int32),
        "rejected_tokens": ((N,), torch.int32),
        "search_latents": ((5, 2 * meta["search_k"]), torch.int64),
        "search_union": ((union,), torch.int64),
        "search_pair": ((m,), torch.int64),
        "search_chosen": ((m, union), torch.float32),
        "search_rejected": ((m, union), torch.float32),
    }


def test_what_stage_1_said_of_each_pair_is_carried_over(run):
    t, _, _ = select(run)
    assert torch.equal(t["split"], SPLIT)
    assert torch.equal(t["group"], GROUP)
    assert t["pair"].tolist() == list(range(N))
    assert t["chosen_tokens"].tolist() == [n + 2 for n in range(N)]
    assert t["rejected_tokens"].tolist() == [n + 3 for n in range(N)]


def test_features_with_a_name_are_written_beside_those_without(run):
    select(run, "--k", 3)
    before = (run / "features.safetensors").read_bytes()
    succeed("02_select_features", "--run", run, "--sae", run.parent / "sae.safetensors",
            "--k", 4, "--name", "other")
    assert (run / "features.safetensors").read_bytes() == before
    named = (run / "other/features.safetensors").read_bytes()
    select(run, "--k", 4)
    assert (run / "features.safetensors").read_bytes() == named


def test_the_later_stages_read_the_features_of_a_name_where_it_has_some(tmp_path):
    assert stage2.features_path(tmp_path) == tmp_path / "features.safetensors"
    assert stage2.features_path(tmp_path, "x") == tmp_path / "features.safetensors"
    write_text(tmp_path / "x/features.safetensors", "")
    assert stage2.features_path(tmp_path, "x") == tmp_path / "x/features.safetensors"


def test_the_metadata_is_one_key_of_sorted_json(run):
    _, meta, _ = select(run)
    with safe_open(run / "features.safetensors", "pt") as file:
        assert file.metadata() == {"sparserm": json.dumps(meta, sort_keys=True)}


def test_the_parents_are_the_hashes_of_what_was_read(run):
    _, meta, _ = select(run)
    shards = sorted((run / "activations").iterdir())
    assert meta["parent"] == {
        "sae": stage1.file_hash(run.parent / "sae.safetensors"),
        "pairs": stage1.file_hash(run / "pairs.jsonl"),
        "activations": [stage1.file_hash(shard) for shard in shards],
    }


def test_the_same_inputs_give_the_same_bytes(run):
    select(run, "--k", 3)
    first = (run / "features.safetensors").read_bytes()
    (run / "features.safetensors").unlink()
    select(run, "--k", 3)
    assert (run / "features.safetensors").read_bytes() == first


def test_the_health_figures_are_those_of_the_train_and_dev_responses(run, sae):
    _, meta, _ = select(run)
    z = torch.cat([CHOSEN[USABLE], REJECTED[USABLE]])
    f = torch.relu((z - sae.b_dec) @ sae.W_enc + sae.b_enc)
    error = (f @ sae.W_dec + sae.b_dec - z).square().sum()
    variance = (z - z.mean(0)).square().sum()
    silent = ~(f > 0).any(0)
    found = meta["health"]
    assert found["n"] == len(z)
    assert found["l0"] == pytest.approx(float((f > 0).sum() / len(z)))
    assert found["explained_variance"] == pytest.approx(float(1 - error / variance), rel=1e-4)
    assert found["silent"] == pytest.approx(float(silent.float().mean()))


# ---------------------------------------------------------------- bad input

def refused(run, *words, args=(), sae="sae.safetensors"):
    """Stage 2 ends with one line that names every one of `words`, and writes nothing."""
    result = command("02_select_features", "--run", run, "--sae", run.parent / sae, *args)
    assert_one_line_error(result, *words)
    assert not (run / "features.safetensors").exists()


def test_stage_2_before_stage_1_names_what_to_run(run):
    refused(run.parent / "nothing", "01_extract.py", "nothing")


def test_an_sae_of_another_width_is_refused_and_both_are_named(run):
    tiny.save_sae(run.parent / "wide.safetensors", layer=1, width=WIDTH + 1)
    refused(run, f"width {WIDTH + 1}", f"have {WIDTH}", "wide.safetensors", sae="wide.safetensors")


def test_an_sae_of_another_layer_is_refused_and_both_are_named(run):
    save_sae(run.parent / "later.safetensors", layer=2)
    refused(run, "layer 2", "layer 1", "later.safetensors", sae="later.safetensors")


def test_an_sae_of_another_model_is_a_warning_that_the_file_keeps(run):
    save_sae(run.parent / "other.safetensors", model="base")
    _, meta, out = select(run, sae="other.safetensors")
    warning = "the SAE was trained on base, the activations are of m"
    assert warning in meta["warnings"]
    assert f"warning: {warning}" in out


@pytest.mark.parametrize("unknown", ["layer", "model"])
def test_an_sae_that_does_not_say_where_it_belongs_is_a_warning(unknown, run):
    save_sae(run.parent / "unknown.safetensors", **{unknown: None})
    _, meta, _ = select(run, sae="unknown.safetensors")
    assert any(f"does not say its {unknown}" in warning for warning in meta["warnings"])


def test_an_sae_that_belongs_gives_no_warning_of_where_it_belongs(run):
    _, meta, _ = select(run)
    assert not any("belongs" in warning or "trained on" in warning for warning in meta["warnings"])


def test_a_missing_shard_is_refused(run):
    _, second = sorted((run / "activations").iterdir())
    second.unlink()
    refused(run, "1 of 2 shards")


def test_a_cut_shard_is_refused(run):
    _, second = sorted((run / "activations").iterdir())
    second.write_bytes(second.read_bytes()[:500])
    refused(run, second.name)


def test_a_shard_of_another_run_is_refused(run):
    first, second = sorted((run / "activations").iterdir())
    tensors, meta = stage1.load_stage(first)
    stage1.save_stage(second, tensors, {**meta, "model": "other"})
    refused(run, "different runs")


def test_a_copy_of_a_shard_under_another_name_is_not_read_twice(run):
    shard = min((run / "activations").iterdir())
    shard.with_name("layer1-mean-copy.safetensors").write_bytes(shard.read_bytes())
    refused(run, "activations")


def test_pairs_that_are_not_those_of_the_activations_are_refused(run):
    with open(run / "pairs.jsonl", "a", encoding="utf-8") as file:
        file.write("{}\n")
    refused(run, "pairs.jsonl", "01_extract.py")


SECOND = {"layer": (3, "1, 3", 2), "token": ("last", "last, mean", "eot")}


@pytest.mark.parametrize("what", SECOND)
def test_of_several_layers_or_token_rules_one_has_to_be_named(what, run):
    second, there, _ = SECOND[what]
    save_activations(run, CHOSEN + 1, REJECTED, **{what: second})
    refused(run, f"several values of --{what}: {there}")


@pytest.mark.parametrize("what", SECOND)
def test_what_was_not_extracted_is_refused_and_what_is_there_named(what, run):
    second, there, missing = SECOND[what]
    save_activations(run, CHOSEN + 1, REJECTED, **{what: second})
    refused(run, f"--{what} {missing} was not extracted", there, args=[f"--{what}", missing])


@pytest.mark.parametrize("what, first", [("layer", 1), ("token", "mean")])
def test_the_layer_or_token_rule_that_is_named_is_the_one_that_is_read(what, first, run):
    alone, _, _ = select(run)
    save_activations(run, CHOSEN + 1, REJECTED, **{what: SECOND[what][0]})
    t, meta, _ = select(run, f"--{what}", first)
    assert meta[what] == first
    assert torch.equal(t["chosen"], alone["chosen"])


def test_sides_that_are_the_same_leave_nothing_to_select(run):
    refused(save_activations(run, CHOSEN, CHOSEN.clone()), "no latent fires more often")


def test_where_all_pairs_are_of_test_there_is_nothing_to_select_from(run):
    all_test = torch.full_like(SPLIT, TEST)
    refused(save_activations(run, CHOSEN, REJECTED, split=all_test), "train split")
