"""Stage 3: a reward head on the alignment scores.

reads   features.safetensors      chosen, rejected [n, 2K] · mean, std [2K] · split [n]
writes  reward_head.safetensors   all that scoring new text needs:
            latents, directions [2K'], [2K', d] · mean, std [2K'] · temperature [1]
            linear: w1 [2K'] · b1 [1]         mlp: w1 [hidden, 2K'] · b1 [hidden] · w2 [hidden] · b2 [1]

    python 03_train_head.py --run runs/demo --head linear --loss bt
    python 03_train_head.py --run runs/demo --check

    reward(z) = head((<z, d_j> - mean_j) / std_j)         trained so that reward(chosen) > reward(rejected)

The paper trains with a margin loss whose margin is not published; Bradley-Terry is the default here, --loss margin is
one flag away. It does not publish learning rate or epochs either, and uses one K: --k auto takes the best on dev.
"""

import argparse
import importlib
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from parts.chat import render
from parts.files import UserError, check_finite, file_hash, load_stage, run_main, save_stage, up_to_date

stage1 = importlib.import_module("01_extract")
TRAIN, DEV = stage1.TRAIN, stage1.DEV
EPOCH_PAIRS = 2**14      # at most, before dev is looked at again


# ---------------------------------------------------------------- the three losses

def bradley_terry_loss(reward_chosen, reward_rejected):
    """Mean of -log σ(r_chosen - r_rejected) over pairs [n] → scalar. Bradley & Terry (1952)."""
    return F.softplus(reward_rejected - reward_chosen).mean()       # softplus(-x) = -log σ(x), stable for large |x|


def margin_loss(reward_chosen, reward_rejected, margin=1.0):
    """Mean of max(0, γ - (r_chosen - r_rejected)) over pairs [n] → scalar. The paper's choice; its γ is not published."""
    return torch.relu(margin - (reward_chosen - reward_rejected)).mean()


def bce_loss(reward_chosen, reward_rejected):
    """Mean binary cross-entropy of single responses, chosen = 1, rejected = 0 → scalar. The paper's weak baseline."""
    return (F.softplus(-reward_chosen).mean() + F.softplus(reward_rejected).mean()) / 2


# ---------------------------------------------------------------- the head

def start_head(width, kind="linear", hidden=512, generator=None):
    """→ dict of parameters. Linear: zeros. MLP: one hidden layer of ReLU (256·512 + 512 + 512 + 1 in the paper)."""
    if kind == "linear":
        return {"w1": torch.zeros(width), "b1": torch.zeros(1)}
    uniform = lambda *shape, fan: (torch.rand(*shape, generator=generator) * 2 - 1) / fan**0.5
    return {"w1": uniform(hidden, width, fan=width), "b1": uniform(hidden, fan=width),
            "w2": uniform(hidden, fan=hidden), "b2": torch.zeros(1)}


def apply_head(head, x):
    """Standardised scores [n, 2K] → rewards [n]."""
    if "w2" not in head:
        return x @ head["w1"] + head["b1"]
    return torch.relu(x @ head["w1"].T + head["b1"]) @ head["w2"] + head["b2"]


def trained_parameters(tensors):
    """How many numbers of a head were trained."""
    return sum(tensors[n].numel() for n in ("w1", "b1", "w2", "b2") if n in tensors)


