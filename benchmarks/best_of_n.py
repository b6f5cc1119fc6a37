"""What n candidates cost: sampled with several prompts a pass, with one, or by transformers'
`generate`; and scored off the sampling, or in a pass of their own, packed or padded.

    python benchmarks/best_of_n.py --reward runs/demo-safe/reward_head.safetensors \\
        --prompts data/prompts.jsonl --limit 40 --n 16

All ways take turns on the same prompts, so that all see the same machine: --batch-rows answers at
once are sampled in three ways, then those of the first way are scored in three ways.

    several prompts     stage 5: as many prompts a pass as --batch-rows has room for
    one prompt          stage 5, one prompt a pass
    generate            transformers, prompts padded on the left, as many rows as the first way

    off the sampling    what stage 5 does
    packed              RewardModel.score, in a pass of its own
    padded              one padded batch a prompt, all blocks and the output matrix

Prints tokens a second of the sampling (an answer's end counts as one), what scoring takes of the
first way's time, the largest difference, and why candidates had to be scored anew.
"""

import collections
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from benchmarks.common import ROOT, stage3, stage5
from parts.candidates import read_prompts
from parts.chat import prompt_ids
from parts.files import run_main
from parts.sampled import score_sampled

SEVERAL, ONE, GENERATE = "several prompts", "one prompt", "generate"


# ---------------------------------------------------------------- sampling

def sample(backbone, prompts, args, layer):
    """Stage 5, all of these prompts in one pass → (texts, Sampled)."""
    return stage5.sample_candidates(backbone, prompts, args.n, max_new_tokens=args.max_new_tokens,
                                    layer=layer)


def sample_one_by_one(backbone, prompts, args, layer):
    """Stage 5, one prompt a pass → list of Sampled."""
    return [sample(backbone, [prompt], args, layer)[1] for prompt in prompts]


