"""The paper's loop in small: does filtering noisy preference pairs by SparseRM make DPO better?

    python benchmarks/align.py --pairs truthfulqa.jsonl --questions truthfulqa_mc.jsonl --write

1. the train and dev questions of --pairs are cut in two: about 500 clean pairs for the reward model, --train-pairs others for the policy
2. of the policy's pairs, a share --noise has its labels flipped
3. each filter drops some of them; what is left trains the policy: TRL's DPOTrainer, a LoRA of PEFT, one epoch
4. the aligned policy is read on the *test* questions: on how many pairs the chosen answer is more likely than the rejected one (sum of
   token log-likelihoods, with the end mark), on how many its log-ratio to the unaligned model is larger (DPO's implicit reward), and
   MC1: for how many of --questions the right candidate is the most likely one

    unaligned       the policy as it is
    none            all pairs, noise included
    sparserm        `05_best_of_n.py pairs --filter`: drops where the rejected side scores as high or higher (the paper's filter)
    random          as many pairs as sparserm keeps, drawn at random
    length          drops where the length rule that wins on the reward model's train pairs says otherwise
    dense           drops where a Bradley-Terry head on the whole hidden state, trained on the same pairs, says otherwise
    oracle          drops exactly the flipped pairs

The learning rate is the one of --lr with which `none` is best on the policy-free dev pairs (implicit reward, first seed). A seed
draws the flips, the random filter, the LoRA's start and the order of the pairs. Finished runs lie in --out and are not run again.
"""

import argparse
import gc
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
files, models, rows_of = (importlib.import_module(f"parts.{n}") for n in ("files", "models", "rows"))
stage1, stage2, stage3, stage4 = (importlib.import_module(n) for n in
                                  ("01_extract", "02_select_features", "03_train_head", "04_evaluate"))
log_likelihoods, interval = importlib.import_module("likelihood").log_likelihoods, importlib.import_module("does_it_hold").interval
RESULTS = ROOT / "benchmarks/results/align.json"
FILTERS = ("none", "sparserm", "random", "length", "dense", "oracle")
METRICS = {"likelihood": "chosen more likely", "implicit": "implicit reward", "mc1": "MC1"}


# ---------------------------------------------------------------- data

def read_pairs(path):
    """--pairs → (pairs of the reward model and the policy by question, test pairs): lists of {id, prompt, chosen, rejected, question}."""
    rows = []
    for n, (_, raw) in enumerate(stage1.read_rows(path)):
        rows += [{"id": f"{raw.get('id', n)}", "prompt": p, "chosen": c, "rejected": r, "question": stage1.question_of(p)}
                 for p, c, r in rows_of.pairs_of_row(raw)]
    test = [r for r in rows if stage1.split_of(r["prompt"]) == "test"]
    rest = [r for r in rows if stage1.split_of(r["prompt"]) != "test"]
    return sorted(rest, key=lambda r: stage1.hash_number(f"align {r['question']}")), test


def cut(rows, count):
    """The first `count` rows, rounded up so that no question is on both sides → (those, the rest)."""
    while 0 < count < len(rows) and rows[count]["question"] == rows[count - 1]["question"]:
        count += 1
    return rows[:count], rows[count:]


def flipped(rows, noise, seed):
    """A share `noise` of the pairs with their sides swapped; `flipped` says which."""
    swap = set(np.random.default_rng([seed, 1]).permutation(len(rows))[:round(noise * len(rows))].tolist())
    return [{**r, "flipped": n in swap, **({"chosen": r["rejected"], "rejected": r["chosen"]} if n in swap else {})}
            for n, r in enumerate(rows)]


# ---------------------------------------------------------------- filters

def dense_differences(pairs, reward, rows):
    """r_chosen - r_rejected of a Bradley-Terry head on z, trained on the reward model's pairs with stage 4's search → [n]."""
    settings = {"lr": 0.01, "epochs": 200, "patience": 20}
    *_, difference = stage4.fit_control(*pairs.z, pairs.split, stage4.DENSE, settings, range(5))
    return difference(*(reward.hidden([r["prompt"] for r in rows], [r[side] for r in rows]) for side in ("chosen", "rejected")))