def fit_head(chosen, rejected, split, columns=slice(None), kind="linear", loss="bt", margin=1.0, hidden=512, lr=0.01, weight_decay=0.1,
             epochs=200, patience=20, batch=256, seed=0):
    """Train one head on some columns of the standardised scores [n, m] of both sides → (head, its loss on dev).

    Adam on mini-batches of train pairs; after each epoch the loss on dev; the weights of the best epoch are what is
    returned. weight_decay is an L2 penalty, weight_decay/2 · ‖w‖² added to the loss. An epoch is EPOCH_PAIRS random pairs where
    there are more: a few hundred weights need no more, so a million pairs take hardly longer than ten thousand.
    """
    losses = {"bt": bradley_terry_loss, "margin": lambda c, r: margin_loss(c, r, margin), "bce": bce_loss}
    generator = torch.Generator().manual_seed(seed)
    head = start_head(chosen[:1, columns].shape[1], kind, hidden, generator)
    parameters = [p.requires_grad_() for p in head.values()]
    adam = torch.optim.Adam(parameters, lr=lr, fused=True)
    rows, dev = (split == TRAIN).nonzero().flatten(), [side[split == DEV][:, columns] for side in (chosen, rejected)]
    best, kept, since = float("inf"), None, 0
    for epoch in range(epochs + 1):         # dev is looked at before the first step and after each epoch
        with torch.no_grad():
            on_dev = float(losses[loss](apply_head(head, dev[0]), apply_head(head, dev[1])))
        if on_dev < best - 1e-6:
            best, kept, since = on_dev, {n: p.detach().clone() for n, p in head.items()}, 0
        else:
            since += 1
        if since > patience or epoch == epochs:
            break
        for pick in rows[torch.randperm(len(rows), generator=generator)[:EPOCH_PAIRS]].split(batch):
            penalty = sum(p.square().sum() for n, p in head.items() if n[0] == "w")
            value = losses[loss](*(apply_head(head, side[pick][:, columns]) for side in (chosen, rejected))) + weight_decay / 2 * penalty
            adam.zero_grad()
            value.backward()
            adam.step()
    return kept, best


def fit_temperature(difference):
    """The T > 0 for which σ(Δr / T) has the least negative log-likelihood on dev → float.

    Each pair counts 1 / (n + 2) the other way (Platt, 1999): a small dev set that is all right would ask for T = 0.
    """
    d, other = difference[:, None].float(), 1 / (len(difference) + 2)
    if not d.any():
        return 1.0
    grid = torch.logspace(-2, 2, 401)
    nll = ((1 - other) * F.softplus(-d / grid) + other * F.softplus(d / grid)).mean(0)
    return float(grid[nll.argmin()])


def fit_best(chosen, rejected, split, options, seeds, **settings):
    """The same search for the method and for every control: the option with the lowest dev loss, then all seeds.

    options: {name: {"columns": which scores, and settings that differ}}. → (name, heads, dev losses, {name: dev loss}).
    """
    def fit(name, seed):
        return fit_head(chosen, rejected, split, **{**settings, **options[name]}, seed=seed)
    curve = {name: fit(name, seeds[0])[1] for name in options} if len(options) > 1 else {}
    name = min(curve, key=curve.get) if curve else next(iter(options))
    heads, losses = zip(*(fit(name, seed) for seed in seeds))
    return name, heads, losses, curve


def k_options(total, k="auto"):
    """K → the columns of its directions: the first K of each side, of `total` a side."""
    choices = [2**i for i in range(20) if 2**i < total] + [total] if k == "auto" else [int(k)]
    return {c: {"columns": torch.cat([torch.arange(c), total + torch.arange(c)])} for c in choices}


def rewards_of(head, side, columns):
    """apply_head on all rows of one side's scores [n, m] → [n], some rows at a time."""
    return torch.cat([apply_head(head, part[:, columns]) for part in side.split(2**16)])


# ---------------------------------------------------------------- using it

