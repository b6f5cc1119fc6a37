"""Does the finished reward model do what it promises, on its own texts?

    python -m tools.self_check --run runs/demo

Exit code 1 where one check fails.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

from parts.chat import control_tokens
from parts.files import UserError, file_hash, load_stage, read_json_rows, run_main

stage2 = importlib.import_module("02_select_features")
stage3 = importlib.import_module("03_train_head")
TEXTS = 16          # train pairs that are looked at, about


def self_check(run, name=None):
    """→ list of (what, does it hold, figure)."""
    run = Path(run)
    features_path = stage2.features_path(run, name)
    head_path = stage2.folder_of(run, name) / "reward_head.safetensors"
    features, meta = load_stage(features_path, "02_select_features.py", "select")
    reward = stage3.RewardModel.load(head_path)
    stale = stale_file(run, features_path, meta, reward)
    if stale:  # the rest would compare what does not belong together
        return [("files belong together", False, stale)]

    pairs = read_json_rows(run / "pairs.jsonl")
    train_rows = (features["fold"] >= 0).nonzero().flatten()
    rows = train_rows[::max(1, len(train_rows) // TEXTS)].tolist()
    texts = []                                  # chosen, rejected, chosen …
    for row in rows:
        texts += [(pairs[row]["prompt"], pairs[row][side]) for side in ("chosen", "rejected")]
    return [
        *check_rendering(reward, texts),
        *check_scores(reward, texts, stored_rewards(reward, features, rows, run), head_path),
        check_preference(reward, texts),
        ("files belong together", True, "features, pairs"),
    ]


def stale_file(run, features_path, meta, reward):
    """Which file has changed since a later stage read it → str, or None."""
    recorded = {
        run / "pairs.jsonl": (meta["parent"]["pairs"], "02_select_features.py"),
        features_path: (reward.meta["parent"]["features"], "03_train_head.py"),
    }
    for path, (wanted, stage) in recorded.items():
        if file_hash(path) != wanted:
            return f"{path.name} has changed since {stage} read it: run the stages again, in order"
    return None


def check_rendering(reward, texts):
    """One BOS at most, and an end-of-turn mark behind the answer."""
    tokenizer = reward.backbone.tokenizer
    rendered = [reward.render(prompt, response) for prompt, response in texts]
    bos = tokenizer.bos_token_id
    doubled = sum(bos is not None and text.ids[:2] == [bos, bos] for text in rendered)
    _, control_ids = control_tokens(tokenizer)
    closed = sum(text.ids[text.eot] in control_ids for text in rendered)
    count = len(rendered)
    return [
        ("no second BOS", doubled == 0, f"{doubled} of {count} texts"),
        ("an end-of-turn token closes the answer", closed == count, f"{closed} of {count} texts"),
    ]


def check_scores(reward, texts, stored, head_path):
    """The same text has the same score, however it is read."""
    backbone = reward.backbone
    together = score(reward, texts)
    packing = backbone.pack
    backbone.pack = "pad"
    padded = score(reward, texts)
    backbone.pack = packing
    again = stage3.RewardModel.load(head_path, model=backbone)
    others = {
        "one by one as together": torch.cat([score(reward, [text]) for text in texts]),
        "backwards as forwards": score(reward, texts[::-1]).flip(0),
        f"padded as packed ({packing})": padded,
        "read again from disk": score(again, texts),
        "new scores as those of stages 1 and 2": stored,
    }
    spread = float(together.std()) or 1.0
    limit = tolerance(backbone)
    found = []
    for what, other in others.items():
        gap = float((other - together).abs().max()) / spread
        found.append((what, gap <= limit, f"{gap:.1e} of the scores' std"))
    return found


def score(reward, texts):
    """[(prompt, response)] → rewards [n]."""
    prompts, responses = zip(*texts)
    return torch.tensor(reward.score(prompts, responses))


def tolerance(backbone):
    """How far two scores of one text may be apart, in stds of the scores."""
    return 1e-3 if backbone.model.dtype == torch.float32 else 0.1


def stored_rewards(reward, features, rows, run):
    """Rewards from the alignment scores that stage 2 stored: chosen, rejected, chosen …, [2n]."""
    latents = features["latents"].tolist()
    wanted = reward.tensors["latents"].tolist()
    if not set(wanted) <= set(latents):
        raise UserError(f"the head's latents are not among those of features.safetensors · {run} · "
                        "run 03_train_head.py again")
    columns = [latents.index(latent) for latent in wanted]
    sides = []
    for side in ("chosen", "rejected"):
        scores = features[side][rows][:, columns]
        sides.append(reward.head((scores - reward.mean) / reward.std))
    return torch.stack(sides, 1).flatten()


def check_preference(reward, texts):
    """The two probabilities of a pair add up to 1."""
    errors = []
    for (prompt, a), (_, b) in zip(texts[::2], texts[1::2]):
        errors.append(abs(reward.prefer(prompt, a, b) + reward.prefer(prompt, b, a) - 1))
    worst = max(errors)
    return ("prefer(a, b) + prefer(b, a) = 1", worst <= tolerance(reward.backbone),
            f"off by {worst:.1e} at most")


def main():
    """The checks from the command line."""
    p = argparse.ArgumentParser(prog="python -m tools.self_check", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", required=True, help="folder of the run")
    p.add_argument("--name", help="check the head in RUN/NAME/")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = p.parse_args()
    found = self_check(args.run, args.name)
    for what, holds, figure in found:
        print(f"{'✓' if holds else '✗'} {what:<42} {figure}")
    if not all(holds for _, holds, _ in found):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
