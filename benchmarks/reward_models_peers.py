"""The methods that reward_models.py compares: one job, one fit each, on a run that it has prepared.

    run_heads     heads on stage 1's activations: sparserm, searched, dense, mlp, words, dense_last
    run_tokens    what reads more than one token of the frozen backbone: swift, likelihood
    run_peer      fine-tuned reward models: full, lora
"""

import copy
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import (
    SIDES,
    cut,
    pairs_by_split,
    stage1,
    stage2,
    stage3,
    stage4,
    token_counts,
)
from parts.files import UserError, load_stage
from parts.models import load_tokenizer, locate_model

TRAIN, DEV, TEST = stage1.TRAIN, stage1.DEV, stage1.TEST
PATIENCE = 100          # epochs: with few train pairs an epoch is one step, and 20 of them stop a
                        # head before it has begun
SETTINGS = {**stage3.DEFAULTS, "patience": PATIENCE}
SEEDS = range(5)        # of a head
FULL = 10**9            # more test pairs than there are: all of them
TO_L, TO_THE_TOP = "to L", "to the top"         # how far the backbone reads


# ---------------------------------------------------------------- pairs and texts

def some(rows, count):
    """About `count` of the rows, whole questions, in an order that no file decides."""
    def place(row):
        return stage1.hash_number("benchmark " + row["question"]), row["id"]
    return cut(sorted(rows, key=place), count)[0]


def rendered(tokenizer, rows, most):
    """Rows → Texts of stage 1: chosen, rejected, chosen …"""
    texts = []
    for row in rows:
        texts += [stage1.render(tokenizer, row["prompt"], row[side], most) for side in SIDES]
    return texts


def places_of_texts(pairs):
    """Numbers of pairs → the places of their texts: chosen, rejected, chosen …"""
    return np.stack([2 * pairs, 2 * pairs + 1], 1).flatten()


def places_where(pairs):
    """Which pairs (bool [n]) → the places of their texts."""
    return places_of_texts(pairs.nonzero().flatten().numpy())


def speed(read, texts, count=128):
    """Rendered texts a second of processor time, on the last `count` of them, after a first call on
    a few."""
    read(texts[-8:])
    started = time.process_time()
    read(texts[-count:])
    return len(texts[-count:]) / (time.process_time() - started)


# ---------------------------------------------------------------- fine-tuned peers

def final_norm(model):
    """The norm between the last block and the output matrix or head."""
    base = getattr(model, model.base_model_prefix)
    names = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
    return next(getattr(base, name) for name in names if hasattr(base, name))


def last_rewards(backbone, texts):
    """Rewards of a sequence classifier with one label, packed as in stage 1: its last block's
    output at the last token [n, d], then its own final norm and head → [n]."""
    top = len(backbone.blocks) - 1
    hidden = stage1.residuals(backbone, texts, [top], "last")[0]
    with torch.inference_mode():
        return backbone.model.score(final_norm(backbone.model)(hidden))[:, 0].float()


def fine_tune(job, rows, tokenizer):
    """TRL's RewardTrainer on tokenised pairs → (the model with its LoRA merged, trained parameters,
    seconds of training). A step is 8 pairs, read one at a time: on a CPU nothing is gained by
    padding pairs to one length."""
    import datasets
    import peft
    import transformers
    import trl
    texts = rendered(tokenizer, rows, job["max_length"])
    if any(text.ids[-1] == tokenizer.pad_token_id for text in texts):
        raise UserError("texts end with the pad token, so RewardTrainer would read another one · "
                        "the chat template · set another pad")
    data = datasets.Dataset.from_list(
        [{"chosen_ids": chosen.ids, "rejected_ids": rejected.ids}
         for chosen, rejected in zip(texts[::2], texts[1::2])])
    lora = None
    if job["method"] == "lora":
        lora = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear",
                               task_type="SEQ_CLS")
    settings = trl.RewardConfig(
        output_dir=str(Path(job["out"]) / "trainer" / str(os.getpid())), learning_rate=job["lr"],
        num_train_epochs=job["epochs"], per_device_train_batch_size=1,
        gradient_accumulation_steps=8, warmup_steps=max(1, len(rows) // 80), seed=job["seed"],
        max_length=None, bf16=False, gradient_checkpointing=False, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=20)

    transformers.set_seed(job["seed"])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        locate_model(job["model"]), num_labels=1, dtype=torch.float32)
    trainer = trl.RewardTrainer(model=model, args=settings, train_dataset=data, peft_config=lora,
                                processing_class=tokenizer)
    parameters = trainer.model.parameters()
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    started = time.process_time()
    trainer.train()
    model = trainer.model.merge_and_unload() if lora else trainer.model
    return model, trained, time.process_time() - started


