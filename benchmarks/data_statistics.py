"""The statistics of the project's own preference sets: the table of data/README.md.

    python benchmarks/data_statistics.py data/truthful.jsonl data/safe.jsonl

words: a Bradley-Terry head on hashed 1- and 2-grams of the responses alone (the `words` control of stage 4), 5 folds by prompt;
the share of held-out pairs that it gets right, ties half.
"""

import importlib
import json
import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
stage1, stage4 = (importlib.import_module(n) for n in ("01_extract", "04_evaluate"))
NEGATION = re.compile(r"\b(no|not|never|cannot|none|nothing|\w+n't)\b", re.IGNORECASE)


def words(text):
    """The words of a text, lower case."""
    return re.findall(r"[\w']+", text.lower())


def words_control(rows, folds=5):
    """Accuracy of the words control over `folds` folds by prompt; a tenth of the other folds stops the training."""
    texts, right = [[r["chosen"] for r in rows], [r["rejected"] for r in rows]], 0.0
    place = torch.tensor([stage1.hash_number("fold:" + stage1.plain_text(r["prompt"])) % (folds * 9) for r in rows])
    for fold in range(folds):
        split = torch.where(place % folds == fold, 2, torch.where(place // folds == fold, 1, 0))
        _, difference = stage4.fit_and_test(*stage4.word_features(texts, split)(texts), split, stage4.DENSE, {}, scale=False)
        right += float(stage4.points(difference).sum())
    return right / len(rows)


def statistics(path):
    """A preference set → dict of its figures."""
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    lengths = [(len(words(r["chosen"])), len(words(r["rejected"]))) for r in rows]
    return {
        "pairs": len(rows), "prompts": len({stage1.plain_text(r["prompt"]) for r in rows}),
        "subjects": len({r["category"] for r in rows}),
        "words a prompt": sum(len(words(r["prompt"])) for r in rows) / len(rows),
        "words chosen": sum(c for c, _ in lengths) / len(rows), "words rejected": sum(r for _, r in lengths) / len(rows),
        "chosen longer": sum((c > r) + (c == r) / 2 for c, r in lengths) / len(rows),
        "negations chosen": sum(bool(NEGATION.search(r["chosen"])) for r in rows),
        "negations rejected": sum(bool(NEGATION.search(r["rejected"])) for r in rows),
        "words control": words_control(rows),
    }


if __name__ == "__main__":
    found = {Path(path).name: statistics(path) for path in sys.argv[1:]}
    print("| | " + " | ".join(found) + " |\n|---|" + "---|" * len(found))
    for key in next(iter(found.values())):
        print(f"| {key} | " + " | ".join(f"{f[key]:.3f}" if isinstance(f[key], float) else str(f[key]) for f in found.values()) + " |")
