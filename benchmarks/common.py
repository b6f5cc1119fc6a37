"""What the benchmarks share: the stages, commands, rows cut at whole questions, tables, results.

A benchmark imports this file and nothing of another benchmark.
"""

import argparse
import dataclasses
import importlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from parts.files import UserError, write_text
from parts.rows import read_rows, usable_pairs
from parts.statistics import bootstrap

stage1 = importlib.import_module("01_extract")
stage2 = importlib.import_module("02_select_features")
stage3 = importlib.import_module("03_train_head")
stage4 = importlib.import_module("04_evaluate")
stage5 = importlib.import_module("05_best_of_n")

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
DEMO_SAE = ROOT / "assets/sae-smollm2-135m-layer16.safetensors"
SIDES = stage4.SIDES
FOLDS = 5


# ---------------------------------------------------------------- commands

def command_line(text):
    """An argument parser whose help begins with a benchmark's docstring, as it is written there."""
    return argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter)


def named_sets(words):
    """["NAME=FILE", …] → {name: file}; None where there is none, or one without the sign."""
    if not words or not all("=" in word for word in words):
        return None
    return dict(word.split("=", 1) for word in words)


def run_script(script, *flags):
    """Run a script, its output thrown away → {seconds, peak_gib}. Errors: UserError."""
    started = time.perf_counter()
    flags = [str(flag) for flag in flags]
    child = subprocess.Popen([sys.executable, ROOT / script, *flags], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)           # the kernel says what this one child took
    child.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise UserError(f"{script} failed, exit {child.returncode} · {' '.join(flags)} · "
                        "its own line above says why")
    return {"seconds": time.perf_counter() - started, "peak_gib": usage.ru_maxrss / 2**20}


def timed(function, *args, **settings):
    """→ (result, seconds)."""
    started = time.perf_counter()
    result = function(*args, **settings)
    return result, time.perf_counter() - started


def peak_mb():
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---------------------------------------------------------------- files

def read_json_rows(path):
    """A JSONL file that the project has written → list of rows."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_json(path, found, sort_keys=True):
    """Write figures as JSON."""
    write_text(path, json.dumps(found, indent=1, sort_keys=sort_keys) + "\n")


def read_result(name):
    """The figures of benchmarks/results/NAME.json; {} where there are none yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def write_result(name, found, sort_keys=True):
    """Write benchmarks/results/NAME.json."""
    write_json(RESULTS / f"{name}.json", found, sort_keys)


# ---------------------------------------------------------------- pairs and questions

def pairs_of_file(tokenizer, path, label=None, max_length=None):
    """Yield (number of the row, row, Pair) for each pair of a file that can be scored."""
    for number, (_, raw) in enumerate(read_rows(path)):
        pairs, _ = usable_pairs(tokenizer, raw, label, max_length)
        for pair in pairs:
            yield number, raw, pair


def pair_row(name, prompt, chosen, rejected):
    """A row of a pairs file with its question, and the split that stage 1 puts it into."""
    return {"id": name, "prompt": prompt, "chosen": chosen, "rejected": rejected,
            "question": stage1.question_of(prompt), "split": stage1.split_of(prompt)}


def cut(rows, count):
    """The first `count` rows → (those, the rest). Rounded up: no question is on both sides."""
    while 0 < count < len(rows) and rows[count]["question"] == rows[count - 1]["question"]:
        count += 1
    return rows[:count], rows[count:]


def pairs_by_split(run):
    """The pairs of a run → {train, dev, test: rows of pairs.jsonl}."""
    found = {split: [] for split in stage1.SPLITS}
    for row in read_json_rows(Path(run) / "pairs.jsonl"):
        found[row["split"]].append(row)
    return found


def unseen_questions(path, seed=0):
    """The rows {prompt, candidates, labels} whose question falls into the test split.

    A question falls into the same split in every file.
    """
    rows = [row for _, row in read_rows(path)]
    return [row for row in rows if stage1.split_of(row["prompt"], seed) == "test"]


