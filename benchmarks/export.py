"""What `05_best_of_n.py export` keeps, costs and gains: a head as a sequence classifier.

    python benchmarks/export.py --reward runs/demo-safe/export/reward_head.safetensors --write

exports the head in float32 and in bfloat16, and reads all texts of its run's pairs.jsonl with
RewardModel and, by transformers alone, with both folders: how far are the logits from reward - c,
in std of the rewards, and how many pairs are ordered otherwise? Then it times, in turn on the same
padded batches in file order, in float32, the cut classifier against the classifier with all blocks
of the same backbone. The latter is what TRL's RewardTrainer fine-tunes; it is left untrained here,
because training does not change its speed.
"""

import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from benchmarks.common import line, stage3
from parts.export import chat_text
from parts.files import read_json_rows, run_main
from parts.models import locate_model


def texts_of(tokenizer, rows):
    """Rows of pairs.jsonl → rendered texts: chosen, rejected, chosen …"""
    return [chat_text(tokenizer, row["prompt"], row[side]) for row in rows for side in common.SIDES]


def batches_of(tokenizer, texts, size):
    """Rendered texts → padded batches in their order."""
    return [tokenizer(texts[start:start + size], add_special_tokens=False, padding=True,
                      return_tensors="pt") for start in range(0, len(texts), size)]


def read(model, batches):
    """Logits of padded batches → [n] float32."""
    with torch.inference_mode():
        return torch.cat([model(**batch).logits[:, 0].float() for batch in batches])


def open_classifier(folder):
    """A folder → its sequence classifier."""
    from transformers import AutoModelForSequenceClassification
    return AutoModelForSequenceClassification.from_pretrained(folder)


def whole_classifier(folder, pad):
    """All blocks of a backbone with an untrained head, as TRL opens it for training."""
    from transformers import AutoModelForSequenceClassification
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1,
                                                               dtype=torch.float32).eval()
    model.config.pad_token_id = pad
    return model


def compare(found, wanted):
    """Logits and rewards - c, chosen, rejected, chosen … → how far apart they are."""
    apart = (found - wanted).abs() / wanted.std()
    order_found, order_wanted = [(x[0::2] > x[1::2]) for x in (found, wanted)]
    return {"texts": len(found), "largest_in_std": float(apart.max()),
            "mean_in_std": float(apart.mean()),
            "pairs_ordered_otherwise": int((order_found != order_wanted).sum())}


def time_in_turn(models, batches, rounds):
    """{name: model} → {name: seconds of each round}; all on the same batches, in turn."""
    seconds = {name: [] for name in models}
    for model in models.values():
        read(model, batches[:1])                    # to warm up
    for _ in range(rounds):
        for name, model in models.items():
            seconds[name].append(common.timed(read, model, batches)[1])
    return seconds


def measure(args):
    """→ the figures."""
    from transformers import AutoTokenizer
    reward = stage3.RewardModel.load(args.reward)
    run = next(folder for folder in Path(args.reward).parents if (folder / "pairs.jsonl").exists())
    rows = read_json_rows(run / "pairs.jsonl")
    prompts = [row["prompt"] for row in rows for _ in common.SIDES]
    answers = [row[side] for row in rows for side in common.SIDES]
    _, c = reward.vector()
    wanted = torch.tensor(reward.score(prompts, answers)) - c

    result = {"model": reward.meta["model"], "layer": reward.meta["layer"],
              "threads": torch.get_num_threads(), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as place:
        models = {}
        for dtype in ("float32", "bfloat16"):
            folder = Path(place) / dtype
            common.run_script("05_best_of_n.py", "export", "--reward", args.reward, "--out", folder,
                              "--dtype", dtype)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            models[dtype] = open_classifier(folder)
            texts = texts_of(tokenizer, rows)
            batches = batches_of(tokenizer, texts, args.batch)
            result[dtype] = compare(read(models[dtype], batches), wanted)
        result["timed"] = speed(args, reward, models["float32"], batches)
    return result


def speed(args, reward, cut, batches):
    """The cut classifier against the whole one → parameters, texts a second, ratio."""
    whole = whole_classifier(locate_model(reward.meta["model"]), cut.config.pad_token_id)
    batches = batches[:args.timed // args.batch]
    texts = sum(len(batch["input_ids"]) for batch in batches)
    seconds = time_in_turn({"cut": cut, "whole": whole}, batches, args.rounds)
    ratios = [slow / fast for slow, fast in zip(seconds["whole"], seconds["cut"])]
    parameters = {name: sum(parameter.numel() for parameter in model.parameters())
                  for name, model in {"cut": cut, "whole": whole}.items()}
    return {
        "texts": texts,
        "batch": args.batch,
        "parameters": parameters,
        "texts_a_second": {name: texts / statistics.median(found)
                           for name, found in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def table(found):
    """The figures → markdown."""
    timed = found["timed"]
    cut, whole = [timed["parameters"][name] for name in ("cut", "whole")]
    speeds = timed["texts_a_second"]
    text = "| | exported | all blocks, as TRL fine-tunes it |\n|---|---|---|\n"
    text += line("parameters", [f"{cut:,} ({cut / whole:.0%})", f"{whole:,}"])
    text += line(f"texts/s, {timed['texts']} texts in padded batches of {timed['batch']}",
                 [f"{speeds['cut']:.1f}", f"{speeds['whole']:.1f}"])
    text += line("times as fast, median of the rounds [least, most]",
                 [f"{timed['ratio']:.2f} [{min(timed['ratios']):.2f}, {max(timed['ratios']):.2f}]",
                  "1"])
    for dtype in ("float32", "bfloat16"):
        of = found[dtype]
        text += line(f"{dtype}: largest distance of the logit from reward − c, in std, on "
                     f"{of['texts']} texts", [f"{of['largest_in_std']:.1e}", "–"])
        text += line(f"{dtype}: pairs ordered otherwise, of {of['texts'] // 2}",
                     [str(of["pairs_ordered_otherwise"]), "–"])
    return text


def main():
    """The command."""
    p = common.command_line(__doc__)
    p.add_argument("--reward", required=True, help="a head that `export` takes, in its run")
    p.add_argument("--batch", type=int, default=16, help="texts a batch (default 16)")
    p.add_argument("--timed", type=int, default=320, help="texts to time (default 320)")
    p.add_argument("--rounds", type=int, default=3, help="(default 3)")
    p.add_argument("--write", action="store_true", help="into benchmarks/results/export.json")
    args = p.parse_args()
    found = measure(args)
    if args.write:
        common.write_result("export", found)
    print(table(found))


if __name__ == "__main__":
    run_main(main)
