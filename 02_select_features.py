"""Stage 2: which latents tell chosen from rejected, and the alignment scores of their directions.

reads   activations/layer16-mean-*.safetensors      chosen, rejected [n, d] · split, group [n]
        an SAE of that layer
writes  features.safetensors
            latents [2K] int64              K of the chosen side, then K of the rejected side,
                                            each by falling separation
            directions [2K, d]              their decoder rows
            frequency_chosen, frequency_rejected [d_sae]
                                            share of train and dev responses a latent fires in
            mean, std [2K]                  of the scores on train and dev
            chosen, rejected [n, 2K]        alignment scores v_j = <z, d_j> of every pair
            fold [n] int8                   which fifth of train and dev a pair is in; -1: test
            pair, split, group, chosen_tokens, rejected_tokens      carried over
        for an honest search of K in stage 3, the same selection with each fifth left out:
            search_latents [5, 2K']         K' <= K: as many as separate in all five
            search_union [U]                all of these latents, sorted
            search_pair [m]                 the pairs that are searched on: all, 20,000 at most
            search_chosen, search_rejected [m, U]

    python 02_select_features.py --run runs/demo-safe --k 128 \
        --sae assets/sae-smollm2-135m-layer16.safetensors

The SAE only chooses the directions. What is projected on them is the raw hidden state z, not the
SAE's activation f (section 3.2 of the paper). Where fewer than K latents separate in the right
direction, fewer are kept; the paper does not say what it does then.
"""

import argparse
import importlib
import re
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
TEST = stage1.TEST
FOLDS = 5
FEWEST_GROUPS = 10          # with fewer prompts to train on nothing is searched
SEARCH_PAIRS = 20_000       # at most: a million pairs stay within memory


# ---------------------------------------------------------------- the activations of a run

def shard_files(run, layer=None, token=None):
    """The shards of one layer and token rule of a run → (sorted paths, their metadata)."""
    folder = Path(run) / "activations"
    layer, token = what_to_read(folder, run, layer, token)
    paths = sorted(folder.glob(f"layer{layer}-{token}-*.safetensors"))
    metas = [read_meta(path, "01_extract.py", "extract") for path in paths]
    count = int(re.search(r"-of-(\d+)", paths[0].name)[1])      # layer16-mean-00000-of-00001
    if len(paths) < count:
        raise UserError(f"only {len(paths)} of {count} shards are there · {folder} · "
                        "run 01_extract.py again")
    if len(paths) > count or any(meta != metas[0] for meta in metas):
        raise UserError(f"shards of different runs · {folder} · run 01_extract.py again")
    pairs = Path(run) / "pairs.jsonl"
    if not pairs.is_file():
        raise UserError(f"file not found · {pairs} · run 01_extract.py again")
    if file_hash(pairs) != metas[0]["parent"]["pairs"]:
        raise UserError("pairs.jsonl is not the file that the activations were made from · "
                        f"{run} · run 01_extract.py again")
    return paths, metas[0]


def what_to_read(folder, run, layer, token):
    """The layer and token rule asked for, or the only ones that were extracted."""
    there = set()
    for path in folder.glob("layer*-*-of-*.safetensors"):
        found = re.match(r"layer(\d+)-(\w+)-\d+-of-\d+", path.name)
        if found:
            there.add((int(found[1]), found[2]))
    if not there:
        raise UserError(f"no activations · {folder} · run 01_extract.py --run {run} first")
    layer = the_one("layer", layer, {of_layer for of_layer, _ in there}, folder)
    token = the_one("token", token, {rule for of_layer, rule in there if of_layer == layer}, folder)
    return layer, token


def the_one(what, asked, there, folder):
    """The value asked for, or the only one there is."""
    names = ", ".join(str(value) for value in sorted(there))
    if asked is None and len(there) > 1:
        raise UserError(f"several values of --{what}: {names} · {folder} · pass --{what}")
    if asked is not None and asked not in there:
        raise UserError(f"--{what} {asked} was not extracted, only {names} · {folder} · "
                        f"run 01_extract.py --{what} {asked}")
    return next(iter(there)) if asked is None else asked


def folder_of(run, name=None):
    """Where stages 2 to 4 write: the run's folder, or with --name one in it."""
    return Path(run) / name if name else Path(run)


def features_path(run, name=None):
    """features.safetensors of --name, where it has its own, else of the run."""
    own = folder_of(run, name) / "features.safetensors"
    return own if own.exists() else Path(run) / "features.safetensors"


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


# ---------------------------------------------------------------- folds

