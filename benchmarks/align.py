"""The paper's loop in small: does filtering noisy preference pairs by SparseRM make DPO better?

    python benchmarks/align.py --pairs truthfulqa.jsonl --questions truthfulqa_mc.jsonl --write

1. the train and dev questions of --pairs are cut in two: about 500 clean pairs for the reward
   model (stages 1 to 3 with their defaults, no pair held out), --train-pairs others for the policy
2. of the policy's pairs, a share --noise has its labels flipped
3. each filter drops some of them; what is left trains the policy: TRL's DPOTrainer, a LoRA of PEFT,
   one epoch
4. the aligned policy is read on the *test* questions: on how many pairs the chosen answer is more
   likely than the rejected one (sum of token log-likelihoods, with the end mark), on how many its
   log-ratio to the unaligned model is larger (DPO's implicit reward), and MC1: for how many of
   --questions the right candidate is the most likely one

    unaligned       the policy as it is
    none            all pairs, noise included
    sparserm        `05_best_of_n.py pairs --filter`: drops where the rejected side scores as high
                    or higher (the paper's filter)
    random          as many pairs as sparserm keeps, drawn at random
    length          drops where the length rule that wins on the reward model's pairs says otherwise
    dense           drops where a Bradley-Terry head on the whole hidden state, trained on the same
                    pairs, says otherwise
    oracle          drops exactly the flipped pairs

The learning rate is the one of --lr with which `none` is best on the policy-free dev pairs
(implicit reward, first seed). A seed draws the flips, the random filter, the LoRA's start and the
order of the pairs. Finished runs lie in --out and are not run again.

--rounds 2 goes on with the first seed. Round 1 is DPO on the pairs that `sparserm` keeps; each
later round is on the policy's own answers: it answers the prompts of its training pairs, --answers
times each, SparseRM scores them, the best and the worst of a prompt become a pair (none that was
cut off), and DPO goes on from there. After each round the policy is read on the test questions as
above, and answers them: what does SparseRM say of these answers, and what a second judge, a dense
head on z that was trained on the dev pairs alone? How many lie outside of what the reward model was
trained on, how many were cut off, how long are they, how many differ?
"""

import functools
import gc
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from benchmarks.common import (
    DEMO_SAE,
    ROOT,
    SIDES,
    cut,
    head_line,
    interval,
    line,
    stage1,
    stage2,
    stage3,
    stage4,
)
from parts.files import (
    UserError,
    folder_moved_into_place,
    run_main,
    write_rows,
    write_text,
)
from parts.models import load_tokenizer, locate_model
from parts.rows import pairs_of_row, read_rows

FILTERS = ("none", "sparserm", "random", "length", "dense", "oracle")
METRICS = {"likelihood": "chosen more likely", "implicit": "implicit reward", "mc1": "MC1"}
RECORDED = ("noise", "seeds", "batch", "beta", "layer", "bf16", "answers")   # into the results
ANSWER_TOKENS = 64          # of a sampled answer, at most


# ---------------------------------------------------------------- data

def read_pairs(path):
    """--pairs → (pairs of the reward model and the policy by question, test pairs)."""
    rows = []
    for number, (_, raw) in enumerate(read_rows(path)):
        name = f"{raw.get('id', number)}"
        rows += [common.pair_row(name, *pair) for pair in pairs_of_row(raw)]
    test = [row for row in rows if row["split"] == "test"]
    rest = [row for row in rows if row["split"] != "test"]
    rest.sort(key=lambda row: stage1.hash_number(f"align {row['question']}"))
    return rest, test


def flipped(rows, noise, seed):
    """A share `noise` of the pairs with their sides swapped; `flipped` says which."""
    order = np.random.default_rng([seed, 1]).permutation(len(rows))
    swap = set(order[:round(noise * len(rows))].tolist())
    found = []
    for n, row in enumerate(rows):
        row = {**row, "flipped": n in swap}
        if n in swap:
            row |= {"chosen": row["rejected"], "rejected": row["chosen"]}
        found.append(row)
    return found


# ---------------------------------------------------------------- filters

