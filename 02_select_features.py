"""Stage 2: which latents tell chosen from rejected, and the alignment scores of their directions.

reads   activations/layer16-*.safetensors   chosen, rejected [n, d] · split [n]
        an SAE of that layer
writes  features.safetensors
            latents [2K] int64              K of the chosen side, then K of the rejected side,
                                            each by falling separation
            directions [2K, d]              their decoder rows
            frequency_chosen, frequency_rejected [d_sae]
                                            share of train responses in which a latent fires
            mean, std [2K]                  of the scores on train
            chosen, rejected [n, 2K]        alignment scores v_j = <z, d_j> of every pair
            pair, split, group, chosen_tokens, rejected_tokens   carried over

    python 02_select_features.py --run runs/demo --k 128 \\
        --sae assets/sae-smollm2-135m-layer16.safetensors

The SAE only chooses the directions. What is projected on them is the raw hidden state z, not the
SAE's activation f (section 3.2 of the paper). Selection, mean and std see the train split only.
Where fewer than K latents separate in the right direction, fewer are kept; the paper does not say
what it does then.
"""

import argparse
import importlib
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm

from parts.files import (
    UserError,
    check_finite,
    file_hash,
    load_stage,
    read_meta,
    run_main,
    save_stage,
    up_to_date,
)
from sae import SAEError, health, load_sae, warnings_of

stage1 = importlib.import_module("01_extract")
CARRIED = ("pair", "split", "group", "chosen_tokens", "rejected_tokens")
TRAIN = stage1.TRAIN


# ---------------------------------------------------------------- the activations of a run

def shard_files(run, layer=None):
    """The activation shards of one layer of a run → (sorted paths, their common metadata)."""
    folder = Path(run) / "activations"
    layer = layer_to_read(folder, run, layer)
    paths = sorted(folder.glob(f"layer{layer}-*.safetensors"))
    metas = [read_meta(path, "01_extract.py", "extract") for path in paths]
    count = int(paths[0].stem.rpartition("-")[2])               # layer16-00000-of-00001
    if len(paths) != count or any(meta != metas[0] for meta in metas):
        raise UserError(f"{len(paths)} of {count} shards, or shards of different runs · {folder} · "
                        "run 01_extract.py again")
    pairs = Path(run) / "pairs.jsonl"
    if not pairs.is_file() or file_hash(pairs) != metas[0]["parent"]["pairs"]:
        raise UserError(f"pairs.jsonl is not the file that the activations were made from · {run} "
                        "· "
                        "run 01_extract.py again")
    return paths, metas[0]


def layer_to_read(folder, run, layer=None):
    """The layer asked for, or the only one that was extracted."""
    shards = folder.glob("layer[0-9]*-*-of-*.safetensors")
    layers = sorted({int(path.name.removeprefix("layer").partition("-")[0]) for path in shards})
    if not layers:
        raise UserError(f"no activations · {folder} · run 01_extract.py --run {run} first")
    if layer is None and len(layers) > 1:
        raise UserError(f"several layers: {layers} · {folder} · pass --layer")
    if layer is not None and layer not in layers:
        raise UserError(f"layer {layer} was not extracted, {layers} were · {folder} · "
                        f"run 01_extract.py --layer {layer}")
    return layers[0] if layer is None else layer


def read_chunks(paths, rows=1024, names=("chosen", "rejected", *CARRIED)):
    """Yield dicts of tensors, `rows` pairs at a time; the shards stay on disk (memory-mapped)."""
    for path in paths:
        with safe_open(path, "pt") as file:
            columns = {name: file.get_slice(name) for name in names}
            [n] = columns["pair"].get_shape()
            for start in range(0, n, rows):
                chunk = {name: column[start:start + rows] for name, column in columns.items()}
                if "chosen" in chunk:
                    check_finite(chunk, path)
                yield chunk


# ---------------------------------------------------------------- which latents matter

