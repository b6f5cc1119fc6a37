"""The statistics of the project's own preference sets: the table of data/README.md.

    python benchmarks/data_statistics.py data/truthful.jsonl data/safe.jsonl

words: a Bradley-Terry head on hashed 1- and 2-grams of the responses alone (the `words` control of
stage 4), 5 folds by prompt; the share of held-out pairs that it gets right, ties half.
"""

import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import FOLDS, SIDES, head_line, line, read_json_rows, stage1, stage4
from parts.statistics import points

NEGATION = re.compile(r"\b(no|not|never|cannot|none|nothing|\w+n't)\b", re.IGNORECASE)


def words(text):
    """The words of a text, lower case."""
    return re.findall(r"[\w']+", text.lower())


def words_control(rows):
    """Accuracy of the words control over FOLDS folds by prompt.

    A tenth of the other folds stops the training.
    """
    texts = [[row[side] for row in rows] for side in SIDES]
    numbers = [stage1.hash_number("fold:" + stage1.plain_text(row["prompt"])) for row in rows]
    place = torch.tensor([number % (FOLDS * 9) for number in numbers])
    right = 0.0
    for fold in range(FOLDS):
        split = torch.full_like(place, stage4.TRAIN)
        split[place // FOLDS == fold] = stage4.DEV
        split[place % FOLDS == fold] = stage4.TEST
        chosen, rejected = stage4.WordFeatures(texts, split)(texts)
        fitted = stage4.fit_control(chosen, rejected, split, stage4.DENSE, {}, scale=False)
        test = split == stage4.TEST
        differences = fitted.differences(chosen[test], rejected[test])
        right += float(points(differences).sum())
    return right / len(rows)


def statistics(path):
    """A preference set → dict of its figures."""
    rows = read_json_rows(path)
    lengths = {name: [len(words(row[name])) for row in rows] for name in ("prompt", *SIDES)}
    longer = [(chosen > rejected) + (chosen == rejected) / 2
              for chosen, rejected in zip(lengths["chosen"], lengths["rejected"])]
    negations = {side: sum(bool(NEGATION.search(row[side])) for row in rows) for side in SIDES}
    return {
        "pairs": len(rows),
        "prompts": len({stage1.plain_text(row["prompt"]) for row in rows}),
        "subjects": len({row["category"] for row in rows}),
        "words a prompt": sum(lengths["prompt"]) / len(rows),
        "words chosen": sum(lengths["chosen"]) / len(rows),
        "words rejected": sum(lengths["rejected"]) / len(rows),
        "chosen longer": sum(longer) / len(rows),
        "negations chosen": negations["chosen"],
        "negations rejected": negations["rejected"],
        "words control": words_control(rows),
    }


def table(found):
    """{name: figures} → markdown, a column each set."""
    text = head_line("", found)
    for name in next(iter(found.values())):
        values = [figures[name] for figures in found.values()]
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in values]
        text += line(name, cells)
    return text


if __name__ == "__main__":
    print(table({Path(path).name: statistics(path) for path in sys.argv[1:]}), end="")
