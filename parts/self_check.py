"""Does the finished reward model do what it promises, on its own texts? `python 03_train_head.py --run DIR --check`."""

import importlib
import json
from pathlib import Path

import torch

from parts.chat import control_tokens, render
from parts.files import UserError, file_hash, load_stage

stage3 = importlib.import_module("03_train_head")


def self_check(run):
    """Does the finished reward model do what it promises, on its own texts? → list of (what, holds, figure)."""
    run = Path(run)
    t, meta = load_stage(run / "features.safetensors", "02_select_features.py")
    reward = stage3.RewardModel.load(run / "reward_head.safetensors")
    backbone, tokenizer = reward.backbone, reward.backbone.tokenizer
    for file, found, wanted, stage in (("pairs.jsonl", run / "pairs.jsonl", meta["parent"]["pairs"], "02_select_features.py"), (
            "features.safetensors", run / "features.safetensors", reward.meta["parent"]["features"], "03_train_head.py")):
        if file_hash(found) != wanted:          # the rest would compare what does not belong together
            return [("files belong together", False, f"{file} has changed since {stage} read it: run the stages again, in order")]
    pairs = [json.loads(line) for line in (run / "pairs.jsonl").open(encoding="utf-8")]
    rows = (t["split"] == stage3.TRAIN).nonzero().flatten()[::max(1, int((t["split"] == stage3.TRAIN).sum()) // 16)].tolist()
    texts = [(pairs[i]["prompt"], pairs[i][side]) for i in rows for side in ("chosen", "rejected")]
    scores = lambda some, model=reward: torch.tensor(model.score(*zip(*some)))
    together, backward = scores(texts), scores(texts[::-1]).flip(0)
    alone = torch.cat([scores([text]) for text in texts])
    packing, backbone.pack = backbone.pack, "pad"
    padded = scores(texts)
    backbone.pack = packing
    reloaded = scores(texts, stage3.RewardModel.load(run / "reward_head.safetensors", model=backbone))
    swapped = max(abs(reward.prefer(p, a, b) + reward.prefer(p, b, a) - 1) for (p, a), (_, b) in zip(texts[::2], texts[1::2]))
    stored = {side: torch.stack([t[side][i] for i in rows]) for side in ("chosen", "rejected")}
    place = {int(j): n for n, j in enumerate(t["latents"])}
    if not {int(j) for j in reward.tensors["latents"]} <= set(place):
        raise UserError(f"the head's latents are not among those of features.safetensors · {run} · run 03_train_head.py again")
    columns = [place[int(j)] for j in reward.tensors["latents"]]
    stored = torch.stack([stage3.apply_head(reward.head, (stored[s][:, columns] - reward.mean) / reward.std) for s in stored], 1).flatten()
    spread = float(together.std()) or 1.0
    limit = 1e-3 if backbone.model.dtype == torch.float32 else 0.1
    gap = lambda a, b: float((a - b).abs().max()) / spread
    rendered = [render(tokenizer, p, r, meta["max_length"]) for p, r in texts]
    bos = tokenizer.bos_token_id
    doubled = sum(x.ids[:2] == [bos, bos] for x in rendered) if bos is not None else 0
    ends = sum(x.ids[x.eot] in control_tokens(tokenizer)[1] for x in rendered)
    return [("no second BOS", doubled == 0, f"{doubled} of {len(rendered)} texts"),
            ("an end-of-turn token closes the answer", ends == len(rendered), f"{ends} of {len(rendered)} texts"),
            *((what, gap(other, together) <= limit, f"{gap(other, together):.1e} of the scores' std") for what, other in (
                ("one by one as together", alone), ("backwards as forwards", backward), (f"padded as packed ({packing})", padded),
                ("read again from disk", reloaded), ("new scores as those of stages 1 and 2", stored))),
            ("prefer(a, b) + prefer(b, a) = 1", swapped <= limit, f"off by {swapped:.1e} at most"),
            ("files belong together", True, "features, pairs")]