def dense_differences(pairs, reward, rows):
    """r_chosen - r_rejected of a Bradley-Terry head on z, trained on the reward model's pairs
    → [n]."""
    prompts = [row["prompt"] for row in rows]
    z = [reward.hidden(prompts, [row[side] for row in rows]) for side in SIDES]
    return common.fit_dense(pairs).differences(z).numpy()


def length_differences(pairs, rows):
    """Words of chosen minus rejected, with the sign that wins on the reward model's pairs (a draw:
    longer) → [n]; 0: as long."""
    longer = np.sign(stage4.longer_by(pairs)).sum()
    sign = 1 if longer >= 0 else -1
    words = [len(row["chosen"].split()) - len(row["rejected"].split()) for row in rows]
    return sign * np.array(words, float)


def kept_by(name, rows, dense, length, folder, seed):
    """A filter → the rows it keeps. dense, length: differences of those two filters [n]."""
    if name == "sparserm":
        return kept_by_sparserm(rows, folder, seed)
    if name == "random":
        size = len(common.read_json_rows(folder / f"kept-{seed}.jsonl"))
        order = np.random.default_rng([seed, 2]).permutation(len(rows))
        return [rows[n] for n in sorted(order[:size])]
    keep = {
        "none": np.ones(len(rows), bool),
        "oracle": np.array([not row["flipped"] for row in rows]),
        "dense": dense > 0,
        "length": length >= 0,
    }[name]
    return [row for row, kept in zip(rows, keep) if kept]


def kept_by_sparserm(rows, folder, seed):
    """As a user would: a file in, a file out."""
    noisy = folder / f"noisy-{seed}.jsonl"
    out = folder / f"kept-{seed}.jsonl"
    write_rows(noisy, rows)
    common.run_script("05_best_of_n.py", "pairs", "--filter", noisy,
                      "--reward", head_of(folder), "--out", out)
    names = {row["id"] for row in common.read_json_rows(out)}
    return [row for row in rows if row["id"] in names]


# ---------------------------------------------------------------- the policy

def align(rows, lr, seed, folder, args, start=None):
    """DPO with a LoRA on `rows`, one epoch → the merged model.

    start: folder of the policy to go on from, which is then DPO's reference; None: --model.
    """
    import datasets
    import peft
    import transformers
    import trl
    settings = trl.DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=args.batch, num_train_epochs=1,
        learning_rate=lr, beta=args.beta, warmup_steps=2, max_length=512, seed=seed,
        use_cpu=args.device == "cpu", bf16=args.bf16, gradient_checkpointing=False,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=10)
    lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    data = datasets.Dataset.from_list([as_messages(row) for row in rows])
    transformers.set_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        start or locate_model(args.model), dtype=torch.float32)
    trainer = trl.DPOTrainer(model=model, args=settings, train_dataset=data, peft_config=lora,
                             processing_class=load_tokenizer(args.model))
    trainer.train()
    merged = trainer.model.merge_and_unload()
    del trainer
    gc.collect()
    return merged


def as_messages(row):
    """A pair as TRL's trainers read it."""
    found = {}
    for name, role in (("prompt", "user"), ("chosen", "assistant"), ("rejected", "assistant")):
        found[name] = [{"role": role, "content": row[name]}]
    return found


def read_policy(backbone, pairs, questions):
    """A policy on pairs and questions →
    {chosen, rejected: sums [n]; mc1: 1 where the right candidate is the most likely}."""
    asked = []                          # one pass over all: the same questions stand in both
    for side in SIDES:
        asked += [(pair["prompt"], pair[side]) for pair in pairs]
    for question in questions:
        asked += [(question["prompt"], candidate) for candidate in question["candidates"]]
    sums, _ = common.log_likelihoods(backbone, *zip(*asked))

    found = {"chosen": sums[:len(pairs)].tolist(),
             "rejected": sums[len(pairs):2 * len(pairs)].tolist(),
             "mc1": []}
    done = 2 * len(pairs)
    for question in questions:
        of_candidates = sums[done:done + len(question["candidates"])]
        done += len(of_candidates)
        found["mc1"].append(question["labels"][int(np.argmax(of_candidates))])
    return found


