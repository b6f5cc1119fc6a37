"""The paper's headline, checked: SparseRM against fine-tuned reward models on the same backbone,
the same pairs, the same tokens.

    python benchmarks/reward_models.py TruthfulQA=truthfulqa.jsonl HH-harmless=hh_harmless.jsonl …
    python benchmarks/reward_models.py TruthfulQA=truthfulqa.jsonl --quick   a subset, in minutes

Texts longer than --max-length are cut for all alike: the response at its end (the prompt keeps at
most half), then the prompt at its beginning. Splits are those of stage 1. Everything is fitted on
the train pairs alone: the frozen methods choose by cross-validation over five folds of these; dev
only gives every method its temperature, and full and lora their learning rate. The frozen methods
read the mean over the response's tokens at block L:

    sparserm        stages 1 to 3 with their defaults: a linear head, K and L2 by cross-validation
    paper           the paper's head: an MLP of 512 with the margin loss on all K = 128 directions
    dense           a linear Bradley-Terry head on z, the vector that SparseRM projects
    mlp             z, 512 hidden units, a scalar: two layers with Bradley-Terry
    full            TRL's RewardTrainer, all weights and a scalar head on the last block's last
                    token, --epochs epochs
    lora            the same with PEFT: rank 16 on every matrix of the blocks, and the scalar head

full and lora try every learning rate on --search-pairs train pairs with one seed (0: the rate that
won on the first set); the one with the lowest dev NLL trains on all with --seeds seeds. Their
number of epochs is not searched, and they do not stop early. A job (one fit) is a process of its
own with --threads threads. Seconds are processor time of training alone (for a frozen backbone: of
reading train, and of fitting, the search included; for full and lora without the search).
Finished jobs lie in --out/jobs and are not run again.

--frozen-only runs the frozen methods alone. The rows of full and lora then are those of the results
file, where a run there has the same numbers of pairs and the settings that decide which; as their
single rewards are not kept there, SparseRM minus them gets the interval of two independent
accuracies (square-and-add), which is too wide rather than too narrow.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from benchmarks import reward_models_peers as peers
from benchmarks import reward_models_tables as tables
from benchmarks.common import DEMO_SAE, stage1
from benchmarks.reward_models_tables import headline, table
from parts.files import UserError, file_hash, read_meta, run_main, write_rows, write_text
from parts.models import load_tokenizer

RATES = {"full": (1e-5, 3e-5, 1e-4), "lora": (1e-4, 3e-4, 1e-3)}
SAME = ("model", "layer", "sae", "max_length", "epochs", "threads", "dev_pairs", "test_pairs",
        "other_pairs")                                          # in one --out folder
PREPARED = 2                # of what lies in --out: another number, another version
QUICK = {"train_pairs": [60], "search_pairs": [24], "seeds": [1], "curve": [], "dev_pairs": 40,
         "test_pairs": 40}


# ---------------------------------------------------------------- the pairs, the same for all

def cut_response(tokenizer, prompt, response, most):
    """A response short enough that prompt and response have at most `most` tokens, where the prompt
    may have half of them."""
    of_prompt = len(stage1.render(tokenizer, prompt, "x", most).ids)
    room = max(most // 2, most - of_prompt) - 2
    tokens = tokenizer(response, add_special_tokens=False, return_offsets_mapping=True)
    offsets = tokens["offset_mapping"]
    return response if len(offsets) <= room else response[:offsets[room - 1][1]]


def cut_rows(file, args):
    """The usable pairs of a file → rows, long responses cut; `cut`: how many of the two were."""
    tokenizer = load_tokenizer(args.model)
    rows = []
    for number, raw, pair in common.pairs_of_file(tokenizer, file):
        chosen = cut_response(tokenizer, pair.prompt, pair.chosen, args.max_length)
        rejected = cut_response(tokenizer, pair.prompt, pair.rejected, args.max_length)
        row = common.pair_row(f"{number}-{raw.get('id', '')}", pair.prompt, chosen, rejected)
        row["cut"] = (chosen != pair.chosen) + (rejected != pair.rejected)
        rows.append(row)
    return rows


def prepare(file, run, train_pairs, args):
    """A file of pairs → stages 1 to 3 on `train_pairs` train pairs of it in `run`, and stage 1 on
    its dev and test pairs in run/held."""
    rows = cut_rows(file, args)
    kept = []
    counts = {"train": train_pairs, "dev": args.dev_pairs, "test": args.test_pairs}
    for split, count in counts.items():
        kept += peers.some([row for row in rows if row["split"] == split], count)
    train = [row for row in kept if row["split"] == "train"]
    held = [row for row in kept if row["split"] != "train"]
    write_pairs(run / "train.jsonl", train)
    write_pairs(run / "held.jsonl", held)

    read = ("--model", args.model, "--layer", args.layer, "--token", peers.RULE,
            "--max-length", args.max_length)
    stages = [
        ("01_extract.py", run, "--pairs", run / "train.jsonl", "--split", "1,0,0", *read),
        ("01_extract.py", run / peers.HELD, "--pairs", run / "held.jsonl", *read),
        ("02_select_features.py", run, "--sae", args.sae),
        ("03_train_head.py", run),
    ]
    measured = [common.run_script(script, "--run", of, *flags) for script, of, *flags in stages]
    done = {"peak_gib": max(stage["peak_gib"] for stage in measured),
            "cut": sum(row["cut"] for row in kept), "texts": 2 * len(kept)}
    write_text(run / "prepared.json", json.dumps(done) + "\n")


def write_pairs(path, rows):
    """Rows → a file for --pairs."""
    columns = ("id", "prompt", "chosen", "rejected")
    write_rows(path, [{name: row[name] for name in columns} for row in rows])


# ---------------------------------------------------------------- jobs

def job_path(job):
    """Where a job's results lie."""
    name = f"{job['set']}-{job['n']}-{job['method']}"
    if "lr" in job:
        name += f"-lr{job['lr']:g}-seed{job['seed']}"
        name += "-search" if job["search"] else ""
    return Path(job["out"]) / "jobs" / f"{name}.json"


