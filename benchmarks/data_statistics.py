"""The statistics of the project's own preference sets: the table of data/README.md.

    python benchmarks/data_statistics.py data/truthful.jsonl data/safe.jsonl

words control: a Bradley-Terry head on hashed 1- and 2-grams of the responses alone (the control
`words` of stage 4), five folds by prompt, the penalty chosen within them; the share of held-out
pairs that it gets right, ties half.
"""

import re
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.common import SIDES, head_line, line, stage1, stage3, stage4
from parts.files import read_json_rows
from parts.statistics import points

NEGATION = re.compile(r"\b(no|not|never|cannot|none|nothing|\w+n't)\b", re.IGNORECASE)


def words(text):
    """The words of a text, lower case."""
    return re.findall(r"[\w']+", text.lower())


def pairs_without_z(rows):
    """Pairs of which only the texts are known."""
    groups = [stage1.hash_number(stage1.plain_text(row["prompt"])) for row in rows]
    nothing = torch.zeros(len(rows), 1)
    no_tokens = np.zeros(len(rows))
    return stage4.Pairs([nothing, nothing], torch.zeros(len(rows)), np.array(groups),
                        [no_tokens, no_tokens], rows)


def words_control(rows):
    """Accuracy of the words control over five folds."""
    pairs = pairs_without_z(rows)
    outcome = stage4.out_of_fold(pairs, stage4.words_of(pairs), [None], stage3.DEFAULTS)
    return float(points(outcome.differences).mean())


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