def length_differences(pairs, rows):
    """Words of chosen minus rejected, with the sign that wins on the reward model's train pairs (a draw: longer) → [n]; 0: as long."""
    train = pairs.part(pairs.split == stage1.TRAIN)
    sign = 1 if np.sign(train.tokens[0] - train.tokens[1].astype(float)).sum() >= 0 else -1
    return sign * np.array([len(r["chosen"].split()) - len(r["rejected"].split()) for r in rows], float)


def kept_by(name, rows, dense, length, folder, args, seed):
    """A filter → the rows it keeps."""
    if name == "sparserm":                  # as a user would: a file in, a file out
        files.write_rows(folder / f"noisy-{seed}.jsonl", rows)
        out = folder / f"kept-{seed}.jsonl"
        command = ["pairs", "--filter", folder / f"noisy-{seed}.jsonl", "--reward", folder / "reward/reward_head.safetensors", "--out", out]
        subprocess.run([sys.executable, ROOT / "05_best_of_n.py", *command], check=True, stdout=subprocess.DEVNULL)
        ids = {json.loads(line)["id"] for line in open(out, encoding="utf-8")}
        return [r for r in rows if r["id"] in ids]
    if name == "random":
        size = sum(1 for _ in open(folder / f"kept-{seed}.jsonl", encoding="utf-8"))
        return [rows[n] for n in sorted(np.random.default_rng([seed, 2]).permutation(len(rows))[:size])]
    good = {"none": lambda n, r: True, "oracle": lambda n, r: not r["flipped"], "dense": lambda n, r: dense[n] > 0,
            "length": lambda n, r: length[n] >= 0}[name]
    return [r for n, r in enumerate(rows) if good(n, r)]


# ---------------------------------------------------------------- the policy

def align(rows, lr, seed, folder, args):
    """DPO with a LoRA on `rows`, one epoch → the merged model."""
    import datasets
    import peft
    import transformers
    import trl
    chat = lambda role, text: [{"role": role, "content": text}]
    data = datasets.Dataset.from_list([{"prompt": chat("user", r["prompt"]), "chosen": chat("assistant", r["chosen"]),
                                        "rejected": chat("assistant", r["rejected"])} for r in rows])
    transformers.set_seed(seed)
    name = models.locate_model(args.model)
    settings = trl.DPOConfig(output_dir=str(folder), per_device_train_batch_size=args.batch, num_train_epochs=1, learning_rate=lr,
                             beta=args.beta, warmup_steps=2, max_length=512, seed=seed, use_cpu=args.device == "cpu", bf16=args.bf16,
                             gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=10)
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    trainer = trl.DPOTrainer(model=model, args=settings, train_dataset=data, peft_config=lora,
                             processing_class=stage1.load_tokenizer(args.model))
    trainer.train()
    merged = trainer.model.merge_and_unload()
    del trainer
    gc.collect()
    return merged


def read_policy(backbone, pairs, questions):
    """A policy on pairs and questions → {chosen, rejected: sums [n]; mc1: 1 where the right candidate is the most likely}."""
    sides = ("chosen", "rejected")
    flat = [(r["prompt"], r[side]) for side in sides for r in pairs] + [(q["prompt"], c) for q in questions for c in q["candidates"]]
    sums = iter(log_likelihoods(backbone, *zip(*flat))[0].tolist())         # one pass: the same questions stand in both
    found = {side: [next(sums) for _ in pairs] for side in sides}
    each = [[next(sums) for _ in q["candidates"]] for q in questions]
    return found | {"mc1": [q["labels"][int(np.argmax(s))] for q, s in zip(questions, each)]}


def right(found, base):
    """What a policy gets right → {metric: array of 0 and 1}."""
    ratio = lambda side: np.array(found[side]) - np.array(base[side])
    return {"likelihood": np.array(found["chosen"]) > np.array(found["rejected"]), "implicit": ratio("chosen") > ratio("rejected"),
            "mc1": np.array(found["mc1"])}