def do(job, args):
    """Run one job in a process of its own, unless it is done → its results; None where --finished
    asks only for what is there."""
    path = job_path(job)
    if not path.exists() and not args.finished:
        print(f"{path.stem} …", file=sys.stderr, flush=True)
        threads = str(args.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
                       "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run([sys.executable, __file__, "--job", json.dumps(job)], check=True,
                       stdout=subprocess.DEVNULL, env=environment)
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def run_job(job):
    """The work of one job, in its own process."""
    if job["method"] == "heads":
        found = peers.run_heads(job)
    else:
        row = peers.run_peer(job)
        row["peak_gib"] = common.peak_mb() / 1024
        found = {job["method"]: row}
    write_text(job_path(job), json.dumps(found, sort_keys=True) + "\n")


# ---------------------------------------------------------------- the plan

class Plan:
    """Which sets, with how many train pairs, searches and seeds; and what of it is prepared."""

    def __init__(self, args):
        self.args = args
        self.files = common.named_sets(args.sets)
        self.first = next(iter(self.files))
        self.train = self.each(args.train_pairs)
        self.search = self.each(args.search_pairs)
        self.seeds = self.each(args.seeds)
        self.runs = {}                              # (set, n): folder
        for name in self.files:
            for n in self.sizes(name):
                self.runs[name, n] = Path(args.out) / f"{name}-{n}"

    def each(self, values):
        """One number for all sets, or one for each → {set: number}."""
        if len(values) == 1:
            values = values * len(self.files)
        return dict(zip(self.files, values, strict=True))

    def sizes(self, name):
        """The numbers of train pairs of a set: all, and on the first set those of --curve."""
        whole = self.train[name]
        fewer = [n for n in self.args.curve if n < whole] if name == self.first else []
        return sorted({whole, *fewer})

    def prepare(self):
        """Stages 1 to 3 where they are missing; what is still missing then is left out."""
        settings = Settings(self)
        for (name, n), run in self.runs.items():
            if not (run / "prepared.json").exists() and not self.args.finished:
                print(f"stages 1 to 3: {run.name}", file=sys.stderr, flush=True)
                prepare(self.files[name], run, n, self.args)
            settings.write()                        # once something is done in the folder
        self.runs = {key: run for key, run in self.runs.items()
                     if (run / "prepared.json").exists()}

    def sets(self):
        """The sets whose run with all train pairs is prepared."""
        return [name for name in self.files if (name, self.train[name]) in self.runs]

    def job(self, name, n, method, **more):
        """What one job needs to know."""
        run = self.runs.get((name, n), self.runs.get((name, self.train[name])))
        job = {key: getattr(self.args, key)
               for key in ("model", "layer", "max_length", "epochs", "out", "other_pairs")}
        job |= {**more, "set": name, "n": n, "method": method, "run": str(run), "others": {}}
        if n == self.train[name]:
            for (other, m), run in self.runs.items():
                if other != name and m == self.train[other]:
                    job["others"][other] = str(run)
        return job