class RewardModel:
    """Score text with a trained head. A plain class, so that trainers take it for a function, not for a module."""

    def __init__(self, tensors, meta, backbone):
        self.tensors, self.meta, self.backbone = tensors, meta, backbone
        self.head = {n: tensors[n].float() for n in ("w1", "b1", "w2", "b2") if n in tensors}
        self.directions, self.mean, self.std = (tensors[n].float() for n in ("directions", "mean", "std"))
        self.temperature = float(tensors["temperature"])
        self.__name__ = "sparserm_reward"       # trainers log a reward function by its name

    @classmethod
    def load(cls, path, model=None, device="auto"):
        """A reward_head.safetensors → RewardModel. `model`: another copy of the backbone (name, folder, or a Backbone
        of stage 1); the recorded one is opened otherwise, never with remote code. Errors: UserError."""
        tensors, meta = load_stage(path, "03_train_head.py")
        missing = {"directions", "mean", "std", "w1", "b1", "temperature"} - set(tensors)
        if missing:
            raise UserError(f"not a reward head: {', '.join(sorted(missing))} missing · {path} · pass reward_head.safetensors")
        backbone = model if isinstance(model, stage1.Backbone) else \
            stage1.load_backbone(model or meta["model"], meta["revision"] if model is None else None, meta["dtype"], device)
        check_backbone(meta, backbone.meta, path)
        return cls(tensors, meta, backbone)

    def hidden(self, prompts, responses):
        """The residual-stream vectors that the reward is read from, [n, d] float32."""
        return self.read([self.render(p, r) for p, r in zip(prompts, responses, strict=True)])

    def render(self, prompt, response):
        """A prompt and a response as the head was trained on them → Text of parts/chat.py."""
        return render(self.backbone.tokenizer, prompt, response, self.meta["max_length"])

    def read(self, texts):
        """Rendered texts → [n, d] float32."""
        return stage1.residuals(self.backbone, texts, [self.meta["layer"]], self.meta["token"])[0].float()

    def vector(self):
        """A linear head folded to one vector: r = <z, u> + c, with u = Σ_j w_j d_j / std_j → (u [d], c)."""
        weight = self.head["w1"].double() / self.std.double()
        u = weight @ self.directions.double()
        return u.float(), float(self.head["b1"].double() - weight @ self.mean.double())

    def reward_of(self, hidden):
        """Residual vectors [n, d] → rewards [n]."""
        if "w2" not in self.head:
            u, c = self.vector()
            return hidden @ u + c
        return apply_head(self.head, self.scores_of(hidden))

    def scores_of(self, hidden):
        """Residual vectors [n, d] → standardised alignment scores [n, 2K]."""
        return (hidden @ self.directions.T - self.mean) / self.std

    def contributions(self, hidden):
        """What each direction adds to the reward of residual vectors [n, d] → [n, 2K]. Linear head: w_j x_j, exact. MLP: the
        change when score j is set to its mean. The difference of two responses is the difference of their rows."""
        x = self.scores_of(hidden)
        if "w2" not in self.head:
            return x * self.head["w1"]
        whole = apply_head(self.head, x)
        return torch.stack([whole - apply_head(self.head, x.index_fill(1, torch.tensor([j]), 0.0)) for j in range(x.shape[1])], 1)

    def score(self, prompts, responses):
        """Raw rewards, 0 on average over the training responses: lists of n prompts and n responses → list of n floats."""
        if isinstance(prompts, str) or isinstance(responses, str):
            raise UserError("score takes lists · a single string was given · write score([prompt], [response])")
        if len(prompts) != len(responses):
            raise UserError(f"{len(prompts)} prompts, {len(responses)} responses · score · pass one response for each prompt")
        return self.reward_of(self.hidden(prompts, responses)).tolist() if prompts else []

    def prefer(self, prompt, a, b):
        """Probability that response a is preferred to b: σ((r_a - r_b) / T), T fitted on dev."""
        r_a, r_b = self.score([prompt, prompt], [a, b])
        return float(torch.sigmoid(torch.tensor((r_a - r_b) / self.temperature)))

    def explain(self, prompt, response):
        """What each latent's direction adds → {reward, bias, contributions: [{latent, side, score, contribution}]}.

        Linear head: w_j (v_j - mean_j) / std_j; with the bias they add up to the reward. MLP: the change when score j is
        set to its mean (an ablation of the head's input; these do not add up). Neither says what causes a preference.
        """
        hidden = self.hidden([prompt], [response])
        x, parts, reward = self.scores_of(hidden)[0], self.contributions(hidden)[0].tolist(), float(self.reward_of(hidden))
        bias = float(self.head["b1"]) if "w2" not in self.head else None
        k = len(parts) // 2
        rows = [{"latent": int(j), "side": "chosen" if n < k else "rejected", "score": float(x[n]), "contribution": c}
                for n, (j, c) in enumerate(zip(self.tensors["latents"], parts))]
        return {"reward": reward, "bias": bias, "contributions": sorted(rows, key=lambda r: -abs(r["contribution"]))}

    def __call__(self, prompts, completions, **_):
        """A TRL reward function: strings or chat messages → list of float, None for a text longer than max_length."""
        rewards, texts = [None] * len(prompts), {}
        for n, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                texts[n] = self.render(prompt, completion if isinstance(completion, str) else completion[-1]["content"])
            except UserError:
                continue
        if texts:
            for n, reward in zip(texts, self.reward_of(self.read(list(texts.values()))).tolist()):
                rewards[n] = reward
        return rewards