def fold_splits(split, group):
    """Train and dev pairs in FOLDS folds by prompt → yield one split a fold.

    A fold is its test, the next one its dev; the pairs of the real test split are left out.
    """
    fold = torch.from_numpy(np.searchsorted(np.unique(group), group)) % FOLDS
    for n in range(FOLDS):
        part = torch.full_like(fold, stage4.TRAIN)
        part[fold == (n + 1) % FOLDS] = stage4.DEV
        part[fold == n] = stage4.TEST
        part[split == stage4.TEST] = stage4.NO_SPLIT
        yield part


# ---------------------------------------------------------------- the language model itself

def log_likelihoods(backbone, prompts, responses, max_length=2048):
    """Σ log p(token | what precedes it) over each response and its end-of-turn mark
    → (sums [n], numbers of tokens [n]), numpy.

    The prompt's own tokens do not count. Texts are packed as in stage 1, with the output matrix in
    the place of block L.
    """
    texts = [stage1.render(backbone.tokenizer, prompt, response, max_length)
             for prompt, response in zip(prompts, responses, strict=True)]
    sums = np.zeros(len(texts))
    cap = getattr(backbone.model.config.get_text_config(), "final_logit_softcapping", None)
    whole = dataclasses.replace(backbone, blocks=[backbone.model.get_output_embeddings()])
    for members, (logits,) in whole.hidden_rows([text.ids for text in texts], [0]):
        if cap:
            logits = cap * torch.tanh(logits.float() / cap)
        logits = logits.float()
        total = logits.logsumexp(-1)                                    # [T]
        for index, path in members:
            text = texts[index]
            before = torch.from_numpy(path[text.first - 1:text.eot])    # each token is told by it
            wanted = torch.tensor(text.ids[text.first:text.eot + 1])
            before, wanted = before.to(logits.device), wanted.to(logits.device)
            sums[index] = float((logits[before, wanted] - total[before]).double().sum())
    return sums, token_counts(texts)


def token_counts(texts):
    """Tokens of each response and its end-of-turn mark → [n] numpy."""
    return np.array([text.eot + 1 - text.first for text in texts])


def padded(texts):
    """Rendered texts → (ids, mask) [n, T], padded on the right."""
    longest = max(len(text.ids) for text in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, text in enumerate(texts):
        ids[n, :len(text.ids)] = torch.tensor(text.ids)
        mask[n, :len(text.ids)] = 1
    return ids, mask


# ---------------------------------------------------------------- intervals and tables

def mean_interval(values, groups):
    """Values [n] or [seeds, n] → {mean, low, high}, a bootstrap over groups."""
    return dict(zip(("mean", "low", "high"), bootstrap(values, groups)))


def printed_interval(row, mean="mean", sign="", ends=("low", "high")):
    """0.586 [0.510, 0.660]"""
    numbers = [f"{row[name]:{sign}.3f}" for name in (mean, *ends)]
    return "{} [{}, {}]".format(*numbers)


def interval(row, mean="accuracy", sign="", ends=("low", "high")):
    """.586 [.510, .660]"""
    return without_zeros(printed_interval(row, mean, sign, ends))


def without_zeros(text):
    """-0.586 → -.586"""
    return re.sub(r"\b0\.", ".", text)


def difference(row):
    """+.012 [-.005, +.030]"""
    return interval(row, "mean", "+")


def half(row):
    """Accuracy with a tie as half, as the differences have it; how many ties there are."""
    ties = f", {row['ties']:.0%} ties" if row["ties"] > 0.005 else ""
    return interval(row, "ties_half", ends=("half_low", "half_high")) + ties


def head_line(first, columns):
    """The first two lines of a markdown table."""
    columns = list(columns)
    return line(first, columns) + "|---" * (1 + len(columns)) + "|\n"


def line(name, cells):
    """A line of a markdown table."""
    return "| " + " | ".join([name, *cells]) + " |\n"