def firing_frequencies(sae, chunks):
    """Share of train responses in which each latent fires → (μ_chosen, μ_rejected, train pairs).

    μ [d_sae] float32.
    """
    counts = torch.zeros(2, sae.d_sae, dtype=torch.int64)
    train_pairs = 0
    at_a_time = max(1, 2**26 // sae.d_sae)                      # at most 256 MB of latents
    for chunk in chunks:
        train = chunk["split"] == TRAIN
        train_pairs += int(train.sum())
        for side, name in enumerate(("chosen", "rejected")):
            for z in chunk[name][train].split(at_a_time):
                counts[side] += (sae.encode(z) > 0).sum(0)
    frequency_chosen, frequency_rejected = (counts / max(1, train_pairs)).float()
    return frequency_chosen, frequency_rejected, train_pairs


def select_latents(frequency_chosen, frequency_rejected, k):
    """The K latents that fire more often in chosen responses, then the K that do in rejected ones →
    [2K'] int64.

    K' <= K: only latents that separate in the right direction count. Ties go to the lower index.
    """
    difference = frequency_chosen - frequency_rejected
    k = min(k, int((difference > 0).sum()), int((difference < 0).sum()))
    more_in_chosen = torch.sort(difference, descending=True, stable=True).indices[:k]
    more_in_rejected = torch.sort(difference, stable=True).indices[:k]
    return torch.cat([more_in_chosen, more_in_rejected])


# ---------------------------------------------------------------- projection

def alignment_scores(hidden, directions):
    """z [n, d], directions [m, d] → v [n, m] with v_ij = <z_i, d_j>."""
    return hidden.float() @ directions.float().T


def standardisation(sides, rows):
    """Mean and std [m] of the given rows (bool [n]) of both sides [n, m] together.

    A score that never changes keeps std 1. Some rows at a time: a million pairs stay within memory.
    """
    count = 2 * int(rows.sum())
    parts = rows.nonzero().flatten().split(2**16)
    total = sum(x[at].double().sum(0) for x in sides for at in parts)
    mean = total / count
    squares = sum((x[at].double() - mean).square().sum(0) for x in sides for at in parts)
    std = (squares / count).sqrt()
    changes = std > 1e-6 * (1 + mean.abs())
    return mean.float(), torch.where(changes, std, torch.ones_like(std)).float()


def project(paths, directions):
    """All pairs → dict of chosen, rejected [n, m] and the carried columns."""
    chunks = list(read_chunks(paths, names=CARRIED))
    table = {name: torch.cat([chunk[name] for chunk in chunks]) for name in CARRIED}
    n = len(table["pair"])
    for side in ("chosen", "rejected"):
        table[side] = torch.empty(n, len(directions))
    start = 0
    for chunk in read_chunks(paths):
        stop = start + len(chunk["pair"])
        for side in ("chosen", "rejected"):
            table[side][start:stop] = alignment_scores(chunk[side], directions)
        start = stop
    return table


# ---------------------------------------------------------------- the SAE

def open_sae(place, dtype="float32", k=None, revision=None):
    """load_sae, its number format by name."""
    return load_sae(place, getattr(torch, dtype), k=k, revision=revision)


def check_belongs(sae, meta, width, path):
    """Refuse an SAE of another width or layer; return warnings where only the names differ."""
    if sae.d_model != width:
        raise UserError(f"the SAE reads width {sae.d_model}, the activations have {width} "
                        f"({meta['model']}) · {path} · choose an SAE of that model")
    layer = sae.info.get("layer")
    if layer is not None and layer != meta["layer"]:
        raise UserError(f"the SAE is for layer {layer}, the activations are from layer "
                        f"{meta['layer']} · "
                        f"{path} · pass an SAE of layer {meta['layer']}, or run 01_extract.py "
                        "--layer "
                        f"{layer}")

    warnings = []
    if layer is None:
        warnings.append("the SAE does not say its layer: check that it belongs to this one")
    model = sae.info.get("model")
    if not model:
        warnings.append(f"the SAE does not say its model: check that it belongs to {meta['model']}")
    elif last_name(model) != last_name(meta["model"]):
        warnings.append(f"the SAE was trained on {model}, the activations are of {meta['model']}")
    return warnings


def last_name(model):
    """HuggingFaceTB/SmolLM2-135M → smollm2-135m."""
    return str(model).rpartition("/")[2].lower()


def train_sample(paths, limit=4096):
    """Up to `limit` hidden states of train responses [n, d], for the health figures."""
    samples = []
    found = 0
    for chunk in read_chunks(paths):
        train = chunk["split"] == TRAIN
        samples.append(torch.cat([chunk["chosen"][train], chunk["rejected"][train]]).float())
        found += len(samples[-1])
        if found >= limit:
            break
    return torch.cat(samples)[:limit]


# ---------------------------------------------------------------- the stage

def parse_args():
    """The flags, checked as far as that needs no file."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", default="runs/demo",
                   help="folder of the run (default runs/demo)")
    p.add_argument("--sae", default="assets/sae-smollm2-135m-layer16.safetensors",
                   help="SAE file, folder or hub:REPO[:SUBFOLDER]")
    p.add_argument("--layer", type=int,
                   help="which extracted layer (default: the only one)")
    p.add_argument("--k", type=int, default=128,
                   help="latents a side (default 128, as in the paper)")
    p.add_argument("--k-sae", type=int,
                   help="k of a TopK SAE whose files do not hold it")
    p.add_argument("--sae-dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                   help="in memory (default float32)")
    p.add_argument("--debug", action="store_true",
                   help="show the traceback of an error")
    args = p.parse_args()
    if args.k < 1:
        raise UserError(f"K must be at least 1 · --k {args.k} · the paper uses 128")
    return args


def main():
    """Stage 2 from the command line."""
    args = parse_args()
    paths, meta = shard_files(args.run, args.layer)
    sae = open_sae(args.sae, args.sae_dtype, args.k_sae)
    first_pair = next(read_chunks(paths, rows=1))
    warnings = check_belongs(sae, meta, first_pair["chosen"].shape[1], args.sae)

    parent = {"activations": [file_hash(path) for path in paths],
              "sae": file_hash(sae.info["weights"]),
              "pairs": meta["parent"]["pairs"]}
    record = {**meta, "stage": "select", "k_asked": args.k, "sae": args.sae,
              "sae_dtype": args.sae_dtype, "k_sae": args.k_sae, "parent": parent}
    out = Path(args.run) / "features.safetensors"
    if not up_to_date(out, record):
        select(args, paths, sae, record, warnings, out)
    report(args, *load_stage(out))


def select(args, paths, sae, record, warnings, out):
    """Two passes over the shards, frequencies and then projections; write features.safetensors."""
    chunks = tqdm(read_chunks(paths), desc="select", unit="chunk", disable=None)
    frequency_chosen, frequency_rejected, train_pairs = firing_frequencies(sae, chunks)
    if not train_pairs:
        raise UserError(f"no pair is in the train split · {args.run} · more pairs, or another "
                        "--split "
                        "in 01")
    latents = select_latents(frequency_chosen, frequency_rejected, args.k)
    if not len(latents):
        raise UserError(f"no latent fires more often on one side than on the other · {args.sae} · "
                        "look at the health figures: python -m tools.check_sae")

    directions = sae.W_dec[latents].float()
    table = project(paths, directions)
    mean, std = standardisation((table["chosen"], table["rejected"]), table["split"] == TRAIN)
    figures = health(sae, train_sample(paths))
    tensors = {"latents": latents, "directions": directions, "mean": mean, "std": std,
               "frequency_chosen": frequency_chosen, "frequency_rejected": frequency_rejected,
               **table}
    save_stage(out, tensors, {**record, "k": len(latents) // 2, "health": figures,
                              "warnings": warnings + warnings_of(sae, None, figures)})


def report(args, t, meta):
    """The table at the end."""
    k = meta["k"]
    figures = meta["health"]
    fewer = f" (only so many separate; {args.k} asked)" if k < args.k else ""
    print()
    print(f"train pairs      {int((t['split'] == TRAIN).sum())}")
    print(f"latents kept     {k} + {k}{fewer}")
    print(f"SAE at the scored token: explained variance {figures['explained_variance']:.3f} · "
          f"L0 {figures['l0']:.1f} · latents that never fire here {figures['silent']:.1%}")
    print("\n  latent   fires in chosen   in rejected")
    for latent in [*t["latents"][:3].tolist(), *t["latents"][k:k + 3].tolist()]:
        in_chosen = float(t["frequency_chosen"][latent])
        in_rejected = float(t["frequency_rejected"][latent])
        print(f"{latent:>8}   {in_chosen:>15.3f}   {in_rejected:>11.3f}")
    for warning in meta["warnings"]:
        print(f"warning: {warning}")
    print(f"\nwritten {args.run}/features.safetensors")
    print(f"next: python 03_train_head.py --run {args.run}")


if __name__ == "__main__":
    run_main(main, SAEError)
