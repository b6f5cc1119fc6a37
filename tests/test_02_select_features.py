"""Stage 2, on activations made up here, against naive loops over responses, latents and coordinates."""

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

stage1 = importlib.import_module("01_extract")
stage2 = importlib.import_module("02_select_features")
TRAIN, DEV, TEST = range(3)
N, WIDTH, D_SAE = 30, 12, 20
SPLIT = torch.tensor(([TRAIN] * 7 + [DEV] + [TEST] * 2) * 3, dtype=torch.uint8)


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def save_activations(run, chosen, rejected, split=SPLIT, layer=1, shard=18, **meta):
    """A run as stage 1 leaves it, with these vectors, in shards of `shard` pairs → the run."""
    n, count = len(split), -(-len(split) // shard)
    write_text(run / "pairs.jsonl", "".join(json.dumps({"id": str(i)}) + "\n" for i in range(n)))
    number = torch.arange(n)
    columns = {"chosen": chosen, "rejected": rejected, "pair": number, "group": number * 7 + 1, "split": split,
               "chosen_tokens": number.int() + 2, "rejected_tokens": number.int() + 3}
    meta = {"stage": "extract", "model": "m", "layer": layer, "token": "last", **meta,
            "parent": {"pairs": stage1.file_hash(run / "pairs.jsonl")}}
    for s in range(count):
        stage1.save_stage(stage1.shard_path(run, layer, s, count), {k: v[s * shard:(s + 1) * shard] for k, v in columns.items()}, meta)
    return run


def save_sae(path, seed=0, encoder=None, decoder=None, **info):
    """A ReLU SAE whose encoder is not its decoder, with every bias in use → its path."""
    w_enc = draw(WIDTH, D_SAE, seed=seed) if encoder is None else encoder
    w_dec = draw(D_SAE, WIDTH, seed=seed + 1) if decoder is None else decoder
    b_enc, b_dec = draw(D_SAE, seed=seed + 2) - 1, draw(WIDTH, seed=seed + 3) / 2
    sae = sae_module.SAE(w_enc, b_enc, w_dec, b_dec, b_dec, "relu", info={"layer": 1, "model": "m", **info})
    importlib.import_module("parts.sae_tools").save_sae(sae, path)
    return path


CHOSEN, REJECTED = draw(N, WIDTH, seed=10) + 0.3, draw(N, WIDTH, seed=11)


@pytest.fixture
def run(tmp_path):
    save_sae(tmp_path / "sae.safetensors")
    return save_activations(tmp_path / "run", CHOSEN, REJECTED)


def select(run, *args, sae="sae.safetensors"):
    """Run stage 2 → (tensors, metadata, what it printed)."""
    out = succeed("02_select_features", "--run", run, "--sae", run.parent / sae, *args)
    return *stage1.load_stage(run / "features.safetensors"), out


# ---------------------------------------------------------------- selection

def fires(sae, z, j):
    """Does latent j of a ReLU SAE fire for one vector? Coordinate by coordinate."""
    return float(sum((float(z[i]) - float(sae.b_in[i])) * float(sae.W_enc[i, j]) for i in range(WIDTH)) + float(sae.b_enc[j])) > 0


def test_frequencies_and_latents_are_those_of_a_naive_double_loop(run):
    t, meta, _ = select(run, "--k", 3)
    sae = sae_module.load_sae(run.parent / "sae.safetensors")
    train = [n for n in range(N) if SPLIT[n] == TRAIN]
    share = [[sum(fires(sae, side[n], j) for n in train) / len(train) for j in range(D_SAE)] for side in (CHOSEN, REJECTED)]
    torch.testing.assert_close(t["frequency_chosen"], torch.tensor(share[0]))
    torch.testing.assert_close(t["frequency_rejected"], torch.tensor(share[1]))
    difference = [round(c - r, 6) for c, r in zip(*share)]
    falling = sorted(range(D_SAE), key=lambda j: (-difference[j], j))[:3]
    rising = sorted(range(D_SAE), key=lambda j: (difference[j], j))[:3]
    assert t["latents"].tolist() == falling + rising and meta["k"] == 3


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=30), st.integers(1, 40))
def test_only_latents_that_separate_in_the_right_direction_are_kept_the_clearest_first(counts, k):
    chosen, rejected = (torch.tensor(side) / 8 for side in zip(*counts))
    found = stage2.select_latents(chosen, rejected, k).tolist()
    clearest = [[j for _, j in sorted((sign * (c - r), j) for j, (c, r) in enumerate(counts) if sign * (c - r) < 0)] for sign in (-1, 1)]
    kept = min(k, *map(len, clearest))
    assert found == clearest[0][:kept] + clearest[1][:kept]


def test_where_k_is_larger_than_what_separates_fewer_latents_are_kept_and_it_is_said(run):
    t, meta, out = select(run, "--k", 1000)
    difference = t["frequency_chosen"] - t["frequency_rejected"]
    k = min(int((difference > 0).sum()), int((difference < 0).sum()))
    assert meta["k"] == k < 1000 == meta["k_asked"] and f"{k} + {k}" in out and "1000 asked" in out
    assert (difference[t["latents"][:k]] > 0).all() and (difference[t["latents"][k:]] < 0).all()
    assert t["chosen"].shape == (N, 2 * k) and t["mean"].shape == t["std"].shape == (2 * k,)


