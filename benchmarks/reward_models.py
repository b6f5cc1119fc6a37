"""The paper's headline, checked: SparseRM against fine-tuned reward models on the same backbone, the same pairs, the same tokens.

    python benchmarks/reward_models.py TruthfulQA=truthfulqa.jsonl HH-harmless=hh_harmless.jsonl … --write
    python benchmarks/reward_models.py TruthfulQA=truthfulqa.jsonl --quick          a subset, in minutes

Texts longer than --max-length are cut for all alike: the response at its end (the prompt keeps at most half), then the prompt at its
beginning. Splits are those of stage 1. Everything is fitted on train; when to stop, the temperature and what a line below says, on dev.

    sparserm        stages 1 to 3 with their defaults (but for --patience 100, as for the other heads): dev chooses K
    searched        the same scores, where dev chooses K, L2 and the learning rate, as for the dense head
    full            TRL's RewardTrainer, all weights and a scalar head on the last block, --epochs epochs
    lora            the same with PEFT: rank 16 on every matrix of the blocks, and the scalar head
    dense           a linear Bradley-Terry head on z, the vector that SparseRM projects; dev: L2, learning rate
    dense_last      the same head on the last block's output after the final norm, where the fine-tuned models have theirs
    mlp             z, 512 hidden units, a scalar: two layers; dev: L2, learning rate
    swift           like SWIFT (arXiv 2505.12225): every response token gets a reward and a gate, both linear; the gated mean. Of one
                    layer here, of all in the paper; dev: L2. It stops after 20 epochs without a gain
    words           1- and 2-grams of the response
    likelihood      the backbone's own log-likelihood of the response; sum or mean a token, by dev

full and lora try every learning rate on --search-pairs train pairs with one seed (0: the rate that won on the first set); the one with
the lowest dev NLL trains on all with --seeds seeds. Their number of epochs is not searched, and they do not stop early. A job (one fit) is
a process of its own with --threads threads. Seconds are processor time of training alone (for a frozen backbone: of reading train and
dev, and of fitting, the search included; for full and lora without the search). Finished jobs lie in --out/jobs and are not run again.
"""

import argparse
import concurrent.futures
import copy
import importlib
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
files, models, rows_of = (importlib.import_module(f"parts.{n}") for n in ("files", "models", "rows"))
stage1, stage2, stage3, stage4 = (importlib.import_module(n) for n in
                                  ("01_extract", "02_select_features", "03_train_head", "04_evaluate"))
cut = importlib.import_module("align").cut
RESULTS = ROOT / "benchmarks/results/reward_models.json"
FROZEN_JOBS = ("heads", "tokens")
FROZEN = ("sparserm", "searched", "dense", "dense_last", "mlp", "words", "swift", "likelihood")
RATES = {"full": (1e-5, 3e-5, 1e-4), "lora": (1e-4, 3e-4, 1e-3)}
SAME = ("model", "layer", "sae", "max_length", "epochs", "threads", "dev_pairs", "test_pairs", "other_pairs")       # in one --out folder
SIDES, DEV, TEST = stage4.SIDES, stage1.DEV, stage1.TEST
PATIENCE = 100          # epochs: with few train pairs an epoch is one step, and 20 of them stop a head before it has begun
SETTINGS = {"lr": 0.01, "weight_decay": 0.1, "epochs": 200, "patience": PATIENCE}         # of stage 3 otherwise


def searched(columns):
    """{name: columns of z or of scores} → options for dev: with each L2 penalty, and a step of 0.01 or, where many dimensions
    go together, 0.001."""
    return {f"{name}{d:g}, {lr:g}": {**of, "weight_decay": d, "lr": lr} for name, of in columns.items() for d in stage4.DENSE
            for lr in (0.01, 0.001)}


WHOLE = searched({"": {"columns": slice(None)}})


# ---------------------------------------------------------------- the pairs, the same for all