def folds_of(group, usable, folds=FOLDS):
    """Groups [n], usable bool [n] → int8 [n]: groups in the order of their hash, dealt in turn.

    -1 where not usable. Pairs of one prompt are always in one fold; a group's number is a hash.
    """
    different = torch.unique(group[usable])                     # sorted
    place = torch.searchsorted(different, group)
    return torch.where(usable, place % folds, -1).to(torch.int8)


# ---------------------------------------------------------------- which latents matter

def firing_counts(sae, chunks, fold):
    """In how many responses of each fold does each latent fire → [folds, 2, d_sae] int64.

    chunks: of all pairs, in order; fold [n] of all pairs, -1: not counted.
    """
    folds = max(FOLDS, int(fold.max()) + 1)
    counts = torch.zeros(folds, 2, sae.d_sae, dtype=torch.int64)
    at_a_time = max(1, 2**26 // sae.d_sae)                      # at most 256 MB of latents
    start = 0
    for chunk in chunks:
        fold_of_pair = fold[start:start + len(chunk["chosen"])]
        start += len(fold_of_pair)
        for number in range(folds):
            for side, name in enumerate(("chosen", "rejected")):
                for z in chunk[name][fold_of_pair == number].split(at_a_time):
                    counts[number, side] += (sae.encode(z) > 0).sum(0)
    return counts


def frequencies(counts, fold, left_out=()):
    """Share of responses a latent fires in, some folds left out → (μ_c, μ_r) [d_sae]."""
    used = [number for number in range(len(counts)) if number not in left_out]
    pairs = sum(int((fold == number).sum()) for number in used)
    frequency_chosen, frequency_rejected = counts[used].sum(0) / max(1, pairs)
    return frequency_chosen.float(), frequency_rejected.float()


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

def normalise(z, how="none", eps=1e-6):
    """What is projected [n, d]: z itself, or with rms z / √(mean z² + eps), eps of the model's
    norm.

    With decoder rows of norm 1 a score then is a cosine, times √d.
    """
    if how == "none":
        return z
    return z / (z.float().square().mean(-1, keepdim=True) + eps).sqrt()


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


def project(chunks, n, directions, record):
    """n pairs, a chunk at a time → chosen, rejected, [n, m] each."""
    scores = {side: torch.empty(n, len(directions)) for side in ("chosen", "rejected")}
    start = 0
    for chunk in chunks:
        stop = start + len(chunk["chosen"])
        for side in scores:
            z = normalise(chunk[side].float(), record["normalise"], record["norm_eps"])
            scores[side][start:stop] = alignment_scores(z, directions)
        start = stop
    return scores["chosen"], scores["rejected"]


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
                        f"{meta['layer']} · {path} · pass an SAE of layer {meta['layer']}, or run "
                        f"01_extract.py --layer {layer}")

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


def health_sample(paths, limit=4096):
    """Up to `limit` hidden states of train and dev responses [n, d], for the health figures."""
    samples = []
    found = 0
    for chunk in read_chunks(paths):
        usable = chunk["split"] != TEST
        samples.append(torch.cat([chunk["chosen"][usable], chunk["rejected"][usable]]).float())
        found += len(samples[-1])
        if found >= limit:
            break
    return torch.cat(samples)[:limit]


# ---------------------------------------------------------------- the stage