class Settings:
    """Refuses to mix jobs of other settings or data in one folder."""

    def __init__(self, plan):
        self.args = plan.args
        self.path = Path(plan.args.out) / "settings.json"
        self.now = {name: getattr(plan.args, name) for name in SAME}
        self.now["prepared"] = PREPARED
        self.now["sets"] = {name: file_hash(file) for name, file in plan.files.items()}
        if self.path.exists() and json.loads(self.path.read_text("utf-8")) != self.now:
            raise UserError(f"its jobs were made with other settings or data · {self.path} · "
                            "pass another --out")

    def write(self):
        """Write down these."""
        if not self.args.finished:
            common.write_json(self.path, self.now)


# ---------------------------------------------------------------- running it

def all_jobs(plan):
    """Run what is not done, the cheap jobs first →
    ({(set, n): {method: [results of each seed]}}, learning rates {set: {method: rate}})."""
    pool = concurrent.futures.ThreadPoolExecutor(plan.args.workers)

    def submit(name, n, method, **more):
        return pool.submit(do, plan.job(name, n, method, **more), plan.args)
    try:
        frozen = {key: submit(*key, "heads") for key in plan.runs}
        trials = submit_trials(plan, submit)
        settle(frozen.values())
        settle(trials.values())
        rates = best_rates(plan, trials)
        final = submit_final(plan, submit, rates)
        settle(final.values())
    finally:
        pool.shutdown(cancel_futures=True)      # Ctrl-C or a failed job: the waiting do not start

    found = {}
    for key, job in frozen.items():
        if job.result():
            found[key] = frozen_rows(job.result(), peers.pairs_of_run(plan.runs[key]))
    for (name, n, method, _), job in final.items():
        if job.result() and (name, n) in found:
            found[name, n].setdefault(method, []).append(job.result()[method])
    return found, rates


def settle(jobs):
    """Wait for all jobs; the first that fails raises at once."""
    for job in concurrent.futures.as_completed(jobs):
        job.result()


def submit_trials(plan, submit):
    """The search for the learning rates of full and lora → {(set, method, rate): job}."""
    trials = {}
    if plan.args.frozen_only:
        return trials
    for name in plan.sets():
        if not plan.search[name]:
            continue
        for method, rates in RATES.items():
            for lr in rates:
                trials[name, method, lr] = submit(name, plan.search[name], method, lr=lr, seed=0,
                                                  search=True)
    return trials


def best_rates(plan, trials):
    """The rates with the lowest dev NLL, where all were tried → {set: {method: rate}}."""
    found = {}
    for name in plan.sets():
        tried_on = name if plan.search[name] else plan.first
        for method, rates in RATES.items():
            losses = {lr: trial_loss(trials.get((tried_on, method, lr)), method) for lr in rates}
            if None not in losses.values():
                found.setdefault(name, {})[method] = min(losses, key=losses.get)
    if found:
        found = {name: found.get(name, {}) for name in plan.sets()}
    return found


def trial_loss(job, method):
    """NLL on dev of a finished trial; None where it was not run."""
    results = job.result() if job else None
    if not results:
        return None
    row = results[method]
    return tables.nll(row["dev"], tables.temperature_of(row))


def submit_final(plan, submit, rates):
    """The fits of full and lora: the first seed of all sets first, then the curve, then more seeds
    → {(set, n, method, seed): job}."""
    wanted = []
    for name, n in plan.runs:
        for method in rates.get(name, {}):
            whole = n == plan.train[name]
            for seed in range(plan.seeds[name]):
                if seed == 0 or whole:
                    wanted.append((seed, not whole, name, n, method))
    wanted.sort(key=lambda job: job[:2])
    return {(name, n, method, seed): submit(name, n, method, lr=rates[name][method], seed=seed,
                                            search=False)
            for seed, _, name, n, method in wanted}