def run_peer(job):
    """One fit of `full` or `lora` → its results."""
    tokenizer = load_tokenizer(job["model"])
    pairs = pairs_by_split(job["run"])
    train = pairs["train"]
    if job["search"]:
        asked = [row | {"question": stage1.question_of(row["prompt"])} for row in train]
        train = some(asked, job["n"])
    model, trained, seconds = fine_tune(job, train, tokenizer)
    backbone = stage1.make_backbone(model, tokenizer, {"model": job["model"]})

    def differences(rows):
        texts = rendered(tokenizer, rows, job["max_length"])
        chosen, rejected = last_rewards(backbone, texts).view(-1, 2).T
        return (chosen - rejected).tolist()

    found = {"pairs": len(train), "dev": differences(pairs["dev"]), "test": {}, "trained": trained,
             "seconds": seconds}
    if not job["search"]:
        found["test"][job["set"]] = differences(pairs["test"])
        texts = rendered(tokenizer, pairs["test"], job["max_length"])
        found["texts_a_second"] = speed(lambda some: last_rewards(backbone, some), texts)
        if job["seed"] == 0:
            for name, rows in rows_of_others(job).items():
                found["test"][name] = differences(rows)
    return found


def rows_of_others(job):
    """The first test pairs of the other sets → {name: rows}."""
    return {name: pairs_by_split(run)["test"][:job["other_pairs"]]
            for name, run in job["others"].items()}


# ---------------------------------------------------------------- methods on the frozen backbone

class Fits:
    """Fits methods on the pairs of a run and reads them on dev and on test pairs.

    views: {set, or None for the own pairs: what a method may see of it}; a method's view makes
    (chosen, rejected) of that.
    """

    def __init__(self, split, views):
        self.split = split
        self.views = views
        self.found = {}

    def add(self, name, fit, view, place=TO_L):
        """fit(*view) → (read, trained); read(*view) → r_chosen - r_rejected. place: how far the
        backbone has to read for it."""
        started = time.process_time()
        read, trained = fit(*view(self.views[None]))
        seconds = time.process_time() - started
        differences = {}
        for of, seen in self.views.items():
            differences[of] = [float(difference) for difference in read(*view(seen))]
        own = differences.pop(None)
        dev = [difference for difference, split in zip(own, self.split) if split == DEV]
        self.found[name] = {"dev": dev, "test": differences, "fit_seconds": seconds,
                            "trained": trained, "place": place}


# ---------------------------------------------------------------- one vector a response

def searched(columns):
    """{name: columns of z or of scores} → options for dev: with each L2 penalty, and the step of
    stage 3 or, where many dimensions go together, a tenth of it."""
    options = {}
    for name, of in columns.items():
        for penalty in stage4.DENSE:
            for rate in (stage3.DEFAULTS["lr"], 0.001):
                more = {"weight_decay": penalty, "lr": rate}
                options[f"{name}{penalty:g}, {rate:g}"] = {**of, **more}
    return options


WHOLE = searched({"": {"columns": slice(None)}})


def head_fit(split, options=WHOLE, seeds=SEEDS, scale=True, **more):
    """A head with stage 4's search on dev, as Fits.add takes it."""
    settings = {**SETTINGS, **more}

    def fit(chosen, rejected):
        fitted = stage4.fit_control(chosen, rejected, split, options, settings, seeds, scale)
        return fitted.differences, stage3.trained_parameters(fitted.head)
    return fit


def activations(run, layer, test=None):
    """The pairs of a run with z of a layer; only their first `test` test pairs."""
    paths, _ = stage2.shard_files(run, layer)
    pairs = stage4.Pairs(**stage4.read_pairs(run, paths))
    if test is None:
        return pairs
    return pairs.part(pairs.test & (pairs.test.cumsum(0) <= test))


def views_of(job, layer):
    """z of a layer: the own pairs, the own test pairs, those of the other sets."""
    views = {None: activations(job["run"], layer), job["set"]: activations(job["run"], layer, FULL)}
    for name, other in job["others"].items():
        views[name] = activations(other, layer, job["other_pairs"])
    return views


