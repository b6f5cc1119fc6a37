"""Multiple choice by reward: how often is the right candidate ranked first, against simpler ways to choose?

    python benchmarks/rank_answers.py --questions truthfulqa_mc.jsonl --reward runs/does-it-hold/TruthfulQA/reward_head.safetensors --write

reads   --questions    rows {prompt, candidates, labels}; only the questions whose hash puts them on the *test* side are used: a question
                       falls on the same side in every file, so the reward model has not seen them
writes  with --write   benchmarks/results/rank_answers.json

    sparserm          `05_best_of_n.py rank`
    log_likelihood    the backbone's own: mean log-probability of the answer's tokens (and `log_likelihood_sum`: their sum)
    longest           the most tokens; a tie counts its share
    random            one of them, in expectation

Intervals are bootstraps over questions; differences are paired.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
files = importlib.import_module("parts.files")
stage1, stage3, stage4 = (importlib.import_module(n) for n in ("01_extract", "03_train_head", "04_evaluate"))
log_likelihoods, cell = importlib.import_module("likelihood").log_likelihoods, importlib.import_module("does_it_hold").interval


def ranked(questions, args):
    """Scores of `05_best_of_n.py rank`, as a user would get them → list of lists."""
    with tempfile.TemporaryDirectory() as folder:
        files.write_rows(f"{folder}/questions.jsonl", questions)
        command = ["rank", "--candidates", f"{folder}/questions.jsonl", "--reward", args.reward, "--out", f"{folder}/ranked.jsonl"]
        subprocess.run([sys.executable, ROOT / "05_best_of_n.py", *command], check=True, stdout=subprocess.DEVNULL)
        return [json.loads(line)["scores"] for line in open(f"{folder}/ranked.jsonl", encoding="utf-8")]


def label_of_best(scores, labels):
    """The mean label of the candidates that share the highest score."""
    scores = np.array(scores)
    return float(np.array(labels)[scores == scores.max()].mean())


def table(found):
    """The figures → markdown."""
    rows = [(name, row) for name, row in found.items() if isinstance(row, dict)]
    return "| ranked by | right answer first | SparseRM minus it |\n|---|---|---|\n" + "".join(
        f"| {name.replace('_', ' ')} | {cell(row, 'mean')} | {'–' if name == 'sparserm' else cell(row['behind'], 'mean', '+')} |\n"
        for name, row in sorted(rows, key=lambda r: -r[1]["mean"]))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--questions", required=True)
    p.add_argument("--reward", default="runs/demo/reward_head.safetensors")
    p.add_argument("--write", action="store_true", help="into benchmarks/results/rank_answers.json")
    args = p.parse_args()
    seed = int(files.read_meta(args.reward, "03_train_head.py")["seed"])
    questions = [row for _, row in stage1.read_rows(args.questions) if stage1.split_of(row["prompt"], seed) == "test"]
    backbone = stage3.RewardModel.load(args.reward).backbone
    flat = [(q["prompt"], c) for q in questions for c in q["candidates"]]
    sums, counts = log_likelihoods(backbone, *zip(*flat))
    ends = np.cumsum([len(q["candidates"]) for q in questions])[:-1]
    split = lambda values: np.split(values, ends)
    ways = {"sparserm": ranked(questions, args), "log_likelihood": split(sums / counts), "log_likelihood_sum": split(sums),
            "longest": split(counts), "random": [[0] * len(q["candidates"]) for q in questions]}
    right = {name: np.array([label_of_best(s, q["labels"]) for s, q in zip(scores, questions)]) for name, scores in ways.items()}
    groups, found = [stage1.question_of(q["prompt"]) for q in questions], {"questions": len(questions), "candidates": len(flat)}
    interval = lambda values: dict(zip(("mean", "low", "high"), stage4.bootstrap(values, groups)))
    for name, values in right.items():
        found[name] = {**interval(values), "behind": interval(right["sparserm"] - values)}
        a, b = found[name], found[name]["behind"]
        print(f"{name:<20} {a['mean']:.3f} [{a['low']:.3f}, {a['high']:.3f}]" + ("" if name == "sparserm" else
              f"   SparseRM minus it {b['mean']:+.3f} [{b['low']:+.3f}, {b['high']:+.3f}]"))
    print(f"{len(questions)} questions of the test split, {len(flat)} candidates")
    if args.write:
        files.write_text(ROOT / "benchmarks/results/rank_answers.json", json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    stage1.run_main(main)