# ---------------------------------------------------------------- the loop

def once(path, make):
    """A JSON file, made if it is not there."""
    if not path.exists():
        found = make()
        files.write_text(path, json.dumps(found, sort_keys=True) + "\n")
    return json.loads(path.read_text("utf-8"))


def train_reward(rows, folder, args):
    """Stages 1 to 3 on the reward model's clean pairs → RewardModel."""
    run = folder / "reward"
    if not (run / "reward_head.safetensors").exists():
        files.write_rows(folder / "clean.jsonl", rows)
        extract = ["--pairs", folder / "clean.jsonl", "--model", args.model, "--layer", args.layer, "--seed", 1, "--split", "0.85,0.15,0"]
        for script, more in (("01_extract.py", extract), ("02_select_features.py", ["--sae", args.sae]), ("03_train_head.py", [])):
            subprocess.run([sys.executable, ROOT / script, "--run", run, *map(str, more)], check=True, stdout=subprocess.DEVNULL)
    return stage3.RewardModel.load(run / "reward_head.safetensors")


def experiment(args):
    """→ dict of all figures."""
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    rest, test = read_pairs(args.pairs)
    clean, rest = cut(rest, args.reward_pairs)
    noisy_source, dev = cut(rest, args.train_pairs)
    questions = [row for _, row in stage1.read_rows(args.questions) if stage1.split_of(row["prompt"]) == "test"] if args.questions else []
    reward = train_reward(clean, folder, args)
    seen = stage4.Pairs(folder / "reward", stage2.shard_files(folder / "reward")[0])        # its own pairs, for the other filters
    print(f"{len(clean)} clean pairs for the reward model, {len(noisy_source)} for the policy, {len(dev)} dev, {len(test)} test, "
          f"{len(questions)} test questions", flush=True)
    base = once(folder / "unaligned.json", lambda: read_policy(reward.backbone, test, questions))
    base_dev = once(folder / "unaligned-dev.json", lambda: read_policy(reward.backbone, dev, []))

    def trained(rows, lr, seed, pairs, asked):
        started = time.perf_counter()
        model = align(rows, lr, seed, folder / "trainer", args)
        seconds = time.perf_counter() - started
        backbone = stage1.make_backbone(model.to(args.device), reward.backbone.tokenizer, {"model": "aligned"})
        return {**read_policy(backbone, pairs, asked), "seconds": seconds, "pairs": len(rows),
                "flipped": sum(r["flipped"] for r in rows)}
    search = {}
    for lr in args.lr if len(args.lr) > 1 else []:
        noisy = flipped(noisy_source, args.noise, 0)
        found = once(folder / f"dev-lr{lr:g}.json", lambda lr=lr, noisy=noisy: trained(noisy, lr, 0, dev, []))
        search[f"{lr:g}"] = float(right(found, base_dev)["implicit"].mean())
        print(f"lr {lr:g}: implicit reward right on {search[f'{lr:g}']:.3f} of the dev pairs ({found['seconds']:.0f} s)", flush=True)
    lr = float(max(search, key=search.get)) if search else args.lr[0]
    runs = {name: [] for name in FILTERS}
    for seed in range(args.seeds):
        noisy = flipped(noisy_source, args.noise, seed)
        dense, length = dense_differences(seen, reward, noisy), length_differences(seen, noisy)
        for name in FILTERS:
            rows = kept_by(name, noisy, dense, length, folder, args, seed)
            result = once(folder / f"{name}-{seed}-lr{lr:g}.json", lambda rows=rows, seed=seed: trained(rows, lr, seed, test, questions))
            runs[name].append(result)
            now = {metric: round(float(values.mean()), 3) for metric, values in right(result, base).items()}
            print(f"seed {seed} {name:<9} {len(rows)} pairs, {result['flipped']} flipped: {now} ({result['seconds']:.0f} s)", flush=True)
    return {"lr": lr, "search": search, **settings_of(args), "counts": {"reward": len(clean), "policy": len(noisy_source), "dev": len(dev),
            "test": len(test), "questions": len(questions)}, "filters": figures(runs, base, test, questions)}