def run_heads(job):
    """The methods that read stage 1's activations, without the backbone → {method: its results}."""
    run = Path(job["run"])
    layer = job["layer"]
    backbone = stage1.load_backbone(job["model"])
    norm = final_norm(backbone.model)
    reward = stage3.RewardModel(*load_stage(run / "reward_head.safetensors"), None)
    features, meta = load_stage(run / "features.safetensors")
    columns_of_k = {f"K {k}, ": columns for k, columns in stage3.k_options(meta["k"]).items()}

    def z(pairs):
        return pairs.z

    def scores(pairs):
        return stage4.score_pairs(pairs, features["directions"])

    def words(pairs):
        return grams(pairs.responses())

    def normed(pairs):
        of_model = [z.to(backbone.device, backbone.model.dtype) for z in pairs.z]
        return [norm(z).float().cpu() for z in of_model]

    views = views_of(job, layer)
    own = views[None]
    split = own.split
    grams = stage4.WordFeatures(own.responses(), split)
    below = Fits(split, views)
    below.add("sparserm", lambda *_: sparserm(reward, run, layer), z)
    below.add("searched", head_fit(split, searched(columns_of_k)), scores)
    below.add("dense", head_fit(split), z)
    below.add("mlp", head_fit(split, kind="mlp"), z)
    below.add("words", head_fit(split, stage4.DENSE, (0,), scale=False), words, None)
    above = Fits(split, views_of(job, len(backbone.blocks) - 1))
    above.add("dense_last", head_fit(split), normed, TO_THE_TOP)

    backbone.pack = "pad"
    texts = rendered(backbone.tokenizer, own.pairs, job["max_length"])
    below.found["sparserm"]["k"] = reward.meta["k"]
    below.found["sparserm"]["padded"] = speed(reader(backbone, layer), texts)
    return below.found | above.found


def reader(backbone, layer):
    """Texts → their last token's output of a block."""
    return lambda texts: stage1.residuals(backbone, texts, [layer], "last")


def sparserm(reward, run, layer):
    """Select and train once more, for the time it takes; the head must be that of the run →
    (read, trained parameters)."""
    given = sys.argv
    with tempfile.TemporaryDirectory() as folder:
        for part in ("pairs.jsonl", "activations"):
            (Path(folder) / part).symlink_to((run / part).resolve())
        flags = {stage2: ["--sae", reward.meta["sae"], "--layer", layer],
                 stage3: ["--patience", PATIENCE]}
        for stage, more in flags.items():
            sys.argv = [stage.__name__, "--run", folder, *map(str, more)]
            stage.main()
        again, _ = load_stage(Path(folder) / "reward_head.safetensors")
    sys.argv = given

    first = reward.tensors["w1"]
    if again["w1"].shape != first.shape or not torch.allclose(again["w1"], first, atol=1e-3):
        raise UserError(f"trained again, the head is another one · {run} · delete this folder")

    def read(chosen, rejected):
        return reward.reward_of(chosen) - reward.reward_of(rejected)
    return read, stage3.trained_parameters(reward.head)


# ---------------------------------------------------------------- every token of a response

class Tokens:
    """What the frozen backbone makes of many texts, in one pass: block L's output at every response
    token `z` [T, d], and the log-likelihood of the response and its end mark: `sums`, `counts` [n].
    """

    def __init__(self, backbone, texts, layer):
        top = len(backbone.blocks) - 1
        norm = final_norm(backbone.model)
        matrix = backbone.model.get_output_embeddings()
        parts = [None] * len(texts)
        self.counts = token_counts(texts)
        self.sums = np.zeros(len(texts))
        for members, (hidden, last) in backbone.hidden_rows([t.ids for t in texts], [layer, top]):
            for index, path in members:
                text = texts[index]
                path = torch.from_numpy(path)
                parts[index] = hidden[path[text.first:text.last]].float()
                before = path[text.first - 1:text.eot]      # each token is told by the one before
                with torch.inference_mode():
                    told = matrix(norm(last[before])).float().log_softmax(-1)
                wanted = torch.tensor(text.ids[text.first:text.eot + 1])
                self.sums[index] = float(told.gather(1, wanted[:, None]).double().sum())
        self.first = starts([len(part) for part in parts])
        self.z = torch.cat(parts)

    def some(self, texts):
        """The same of some of the texts (indices)."""
        places, _ = self.owner(texts)
        found = copy.copy(self)
        found.z = self.z[places]
        found.first = starts(self.lengths(texts))
        found.sums = self.sums[texts]
        found.counts = self.counts[texts]
        return found

    def lengths(self, texts):
        """How many tokens some texts have."""
        return self.first[texts + 1] - self.first[texts]

    def owner(self, texts):
        """Some texts (indices) →
        (places of their tokens in z, which of the texts each belongs to)."""
        places = [np.arange(self.first[text], self.first[text + 1]) for text in texts]
        owner = np.repeat(np.arange(len(texts)), self.lengths(texts))
        return torch.from_numpy(np.concatenate(places)), torch.from_numpy(owner)


def starts(lengths):
    """Where each of several stretches begins; at last the end of all."""
    return np.concatenate([[0], np.cumsum(lengths)])


