"""What scoring n candidates costs: read off the sampling, or in a pass of its own, packed or
padded.

    python benchmarks/best_of_n.py --reward runs/demo/reward_head.safetensors \\
        --prompts data/prompts.jsonl --limit 50 --n 16

Every prompt is sampled once and its candidates are scored three ways, one after the other, so that
all three see the same texts and the same machine. Prints the shares of the sampling time, the
largest difference, and why candidates had to be scored anew.
"""

import collections
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from benchmarks.common import ROOT, stage3, stage5
from parts.files import run_main
from parts.rows import read_prompts
from parts.sampled import score_sampled


def score_padded(reward, prompt, texts):
    """What most people write: one padded batch a prompt, all blocks and the output matrix,
    hidden_states → rewards."""
    backbone = reward.backbone
    rendered = [reward.render(prompt, text) for text in texts]
    ids, mask = common.padded(rendered)
    ids, mask = ids.to(backbone.device), mask.to(backbone.device)
    with torch.inference_mode():
        states = backbone.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    hidden = states.hidden_states[reward.meta["layer"] + 1]
    places = [reward.token_range(text)[0] for text in rendered]
    return reward.reward_of(hidden[range(len(texts)), places].float().cpu()).tolist()


def measure(reward, prompts, n, max_new_tokens):
    """→ (seconds of each prompt and way, scores of each way, Counter of reasons against reading
    off). The first prompt comes twice: it warms up."""
    seconds = collections.defaultdict(list)
    scores = collections.defaultdict(list)
    reasons = collections.Counter()

    def timed(name, call, *inputs, **settings):
        result, taken = common.timed(call, *inputs, **settings)
        seconds[name].append(taken)
        return result

    for prompt in [prompts[0], *prompts]:
        texts, state = timed("sampling", stage5.sample_candidates, reward.backbone, prompt, n,
                             max_new_tokens=max_new_tokens)
        read, why = timed("off the sampling", score_sampled, reward, prompt, texts, state)
        scores["off the sampling"] += read
        reasons += why
        scores["packed"] += timed("packed", reward.score, [prompt] * n, texts)
        scores["padded"] += timed("padded", score_padded, reward, prompt, texts)
    return seconds, scores, reasons


def figures(args, prompts, seconds, scores, reasons):
    """What was measured → the figures of the results file."""
    total = {name: sum(times[1:]) for name, times in seconds.items()}       # without the warm-up
    own = np.array(scores["packed"])
    off = {name: np.abs(np.array(values) - own).max() for name, values in scores.items()}
    return {
        "prompts": len(prompts),
        "n": args.n,
        "max_new_tokens": args.max_new_tokens,
        "seconds": total,
        "share_of_sampling": {name: total[name] / total["sampling"] for name in scores},
        "difference_in_std": {name: float(value / own.std()) for name, value in off.items()},
        "scored_anew": reasons.total() / (args.n * (len(prompts) + 1)),
        "reasons": dict(reasons),
    }


def show(found):
    """The lines to print."""
    print(f"{found['prompts']} prompts × {found['n']} candidates of at most "
          f"{found['max_new_tokens']} tokens: sampling {found['seconds']['sampling']:.1f} s")
    for name, share in found["share_of_sampling"].items():
        print(f"  {name:<17} {share:>6.1%} of the sampling time   largest difference "
              f"{found['difference_in_std'][name]:.1e} of the scores' std")
    print(f"  scored anew       {found['scored_anew']:.1%}: {found['reasons'] or 'none'}")


def main():
    """The command."""
    p = common.command_line(__doc__)
    p.add_argument("--reward", default="runs/demo/reward_head.safetensors")
    p.add_argument("--prompts", default=str(ROOT / "data/prompts.jsonl"))
    p.add_argument("--limit", type=int, default=50)
    p.add_argument("--n", type=int, default=16)
    p.add_argument("--max-new-tokens", type=int, default=48)
    p.add_argument("--write", action="store_true", help="into benchmarks/results/best_of_n.json")
    args = p.parse_args()
    reward = stage3.RewardModel.load(args.reward)
    prompts = read_prompts(args.prompts)[:args.limit]
    measured = measure(reward, prompts, args.n, args.max_new_tokens)
    found = figures(args, prompts, *measured)
    show(found)
    if args.write:
        common.write_result("best_of_n", found)


if __name__ == "__main__":
    run_main(main)