def right(found, base):
    """What a policy gets right → {metric: array of 0 and 1}. base: the unaligned one."""
    chosen, rejected = [np.array(found[side]) for side in SIDES]
    base_chosen, base_rejected = [np.array(base[side]) for side in SIDES]
    return {"likelihood": chosen > rejected,
            "implicit": chosen - base_chosen > rejected - base_rejected,
            "mc1": np.array(found["mc1"])}


# ---------------------------------------------------------------- the loop

def once(path, make):
    """A JSON file, made if it is not there."""
    if not path.exists():
        write_text(path, json.dumps(make(), sort_keys=True) + "\n")
    return json.loads(path.read_text("utf-8"))


def head_of(folder):
    """The head of the reward model of an experiment."""
    return folder / "reward/reward_head.safetensors"


def train_reward(rows, folder, args):
    """Stages 1 to 3 on the reward model's clean pairs → RewardModel."""
    head = head_of(folder)
    run = head.parent
    if not head.exists():
        write_rows(folder / "clean.jsonl", rows)
        common.run_script("01_extract.py", "--run", run, "--pairs", folder / "clean.jsonl",
                          "--model", args.model, "--layer", args.layer, "--split", "1,0,0")
        common.run_script("02_select_features.py", "--run", run, "--sae", args.sae)
        common.run_script("03_train_head.py", "--run", run)
    return stage3.RewardModel.load(head)


