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

from parts.files import UserError, read_json_rows, write_text
from parts.packing import common_prefix
from parts.rows import read_rows, usable_pairs
from parts.statistics import LIMITS, group_weights, is_clear, says_little

stage1 = importlib.import_module("01_extract")
stage2 = importlib.import_module("02_select_features")
stage3 = importlib.import_module("03_train_head")
stage4 = importlib.import_module("04_evaluate")
stage5 = importlib.import_module("05_best_of_n")

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
DEMO_SAE = ROOT / "assets/sae-smollm2-135m-layer16.safetensors"
SIDES = stage4.SIDES


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


# ---------------------------------------------------------------- a dense head

def dense_out_of_fold(pairs):
    """A dense head with Bradley-Terry, the penalty chosen within the folds → Outcome."""
    return stage4.dense_out_of_fold(pairs, stage3.DEFAULTS)


def fit_dense(pairs):
    """A dense head on all of these pairs, the penalty by cross-validation over their folds
    → Fitted."""
    settings = stage3.DEFAULTS
    pair_loss = stage3.loss_named(settings["loss"])
    losses = {}
    view = stage4.all_of_z()
    for fold in range(pairs.folds):
        held = pairs.fold == fold
        path = stage4.fit_path(view, pairs.z, ~held, [None], stage3.PENALTIES, settings)
        for option, fitted in path:
            table = losses.setdefault(option, torch.zeros(len(held)))
            table[held] = fitted.losses([z[held] for z in pairs.z], pair_loss)
    _, l2 = stage3.choose(losses, pairs.group, "best")
    return stage4.fit_one(view, pairs.z, pairs.used(()), None, l2, settings)


# ---------------------------------------------------------------- the limit

def matrices(backbone, layer):
    """The weight matrices of blocks 0..L."""
    found = []
    for block in backbone.blocks[:layer + 1]:
        found += [parameter for parameter in block.parameters() if parameter.dim() == 2]
    return found


def size_of(tensors):
    """How many numbers they hold."""
    return sum(tensor.numel() for tensor in tensors)


def least_work(backbone, texts, layer):
    """→ (distinct tokens, FLOPs): two a weight and token, and attention of each to itself and those
    before it, nothing twice."""
    before = []
    tokens = 0
    seen = 0                            # couples of a token and one that it attends to
    for ids in sorted(text.ids for text in texts):
        shared = common_prefix(before, ids)
        tokens += len(ids) - shared
        seen += (len(ids) * (len(ids) + 1) - shared * (shared + 1)) // 2
        before = ids
    config = backbone.model.config.get_text_config()
    head_width = getattr(config, "head_dim", None)
    head_width = head_width or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_width
    products = 2 * tokens * size_of(matrices(backbone, layer))
    return tokens, products + 4 * seen * width * (layer + 1)


def product_speeds(weights, rows, repeats=3):
    """FLOPs a second of plain products of `rows` vectors with each matrix, several times → list."""
    inputs = {weight.shape[1]: torch.randn(rows, weight.shape[1]).to(weight.dtype)
              for weight in weights}

    def all_products():
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    work = 2 * rows * size_of(weights)
    with torch.inference_mode():
        return [work / timed(all_products)[1] for _ in range(repeats)]


# ---------------------------------------------------------------- the language model itself

def log_likelihoods(backbone, prompts, responses, max_length=2048):
    """Σ log p(token | what precedes it) over each response and its end-of-turn mark
    → (sums [n], numbers of tokens [n]), numpy.

    The prompt's own tokens do not count.
    """
    texts = [stage1.render(backbone.tokenizer, prompt, response, max_length)
             for prompt, response in zip(prompts, responses, strict=True)]
    sums = log_likelihoods_of_ids(backbone, [text.ids[:text.eot + 1] for text in texts],
                                  [text.first for text in texts])
    return sums, token_counts(texts)


def log_likelihoods_of_ids(backbone, sequences, firsts):
    """Σ log p(token | what precedes it) over token ids from place `first` on → [n] numpy.

    Sequences are packed as in stage 1, with the output matrix in the place of block L.
    """
    sums = np.zeros(len(sequences))
    cap = getattr(backbone.model.config.get_text_config(), "final_logit_softcapping", None)
    whole = dataclasses.replace(backbone, blocks=[backbone.model.get_output_embeddings()])
    for members, (logits,) in whole.hidden_rows(sequences, [0]):
        if cap:
            logits = cap * torch.tanh(logits.float() / cap)
        logits = logits.float()
        total = logits.logsumexp(-1)                                    # [T]
        for index, path in members:
            first = firsts[index]
            before = torch.from_numpy(path[first - 1:-1])               # each token is told by it
            wanted = torch.tensor(sequences[index][first:])
            before, wanted = before.to(logits.device), wanted.to(logits.device)
            sums[index] = float((logits[before, wanted] - total[before]).double().sum())
    return sums


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
    """Values [n], or [seeds, n] → {mean, low, high}: a bootstrap over groups and seeds."""
    values = np.atleast_2d(np.asarray(values, dtype=float))
    _, group_of = np.unique(groups, return_inverse=True)
    of_group = np.stack([np.bincount(group_of, row) for row in values])     # [seeds, groups]
    weights = group_weights(groups)                                         # [draws, groups]
    means = weights @ of_group.T / (weights @ np.bincount(group_of))[:, None]

    seeds = group_weights(range(len(values)), seed=1) / len(values)         # [draws, seeds]
    low, high = np.quantile((means * seeds).sum(1), LIMITS)
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def gap_interval(values, groups):
    """As mean_interval, of a difference; low and high are None where too few groups differ."""
    found = mean_interval(values, groups)
    if says_little(np.atleast_2d(values).mean(0), groups):
        found |= {"low": None, "high": None}
    return found


def by_sign(gaps):
    """{name: difference} → {1: names clearly above 0, -1: clearly below, 0: neither}."""
    found = {1: [], -1: [], 0: []}
    for name, gap in gaps.items():
        found[is_clear(gap)].append(name)
    return found


def printed_interval(row, mean="mean", sign="", ends=("low", "high")):
    """0.586 [0.510, 0.660]; 0.586 (cannot tell) where there is no interval"""
    if row[ends[0]] is None:
        return f"{row[mean]:{sign}.3f} (cannot tell)"
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
