"""Stage 2: which latents tell chosen from rejected, and the alignment scores of their directions.

reads   activations/layer16-*.safetensors   chosen, rejected [n, d] · split [n]
        an SAE of that layer
writes  features.safetensors
            latents [2K] int64              K of the chosen side, then K of the rejected side, each by falling separation
            directions [2K, d]              their decoder rows
            frequency_chosen, frequency_rejected [d_sae]    share of train responses in which a latent fires
            mean, std [2K]                  of the scores on train
            chosen, rejected [n, 2K]        alignment scores v_j = <z, d_j> of every pair
            pair, split, group, chosen_tokens, rejected_tokens   carried over

    python 02_select_features.py --run runs/demo --sae assets/sae-smollm2-135m-layer16.safetensors --k 128

The SAE only chooses the directions. What is projected on them is the raw hidden state z, not the SAE's activation f
(section 3.2 of the paper). Selection, mean and std see the train split only. Where fewer than K latents separate in the
right direction, fewer are kept; the paper does not say what it does then.
"""

import argparse
import importlib
import re
from pathlib import Path

import torch
from safetensors import safe_open
from tqdm import tqdm

from parts.files import UserError, check_finite, file_hash, load_stage, read_meta, run_main, save_stage, up_to_date
from sae import SAEError, load_sae

stage1 = importlib.import_module("01_extract")
CARRIED = ("pair", "split", "group", "chosen_tokens", "rejected_tokens")
TRAIN = stage1.TRAIN


def shard_files(run, layer=None):
    """The activation shards of one layer of a run → (sorted paths, their common metadata)."""
    folder = Path(run) / "activations"
    layers = sorted({int(p.name[5:].partition("-")[0]) for p in folder.glob("layer[0-9]*-*-of-*.safetensors")})
    if not layers:
        raise UserError(f"no activations · {folder} · run 01_extract.py --run {run} first")
    if layer is None and len(layers) > 1:
        raise UserError(f"several layers: {layers} · {folder} · pass --layer")
    layer = layers[0] if layer is None else layer
    if layer not in layers:
        raise UserError(f"layer {layer} was not extracted, {layers} were · {folder} · run 01_extract.py --layer {layer}")
    paths = sorted(folder.glob(f"layer{layer}-*.safetensors"))
    metas = [read_meta(p, "01_extract.py", "extract") for p in paths]
    count = int(paths[0].stem.rpartition("-")[2])
    if len(paths) != count or any(m != metas[0] for m in metas):
        raise UserError(f"{len(paths)} of {count} shards, or shards of different runs · {folder} · run 01_extract.py again")
    pairs = Path(run) / "pairs.jsonl"
    if not pairs.is_file() or file_hash(pairs) != metas[0]["parent"]["pairs"]:
        raise UserError(f"pairs.jsonl is not the file that the activations were made from · {run} · run 01_extract.py again")
    return paths, metas[0]


def read_chunks(paths, rows=1024, names=("chosen", "rejected", *CARRIED)):
    """Yield dicts of tensors, `rows` pairs at a time; the shards stay on disk (memory-mapped)."""
    for path in paths:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in names}
            n = slices["pair"].get_shape()[0]
            for start in range(0, n, rows):
                chunk = {name: s[start:start + rows] for name, s in slices.items()}
                if "chosen" in chunk:
                    check_finite(chunk, path)
                yield chunk