# ---------------------------------------------------------------- projection

def test_scores_project_the_raw_hidden_state_and_not_the_activation_of_the_sae(run):
    t, _, _ = select(run, "--k", 4)
    w_dec = sae_module.load_sae(run.parent / "sae.safetensors").W_dec
    for side, z in (("chosen", CHOSEN), ("rejected", REJECTED)):
        by_hand = [[sum(float(z[n, i]) * float(w_dec[j, i]) for i in range(WIDTH)) for j in t["latents"]] for n in range(N)]
        torch.testing.assert_close(t[side], torch.tensor(by_hand), rtol=1e-4, atol=1e-4)
        assert (t[side] < 0).any()          # no activation of a ReLU is
    assert torch.equal(t["directions"], w_dec[t["latents"]])


def test_mean_and_std_are_those_of_both_sides_of_the_train_pairs(run):
    t, _, _ = select(run, "--k", 4)
    scores = np.concatenate([t[side].numpy()[SPLIT.numpy() == TRAIN] for side in ("chosen", "rejected")])
    np.testing.assert_allclose(t["mean"], scores.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(t["std"], scores.std(0), rtol=1e-4)


def test_a_score_that_never_changes_has_std_1(tmp_path):
    constant = torch.full((50,), 1234.567)
    side = torch.stack([constant, torch.zeros(50), torch.arange(50.0)], 1)
    mean, std = stage2.standardisation((side, side + 1), torch.arange(50) < 40)             # the last ten are not train
    assert std[1] == pytest.approx(0.5) and std[2] == pytest.approx(np.concatenate([np.arange(40), np.arange(1, 41)]).std())
    assert mean[2] == pytest.approx(20) and stage2.standardisation((side, side), torch.arange(50) < 40)[1][:2].tolist() == [1, 1]
    run = save_activations(tmp_path / "run", CHOSEN, REJECTED)
    save_sae(tmp_path / "sae.safetensors", decoder=torch.zeros(D_SAE, WIDTH))
    t, _, _ = select(run, "--k", 2)
    assert t["std"].tolist() == [1] * 4 and not t["chosen"].any()


def test_bfloat16_activations_are_projected_in_float32(tmp_path):
    z = CHOSEN.bfloat16(), REJECTED.bfloat16()
    run = save_activations(tmp_path / "run", *z)
    sae = sae_module.load_sae(save_sae(tmp_path / "sae.safetensors"))
    t, _, _ = select(run, "--k", 4)
    torch.testing.assert_close(t["chosen"], (z[0].double() @ sae.W_dec[t["latents"]].double().T).float(), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- what may be looked at

def test_dev_and_test_pairs_touch_neither_selection_nor_mean_nor_std(run, tmp_path):
    before, meta, _ = select(run, "--k", 5)
    outside = (SPLIT != TRAIN)[:, None]
    noise = [torch.where(outside, 1e4 * draw(N, WIDTH, seed=s), z) for s, z in ((20, CHOSEN), (21, REJECTED))]
    after, corrupted, _ = select(save_activations(tmp_path / "run", *noise), "--k", 5)
    for name in ("latents", "directions", "frequency_chosen", "frequency_rejected", "mean", "std"):
        assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["chosen"], after["chosen"]) and meta["health"] == corrupted["health"]


def test_how_the_pairs_are_cut_into_shards_and_chunks_does_not_matter(run, tmp_path):
    paths, _ = stage2.shard_files(run)
    assert [len(c["pair"]) for c in stage2.read_chunks(paths, 5)] == [5, 5, 5, 3, 5, 5, 2]
    before, _, _ = select(run, "--k", 5)
    save_sae(tmp_path / "small/sae.safetensors")
    after, _, _ = select(save_activations(tmp_path / "small/run", CHOSEN, REJECTED, shard=4), "--k", 5)
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor)


# ---------------------------------------------------------------- the file

def test_the_file_holds_what_the_contract_says_and_one_metadata_key_of_sorted_json(run):
    t, meta, _ = select(run, "--k", 3)
    vector = ((6,), torch.float32)
    assert {n: (tuple(v.shape), v.dtype) for n, v in t.items()} == {
        "latents": ((6,), torch.int64), "directions": ((6, WIDTH), torch.float32), "mean": vector, "std": vector,
        "frequency_chosen": ((D_SAE,), torch.float32), "frequency_rejected": ((D_SAE,), torch.float32),
        "chosen": ((N, 6), torch.float32), "rejected": ((N, 6), torch.float32), "pair": ((N,), torch.int64), "group": ((N,), torch.int64),
        "split": ((N,), torch.uint8), "chosen_tokens": ((N,), torch.int32), "rejected_tokens": ((N,), torch.int32)}
    assert torch.equal(t["split"], SPLIT) and t["group"].tolist() == [7 * n + 1 for n in range(N)]
    with safe_open(run / "features.safetensors", "pt") as file:
        assert file.metadata() == {"sparserm": json.dumps(meta, sort_keys=True)}
    assert meta["parent"] == {"sae": stage1.file_hash(run.parent / "sae.safetensors"), "pairs": stage1.file_hash(run / "pairs.jsonl"),
                              "activations": [stage1.file_hash(p) for p in sorted((run / "activations").iterdir())]}
    first = (run / "features.safetensors").read_bytes()
    select(run, "--k", 3)
    assert (run / "features.safetensors").read_bytes() == first


