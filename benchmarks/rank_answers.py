"""Multiple choice by reward: how often is the right candidate ranked first, against simpler ways to
choose?

    python benchmarks/rank_answers.py --questions truthfulqa_mc.jsonl \\
        --reward runs/does-it-hold/TruthfulQA/reward_head.safetensors --write

reads   --questions    rows {prompt, candidates, labels}; only the questions whose hash puts them on
                       the *test* side are used: a question falls on the same side in every file, so
                       the reward model has not seen them
writes  with --write   benchmarks/results/rank_answers.json

    sparserm          `05_best_of_n.py rank`
    log_likelihood    the backbone's own: mean log-probability of the answer's tokens
                      (and `log_likelihood_sum`: their sum)
    longest           the most tokens; a tie counts its share
    random            one of them, in expectation

Intervals are bootstraps over questions; differences are paired.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from benchmarks.common import difference, head_line, interval, line, stage1, stage3
from parts.files import read_meta, run_main, write_rows


def ranked(questions, reward):
    """Scores of `05_best_of_n.py rank`, as a user would get them → list of lists."""
    with tempfile.TemporaryDirectory() as folder:
        given = f"{folder}/questions.jsonl"
        out = f"{folder}/ranked.jsonl"
        write_rows(given, questions)
        common.run_script("05_best_of_n.py", "rank", "--candidates", given,
                          "--reward", reward, "--out", out)
        return [row["scores"] for row in common.read_json_rows(out)]


def label_of_best(scores, labels):
    """The mean label of the candidates that share the highest score."""
    scores = np.array(scores)
    return float(np.array(labels)[scores == scores.max()].mean())


def ways_to_choose(questions, reward):
    """{way: scores of each question's candidates}."""
    backbone = stage3.RewardModel.load(reward).backbone
    prompts = [question["prompt"] for question in questions for _ in question["candidates"]]
    candidates = [text for question in questions for text in question["candidates"]]
    sums, counts = common.log_likelihoods(backbone, prompts, candidates)
    ends = np.cumsum([len(question["candidates"]) for question in questions])[:-1]
    return {
        "sparserm": ranked(questions, reward),
        "log_likelihood": np.split(sums / counts, ends),
        "log_likelihood_sum": np.split(sums, ends),
        "longest": np.split(counts, ends),
        "random": [[0] * len(question["candidates"]) for question in questions],
    }


def figures(questions, ways):
    """How often each way is right → the figures of the results file."""
    right = {}
    for way, scores in ways.items():
        labels = [label_of_best(s, question["labels"]) for s, question in zip(scores, questions)]
        right[way] = np.array(labels)

    groups = [stage1.question_of(question["prompt"]) for question in questions]
    candidates = sum(len(question["candidates"]) for question in questions)
    found = {"questions": len(questions), "candidates": candidates}
    for way, values in right.items():
        behind = common.mean_interval(right["sparserm"] - values, groups)
        found[way] = {**common.mean_interval(values, groups), "behind": behind}
    return found


def rows_of(found):
    """The ways among the figures → {way: row}."""
    return {name: row for name, row in found.items() if isinstance(row, dict)}


def show(found):
    """The lines to print."""
    for name, row in rows_of(found).items():
        gap = ""
        if name != "sparserm":
            gap = "   SparseRM minus it " + common.printed_interval(row["behind"], sign="+")
        print(f"{name:<20} {common.printed_interval(row)}{gap}")
    print(f"{found['questions']} questions of the test split, {found['candidates']} candidates")


def table(found):
    """The figures → markdown, the best way first."""
    text = head_line("ranked by", ["right answer first", "SparseRM minus it"])
    rows = sorted(rows_of(found).items(), key=lambda named: -named[1]["mean"])
    for name, row in rows:
        behind = "–" if name == "sparserm" else difference(row["behind"])
        text += line(name.replace("_", " "), [interval(row, "mean"), behind])
    return text


def main():
    """The command."""
    p = common.command_line(__doc__)
    p.add_argument("--questions", required=True)
    p.add_argument("--reward", required=True, help="reward_head.safetensors of stage 3")
    p.add_argument("--write", action="store_true", help="into benchmarks/results/rank_answers.json")
    args = p.parse_args()
    seed = int(read_meta(args.reward, "03_train_head.py")["seed"])
    questions = common.unseen_questions(args.questions, seed)
    found = figures(questions, ways_to_choose(questions, args.reward))
    show(found)
    if args.write:
        common.write_result("rank_answers", found)


if __name__ == "__main__":
    run_main(main)