def frozen_rows(heads, pairs):
    """The results of the frozen job of a run → {method: [its results]}: what it takes to read
    train comes to the fit."""
    rows = {}
    texts = 2 * len(pairs["train"])
    for name, row in heads.items():
        if name == "rate":
            continue
        row["seconds"] = row["fit_seconds"] + texts / heads["rate"]
        row["texts_a_second"] = heads["rate"]
        if "padded" in row:
            row["seconds_padded"] = row["fit_seconds"] + texts / row["padded"]
        rows[name] = [row]
    return rows


def figures(plan, found, rates):
    """The results of all jobs → what the tables need."""
    args = plan.args
    settings = {name: getattr(args, name)
                for name in (*SAME, "train_pairs", "search_pairs", "seeds", "curve")}
    settings |= {"model": Path(args.model).name, "sae": Path(args.sae).name, "rates": RATES,
                 "torch": torch.__version__}
    head = next(iter(plan.runs.values())) / "reward_head.safetensors"
    result = {"settings": settings, "rates": rates,
              "backbone_parameters": read_meta(head)["parameters"],
              "sets": tables.figures_of_sets(found, plan.runs)}
    if args.frozen_only:
        tables.add_fine_tuned(result, common.read_result("reward_models"))
    return result


# ---------------------------------------------------------------- command line

def parse_args():
    """The flags, and whether they go together."""
    p = common.command_line(__doc__)
    p.add_argument("sets", nargs="*", metavar="NAME=FILE")
    p.add_argument("--model", default="demo")
    p.add_argument("--layer", type=int, default=16)
    p.add_argument("--sae", default=str(DEMO_SAE))
    p.add_argument("--train-pairs", type=int, nargs="+", default=[1000],
                   help="at most; one number, or one a set (default 1000)")
    p.add_argument("--search-pairs", type=int, nargs="+", default=[300],
                   help="for the learning rate; 0: the first set's (default 300)")
    p.add_argument("--seeds", type=int, nargs="+", default=[3],
                   help="of full and lora (default 3)")
    p.add_argument("--curve", type=int, nargs="*", default=[100, 300],
                   help="fewer train pairs, on the first set (default 100 300)")
    p.add_argument("--dev-pairs", type=int, default=150)
    p.add_argument("--test-pairs", type=int, default=400)
    p.add_argument("--other-pairs", type=int, default=200,
                   help="test pairs of each other set (default 200)")
    p.add_argument("--max-length", type=int, default=256, help="tokens of a text (default 256)")
    p.add_argument("--epochs", type=float, default=1, help="of full and lora (default 1)")
    p.add_argument("--threads", type=int, default=1, help="of a job (default 1)")
    p.add_argument("--workers", type=int, default=2, help="jobs at once (default 2)")
    p.add_argument("--out", default="runs/reward-models")
    p.add_argument("--frozen-only", action="store_true",
                   help="run the frozen methods only; full and lora are those of the results file")
    p.add_argument("--finished", action="store_true",
                   help="run nothing: the figures of the jobs that are done")
    p.add_argument("--quick", action="store_true",
                   help="60 train pairs, one seed, no curve: to see it work")
    p.add_argument("--write", action="store_true",
                   help="into benchmarks/results/reward_models.json")
    p.add_argument("--tables", action="store_true", help="only print the tables of that file")
    p.add_argument("--job", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.job or args.tables:
        return args

    if not common.named_sets(args.sets):
        p.error("name the sets: NAME=FILE …")
    if args.search_pairs[0] == 0 and any(args.search_pairs):
        p.error("the first set needs --search-pairs: others take its learning rate")
    args.frozen_only |= not any(args.search_pairs)
    if args.quick and args.write:
        p.error("--quick is to see it work: nothing is written")
    if args.quick:
        vars(args).update(QUICK)
        args.out += "-quick"
    return args


def main():
    """The command."""
    args = parse_args()
    if args.job:
        run_job(json.loads(args.job))
        return
    if args.tables:
        found = common.read_result("reward_models")
    else:
        plan = Plan(args)
        plan.prepare()
        results, rates = all_jobs(plan)
        found = figures(plan, results, rates)
        if args.write:
            common.write_result("reward_models", found, sort_keys=False)
    print(headline(found), table(found), sep="\n")


if __name__ == "__main__":
    run_main(main)