def check_backbone(wanted, found, where):
    """Refuse a backbone that is not a copy of the one the head was trained on."""
    for key, what in (("backbone", "shape"), ("template", "chat template")):
        if wanted[key] != found[key]:
            raise UserError(f"the head was trained on {wanted['model']} ({what} {wanted[key]}), this is {found['model']} "
                            f"({found[key]}) · {where} · pass the same backbone")
    both = list(zip(wanted["weights"], found["weights"]))                      # None: a block that lies on the disk
    if not all(None in pair or math.isclose(*pair, rel_tol=0.02, abs_tol=1e-4) for pair in both):
        raise UserError(f"the weights of {found['model']} are not those of {wanted['model']} · {where} · pass the same backbone")


# ---------------------------------------------------------------- the stage

def standardised(t):
    """features.safetensors → chosen, rejected [n, 2K] with mean 0 and standard deviation 1 on train (in place: they may be large)."""
    return (t[side].sub_(t["mean"]).div_(t["std"]) for side in ("chosen", "rejected"))


def parse_args():
    """The flags, checked as far as that needs no file."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", default="runs/demo", help="folder of the run (default runs/demo)")
    p.add_argument("--head", choices=("linear", "mlp"), default="linear", help="(default linear)")
    p.add_argument("--hidden", type=int, default=512, help="units of the MLP's hidden layer (default 512)")
    p.add_argument("--loss", choices=("bt", "margin", "bce"), default="bt", help="bt Bradley-Terry, margin, bce (default bt)")
    p.add_argument("--margin", type=float, default=1.0, help="γ of the margin loss (default 1)")
    p.add_argument("--k", default="auto", help="auto (the best on dev) or N: the first N of each side (default auto)")
    p.add_argument("--lr", type=float, default=0.01, help="learning rate of Adam (default 0.01)")
    p.add_argument("--weight-decay", type=float, default=0.1, help="L2 penalty (default 0.1)")
    p.add_argument("--epochs", type=int, default=200, help="at most (default 200)")
    p.add_argument("--patience", type=int, default=20, help="epochs without a lower dev loss before it stops (default 20)")
    p.add_argument("--seeds", type=int, default=5, help="heads to train; the one with the lowest dev loss is kept (default 5)")
    p.add_argument("--check", action="store_true", help="check the finished reward model on its own texts; exit code 1 if one check fails")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return p.parse_args()


def check_settings(args):
    """Refuse values that cannot train."""
    least_of = {"--seeds": 1, "--epochs": 1, "--hidden": 1, "--patience": 0, "--lr": 1e-12, "--weight-decay": 0, "--margin": 0}
    for flag, least in least_of.items():
        value = getattr(args, flag[2:].replace("-", "_"))
        if not least <= value < float("inf"):
            raise UserError(f"{flag} {value} is out of range · {flag} · pass a number from {least:g}")


def settings_of(args):
    """What fit_head needs of the arguments (stage 4 gives its controls the same)."""
    return {"kind": args.head, "loss": args.loss, "margin": args.margin, "hidden": args.hidden, "lr": args.lr,
            "weight_decay": args.weight_decay, "epochs": args.epochs, "patience": args.patience}


def main():
    """Stage 3 from the command line."""
    args = parse_args()
    check_settings(args)
    if args.check:
        found = importlib.import_module("parts.self_check").self_check(args.run)
        print(*(f"{'✓' if holds else '✗'} {what:<42} {figure}" for what, holds, figure in found), sep="\n")
        sys.exit(0 if all(holds for _, holds, _ in found) else 1)
    path = Path(args.run) / "features.safetensors"
    t, meta = load_stage(path, "02_select_features.py", "select")
    check_finite(t, path)
    split, total = t["split"], meta["k"]
    for number, name in ((TRAIN, "train"), (DEV, "dev")):
        if not (split == number).any():
            raise UserError(f"no pair is in the {name} split · {path} · more pairs, or another --split in 01_extract.py")
    if (split == DEV).sum() < 30:
        print(f"note: only {int((split == DEV).sum())} dev pairs, which choose K, when to stop and the temperature: more would be safer")
    if args.k != "auto" and not (args.k.isdigit() and 1 <= int(args.k) <= total):
        raise UserError(f"--k must be auto or 1 to {total} · --k {args.k} · {total} latents a side were selected in stage 2")
    record = {**meta, "stage": "head", "asked": {"k": args.k, "seeds": args.seeds}, "settings": settings_of(args),
              "parent": {"features": file_hash(path), **{n: meta["parent"][n] for n in ("pairs", "sae")}}}
    out = Path(args.run) / "reward_head.safetensors"
    seconds = 0.0
    if not up_to_date(out, {n: v for n, v in record.items() if n != "k"}):
        seconds = train(args, t, record, out)
    report(args, seconds, *load_stage(out))


def train(args, t, record, out):
    """Search K on dev, train all seeds, keep the one with the lowest dev loss → seconds taken."""
    started = time.perf_counter()
    chosen, rejected = standardised(t)
    split, options = t["split"], k_options(record["k"], args.k)
    k, heads, losses, curve = fit_best(chosen, rejected, split, options, range(args.seeds), **settings_of(args))
    best, columns = min(range(len(losses)), key=losses.__getitem__), options[k]["columns"]
    rewards = [torch.stack([rewards_of(head, side, columns) for side in (chosen, rejected)]) for head in heads]    # [2, n] each
    right = [(r[0] > r[1]).float() for r in rewards]                        # strictly
    kept, bias = rewards[best], "b2" if "w2" in heads[best] else "b1"
    head = {**heads[best], bias: heads[best][bias] - kept[:, split == TRAIN].mean()}        # 0 on average over the train responses
    temperature = fit_temperature((kept[0] - kept[1])[split == DEV])
    on_dev = [float(r[split == DEV].mean()) for r in right]
    found = {"train": float(right[best][split == TRAIN].mean()), "dev": on_dev[best], "dev_of_seeds": on_dev, "dev_loss": losses[best]}
    save_stage(out, {**{n: t[n][columns] for n in ("latents", "directions", "mean", "std")}, **head,
                            "temperature": torch.tensor([temperature])},
                      {**record, "k": k, "seed_kept": best, "accuracy": found, "k_curve": {str(c): v for c, v in curve.items()}})
    return time.perf_counter() - started


def report(args, seconds, t, meta):
    """The table at the end."""
    trained, found = trained_parameters(t), meta["accuracy"]
    if meta["k_curve"]:
        print("\ndev loss by K   " + "   ".join(f"{c}: {meta['k_curve'][c]:.3f}" for c in sorted(meta["k_curve"], key=int)))
    print(f"\nhead         {args.head}, loss {args.loss}, K = {meta['k']} a side ({2 * meta['k']} directions)"
          f"\naccuracy     train {found['train']:.3f} · dev {found['dev']:.3f} (all {args.seeds} seeds: "
          f"{min(found['dev_of_seeds']):.3f} to {max(found['dev_of_seeds']):.3f}; test is read by stage 4 only)"
          f"\nparameters   {trained:,} trained, {trained / meta['parameters']:.2e} of the backbone's {meta['parameters']:,}"
          f"\ntemperature  {float(t['temperature']):.3f}"
          f"\ntime         {f'{seconds:.1f} s' if seconds else 'found complete, not trained again'}"
          f"\nwritten      {args.run}/reward_head.safetensors\n\nnext: python 04_evaluate.py --run {args.run}")


if __name__ == "__main__":
    run_main(main)