def gated_rewards(weights, z, owner, count):
    """Σ σ(g_t) r_t / Σ σ(g_t) over the tokens of each text, (g_t, r_t) = z_t W + b:
    z [T, d], owner [T] → [count]."""
    gate, reward = (z @ weights["w"] + weights["b"]).unbind(1)
    gate = torch.sigmoid(gate)
    rewards = torch.zeros(count).index_add(0, owner, gate * reward)
    return rewards / torch.zeros(count).index_add(0, owner, gate)


def fit_swift(tokens, split, decays=(0.001, 0.01, 0.1)):
    """Bradley-Terry on gated token rewards, z standardised on train; the L2 penalty and when to
    stop by dev → (read(tokens) → r_chosen - r_rejected [n], trained parameters)."""
    train = (split == TRAIN).nonzero().flatten().numpy()
    dev = (split == DEV).nonzero().flatten().numpy()
    places, _ = tokens.owner(places_of_texts(train))
    mean = tokens.z[places].mean(0)
    std = tokens.z[places].std(0) + 1e-6

    def rewards(weights, tokens, pairs):
        places, owner = tokens.owner(places_of_texts(pairs))
        z = (tokens.z[places] - mean) / std
        return gated_rewards(weights, z, owner, 2 * len(pairs)).view(-1, 2).unbind(1)

    def loss(weights, pairs):
        return stage3.bradley_terry_loss(*rewards(weights, tokens, pairs))

    best = float("inf")
    kept = None
    for decay in decays:
        weights, value = train_swift(loss, len(mean), train, dev, decay)
        if value < best:
            best = value
            kept = weights

    def read(tokens):
        pairs = np.arange((len(tokens.first) - 1) // 2)
        return torch.sub(*rewards(kept, tokens, pairs))
    return read, 2 * len(mean) + 2


def train_swift(loss, width, train, dev, decay, batch=64):
    """One fit with one L2 penalty → (weights of its best epoch on dev, that loss)."""
    generator = torch.Generator().manual_seed(0)
    weights = {"w": torch.zeros(width, 2, requires_grad=True),
               "b": torch.zeros(2, requires_grad=True)}
    adam = torch.optim.Adam(weights.values(), lr=stage3.DEFAULTS["lr"])
    best = float("inf")
    kept = None
    epochs_since = 0
    for _ in range(stage3.DEFAULTS["epochs"]):
        for pick in torch.randperm(len(train), generator=generator).split(batch):
            penalty = decay / 2 * weights["w"].square().sum()
            objective = loss(weights, train[pick.numpy()]) + penalty
            adam.zero_grad()
            objective.backward()
            adam.step()
        with torch.no_grad():
            value = float(loss(weights, dev))
        epochs_since = 0 if value < best - 1e-5 else epochs_since + 1
        if value < best:
            best = value
            kept = {name: weight.detach().clone() for name, weight in weights.items()}
        if epochs_since > stage3.DEFAULTS["patience"]:
            break
    return kept, best


def run_tokens(job):
    """The methods that read more than one token of the frozen backbone, and how fast it reads →
    {method: its results}."""
    layer = job["layer"]
    backbone = stage1.load_backbone(job["model"])
    pairs = activations(job["run"], layer)
    texts = rendered(backbone.tokenizer, pairs.pairs, job["max_length"])
    rate = {TO_L: speed(reader(backbone, layer), texts),
            TO_THE_TOP: speed(reader(backbone, len(backbone.blocks) - 1), texts)}

    tokens = Tokens(backbone, texts, layer)
    views = {None: tokens, job["set"]: tokens.some(places_where(pairs.test))}
    for name, rows in rows_of_others(job).items():
        others = rendered(backbone.tokenizer, rows, job["max_length"])
        views[name] = Tokens(backbone, others, layer)
    fits = Fits(pairs.split, views)
    fits.add("swift", lambda tokens: fit_swift(tokens, pairs.split), lambda tokens: (tokens,))
    fits.add("sum", nothing_to_fit, lambda tokens: both_sides(tokens.sums), TO_THE_TOP)
    fits.add("mean", nothing_to_fit, lambda tokens: both_sides(tokens.sums / tokens.counts),
             TO_THE_TOP)

    right = {way: np.mean(np.array(fits.found[way]["dev"]) > 0) for way in ("sum", "mean")}
    way = max(right, key=right.get)
    return {"swift": fits.found["swift"], "likelihood": {**fits.found[way], "way": way},
            "rate": rate}


def both_sides(values):
    """Values of texts → (those of chosen, those of rejected)."""
    return values[0::2], values[1::2]


def nothing_to_fit(chosen, rejected):
    """The larger value is preferred."""
    return np.subtract, 0