def settings_of(args):
    """The settings that belong into the results."""
    return {n: getattr(args, n) for n in ("noise", "seeds", "batch", "beta", "layer", "bf16")}


def figures(runs, base, test, questions):
    """What every run got right → {filter: kept, flipped, {metric: {mean, low, high, minus_none, minus_random}}}, resampled by question."""
    groups = {"likelihood": [r["question"] for r in test], "implicit": [r["question"] for r in test],
              "mc1": [stage1.question_of(q["prompt"]) for q in questions]}
    values = {name: {m: np.stack([right(f, base)[m] for f in found]).astype(float) for m in METRICS} for name, found in runs.items()}
    values["unaligned"] = {m: v[None].astype(float) for m, v in right(base, base).items()}
    result = {}
    for name in ("unaligned", *runs):
        result[name] = {"kept": [f["pairs"] for f in runs.get(name, [])], "flipped": [f["flipped"] for f in runs.get(name, [])],
                        "seconds": [round(f["seconds"], 1) for f in runs.get(name, [])]}
        for metric in METRICS:
            if not groups[metric] or (name == "unaligned" and metric == "implicit"):
                continue
            row = dict(zip(("mean", "low", "high"), stage4.bootstrap(values[name][metric], groups[metric])))
            for other in ("none", "random"):
                if other != name and other in values:
                    difference = values[name][metric] - values[other][metric]
                    row[f"minus_{other}"] = dict(zip(("mean", "low", "high"), stage4.bootstrap(difference, groups[metric])))
            result[name][metric] = row
    return result


def table(found):
    """The figures → markdown."""
    cell = lambda r, sign="": interval(r, "mean", sign) if r else "–"
    columns = ["filter", "pairs kept, of which flipped", *METRICS.values(), *(f"{name}, minus no filter" for name in METRICS.values())]
    text = "| " + " | ".join(columns) + " |\n"
    text += "|---" * len(columns) + "|\n"
    for name, row in found["filters"].items():
        kept = f"{np.mean(row['kept']):.0f}, {np.mean(row['flipped']) / np.mean(row['kept']):.1%}" if row["kept"] else "–"
        text += "| " + " | ".join([name, kept, *(cell(row.get(m)) for m in METRICS),
                                   *(cell((row.get(m) or {}).get("minus_none"), "+") for m in METRICS)]) + " |\n"
    return text


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pairs", default=str(ROOT / "data/truthful.jsonl"), help="clean preference pairs")
    p.add_argument("--questions", help="rows {prompt, candidates, labels} for MC1")
    p.add_argument("--model", default="demo")
    p.add_argument("--layer", type=int, default=16)
    p.add_argument("--sae", default=str(ROOT / "assets/sae-smollm2-135m-layer16.safetensors"))
    p.add_argument("--reward-pairs", type=int, default=500, help="clean pairs of the reward model, its dev pairs included")
    p.add_argument("--train-pairs", type=int, default=320, help="pairs of the policy, before the filter")
    p.add_argument("--noise", type=float, default=0.3, help="share of labels flipped")
    p.add_argument("--lr", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3], help="tried on dev")
    p.add_argument("--beta", type=float, default=0.1)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--bf16", action="store_true", help="train in mixed precision; 2.5 times faster on a CPU with AVX-512 BF16")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", default="runs/align", help="folder of the finished runs")
    p.add_argument("--write", action="store_true", help="into benchmarks/results/align.json")
    p.add_argument("--table", action="store_true", help="only print the table of the results file")
    args = p.parse_args()
    if args.table:
        return print(table(json.loads(RESULTS.read_text("utf-8"))))
    found = experiment(args)
    if args.write:
        files.write_text(RESULTS, json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(table(found))


if __name__ == "__main__":
    stage1.run_main(main)