class Experiment:
    """The data, the reward model and the unaligned policy; trains and reads policies."""

    def __init__(self, args):
        self.args = args
        self.folder = Path(args.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        rest, self.test = read_pairs(args.pairs)
        self.clean, rest = cut(rest, args.reward_pairs)
        self.source, self.dev = cut(rest, args.train_pairs)
        self.questions = common.unseen_questions(args.questions) if args.questions else []

        self.reward = train_reward(self.clean, self.folder, args)
        run = self.folder / "reward"
        paths, _ = stage2.shard_files(run)
        pairs = stage4.read_pairs(run, paths, self.reward.meta)
        self.seen = stage4.Pairs(**pairs)       # for the other filters

    def noisy(self, seed):
        """The policy's pairs with the flips of a seed."""
        return flipped(self.source, self.args.noise, seed)

    def unaligned(self, pairs, questions, name):
        """What the policy says before it is aligned, kept in a file of this name."""
        return once(self.folder / name,
                    lambda: read_policy(self.reward.backbone, pairs, questions))

    def trained(self, rows, lr, seed, pairs, questions):
        """Align a policy on `rows`, read it on pairs and questions."""
        model, seconds = common.timed(align, rows, lr, seed, self.folder / "trainer", self.args)
        backbone = stage1.make_backbone(model.to(self.args.device), self.reward.backbone.tokenizer,
                                        {"model": "aligned"})
        return {**read_policy(backbone, pairs, questions), "seconds": seconds, "pairs": len(rows),
                "flipped": sum(row["flipped"] for row in rows)}

    def search(self):
        """Each learning rate on dev, where there are several → {rate: share of pairs right}."""
        found = {}
        if len(self.args.lr) == 1:
            return found
        base = self.unaligned(self.dev, [], "unaligned-dev.json")
        noisy = self.noisy(0)
        for lr in self.args.lr:
            policy = once(self.folder / f"dev-lr{lr:g}.json",
                          lambda lr=lr: self.trained(noisy, lr, 0, self.dev, []))
            share = float(right(policy, base)["implicit"].mean())
            found[f"{lr:g}"] = share
            print(f"lr {lr:g}: implicit reward right on {share:.3f} of the dev pairs "
                  f"({policy['seconds']:.0f} s)", flush=True)
        return found

    def runs(self, lr, base):
        """Every filter with every seed → {filter: list of what the policies say}."""
        found = {name: [] for name in FILTERS}
        for seed in range(self.args.seeds):
            noisy = self.noisy(seed)
            dense = dense_differences(self.seen, self.reward, noisy)
            length = length_differences(self.seen, noisy)
            for name in FILTERS:
                rows = kept_by(name, noisy, dense, length, self.folder, seed)
                policy = once(
                    self.folder / f"{name}-{seed}-lr{lr:g}.json",
                    lambda rows=rows, seed=seed: self.trained(rows, lr, seed, self.test,
                                                              self.questions))
                found[name].append(policy)
                now = {metric: round(float(values.mean()), 3)
                       for metric, values in right(policy, base).items()}
                print(f"seed {seed} {name:<9} {len(rows)} pairs, {policy['flipped']} flipped: "
                      f"{now} ({policy['seconds']:.0f} s)", flush=True)
        return found

    def counts(self):
        """How many pairs and questions there are of each kind."""
        return {"reward": len(self.clean), "policy": len(self.source), "dev": len(self.dev),
                "test": len(self.test), "questions": len(self.questions)}


def experiment(args):
    """→ dict of all figures."""
    work = Experiment(args)
    counts = work.counts()
    print("{reward} clean pairs for the reward model, {policy} for the policy, {dev} dev, "
          "{test} test, {questions} test questions".format(**counts), flush=True)
    base = work.unaligned(work.test, work.questions, "unaligned.json")
    search = work.search()
    lr = float(max(search, key=search.get)) if search else args.lr[0]
    runs = work.runs(lr, base)
    settings = {name: getattr(args, name) for name in RECORDED}
    found = {"lr": lr, "search": search, **settings, "counts": counts,
             "filters": figures(runs, base, work.test, work.questions)}
    if args.rounds:
        found["rounds"] = judge_rounds(work, train_rounds(work, lr), base)
    return found


# ---------------------------------------------------------------- rounds

def round_name(work, lr, number):
    """What the files of a round are called; a policy of other settings has another name."""
    return f"round-{number}-lr{lr:g}-n{work.args.answers}"


def beside(folder, ending):
    """round-1-lr0.001-n4 → round-1-lr0.001-n4.json: the name may hold a dot, so no with_suffix."""
    return folder.parent / f"{folder.name}{ending}"


def train_rounds(work, lr):
    """The policies of all rounds, each trained from the one before → their folders."""
    folders = []
    for number in range(1, work.args.rounds + 1):
        before = folders[-1] if folders else None
        folder = work.folder / round_name(work, lr, number)
        if not folder.exists():
            if before:
                rows = own_answers(work, before)
            else:
                rows = kept_by_sparserm(work.noisy(0), work.folder, 0)
            model, seconds = common.timed(align, rows, lr, 0, work.folder / "trainer", work.args,
                                          before)
            write_text(beside(folder, ".pairs"), f"{len(rows)}\n")
            save_policy(model, load_tokenizer(work.args.model), folder)
            print(f"round {number}: {len(rows)} pairs ({seconds:.0f} s)", flush=True)
        folders.append(folder)
    return folders


def own_answers(work, policy):
    """The policy's answers to the prompts of its training pairs → pairs, best against worst."""
    name = f"{policy.name}.candidates"
    whole = work.folder / f"{name}.whole.jsonl"
    rows = [without_cut(row, work.reward.backbone.tokenizer)
            for row in sample(work, policy, work.source, name)]
    write_rows(whole, [row for row in rows if len(row["candidates"]) > 1])
    out = work.folder / f"{name}.pairs.jsonl"
    common.run_script("05_best_of_n.py", "pairs", "--candidates", whole, "--plain",
                      "--reward", head_of(work.folder), "--out", out)
    return common.read_json_rows(out)


def is_cut(text, tokenizer):
    """Did this answer end because it was too long?"""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) >= ANSWER_TOKENS - 1


def without_cut(row, tokenizer):
    """A row of candidates → {prompt, candidates}, those that ended by themselves."""
    whole = [text for text in row["candidates"] if not is_cut(text, tokenizer)]
    return {"prompt": row["prompt"], "candidates": whole}


def sample(work, policy, rows, name):
    """The policy's answers to the prompts of rows, with SparseRM's scores → rows of candidates."""
    prompts = work.folder / f"{name}.prompts.jsonl"
    write_rows(prompts, [{"prompt": prompt} for prompt in dict.fromkeys(r["prompt"] for r in rows)])
    out = work.folder / f"{name}.jsonl"
    whose = ["--policy", policy] if policy else []
    common.run_script("05_best_of_n.py", "sample", "--prompts", prompts, "--n", work.args.answers,
                      "--max-new-tokens", ANSWER_TOKENS, "--out", out, *whose,
                      "--reward", head_of(work.folder))
    return common.read_json_rows(out)


