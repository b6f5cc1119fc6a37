"""The methods that reward_models.py compares: one job, one fit each, on a run that it has prepared.

    run_heads     heads on stage 1's activations: sparserm, paper, dense, mlp
    run_peer      fine-tuned reward models: full, lora
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.common import SIDES, cut, stage1, stage2, stage3, stage4
from parts.files import UserError, load_stage
from parts.models import load_tokenizer, locate_model

HELD = "held"               # the folder in a run with its dev and test pairs
RULE = "mean"               # of every frozen method
PAPER = ("--head", "mlp", "--loss", "margin")       # K = 128 and 512 units are the defaults


# ---------------------------------------------------------------- pairs and texts

def pairs_of_run(run):
    """The pairs of a prepared run → {train, dev, test: rows}."""
    held = common.pairs_by_split(Path(run) / HELD)
    return {**held, "train": common.pairs_by_split(run)["train"]}


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
    hidden = stage1.residuals(backbone, texts, [top], ["last"])[top, "last"]
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
    pairs = pairs_of_run(job["run"])
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
    return {name: pairs_of_run(run)["test"][:job["other_pairs"]]
            for name, run in job["others"].items()}


# ---------------------------------------------------------------- methods on the frozen backbone

def activations(run, layer, split=None, most=None):
    """z of a run's pairs, at most of those of a split the first `most` → Pairs."""
    paths, _ = stage2.shard_files(run, layer, RULE)
    read = stage4.read_pairs(run, paths)
    pairs = stage4.Pairs(**read)
    if split is None:
        return pairs
    wanted = pairs.split == split
    if most is not None:
        wanted &= wanted.cumsum(0) <= most
    return pairs.part(wanted)


def views_of(job):
    """What a fitted head reads: None the own dev pairs, and the test pairs of each set
    → {set: [chosen, rejected]}."""
    own = Path(job["run"]) / HELD
    layer = job["layer"]
    views = {None: activations(own, layer, stage1.DEV).z,
             job["set"]: activations(own, layer, stage1.TEST).z}
    for name, run in job["others"].items():
        other = activations(Path(run) / HELD, layer, stage1.TEST, job["other_pairs"])
        views[name] = other.z
    return views


def run_heads(job):
    """The methods that read stage 1's activations → {method: its results; rate: texts a second}."""
    run = Path(job["run"])
    train = activations(run, job["layer"])          # nothing else is seen by a fit
    views = views_of(job)
    found = {
        "sparserm": fitted_and_read(lambda: trained(run), views),
        "paper": fitted_and_read(lambda: trained(run, *PAPER), views),
        "dense": fitted_and_read(lambda: fit_dense(train), views),
        "mlp": fitted_and_read(lambda: fit_mlp(train), views),
    }
    _, meta = load_stage(run / "reward_head.safetensors")
    found["sparserm"]["k"] = meta["k"]
    found["sparserm"]["l2"] = meta["l2"]

    backbone = stage1.load_backbone(job["model"])
    texts = rendered(backbone.tokenizer, train.pairs, job["max_length"])
    found["rate"] = speed(reader(backbone, job["layer"]), texts)
    backbone.pack = "pad"
    found["sparserm"]["padded"] = speed(reader(backbone, job["layer"]), texts)
    return found


def reader(backbone, layer):
    """Texts → what stage 1 reads of them."""
    def read(texts):
        return stage1.residuals(backbone, texts, [layer], [RULE])
    return read


def fitted_and_read(fit, views):
    """fit() → (read([chosen, rejected]) → r_chosen - r_rejected, trained parameters)
    → its results."""
    started = time.process_time()
    read, trained = fit()
    seconds = time.process_time() - started
    differences = {of: read(sides).tolist() for of, sides in views.items()}
    dev = differences.pop(None)
    return {"dev": dev, "test": differences, "fit_seconds": seconds, "trained": trained}


def trained(run, *flags):
    """Stages 2 and 3 on the train pairs of a run, in a folder of their own: here the time counts
    → (read, trained parameters)."""
    _, meta = load_stage(run / "features.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        for part in ("pairs.jsonl", "activations"):
            (Path(folder) / part).symlink_to((run / part).resolve())
        run_here(stage2, folder, "--sae", meta["sae"])
        run_here(stage3, folder, *flags)
        tensors, meta = load_stage(Path(folder) / "reward_head.safetensors")
    reward = stage3.RewardModel(tensors, meta, None)

    def read(sides):
        chosen, rejected = [reward.reward_of(reward.normalise(z)) for z in sides]
        return chosen - rejected
    return read, stage3.trained_parameters(reward.head)


def run_here(stage, run, *flags):
    """The main() of a stage within this process."""
    given = sys.argv
    sys.argv = [stage.__name__, "--run", str(run), *map(str, flags)]
    try:
        stage.main()
    finally:
        sys.argv = given


def fit_dense(train):
    """A linear Bradley-Terry head on z, its penalty by cross-validation, as fitted_and_read takes
    it."""
    fitted = common.fit_dense(train)
    return fitted.differences, stage3.trained_parameters(fitted.head)


def fit_mlp(train):
    """The paper's MLP with Bradley-Terry on z, as fitted_and_read takes it: stopped on one fold,
    then as many steps on all."""
    settings = {**stage3.DEFAULTS, "l2": stage3.MLP_L2}
    del settings["kind"]
    fit, held = stage4.mlp_sides(train, stage4.all_of_z(), None, train.used((0,)), 0)
    _, steps, _ = stage3.fit_mlp(*fit, held=held, **settings)

    mean, std = stage2.standardisation(train.z, train.used(()))
    chosen, rejected = [(z - mean) / std for z in train.z]
    head, _, _ = stage3.fit_mlp(chosen, rejected, steps=steps, **settings)

    def read(sides):
        reward_chosen, reward_rejected = [head((z - mean) / std) for z in sides]
        return reward_chosen - reward_rejected
    return read, stage3.trained_parameters(head)