def parse_args():
    """The flags, checked as far as that needs no file."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", required=True,
                   help="folder of the run")
    p.add_argument("--name",
                   help="keep these features beside others, in RUN/NAME/")
    p.add_argument("--sae", required=True,
                   help="SAE file, folder or hub:REPO[:SUBFOLDER]")
    p.add_argument("--layer", type=int,
                   help="which extracted layer (default: the only one)")
    p.add_argument("--token", choices=stage1.RULES,
                   help="which extracted token rule (default: the only one)")
    p.add_argument("--k", type=int, default=128,
                   help="latents a side (default 128, as in the paper)")
    p.add_argument("--normalise", choices=("none", "rms"), default="none",
                   help="z before the projection: as it is, or divided by its root mean "
                        "square (default none)")
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
    paths, meta = shard_files(args.run, args.layer, args.token)
    sae = open_sae(args.sae, args.sae_dtype, args.k_sae)
    first_pair = next(read_chunks(paths, rows=1))
    warnings = check_belongs(sae, meta, first_pair["chosen"].shape[1], args.sae)

    parent = {"activations": [file_hash(path) for path in paths],
              "sae": file_hash(sae.info["weights"]),
              "pairs": meta["parent"]["pairs"]}
    record = {**meta, "stage": "select", "k_asked": args.k, "sae": args.sae,
              "sae_dtype": args.sae_dtype, "k_sae": args.k_sae, "normalise": args.normalise,
              "parent": parent}
    out = folder_of(args.run, args.name) / "features.safetensors"
    if not up_to_date(out, record):
        if out.exists():
            print(f"note: {out} is replaced")
        select(args, paths, sae, record, warnings, out)
    report(args, out, *load_stage(out))


def select(args, paths, sae, record, warnings, out):
    """Two passes over the shards, firing and projection → features.safetensors."""
    columns = list(read_chunks(paths, names=CARRIED))
    table = {name: torch.cat([chunk[name] for chunk in columns]) for name in CARRIED}
    usable = table["split"] != TEST
    if not usable.any():
        raise UserError(f"no pair is in the train split · {args.run} · "
                        "more pairs, or another --split in 01")
    fold = folds_of(table["group"], usable)
    counts = firing_counts(sae, tqdm(read_chunks(paths), desc="select", unit="chunk", disable=None),
                           fold)
    frequency_chosen, frequency_rejected = frequencies(counts, fold)
    latents = select_latents(frequency_chosen, frequency_rejected, args.k)
    if not len(latents):
        raise UserError(f"no latent fires more often on one side than on the other · {args.sae} · "
                        "look at the health figures: python -m tools.check_sae")
    directions = sae.W_dec[latents].float()
    chosen, rejected = project(read_chunks(paths), len(fold), directions, record)
    mean, std = standardisation((chosen, rejected), usable)

    search, search_k = search_tensors(paths, sae, counts, fold, table["group"], args.k, record)
    figures = health(sae, health_sample(paths))
    tensors = {"latents": latents, "directions": directions, "mean": mean, "std": std,
               "frequency_chosen": frequency_chosen, "frequency_rejected": frequency_rejected,
               "chosen": chosen, "rejected": rejected, "fold": fold, **table, **search}
    save_stage(out, tensors, {**record, "k": len(latents) // 2, "search_k": search_k,
                              "health": figures,
                              "warnings": warnings + warnings_of(sae, None, figures)})


def search_tensors(paths, sae, counts, fold, group, k, record):
    """The selection with each fold left out → ({search_latents, …}, K'). Empty with few prompts."""
    if len(torch.unique(group[fold >= 0])) < FEWEST_GROUPS:
        return {}, 0
    selected = [select_latents(*frequencies(counts, fold, left_out=[number]), k)
                for number in range(FOLDS)]
    k = min(len(latents) // 2 for latents in selected)
    if not k:
        return {}, 0
    both_sides = [torch.cat([latents[:k], latents[len(latents) // 2:][:k]]) for latents in selected]
    search_latents = torch.stack(both_sides)                    # [FOLDS, 2K']
    union = torch.unique(search_latents)

    pairs = (fold >= 0).nonzero().flatten()
    pairs = pairs[group[pairs].argsort(stable=True)][:SEARCH_PAIRS].sort().values       # by hash
    directions = sae.W_dec[union].float()
    chosen, rejected = project(chosen_rows(paths, pairs), len(pairs), directions, record)
    return {"search_latents": search_latents, "search_union": union, "search_pair": pairs,
            "search_chosen": chosen, "search_rejected": rejected}, k


def chosen_rows(paths, pairs):
    """Yield the chunks with only the pairs of these numbers (sorted)."""
    start = 0
    for chunk in read_chunks(paths):
        stop = start + len(chunk["pair"])
        rows = pairs[(pairs >= start) & (pairs < stop)] - start
        yield {side: chunk[side][rows] for side in ("chosen", "rejected")}
        start = stop


def report(args, out, t, meta):
    """The table at the end."""
    k = meta["k"]
    figures = meta["health"]
    fewer = f" (only so many separate; {args.k} asked)" if k < args.k else ""
    print()
    print(f"pairs            {int((t['fold'] >= 0).sum())} to train on, "
          f"{int((t['fold'] < 0).sum())} of test")
    print(f"latents kept     {k} + {k}{fewer}")
    print(f"SAE at what rule {meta['token']} reads: explained variance "
          f"{figures['explained_variance']:.3f} · "
          f"L0 {figures['l0']:.1f} · latents that never fire here {figures['silent']:.1%}")
    print("\n  latent   fires in chosen   in rejected")
    for latent in [*t["latents"][:3].tolist(), *t["latents"][k:k + 3].tolist()]:
        in_chosen = float(t["frequency_chosen"][latent])
        in_rejected = float(t["frequency_rejected"][latent])
        print(f"{latent:>8}   {in_chosen:>15.3f}   {in_rejected:>11.3f}")
    for warning in meta["warnings"]:
        print(f"warning: {warning}")
    name = f" --name {args.name}" if args.name else ""
    print(f"\nwritten {out}")
    print(f"next: python 03_train_head.py --run {args.run}{name}")


if __name__ == "__main__":
    run_main(main, SAEError)