def save_policy(model, tokenizer, folder):
    """A merged model and its tokenizer into a folder, which is there whole or not at all."""
    with folder_moved_into_place(folder) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)


@functools.cache
def second_judge(work):
    """A dense head on z, trained on the dev pairs, which nothing else is trained on."""
    rows = work.dev
    prompts = [row["prompt"] for row in rows]
    z = []
    for side in SIDES:
        answers = [row[side] for row in rows]
        z.append(work.reward.hidden(prompts, answers))

    group = np.array([stage1.hash_number(row["question"]) for row in rows])
    zeros = np.zeros(len(rows), int)
    pairs = stage4.Pairs(z, split=torch.from_numpy(zeros), group=group, tokens=[zeros, zeros],
                         pairs=rows)
    return common.fit_dense(pairs)


def read_answers(work, policy, name):
    """What the policy answers to the test questions → a row an answer that can be scored:
    {prompt, text, words, reward, judge, outside, cut}."""
    tokenizer = work.reward.backbone.tokenizer
    asked = [{"prompt": question["prompt"]} for question in work.questions]
    rows = []
    for row in sample(work, policy, asked, f"{name}.answers"):
        columns = zip(row["candidates"], row["scores"], row["outside"])
        rows += [{"prompt": row["prompt"], "text": text, "words": len(text.split()),
                  "reward": score, "outside": outside, "cut": is_cut(text, tokenizer)}
                 for text, score, outside in columns if score is not None]
    z = work.reward.hidden([row["prompt"] for row in rows], [row["text"] for row in rows])
    [judged] = second_judge(work).rewards([z])
    for row, reward in zip(rows, judged.tolist()):
        row["judge"] = reward
    return rows


OF_ANSWERS = ("reward", "judge", "outside", "cut", "words")
IN_STD = ("reward", "judge")


def judge_rounds(work, folders, base):
    """The unaligned policy and that of each round → list of {metric: {mean, low, high, and from
    round 1 on `gain`: the same of what the round changed}, pairs, answers, distinct}."""
    unaligned = f"unaligned-n{work.args.answers}"
    measured = [(right(base, base), once(work.folder / f"{unaligned}.read.json",
                                         lambda: read_answers(work, None, unaligned)))]
    for folder in folders:
        policy = once(beside(folder, ".json"),
                      lambda folder=folder: read_policy(stage1.load_backbone(str(folder)),
                                                        work.test, work.questions))
        answers = once(beside(folder, ".read.json"),
                       lambda folder=folder: read_answers(work, folder, folder.name))
        measured.append((right(policy, base), answers))

    groups = {"likelihood": [row["question"] for row in work.test],
              "mc1": [stage1.question_of(question["prompt"]) for question in work.questions]}
    groups["implicit"] = groups["likelihood"]
    found = figures_of_rounds(measured, groups)
    for row, folder in zip(found[1:], folders):
        row["pairs"] = int(beside(folder, ".pairs").read_text())
    return found


def figures_of_rounds(measured, groups):
    """[(what a policy gets right, its answers)], the first unaligned → the figures of judge_rounds.

    Both rewards are differences to the unaligned policy's answer to the same prompt, in the std of
    its answers.
    """
    prompts, tables = by_prompt([answers for _, answers in measured])
    first = measured[0][1]
    before = {}
    found = []
    for number, (correct, answers) in enumerate(measured):
        columns = {name: (np.asarray(correct[name], float), groups[name]) for name in METRICS}
        for name in OF_ANSWERS:
            values = tables[number][name]
            if name in IN_STD:
                std = np.std([answer[name] for answer in first])
                values = (values - tables[0][name]) / std
            columns[name] = (values, prompts)
        row = {}
        for name, (values, of_group) in columns.items():
            row[name] = common.mean_interval(values, of_group)
            if number:
                row[name]["gain"] = common.gap_interval(values - before[name], of_group)
            before[name] = values
        row["answers"] = len(answers)
        row["distinct"] = len({answer["text"] for answer in answers}) / len(answers)
        found.append(row)
    return found


