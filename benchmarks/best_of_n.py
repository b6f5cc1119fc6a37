"""What scoring n candidates costs: read off the sampling, against a pass of its own, packed or padded.

    python benchmarks/best_of_n.py --reward runs/demo/reward_head.safetensors --prompts data/prompts.jsonl --limit 50 --n 16

Every prompt is sampled once and its candidates are scored three ways, one after the other, so that all three see the same texts
and the same machine. Prints the shares of the sampling time, the largest difference, and why candidates had to be scored anew.
"""

import argparse
import collections
import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
files = importlib.import_module("parts.files")
stage1, stage3, stage5 = (importlib.import_module(n) for n in ("01_extract", "03_train_head", "05_best_of_n"))


def padded(reward, prompt, texts):
    """What most people write: one padded batch a prompt, all blocks and the output matrix, hidden_states → rewards."""
    rendered, backbone = [reward.render(prompt, text) for text in texts], reward.backbone
    ids = torch.zeros(len(texts), max(len(t.ids) for t in rendered), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, text in enumerate(rendered):
        ids[n, :len(text.ids)], mask[n, :len(text.ids)] = torch.tensor(text.ids), 1
    with torch.inference_mode():
        states = backbone.model(input_ids=ids.to(backbone.device), attention_mask=mask.to(backbone.device), output_hidden_states=True)
    hidden = states.hidden_states[reward.meta["layer"] + 1]
    places = [text.span(reward.meta["token"])[0] for text in rendered]
    return reward.reward_of(hidden[range(len(texts)), places].float().cpu()).tolist()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--reward", default="runs/demo/reward_head.safetensors")
    p.add_argument("--prompts", default=str(ROOT / "data/prompts.jsonl"))
    p.add_argument("--limit", type=int, default=50)
    p.add_argument("--n", type=int, default=16)
    p.add_argument("--max-new-tokens", type=int, default=48)
    p.add_argument("--write", action="store_true", help="into benchmarks/results/best_of_n.json")
    args = p.parse_args()
    reward = stage3.RewardModel.load(args.reward)
    prompts, seconds = stage5.read_prompts(args.prompts)[:args.limit], collections.defaultdict(list)
    scores, reasons = collections.defaultdict(list), collections.Counter()

    def timed(name, call, *inputs, **settings):
        started = time.perf_counter()
        result = call(*inputs, **settings)
        seconds[name].append(time.perf_counter() - started)
        return result
    for prompt in [prompts[0], *prompts]:               # the first one warms up and is not counted
        texts, state = timed("sampling", stage5.sample_candidates, reward.backbone, prompt, args.n, max_new_tokens=args.max_new_tokens)
        read, why = timed("off the sampling", stage5.score_sampled, reward, prompt, texts, state)
        scores["off the sampling"] += read
        reasons += why
        scores["packed"] += timed("packed", reward.score, [prompt] * args.n, texts)
        scores["padded"] += timed("padded", padded, reward, prompt, texts)
    total = {name: sum(times[1:]) for name, times in seconds.items()}
    own = np.array(scores["packed"])
    found = {"prompts": len(prompts), "n": args.n, "max_new_tokens": args.max_new_tokens, "seconds": total,
             "share_of_sampling": {name: total[name] / total["sampling"] for name in scores},
             "difference_in_std": {name: float(np.abs(np.array(s) - own).max() / own.std()) for name, s in scores.items()},
             "scored_anew": reasons.total() / (args.n * (len(prompts) + 1)), "reasons": dict(reasons)}
    print(f"{len(prompts)} prompts × {args.n} candidates of at most {args.max_new_tokens} tokens: sampling {total['sampling']:.1f} s")
    for name in scores:
        print(f"  {name:<17} {found['share_of_sampling'][name]:>6.1%} of the sampling time   largest difference "
              f"{found['difference_in_std'][name]:.1e} of the scores' std")
    print(f"  scored anew       {found['scored_anew']:.1%}: {dict(reasons) or 'none'}")
    if args.write:
        files.write_text(ROOT / "benchmarks/results/best_of_n.json", json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    stage1.run_main(main)