def cut_response(tokenizer, prompt, response, most):
    """A response short enough that prompt and response have at most `most` tokens, where the prompt may have half of them."""
    room = max(most // 2, most - len(stage1.render(tokenizer, prompt, "x", most).ids)) - 2
    offsets = tokenizer(response, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return response if len(offsets) <= room else response[:offsets[room - 1][1]]


def some(rows, count):
    """About `count` of the rows, whole questions, in an order that no file decides."""
    return cut(sorted(rows, key=lambda r: (stage1.hash_number("benchmark " + r["question"]), r["id"])), count)[0]


def prepare(file, run, train_pairs, args):
    """A file of pairs → run/cut.jsonl with `train_pairs` train pairs, and stages 1 to 3 on it."""
    tokenizer, rows = stage1.load_tokenizer(args.model), []
    for n, (_, raw) in enumerate(stage1.read_rows(file)):
        for prompt, *both in rows_of.usable_pairs(tokenizer, raw, None, None)[0]:
            chosen, rejected = (cut_response(tokenizer, prompt, text, args.max_length) for text in both)
            rows.append({"id": f"{n}-{raw.get('id', '')}", "prompt": prompt, "chosen": chosen, "rejected": rejected,
                         "question": stage1.question_of(prompt), "split": stage1.split_of(prompt),
                         "cut": (chosen != both[0]) + (rejected != both[1])})
    counts = {"train": train_pairs, "dev": args.dev_pairs, "test": args.test_pairs}
    kept = [row for split, count in counts.items() for row in some([r for r in rows if r["split"] == split], count)]
    files.write_rows(run / "cut.jsonl", [{n: r[n] for n in ("id", "prompt", "chosen", "rejected")} for r in kept])
    top = stage1.load_config(args.model).num_hidden_layers - 1
    extract = ["--pairs", run / "cut.jsonl", "--model", args.model, "--layer", args.layer, top, "--max-length", args.max_length]
    select, train = ["--sae", args.sae, "--layer", args.layer], ["--patience", PATIENCE]
    peak = 0
    for script, more in (("01_extract.py", extract), ("02_select_features.py", select), ("03_train_head.py", train)):
        process = subprocess.Popen([sys.executable, ROOT / script, "--run", run, *map(str, more)], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise files.UserError(f"{script} failed · {run} · its own line above says why")
        peak = max(peak, usage.ru_maxrss / 2**20)
    done = {"peak_gib": peak, "cut": sum(r["cut"] for r in kept), "texts": 2 * len(kept)}
    files.write_text(run / "prepared.json", json.dumps(done) + "\n")


def load_pairs(run):
    """The pairs of a prepared run, by split → {train, dev, test: rows}."""
    rows = [json.loads(line) for line in open(run / "pairs.jsonl", encoding="utf-8")]
    return {split: [r for r in rows if r["split"] == split] for split in stage1.SPLITS}


def rendered(tokenizer, rows, most):
    """Rows → Texts of stage 1: chosen, rejected, chosen …"""
    return [stage1.render(tokenizer, r["prompt"], r[side], most) for r in rows for side in SIDES]


# ---------------------------------------------------------------- fine-tuned peers

def final_norm(model):
    """The norm between the last block and the output matrix or head."""
    base = getattr(model, model.base_model_prefix)
    return next(getattr(base, name) for name in ("norm", "ln_f", "final_layer_norm", "final_layernorm") if hasattr(base, name))


def last_rewards(backbone, texts):
    """Rewards of a sequence classifier with one label, packed as in stage 1: its last block's output at the last token [n, d], then
    its own final norm and head → [n]."""
    hidden = stage1.residuals(backbone, texts, [len(backbone.blocks) - 1], "last")[0]
    with torch.inference_mode():
        return backbone.model.score(final_norm(backbone.model)(hidden))[:, 0].float()


def fine_tune(job, rows, tokenizer):
    """TRL's RewardTrainer on tokenised pairs → (the model with its LoRA merged, trained parameters, seconds of training). A step is
    8 pairs, read one at a time: on a CPU nothing is gained by padding pairs to one length."""
    datasets, peft, transformers, trl = (importlib.import_module(n) for n in ("datasets", "peft", "transformers", "trl"))
    texts = rendered(tokenizer, rows, job["max_length"])
    if any(text.ids[-1] == tokenizer.pad_token_id for text in texts):
        raise files.UserError("texts end with the pad token, so RewardTrainer would read another one · the chat template · set another pad")
    data = datasets.Dataset.from_list([{"chosen_ids": a.ids, "rejected_ids": b.ids} for a, b in zip(texts[::2], texts[1::2])])
    transformers.set_seed(job["seed"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(models.locate_model(job["model"]), num_labels=1,
                                                                            dtype=torch.float32)
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS") if job["method"] == "lora" else None
    settings = trl.RewardConfig(
        output_dir=str(Path(job["out"]) / "trainer" / str(os.getpid())), learning_rate=job["lr"], num_train_epochs=job["epochs"],
        per_device_train_batch_size=1, gradient_accumulation_steps=8, warmup_steps=max(1, len(rows) // 80), seed=job["seed"],
        max_length=None, bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        logging_steps=20)
    trainer = trl.RewardTrainer(model=model, args=settings, train_dataset=data, peft_config=lora, processing_class=tokenizer)
    trained, started = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad), time.process_time()
    trainer.train()
    return (trainer.model.merge_and_unload() if lora else trainer.model), trained, time.process_time() - started


def run_peer(job):
    """One fit of `full` or `lora` → its results."""
    tokenizer, pairs = stage1.load_tokenizer(job["model"]), load_pairs(Path(job["run"]))
    train = [r | {"question": stage1.question_of(r["prompt"])} for r in pairs["train"]]
    train = some(train, job["n"]) if job["search"] else train
    model, trained, seconds = fine_tune(job, train, tokenizer)
    backbone = stage1.make_backbone(model, tokenizer, {"model": job["model"]})
    texts = lambda rows: rendered(tokenizer, rows, job["max_length"])
    differ = lambda rows: torch.sub(*last_rewards(backbone, texts(rows)).view(-1, 2).T).tolist()
    found = {"pairs": len(train), "dev": differ(pairs["dev"]), "test": {}, "trained": trained, "seconds": seconds}
    if not job["search"]:
        found["test"][job["set"]] = differ(pairs["test"])
        found["texts_a_second"] = speed(lambda some: last_rewards(backbone, some), texts(pairs["test"]))
        for name, run in job["others"].items() if job["seed"] == 0 else ():
            found["test"][name] = differ(load_pairs(Path(run))["test"][:job["other_pairs"]])
    return found


def speed(read, texts, count=128):
    """Rendered texts a second of processor time, on the last `count` of them, after a first call on a few."""
    read(texts[-8:])
    started = time.process_time()
    read(texts[-count:])
    return len(texts[-count:]) / (time.process_time() - started)


# ---------------------------------------------------------------- methods on the frozen backbone

class Tokens:
    """What the frozen backbone makes of many texts, in one pass: block L's output at every response token `z` [T, d], and the
    log-likelihood of the response and its end mark: `sums`, `counts` [n]."""

    def __init__(self, backbone, texts, layer):
        last, parts = len(backbone.blocks) - 1, [None] * len(texts)
        norm, matrix = final_norm(backbone.model), backbone.model.get_output_embeddings()
        self.sums, self.counts = np.zeros(len(texts)), np.array([t.eot + 1 - t.first for t in texts])
        for members, (hidden, top) in stage1.hidden_rows(backbone, [t.ids for t in texts], [layer, last]):
            for i, path in members:
                text, path = texts[i], torch.from_numpy(path)
                parts[i] = hidden[path[text.first:text.last]].float()
                with torch.inference_mode():                # each token is told by the one before
                    told = matrix(norm(top[path[text.first - 1:text.eot]])).float().log_softmax(-1)
                wanted = torch.tensor(text.ids[text.first:text.eot + 1])
                self.sums[i] = float(told.gather(1, wanted[:, None]).double().sum())
        self.first = np.concatenate([[0], np.cumsum([len(p) for p in parts])])
        self.z = torch.cat(parts)

    def some(self, texts):
        """The same of some of the texts."""
        found, (places, _) = copy.copy(self), self.owner(texts)
        found.z, found.first = self.z[places], np.concatenate([[0], np.cumsum(self.first[texts + 1] - self.first[texts])])
        found.sums, found.counts = self.sums[texts], self.counts[texts]
        return found

    def owner(self, texts):
        """Some texts (indices) → (places of their tokens in z, which of the texts each belongs to)."""
        lengths = self.first[texts + 1] - self.first[texts]
        places = np.concatenate([np.arange(self.first[t], self.first[t + 1]) for t in texts])
        return torch.from_numpy(places), torch.from_numpy(np.repeat(np.arange(len(texts)), lengths))


def gated_rewards(weights, z, owner, count):
    """Σ σ(g_t) r_t / Σ σ(g_t) over the tokens of each text, (g_t, r_t) = z_t W + b: z [T, d], owner [T] → [count]."""
    gate, reward = (z @ weights["w"] + weights["b"]).unbind(1)
    gate = torch.sigmoid(gate)
    return torch.zeros(count).index_add(0, owner, gate * reward) / torch.zeros(count).index_add(0, owner, gate)


def fit_swift(tokens, split, decays=(0.001, 0.01, 0.1), lr=0.01, epochs=200, patience=20, batch=64):
    """Bradley-Terry on gated token rewards, z standardised on train; the L2 penalty and when to stop by dev → (read(tokens) →
    r_chosen - r_rejected [n], trained parameters)."""
    seen = tokens.z[tokens.owner(both_sides(split == stage1.TRAIN))[0]]
    mean, std, best, kept = seen.mean(0), seen.std(0) + 1e-6, float("inf"), None

    def rewards(weights, tokens, pairs):
        places, owner = tokens.owner(np.stack([2 * pairs, 2 * pairs + 1], 1).flatten())
        return gated_rewards(weights, (tokens.z[places] - mean) / std, owner, 2 * len(pairs)).view(-1, 2).unbind(1)
    train, dev = ((split == s).nonzero().flatten().numpy() for s in (stage1.TRAIN, DEV))
    for decay in decays:
        generator, since = torch.Generator().manual_seed(0), 0
        weights = {"w": torch.zeros(len(mean), 2, requires_grad=True), "b": torch.zeros(2, requires_grad=True)}
        adam, lowest = torch.optim.Adam(weights.values(), lr=lr), float("inf")
        for _ in range(epochs):
            for pick in torch.randperm(len(train), generator=generator).split(batch):
                loss = stage3.bradley_terry_loss(*rewards(weights, tokens, train[pick.numpy()])) + decay / 2 * weights["w"].square().sum()
                adam.zero_grad()
                loss.backward()
                adam.step()
            with torch.no_grad():
                value = float(stage3.bradley_terry_loss(*rewards(weights, tokens, dev)))
            since = 0 if value < lowest - 1e-5 else since + 1
            lowest = min(lowest, value)
            if value < best:
                best, kept = value, {n: p.detach().clone() for n, p in weights.items()}
            if since > patience:
                break
    return lambda tokens: torch.sub(*rewards(kept, tokens, np.arange((len(tokens.first) - 1) // 2))), 2 * len(mean) + 2


class Fits:
    """Fits methods on the pairs of a run and reads them on dev and on test pairs. views: {set, or None for the own pairs: what a
    method may see of it}; a method's view makes (chosen, rejected) of that."""

    def __init__(self, split, views):
        self.split, self.views, self.found = split, views, {}

    def add(self, name, fit, view, place="to L"):
        """fit(*view) → (read, trained); read(*view) → r_chosen - r_rejected. place: how far the backbone has to read for it."""
        started = time.process_time()
        read, trained = fit(*view(self.views[None]))
        seconds = time.process_time() - started
        differences = {of: [float(d) for d in read(*view(seen))] for of, seen in self.views.items()}
        self.found[name] = {"dev": [d for d, s in zip(differences.pop(None), self.split) if s == DEV], "test": differences,
                            "fit_seconds": seconds, "trained": trained, "place": place}


def activations(run, layer, test=None):
    """The pairs of a run with z of a layer; only their first `test` test pairs."""
    pairs = stage4.Pairs(run, stage2.shard_files(run, layer)[0])
    if test is None:
        return pairs
    return pairs.part((pairs.split == TEST) & ((pairs.split == TEST).cumsum(0) <= test))


def run_heads(job):
    """The methods that read stage 1's activations, without the backbone → {method: its results}."""
    run, layer, backbone = Path(job["run"]), job["layer"], stage1.load_backbone(job["model"])
    reward, (features, meta) = (stage3.RewardModel(*files.load_stage(run / "reward_head.safetensors"), None),
                                files.load_stage(run / "features.safetensors"))
    top, norm = len(backbone.blocks) - 1, final_norm(backbone.model)
    at = lambda layer: {None: activations(run, layer), job["set"]: activations(run, layer, 10**9),
                        **{name: activations(Path(other), layer, job["other_pairs"]) for name, other in job["others"].items()}}
    below, above = Fits(split := activations(run, layer).split, at(layer)), Fits(split, at(top))
    z = lambda pairs: pairs.z

    def head(options=WHOLE, seeds=range(5), scale=True, **more):
        def fit(chosen, rejected):
            _, weights, read = stage4.fit_control(chosen, rejected, split, options, {**SETTINGS, **more}, seeds, scale)
            return read, stage3.trained_parameters(weights)
        return fit
    responses = lambda pairs: [[r[side] for r in pairs.pairs] for side in SIDES]
    grams = stage4.word_features(responses(below.views[None]), split)
    below.add("sparserm", lambda *_: sparserm(reward, run, layer), z)
    below.add("searched", head(searched({f"K {k}, ": of for k, of in stage3.k_options(meta["k"]).items()})),
              lambda pairs: stage4.score_pairs(pairs, features["directions"]))
    below.add("dense", head(), z)
    below.add("mlp", head(kind="mlp", hidden=512), z)
    below.add("words", head(stage4.DENSE, (0,), scale=False), lambda pairs: grams(responses(pairs)), None)
    above.add("dense_last", head(), lambda pairs: [norm(z.to(backbone.device, backbone.model.dtype)).float().cpu() for z in pairs.z],
              "to the top")
    below.found["sparserm"]["k"], backbone.pack = reward.meta["k"], "pad"
    texts = rendered(backbone.tokenizer, below.views[None].pairs, job["max_length"])
    below.found["sparserm"]["padded"] = speed(lambda some: stage1.residuals(backbone, some, [layer], "last"), texts)
    return below.found | above.found


def run_tokens(job):
    """The methods that read more than one token of the frozen backbone, and how fast it reads → {method: its results}."""
    run, layer = Path(job["run"]), job["layer"]
    backbone, pairs = stage1.load_backbone(job["model"]), activations(run, layer)
    texts = rendered(backbone.tokenizer, pairs.pairs, job["max_length"])
    rate = {place: speed(lambda some, block=block: stage1.residuals(backbone, some, [block], "last"), texts)
            for place, block in (("to L", layer), ("to the top", len(backbone.blocks) - 1))}
    tokens = Tokens(backbone, texts, layer)
    others = {name: load_pairs(Path(other))["test"][:job["other_pairs"]] for name, other in job["others"].items()}
    fits = Fits(pairs.split, {None: tokens, job["set"]: tokens.some(both_sides(pairs.split == TEST)), **{
        name: Tokens(backbone, rendered(backbone.tokenizer, rows, job["max_length"]), layer) for name, rows in others.items()}})
    fits.add("swift", lambda tokens: fit_swift(tokens, pairs.split), lambda tokens: (tokens,))
    sides = lambda x: (x[0::2], x[1::2])
    for name, view in (("sum", lambda t: sides(t.sums)), ("mean", lambda t: sides(t.sums / t.counts))):
        fits.add(name, lambda *_: (np.subtract, 0), view, "to the top")
    way = max(("sum", "mean"), key=lambda name: np.mean(np.array(fits.found[name]["dev"]) > 0))
    return {"swift": fits.found["swift"], "likelihood": {**fits.found[way], "way": way}, "rate": rate}


def both_sides(pairs):
    """Which pairs (bool [n]) → the places of their texts: chosen, rejected, chosen …"""
    at = pairs.nonzero().flatten().numpy()
    return np.stack([2 * at, 2 * at + 1], 1).flatten()


def sparserm(reward, run, layer):
    """Select and train once more, for the time it takes; the head must be that of the run → (read, trained parameters)."""
    given = sys.argv
    with tempfile.TemporaryDirectory() as folder:
        for part in ("pairs.jsonl", "activations"):
            (Path(folder) / part).symlink_to((run / part).resolve())
        for script, more in ((stage2, ["--sae", reward.meta["sae"], "--layer", layer]), (stage3, ["--patience", PATIENCE])):
            sys.argv = [script.__name__, "--run", folder, *map(str, more)]
            script.main()
        again = files.load_stage(Path(folder) / "reward_head.safetensors")[0]
    sys.argv = given
    if again["w1"].shape != reward.tensors["w1"].shape or not torch.allclose(again["w1"], reward.tensors["w1"], atol=1e-3):
        raise files.UserError(f"trained again, the head is another one · {run} · delete this folder")
    return lambda chosen, rejected: reward.reward_of(chosen) - reward.reward_of(rejected), stage3.trained_parameters(reward.head)


# ---------------------------------------------------------------- jobs

def job_path(job):
    """Where a job's results lie."""
    more = f"-lr{job['lr']:g}-seed{job['seed']}" + ("-search" if job["search"] else "") if "lr" in job else ""
    return Path(job["out"]) / "jobs" / f"{job['set']}-{job['n']}-{job['method']}{more}.json"


def do(job, args):
    """Run one job in a process of its own, unless it is done → its results; None where --finished asks only for what is there."""
    path = job_path(job)
    if not path.exists() and not args.finished:
        print(f"{path.stem} …", file=sys.stderr, flush=True)
        threads = {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        subprocess.run([sys.executable, __file__, "--job", json.dumps(job)], check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false"})
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def run_job(job):
    """The work of one job, in its own process."""
    work = {"heads": run_heads, "tokens": run_tokens}.get(job["method"])
    found = work(job) if work else {job["method"]: run_peer(job)}
    if not work:
        found[job["method"]]["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    files.write_text(job_path(job), json.dumps(found, sort_keys=True) + "\n")


def nll(differences, temperature):
    """Negative log-likelihood of r_chosen - r_rejected → float."""
    return float(F.softplus(-torch.tensor(differences) / temperature).mean())


def temperature_of(row):
    """Dev's own temperature, for every method by the same rule."""
    return stage3.fit_temperature(torch.tensor(row["dev"]))


def same_settings(path, sets, args):
    """Refuse to mix jobs of other settings or data in one folder → writes down these, for once something is done in it."""
    now = {**{n: getattr(args, n) for n in SAME}, "sets": {name: files.file_hash(file) for name, file in sets.items()}}
    if path.exists() and json.loads(path.read_text("utf-8")) != now:
        raise files.UserError(f"its jobs were made with other settings or data · {path} · pass another --out")
    return lambda: args.finished or files.write_text(path, json.dumps(now, indent=1, sort_keys=True) + "\n")


def settled(jobs):
    """Wait for all jobs; the first that fails raises at once."""
    for job in concurrent.futures.as_completed(jobs):
        job.result()


def all_jobs(args):
    """Run what is not done, the cheap jobs first → ({(set, n): {method: [results of each seed]}}, {(set, n): run}, learning rates)."""
    out, sets = Path(args.out), dict(s.split("=", 1) for s in args.sets)
    each = lambda values: dict(zip(sets, values if len(values) > 1 else values * len(sets), strict=True))
    train, search, seeds, first = each(args.train_pairs), each(args.search_pairs), each(args.seeds), next(iter(sets))
    sizes = {name: sorted({train[name], *(n for n in args.curve if name == first and n < train[name])}) for name in sets}
    runs = {(name, n): out / f"{name}-{n}" for name in sets for n in sizes[name]}
    write_down = same_settings(out / "settings.json", sets, args)
    for (name, n), run in runs.items():
        if not (run / "prepared.json").exists() and not args.finished:
            print(f"stages 1 to 3: {run.name}", file=sys.stderr, flush=True)
            prepare(sets[name], run, n, args)
        write_down()
    runs = {key: run for key, run in runs.items() if (run / "prepared.json").exists()}
    pool = concurrent.futures.ThreadPoolExecutor(args.workers)

    def submit(name, n, method, **more):
        job = {**{key: getattr(args, key) for key in ("model", "layer", "max_length", "epochs", "out", "other_pairs")}, **more,
               "set": name, "n": n, "method": method, "run": str(runs[name, n if (name, n) in runs else train[name]]),
               "others": {other: str(run) for (other, m), run in runs.items() if other != name and m == train[other] and n == train[name]}}
        return pool.submit(do, job, args)
    try:
        return gather(args, submit, runs, {"train": train, "search": search, "seeds": seeds})
    finally:
        pool.shutdown(cancel_futures=True)          # Ctrl-C or a failed job: the waiting ones do not start


def frozen_rows(heads, tokens, pairs):
    """The results of the two frozen jobs of a run → {method: [its results]}: what it takes to read train and dev comes to the fit."""
    rate, rows = tokens["rate"], {name: row for name, row in (heads | tokens).items() if name != "rate"}
    for name, row in rows.items():
        read = 2 * len(pairs["train"] + pairs["dev"]) / rate[row["place"]] if row["place"] and name != "likelihood" else 0
        row |= {"seconds": row["fit_seconds"] + read if row["trained"] else 0.0, "texts_a_second": rate.get(row["place"])}
        if "padded" in row:
            row["seconds_padded"] = row["fit_seconds"] + read * rate["to L"] / row["padded"]
    return {name: [row] for name, row in rows.items()}


def gather(args, submit, runs, plan):
    """Submit all jobs, the final fits of full and lora when their learning rates are known → as all_jobs."""
    train, search, seeds, first = plan["train"], plan["search"], plan["seeds"], next(iter(plan["train"]))
    sets = [name for name in train if (name, train[name]) in runs]
    frozen = {key: [submit(*key, method) for method in FROZEN_JOBS] for key in runs}
    trials = {(name, method, lr): submit(name, search[name], method, lr=lr, seed=0, search=True)
              for name in sets for method in RATES for lr in RATES[method] if search[name] and not args.frozen}
    settled([job for jobs in (*frozen.values(), trials.values()) for job in jobs])
    tried, rates = {key: job.result()[key[1]] for key, job in trials.items() if job.result()}, {}
    for name, method in itertools.product(sets, RATES):
        rows = {lr: tried.get((name if search[name] else first, method, lr)) for lr in RATES[method]}
        if all(rows.values()):
            rates[name, method] = min(rows, key=lambda lr, rows=rows: nll(rows[lr]["dev"], temperature_of(rows[lr])))
    wanted = [(seed, n != train[name], name, n, method) for name, n in runs for method in RATES for seed in range(seeds[name])
              if (name, method) in rates and (seed == 0 or n == train[name])]
    final = {(name, n, method, seed): submit(name, n, method, lr=rates[name, method], seed=seed, search=False)
             for seed, _, name, n, method in sorted(wanted, key=lambda w: w[:2])}
    settled(final.values())
    found = {key: frozen_rows(*(job.result() for job in jobs), load_pairs(runs[key])) for key, jobs in frozen.items()
             if all(job.result() for job in jobs)}
    for (name, n, method, _), job in final.items():
        if job.result() and (name, n) in found:
            found[name, n].setdefault(method, []).append(job.result()[method])
    return found, runs, {name: {m: rates[name, m] for m in RATES if (name, m) in rates} for name in sets if rates}


# ---------------------------------------------------------------- figures and tables

def figures(found, runs, rates, args):
    """The results of all jobs → what the tables need."""
    pairs, result = {key: load_pairs(run) for key, run in runs.items()}, {}
    own = {name: pairs[name, max(n for other, n in runs if other == name)] for name, _ in runs}
    for (name, n), methods in found.items():
        groups = np.array([p["group"] for p in pairs[name, n]["test"]])
        ours = np.array([row["test"][name] for row in methods["sparserm"]])
        rows = {}
        for method, seeds in methods.items():
            d = np.array([row["test"][name] for row in seeds])
            rows[method] = {**stage4.summary(d, groups), "behind": stage4.gap(ours, d, groups),
                            "nll": float(np.mean([nll(row["test"][name], temperature_of(row)) for row in seeds])),
                            **{key: float(np.mean([row[key] for row in seeds])) for key in ("seconds", "trained")},
                            **{key: seeds[0].get(key) for key in ("texts_a_second", "peak_gib")},
                            **({"seconds_padded": seeds[0].get("seconds_padded")} if method == "sparserm" else {})}
            others = [other for other in own if other != name and all(other in row["test"] for row in (seeds[0], methods["sparserm"][0]))]
            if others:
                pooled = lambda row, others=others: np.concatenate([row["test"][other] for other in others])[None]
                where = np.concatenate([[p["group"] for p in own[other]["test"][:len(seeds[0]["test"][other])]] for other in others])
                rows[method]["others"] = {**stage4.summary(pooled(seeds[0]), where), "names": others,
                                          "behind": stage4.gap(pooled(methods["sparserm"][0]), pooled(seeds[0]), where)}
        prepared = json.loads((runs[name, n] / "prepared.json").read_text("utf-8"))
        rows["sparserm"]["peak_gib"] = prepared["peak_gib"]
        result.setdefault(name, {})[str(n)] = {"pairs": {split: len(rows) for split, rows in pairs[name, n].items()}, "methods": rows,
                                               "cut": prepared["cut"], "texts": prepared["texts"], "k": methods["sparserm"][0]["k"],
                                               "likelihood": methods["likelihood"][0]["way"]}
    settings = {key: getattr(args, key) for key in (*SAME, "train_pairs", "search_pairs", "seeds", "curve")} | {
        "model": Path(args.model).name, "sae": Path(args.sae).name, "rates": RATES, "torch": torch.__version__}
    return {"settings": settings, "rates": rates, "backbone_parameters": args.parameters, "sets": result}


NAMES = {"sparserm": "SparseRM", "searched": "SparseRM, L2 and rate by dev", "full": "full fine-tuning (TRL)",
         "lora": "LoRA (TRL, PEFT)", "dense": "dense head, block L", "dense_last": "dense head, last block", "mlp": "2-layer MLP on z",
         "swift": "SWIFT-style, block L", "words": "words", "likelihood": "log-likelihood"}


HOLD = importlib.import_module("does_it_hold")
cell, difference = HOLD.half, lambda row: HOLD.interval(row, "mean", "+")


def table(found):
    """The figures → markdown: a table for each set with all its train pairs, then the curve over their number."""
    text, parts = "", found["backbone_parameters"]
    for name, sizes in found["sets"].items():
        run = sizes[max(sizes, key=int)]
        counts, rows = run["pairs"], run["methods"]
        cut = f"{run['cut']} of {run['texts']:,} texts cut"
        text += HOLD.head_line(f"{name}: {counts['train']} train, {counts['test']} test pairs, {cut}", (
            "accuracy", "SparseRM minus it", "NLL", "other sets", "SparseRM minus it, there", "trained parameters", "seconds", "texts/s",
            "peak GiB"))
        for method in (m for m in NAMES if m in rows):
            row, other = rows[method], rows[method].get("others")
            text += HOLD.line(NAMES[method] + (f" ({len(row['seeds'])} seeds)" if len(row["seeds"]) > 1 else ""), [
                cell(row), "–" if method == "sparserm" else difference(row["behind"]), f"{row['nll']:.3f}", cell(other) if other else "–",
                difference(other["behind"]) if other and method != "sparserm" else "–",
                f"{row['trained']:,.0f} ({100 * row['trained'] / parts:.3g} %)" if row["trained"] else "0",
                *(f"{row[key]:{form}}" if row[key] else "–" for key, form in (("seconds", ",.0f"), ("texts_a_second", ".1f"),
                                                                              ("peak_gib", ".1f")))])
        text += "\n"
    for name, sizes in found["sets"].items():
        ns = sorted(sizes, key=int)
        if len(ns) > 1:
            text += HOLD.head_line(f"{name}, train pairs (full and LoRA: first seed)", [str(sizes[n]["pairs"]["train"]) for n in ns])
            for method in (m for m in NAMES if any(m in sizes[n]["methods"] for n in ns)):
                text += HOLD.line(NAMES[method], [curve_cell(sizes[n]["methods"].get(method)) for n in ns])
    return text


def curve_cell(row):
    """The first seed's accuracy; with its interval where there is no other seed."""
    return "–" if row is None else cell(row) if len(row["seeds"]) == 1 else f"{row['seeds'][0]:.3f}".replace("0.", ".", 1)


def headline(found):
    """The figures → markdown: accuracy on every set, SparseRM minus each, and what it costs on the first set."""
    sets = {name: sizes[max(sizes, key=int)] for name, sizes in found["sets"].items()}
    first, methods = next(iter(sets.values()))["methods"], [m for m in NAMES if m in next(iter(sets.values()))["methods"]]
    of = lambda method, write: [write(row["methods"][method]) if method in row["methods"] else "–" for row in sets.values()]
    costs = (f"{what} ({next(iter(sets))})" for what in ("parameters trained", "seconds to train", "texts scored a second"))
    text = HOLD.head_line("test accuracy", [*(f"{name}, {row['pairs']['train']} train pairs" for name, row in sets.items()), *costs])
    for method in methods:
        cost, share = first[method], 100 * first[method]["trained"] / found["backbone_parameters"]
        text += HOLD.line(NAMES[method], [*of(method, cell), f"{cost['trained']:,.0f}, {share:.3g} %" if cost["trained"] else "0",
                                          *(f"{cost[key]:,.0f}" if cost[key] else "–" for key in ("seconds", "texts_a_second"))])
    text += "\n" + HOLD.head_line("SparseRM minus", sets)
    for method in methods[1:]:
        text += HOLD.line(NAMES[method], of(method, lambda row: difference(row["behind"])))
    return text


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("sets", nargs="*", metavar="NAME=FILE")
    p.add_argument("--model", default="demo")
    p.add_argument("--layer", type=int, default=16)
    p.add_argument("--sae", default=str(ROOT / "assets/sae-smollm2-135m-layer16.safetensors"))
    p.add_argument("--train-pairs", type=int, nargs="+", default=[1000], help="at most; one number, or one a set (default 1000)")
    p.add_argument("--search-pairs", type=int, nargs="+", default=[300], help="for the learning rate; 0: the first set's (default 300)")
    p.add_argument("--seeds", type=int, nargs="+", default=[3], help="of full and lora (default 3)")
    p.add_argument("--curve", type=int, nargs="*", default=[100, 300], help="fewer train pairs, on the first set (default 100 300)")
    p.add_argument("--dev-pairs", type=int, default=150)
    p.add_argument("--test-pairs", type=int, default=400)
    p.add_argument("--other-pairs", type=int, default=200, help="test pairs of each other set (default 200)")
    p.add_argument("--max-length", type=int, default=256, help="tokens of a text (default 256)")
    p.add_argument("--epochs", type=float, default=1, help="of full and lora (default 1)")
    p.add_argument("--threads", type=int, default=1, help="of a job (default 1)")
    p.add_argument("--workers", type=int, default=2, help="jobs at once (default 2)")
    p.add_argument("--out", default="runs/reward-models")
    p.add_argument("--frozen", action="store_true", help="without full and lora")
    p.add_argument("--finished", action="store_true", help="run nothing: the figures of the jobs that are done")
    p.add_argument("--quick", action="store_true", help="60 train pairs, one seed, no curve: to see it work")
    p.add_argument("--write", action="store_true", help="into benchmarks/results/reward_models.json")
    p.add_argument("--tables", action="store_true", help="only print the tables of that file")
    p.add_argument("--job", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.job:
        return run_job(json.loads(args.job))
    if args.tables:
        return print(*(write(json.loads(RESULTS.read_text("utf-8"))) for write in (headline, table)), sep="\n")
    if not args.sets or not all("=" in s for s in args.sets):
        p.error("name the sets: NAME=FILE …")
    if args.search_pairs[0] == 0 and any(args.search_pairs):
        p.error("the first set needs --search-pairs: others take its learning rate")
    args.frozen |= not any(args.search_pairs)
    if args.quick and args.write:
        p.error("--quick is to see it work: nothing is written")
    if args.quick:
        args.train_pairs, args.search_pairs, args.seeds, args.curve, args.dev_pairs, args.test_pairs = [60], [24], [1], [], 40, 40
        args.out += "-quick"
    results, runs, rates = all_jobs(args)
    args.parameters = files.read_meta(next(iter(runs.values())) / "reward_head.safetensors")["parameters"]
    found = figures(results, runs, rates, args)
    if args.write:
        files.write_text(RESULTS, json.dumps(found, indent=1) + "\n")
    print(headline(found), table(found), sep="\n")


if __name__ == "__main__":
    stage1.run_main(main)