def by_prompt(rounds):
    """Answers of several policies → (the prompts that all have answers to, for each policy
    {column: its mean over the answers to each of these prompts})."""
    means = []
    for answers in rounds:
        of_prompt = {}
        for row in answers:
            of_prompt.setdefault(row["prompt"], []).append([float(row[name])
                                                            for name in OF_ANSWERS])
        means.append({prompt: np.mean(rows, axis=0) for prompt, rows in of_prompt.items()})
    prompts = [prompt for prompt in means[0] if all(prompt in found for found in means)]
    tables = []
    for found in means:
        values = np.array([found[prompt] for prompt in prompts])            # [prompts, columns]
        tables.append(dict(zip(OF_ANSWERS, values.T)))
    return prompts, tables


TITLES = METRICS | {"reward": "SparseRM's reward", "judge": "the second judge's",
                    "outside": "outside", "cut": "cut off", "words": "words"}


def rounds_table(found):
    """The figures of the rounds → markdown."""
    unaligned, *rounds = found["rounds"]
    text = head_line("policy", ["pairs of the round", *TITLES.values(), "distinct answers"])
    text += line("unaligned", ["–", *cells_of_round(unaligned, is_first=True)])
    for number, row in enumerate(rounds, 1):
        text += line(f"after round {number}", [str(row.get("pairs", "–")), *cells_of_round(row)])

    text += "\n" + head_line("what the round changed", TITLES.values())
    for number, row in enumerate(rounds, 1):
        gains = gains_of_round(number, row)
        cells = [common.difference(gains[name]) if name in gains else "–" for name in TITLES]
        text += line(f"round {number}", cells)
    return text


def cells_of_round(row, is_first=False):
    """The cells of a policy. is_first: unaligned, which the others are compared with."""
    cells = {}
    for name in METRICS:
        cells[name] = interval(row[name], "mean")
    for name in IN_STD:
        cells[name] = "0" if is_first else common.difference(row[name])
    for name in ("outside", "cut"):
        cells[name] = f"{row[name]['mean']:.1%}"
    if is_first:
        cells["implicit"] = "–"

    words = row["words"]
    cells["words"] = f"{words['mean']:.1f} [{words['low']:.1f}, {words['high']:.1f}]"
    in_order = [cells[name] for name in TITLES]
    return [*in_order, f"{row['distinct']:.0%} of {row['answers']}"]


def gains_of_round(number, row):
    """What a round changed → {metric: difference}; the implicit reward begins with the first."""
    gains = {name: row[name]["gain"] for name in TITLES}
    if number == 1:
        del gains["implicit"]
    return gains


def claim(found):
    """What each filter changed, in words → markdown."""
    kept = found["filters"]["sparserm"]
    flips = np.mean(found["filters"]["none"]["flipped"])
    right_ones = np.mean(found["filters"]["none"]["kept"]) - flips
    caught = 1 - np.mean(kept["flipped"]) / flips
    lost = 1 - (np.mean(kept["kept"]) - np.mean(kept["flipped"])) / right_ones
    text = (f"* SparseRM's filter takes out {caught:.0%} of the flipped labels and {lost:.0%} of "
            "the right ones.\n")
    for name in ("sparserm", "dense", "oracle", "random", "length"):
        gaps = {words: found["filters"][name][metric]["minus_none"]
                for metric, words in METRICS.items()}
        text += f"* *{name}*: " + in_words(gaps, {1: "clearly better than no filter by",
                                                  -1: "clearly worse by",
                                                  0: "no measurable difference by"})
    return text


def in_words(gaps, said):
    """{name: difference}, what is said of each sign → the end of a line, names by sign."""
    found = common.by_sign(gaps)
    parts = [f"{words} {', '.join(found[sign])}" for sign, words in said.items() if found[sign]]
    return f"{'; '.join(parts)}.\n"


def rounds_claim(found):
    """What each round changed, in words → markdown."""
    text = ""
    for number, row in enumerate(found["rounds"][1:], 1):
        gains = {TITLES[name]: gap for name, gap in gains_of_round(number, row).items()}
        text += f"* Round {number}: " + in_words(gains, {1: "clearly up:", -1: "clearly down:",
                                                         0: "no measurable change:"})
    return text


# ---------------------------------------------------------------- figures