def firing_frequencies(sae, chunks):
    """Share of train responses in which each latent fires → (μ_chosen, μ_rejected) [d_sae] float32, and their number."""
    counts = torch.zeros(2, sae.d_sae, dtype=torch.int64)
    n = 0
    for chunk in chunks:
        train = chunk["split"] == TRAIN
        n += int(train.sum())
        for side, name in enumerate(("chosen", "rejected")):
            for part in chunk[name][train].split(max(1, 2**26 // sae.d_sae)):        # at most 256 MB of latents at a time
                counts[side] += (sae.encode(part) > 0).sum(0)
    return *(counts / max(1, n)).float(), n


def select_latents(frequency_chosen, frequency_rejected, k):
    """The K latents that fire more often in chosen responses, then the K that do in rejected ones → [2K'] int64.

    K' <= K: only latents that separate in the right direction count. Ties go to the lower index.
    """
    difference = frequency_chosen - frequency_rejected
    k = min(k, int((difference > 0).sum()), int((difference < 0).sum()))
    more_in_chosen = torch.sort(difference, descending=True, stable=True).indices[:k]
    more_in_rejected = torch.sort(difference, stable=True).indices[:k]
    return torch.cat([more_in_chosen, more_in_rejected])


def alignment_scores(hidden, directions):
    """z [n, d], directions [m, d] → v [n, m] with v_ij = <z_i, d_j>."""
    return hidden.float() @ directions.float().T


def standardisation(sides, rows):
    """Mean and standard deviation [m] of the given rows (bool [n]) of both sides [n, m]; a score that never changes keeps std 1."""
    chunks = [(x, at) for x in sides for at in rows.nonzero().flatten().split(2**16)]       # a million pairs stay within memory
    count = 2 * int(rows.sum())
    mean = sum(x[at].double().sum(0) for x, at in chunks) / count
    std = (sum((x[at].double() - mean).square().sum(0) for x, at in chunks) / count).sqrt()
    return mean.float(), torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.ones_like(std)).float()


def project(paths, directions):
    """All pairs → dict of chosen, rejected [n, m] and the carried columns."""
    columns = list(read_chunks(paths, names=CARRIED))
    table = {name: torch.cat([c[name] for c in columns]) for name in CARRIED}
    table |= {name: torch.empty(len(table["pair"]), len(directions)) for name in ("chosen", "rejected")}
    start = 0
    for chunk in read_chunks(paths):
        for name in ("chosen", "rejected"):
            table[name][start:start + len(chunk[name])] = alignment_scores(chunk[name], directions)
        start += len(chunk["pair"])
    return table


# ---------------------------------------------------------------- health of the SAE on these activations

def health(sae, z):
    """How well the SAE fits residual vectors z [n, d] → dict.

    explained variance = 1 - Σ‖z - z'‖² / Σ‖z - mean‖² around the mean of *these* vectors. Give the scored token's vectors
    alone: among others, the distance between the two means would count as variance and hide a bad fit.
    """
    error = torch.zeros((), dtype=torch.float64)
    alive, fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=z.device), 0
    for chunk in z.split(1024):
        f = sae.encode(chunk)
        error += (sae.decode(f, like=chunk).float() - chunk.float()).square().sum().double().cpu()
        alive |= (f > 0).any(0)
        fired += int((f > 0).sum())
    total = (z.float() - z.float().mean(0)).square().sum().double().cpu()
    return {"explained_variance": float(1 - error / total), "l0": fired / len(z), "silent": float((~alive).float().mean()), "n": len(z)}


def warnings_of(sae, every=None, ended=None):
    """What looks wrong → list of sentences with the likely cause."""
    found, model = [sae.info["warning"]] if sae.info.get("warning") else [], str(sae.info.get("model") or "")
    families = re.search(r"(?i)llama-?3|gemma|qwen", model) and not re.search(r"(?i)it\b|instruct|chat", model)
    if re.search(r"(?i)base\b", model) or families:
        found.append(f"trained on {model}, by its name a base model: on an instruct model look at the explained variance")
    seen = every or ended
    if every and every["explained_variance"] < 0.3:
        found.append(f"explained variance {every['explained_variance']:.2f} over all tokens: the layer is off by one, the scale is wrong, "
                     "or the SAE belongs to another model")
    stated = sae.k or sae.info.get("l0")
    if seen and stated and seen["l0"] > 2 * float(stated):
        found.append(f"L0 {seen['l0']:.0f}, stated {float(stated):.0f}: a wrong scale or threshold, or BOS missing")
    if ended and ended["explained_variance"] < 0.2 and (not every or every["explained_variance"] >= 0.3):
        cause = "the SAE has hardly seen a chat template; try --token content" if ended["explained_variance"] > -1 else \
            "is it an SAE of this model and layer?"
        found.append(f"explained variance {ended['explained_variance']:.2f} at the scored token: {cause}")
    return found


def train_sample(paths, limit=4096):
    """Up to `limit` hidden states of train responses [n, d], for the health figures."""
    rows = []
    for chunk in read_chunks(paths):
        rows.append(torch.cat([chunk["chosen"], chunk["rejected"]])[(chunk["split"] == TRAIN).repeat(2)].float())
        if sum(map(len, rows)) >= limit:
            break
    return torch.cat(rows)[:limit]