def test_the_health_figures_are_those_of_the_train_responses(run):
    _, meta, _ = select(run)
    sae = sae_module.load_sae(run.parent / "sae.safetensors")
    z = torch.cat([CHOSEN[SPLIT == TRAIN], REJECTED[SPLIT == TRAIN]])
    f = torch.relu((z - sae.b_dec) @ sae.W_enc + sae.b_enc)
    error, total = (f @ sae.W_dec + sae.b_dec - z).square().sum(), (z - z.mean(0)).square().sum()
    assert meta["health"]["n"] == len(z) and meta["health"]["l0"] == pytest.approx(float((f > 0).sum() / len(z)))
    assert meta["health"]["explained_variance"] == pytest.approx(float(1 - error / total), rel=1e-4)
    assert meta["health"]["silent"] == pytest.approx(float((~(f > 0).any(0)).float().mean()))


# ---------------------------------------------------------------- bad input

def refused(run, *words, args=(), sae="sae.safetensors"):
    assert_one_line_error(command("02_select_features", "--run", run, "--sae", run.parent / sae, *args), *words)
    assert not (run / "features.safetensors").exists()


def test_stage_2_before_stage_1_names_what_to_run(tmp_path):
    save_sae(tmp_path / "sae.safetensors")
    refused(tmp_path / "nothing", "01_extract.py", "nothing")


def test_an_sae_of_another_width_or_layer_is_refused_and_both_sides_are_named(run):
    tiny.save_sae(run.parent / "wide.safetensors", layer=1, width=WIDTH + 1)
    refused(run, f"width {WIDTH + 1}", f"have {WIDTH}", "wide.safetensors", sae="wide.safetensors")
    save_sae(run.parent / "later.safetensors", layer=2)
    refused(run, "layer 2", "layer 1", "later.safetensors", sae="later.safetensors")


def test_an_sae_of_another_or_unknown_model_is_a_warning_that_the_file_keeps(run):
    save_sae(run.parent / "other.safetensors", model="base")
    _, meta, out = select(run, sae="other.safetensors")
    assert any("base" in w and " m" in w for w in meta["warnings"]) and "warning: " in out and "base" in out
    save_sae(run.parent / "unknown.safetensors", layer=None, model=None)
    assert any("layer" in w for w in select(run, sae="unknown.safetensors")[1]["warnings"])


@pytest.mark.parametrize("name, data", [("none.safetensors", None), ("text.safetensors", b"no tensors"), ("empty.safetensors", b"")])
def test_a_missing_or_unreadable_sae_is_one_line_that_names_it(name, data, run):
    if data is not None:
        (run.parent / name).write_bytes(data)
    refused(run, name, sae=name)


def test_a_missing_cut_or_foreign_shard_is_refused(run):
    shards = sorted((run / "activations").iterdir())
    content = shards[1].read_bytes()
    shards[1].unlink()
    refused(run, "1 of 2 shards")
    shards[1].write_bytes(content[:500])
    refused(run, shards[1].name)
    tensors, meta = stage1.load_stage(shards[0])
    stage1.save_stage(shards[1], tensors, {**meta, "token": "mean"})
    refused(run, "different runs")


def test_a_copy_of_a_shard_under_another_name_is_not_read_twice(run):
    (run / "activations/layer1-copy.safetensors").write_bytes(next((run / "activations").iterdir()).read_bytes())
    refused(run, "activations")


def test_pairs_that_are_not_those_of_the_activations_are_refused(run):
    with open(run / "pairs.jsonl", "a", encoding="utf-8") as file:
        file.write("{}\n")
    refused(run, "pairs.jsonl", "01_extract.py")


def test_of_several_layers_one_has_to_be_named(run):
    save_activations(run, CHOSEN + 1, REJECTED, layer=3)
    refused(run, "[1, 3]", "--layer")
    refused(run, "layer 2", "[1, 3]", args=["--layer", 2])
    assert select(run, "--layer", 1)[1]["layer"] == 1


def test_nothing_to_select_from_is_one_line(run, tmp_path):
    refused(run, "--k 0", args=["--k", 0])
    refused(save_activations(tmp_path / "run", CHOSEN, CHOSEN.clone()), "no latent fires more often")
    refused(save_activations(tmp_path / "run", CHOSEN, REJECTED, split=torch.full_like(SPLIT, DEV)), "train split")