def figures(runs, base, test, questions):
    """What every run got right, resampled by question →
    {filter: kept, flipped, {metric: {mean, low, high, minus_none, minus_random}}}."""
    of_pairs = [row["question"] for row in test]
    groups = {"likelihood": of_pairs, "implicit": of_pairs,
              "mc1": [stage1.question_of(question["prompt"]) for question in questions]}
    values = {"unaligned": right_of_all([base], base)}
    values |= {name: right_of_all(found, base) for name, found in runs.items()}

    result = {}
    for name in values:
        found = runs.get(name, [])
        result[name] = {"kept": [policy["pairs"] for policy in found],
                        "flipped": [policy["flipped"] for policy in found],
                        "seconds": [round(policy["seconds"], 1) for policy in found]}
        for metric in METRICS:
            if not groups[metric] or (name == "unaligned" and metric == "implicit"):
                continue
            row = common.mean_interval(values[name][metric], groups[metric])
            for other in ("none", "random"):
                if other != name and other in values:
                    gap = values[name][metric] - values[other][metric]
                    row[f"minus_{other}"] = common.gap_interval(gap, groups[metric])
            result[name][metric] = row
    return result


def right_of_all(found, base):
    """What policies get right → {metric: [policies, n] of 0 and 1}."""
    rows = [right(policy, base) for policy in found]
    return {metric: np.stack([row[metric] for row in rows]).astype(float) for metric in METRICS}


def table(found):
    """The figures → markdown."""
    behind = [f"{name}, minus no filter" for name in METRICS.values()]
    text = head_line("filter", ["pairs kept, of which flipped", *METRICS.values(), *behind])
    for name, row in found["filters"].items():
        cells = ["–"]
        if row["kept"]:
            kept, bad = np.mean(row["kept"]), np.mean(row["flipped"])
            cells = [f"{kept:.0f}, {bad / kept:.1%}"]
        metrics = [row.get(metric, {}) for metric in METRICS]
        cells += [interval(of, "mean") if of else "–" for of in metrics]
        gaps = [of.get("minus_none") for of in metrics]
        cells += [common.difference(gap) if gap else "–" for gap in gaps]
        text += line(name, cells)
    return text


# ---------------------------------------------------------------- command line

def parse_args():
    """The flags."""
    p = common.command_line(__doc__)
    p.add_argument("--pairs", default=str(ROOT / "data/truthful.jsonl"),
                   help="clean preference pairs")
    p.add_argument("--questions", help="rows {prompt, candidates, labels} for MC1")
    p.add_argument("--model", default="demo")
    p.add_argument("--layer", type=int, default=16)
    p.add_argument("--sae", default=str(DEMO_SAE))
    p.add_argument("--reward-pairs", type=int, default=500,
                   help="clean pairs of the reward model")
    p.add_argument("--train-pairs", type=int, default=320,
                   help="pairs of the policy, before the filter")
    p.add_argument("--noise", type=float, default=0.3, help="share of labels flipped")
    p.add_argument("--lr", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3], help="tried on dev")
    p.add_argument("--beta", type=float, default=0.1)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--bf16", action="store_true",
                   help="train in mixed precision; 2.5 times faster on a CPU with AVX-512 BF16")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--rounds", type=int, default=0,
                   help="rounds of DPO with the first seed, from the second on with own answers")
    p.add_argument("--answers", type=int, default=4,
                   help="rounds: sampled for each prompt")
    p.add_argument("--device", default="cpu")
    p.add_argument("--out", default="runs/align", help="folder of the finished runs")
    p.add_argument("--write", action="store_true", help="into benchmarks/results/align.json")
    p.add_argument("--table", action="store_true",
                   help="only print the table of the results file")
    return p.parse_args()


def main():
    """The command."""
    args = parse_args()
    if args.rounds and not args.questions:
        raise UserError("the rounds are judged on questions · --rounds · pass --questions too")
    if args.table:
        found = common.read_result("align")
        print(table(found))
        print(rounds_table(found))
        return
    found = experiment(args)
    if args.write:
        common.write_result("align", found)
    print(table(found))
    if args.rounds:
        print(rounds_table(found))


if __name__ == "__main__":
    run_main(main)