def check_belongs(sae, meta, width, path):
    """Refuse an SAE of another width or layer; return warnings where only the names differ."""
    if sae.d_model != width:
        raise UserError(f"the SAE reads width {sae.d_model}, the activations have {width} ({meta['model']}) · {path} · "
                               "choose an SAE of that model")
    layer, model = sae.info.get("layer"), sae.info.get("model")
    if layer is not None and layer != meta["layer"]:
        raise UserError(f"the SAE is for layer {layer}, the activations are from layer {meta['layer']} · {path} · "
                               f"pass an SAE of layer {meta['layer']}, or run 01_extract.py --layer {layer}")
    found = [] if layer is not None else ["the SAE does not say its layer: check that it belongs to this one"]
    if not model:
        found.append(f"the SAE does not say its model: check that it belongs to {meta['model']}")
    if model and str(model).rpartition("/")[2].lower() != str(meta["model"]).rpartition("/")[2].lower():
        found.append(f"the SAE was trained on {model}, the activations are of {meta['model']}")
    return found


# ---------------------------------------------------------------- the stage

def parse_args():
    """The flags, checked as far as that needs no file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", default="runs/demo", help="folder of the run (default runs/demo)")
    p.add_argument("--sae", default="assets/sae-smollm2-135m-layer16.safetensors", help="SAE file, folder or hub:REPO[:SUBFOLDER]")
    p.add_argument("--layer", type=int, help="which extracted layer (default: the only one)")
    p.add_argument("--k", type=int, default=128, help="latents a side (default 128, as in the paper)")
    p.add_argument("--k-sae", type=int, help="k of a TopK SAE whose files do not hold it")
    p.add_argument("--sae-dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="in memory (default float32)")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return p.parse_args()


def main():
    """Stage 2 from the command line."""
    args = parse_args()
    if args.k < 1:
        raise UserError(f"K must be at least 1 · --k {args.k} · the paper uses 128")
    paths, meta = shard_files(args.run, args.layer)
    sae = load_sae(args.sae, getattr(torch, args.sae_dtype), k=args.k_sae)
    warnings = check_belongs(sae, meta, next(read_chunks(paths, 1))["chosen"].shape[1], args.sae)
    parent = {"activations": [file_hash(p) for p in paths], "sae": file_hash(sae.info["weights"]),
              "pairs": meta["parent"]["pairs"]}
    record = {**meta, "stage": "select", "k_asked": args.k, "sae": args.sae, "sae_dtype": args.sae_dtype, "k_sae": args.k_sae,
              "parent": parent}
    out = Path(args.run) / "features.safetensors"
    if not up_to_date(out, record):
        select(args, paths, sae, record, warnings, out)
    report(args, *load_stage(out))


def select(args, paths, sae, record, warnings, out):
    """Two passes over the shards, frequencies and then projections; write features.safetensors."""
    frequency_chosen, frequency_rejected, n = firing_frequencies(sae, tqdm(read_chunks(paths), desc="select", unit="chunk", disable=None))
    if not n:
        raise UserError(f"no pair is in the train split · {args.run} · more pairs, or another --split in 01")
    latents = select_latents(frequency_chosen, frequency_rejected, args.k)
    if not len(latents):
        raise UserError(f"no latent fires more often on one side than on the other · {args.sae} · "
                               "look at the health figures: python sae.py check")
    directions = sae.W_dec[latents].float()
    table = project(paths, directions)
    mean, std = standardisation((table["chosen"], table["rejected"]), table["split"] == TRAIN)
    figures = health(sae, train_sample(paths))
    save_stage(out, {"latents": latents, "directions": directions, "frequency_chosen": frequency_chosen,
                            "frequency_rejected": frequency_rejected, "mean": mean, "std": std, **table},
                      {**record, "k": len(latents) // 2, "health": figures, "warnings": warnings + warnings_of(sae, None, figures)})


def report(args, t, meta):
    """The table at the end."""
    k, figures = meta["k"], meta["health"]
    print(f"\ntrain pairs      {int((t['split'] == TRAIN).sum())}"
          f"\nlatents kept     {k} + {k}" + (f" (only so many separate; {args.k} asked)" if k < args.k else "") +
          f"\nSAE at the scored token: explained variance {figures['explained_variance']:.3f} · L0 {figures['l0']:.1f} · "
          f"latents that never fire here {figures['silent']:.1%}"
          "\n\n  latent   fires in chosen   in rejected")
    for j in [*t["latents"][:3].tolist(), *t["latents"][k:k + 3].tolist()]:
        print(f"{j:>8}   {t['frequency_chosen'][j]:>15.3f}   {t['frequency_rejected'][j]:>11.3f}")
    print(*(f"warning: {w}" for w in meta["warnings"]), f"\nwritten {args.run}/features.safetensors"
          f"\nnext: python 03_train_head.py --run {args.run}", sep="\n")


if __name__ == "__main__":
    run_main(main, SAEError)