def generate(backbone, prompts, args):
    """transformers, with the settings of stage 5 → token ids of the answers [rows, T]."""
    sequences = [prompt_ids(backbone.tokenizer, prompt) for prompt in prompts]
    longest = max(len(ids) for ids in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, sequence in enumerate(sequences):
        ids[n, longest - len(sequence):] = torch.tensor(sequence)
        mask[n, longest - len(sequence):] = 1
    ends = sorted(stage5.stop_ids(backbone))
    torch.manual_seed(0)
    with torch.inference_mode():
        output = backbone.model.generate(
            ids.to(backbone.device), attention_mask=mask.to(backbone.device), do_sample=True,
            temperature=1.0, top_p=0.95, top_k=0, num_return_sequences=args.n,
            max_new_tokens=args.max_new_tokens, eos_token_id=ends, pad_token_id=ends[0])
    return output[:, longest:]


def tokens_sampled(sampled):
    """Tokens that were drawn, an answer's end included."""
    return sum(map(len, sampled.rows)) + sum(sampled.ended)


def tokens_generated(output, ends):
    """The same of generate()'s output [rows, T]."""
    count = 0
    for row in output.tolist():
        answer = stage5.until_end(row, ends)
        count += len(answer) + (len(answer) < len(row))
    return count


# ---------------------------------------------------------------- scoring

def score_padded(reward, prompts, texts, n):
    """What most people write: one padded batch a prompt, all blocks and the output matrix,
    hidden_states → rewards."""
    backbone = reward.backbone
    rendered = [reward.render(prompt, text) for prompt, text in zip(prompts, texts)]
    vectors = []
    for start in range(0, len(rendered), n):
        batch = rendered[start:start + n]
        ids, mask = common.padded(batch)
        ids, mask = ids.to(backbone.device), mask.to(backbone.device)
        with torch.inference_mode():
            states = backbone.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        hidden = states.hidden_states[reward.meta["layer"] + 1]
        for row, text in zip(hidden, batch):
            first, last = reward.token_range(text)
            vectors.append(row[first:last].float().mean(0).cpu())
    return reward.reward_of(reward.normalise(torch.stack(vectors))).tolist()


# ---------------------------------------------------------------- measuring

class Measured:
    """Seconds and tokens of each way, scores, and reasons against reading off."""

    def __init__(self):
        self.seconds = collections.Counter()
        self.tokens = collections.Counter()
        self.scores = collections.defaultdict(list)
        self.reasons = collections.Counter()

    def timed(self, name, call, *inputs, **settings):
        """Call a function and add up the seconds under a name → its result."""
        result, taken = common.timed(call, *inputs, **settings)
        self.seconds[name] += taken
        return result


def measure(reward, prompts, args):
    """All ways on all prompts → Measured. The first prompts come twice: they warm up."""
    groups = stage5.groups_of(prompts, max(1, args.batch_rows // args.n))
    measure_group(Measured(), reward, groups[0], args)
    found = Measured()
    for some in groups:
        measure_group(found, reward, some, args)
    return found


def measure_group(found, reward, prompts, args):
    """The prompts of one pass."""
    backbone = reward.backbone
    layer = reward.meta["layer"] if reward.meta["token"] == "mean" else None
    texts, sampled = found.timed(SEVERAL, sample, backbone, prompts, args, layer)
    found.tokens[SEVERAL] += tokens_sampled(sampled)

    prompt_of_row = [prompt for prompt in prompts for _ in range(args.n)]
    read, _, _, reasons = found.timed("off the sampling", score_sampled, reward, prompt_of_row,
                                      texts, sampled)
    spoken = [n for n, text in enumerate(texts) if text]            # an empty answer has no score
    prompt_of_row = [prompt_of_row[n] for n in spoken]
    texts = [texts[n] for n in spoken]
    found.scores["off the sampling"] += [read[n] for n in spoken]
    found.reasons += reasons
    found.scores["packed"] += found.timed("packed", reward.score, prompt_of_row, texts)
    found.scores["padded"] += found.timed("padded", score_padded, reward, prompt_of_row, texts,
                                          args.n)
    one_by_one = found.timed(ONE, sample_one_by_one, backbone, prompts, args, layer)
    found.tokens[ONE] += sum(tokens_sampled(of_prompt) for of_prompt in one_by_one)
    output = found.timed(GENERATE, generate, backbone, prompts, args)
    found.tokens[GENERATE] += tokens_generated(output, stage5.stop_ids(backbone))


def figures(args, prompts, found):
    """What was measured → the figures of the results file."""
    own = np.array(found.scores["packed"])
    spread = own.std()
    seconds = found.seconds
    speeds = {}
    for way, tokens in found.tokens.items():
        speeds[way] = tokens / seconds[way]
    shares = {}
    differences = {}
    for way, scores in found.scores.items():
        shares[way] = seconds[way] / seconds[SEVERAL]
        differences[way] = float(np.abs(np.array(scores) - own).max() / spread)
    return {
        "prompts": len(prompts),
        "n": args.n,
        "batch_rows": args.batch_rows,
        "max_new_tokens": args.max_new_tokens,
        "threads": torch.get_num_threads(),
        "seconds": dict(seconds),
        "tokens": dict(found.tokens),
        "tokens_a_second": speeds,
        "share_of_sampling": shares,
        "difference_in_std": differences,
        "scored_anew": found.reasons.total() / len(own),
        "reasons": dict(found.reasons),
    }


def show(found):
    """The lines to print."""
    print(f"{found['prompts']} prompts × {found['n']} candidates of at most "
          f"{found['max_new_tokens']} tokens, {found['batch_rows']} rows at once")
    slowest = found["tokens_a_second"][ONE]
    for name, speed in found["tokens_a_second"].items():
        print(f"  {name:<17} {speed:>7,.0f} tokens/s   {speed / slowest:.2f} × one prompt a pass")
    for name, share in found["share_of_sampling"].items():
        print(f"  {name:<17} {share:>6.1%} of the sampling time   largest difference "
              f"{found['difference_in_std'][name]:.1e} of the scores' std")
    print(f"  scored anew       {found['scored_anew']:.1%}: {found['reasons'] or 'none'}")


def claim(found):
    """The same in a few sentences → markdown."""
    speeds, shares = found["tokens_a_second"], found["share_of_sampling"]
    furthest = max(found["difference_in_std"].values())
    return (f"{found['prompts']} prompts, {found['n']} candidates of at most "
            f"{found['max_new_tokens']} tokens, {found['batch_rows']} rows at once, "
            f"{found['threads']} threads: {speeds[SEVERAL]:.0f} tokens/s, "
            f"{speeds[SEVERAL] / speeds[ONE]:.2f} × one prompt a pass, "
            f"{speeds[SEVERAL] / speeds[GENERATE]:.2f} × transformers' `generate` "
            f"({speeds[GENERATE]:.0f} tokens/s). Reading the reward off takes "
            f"{shares['off the sampling']:.1%} of the sampling time; our packed pass "
            f"{shares['packed']:.1%}, a padded pass of the whole model {shares['padded']:.1%}; "
            f"{found['scored_anew']:.1%} of the candidates had to be scored anew (their text "
            f"tokenises differently); largest difference {furthest:.1e} of the scores' std.\n")


def main():
    """The command."""
    p = common.command_line(__doc__)
    p.add_argument("--reward", required=True, help="reward_head.safetensors of stage 3")
    p.add_argument("--prompts", default=str(ROOT / "data/prompts.jsonl"))
    p.add_argument("--limit", type=int, default=40)
    p.add_argument("--n", type=int, default=16)
    p.add_argument("--batch-rows", type=int, default=64, help="answers sampled at once")
    p.add_argument("--max-new-tokens", type=int, default=48)
    p.add_argument("--write", action="store_true", help="into benchmarks/results/best_of_n.json")
    args = p.parse_args()
    reward = stage3.RewardModel.load(args.reward)
    prompts, _ = read_prompts(args.prompts)
    prompts = prompts[:args.limit]
    found = figures(args, prompts, measure(reward, prompts, args))
    show(found)
    if args.write:
        common.write_result("best_of_n", found)


if __name__ == "__main__":
    run_main(main)
