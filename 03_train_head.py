"""Stage 3: a reward head on the alignment scores.

reads   features.safetensors      chosen, rejected [n, 2K] · mean, std [2K] · split [n]
writes  reward_head.safetensors   all that scoring new text needs:
            latents, directions [2K'], [2K', d] · mean, std [2K'] · temperature [1]
            linear: w1 [2K'] · b1 [1]
            mlp: w1 [hidden, 2K'] · b1 [hidden] · w2 [hidden] · b2 [1]

    python 03_train_head.py --run runs/demo --head linear --loss bt

    reward(z) = head((<z, d_j> - mean_j) / std_j)       trained so that chosen is above rejected

The paper trains with a margin loss whose margin is not published; Bradley-Terry is the default
here, --loss margin is one flag away. It does not publish learning rate or epochs either, and uses
one K: --k auto takes the best on dev.
"""

import argparse
import functools
import importlib
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from parts.chat import render
from parts.files import (
    UserError,
    check_finite,
    file_hash,
    load_stage,
    run_main,
    save_stage,
    up_to_date,
)
from parts.models import same_weights

stage1 = importlib.import_module("01_extract")
TRAIN, DEV = stage1.TRAIN, stage1.DEV
EPOCH_PAIRS = 2**14      # at most, before dev is looked at again


# ---------------------------------------------------------------- the three losses

def bradley_terry_loss(reward_chosen, reward_rejected):
    """Mean of -log σ(r_chosen - r_rejected) over pairs [n] → scalar. Bradley & Terry (1952)."""
    # softplus(-x) = -log σ(x), stable for large |x|
    return F.softplus(reward_rejected - reward_chosen).mean()


def margin_loss(reward_chosen, reward_rejected, margin=1.0):
    """Mean of max(0, γ - (r_chosen - r_rejected)) over pairs [n] → scalar. The paper's choice; its
    γ is not published."""
    return torch.relu(margin - (reward_chosen - reward_rejected)).mean()


def bce_loss(reward_chosen, reward_rejected):
    """Mean binary cross-entropy of single responses, chosen = 1, rejected = 0 → scalar. The paper's
    weak baseline."""
    return (F.softplus(-reward_chosen).mean() + F.softplus(reward_rejected).mean()) / 2


# ---------------------------------------------------------------- the head

class LinearHead(torch.nn.Module):
    """r = x · w1 + b1: one weight a direction."""
    kind = "linear"

    def __init__(self, width):
        super().__init__()
        self.w1 = torch.nn.Parameter(torch.zeros(width))
        self.b1 = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        """Standardised scores [n, 2K] → rewards [n]."""
        return x @ self.w1 + self.b1

    def weights(self):
        """What the L2 penalty is on."""
        return [self.w1]

    def output_bias(self):
        """What is added to every reward."""
        return self.b1


class MLPHead(torch.nn.Module):
    """One hidden layer of ReLU, 256·512 + 512 + 512 + 1 numbers in the paper."""
    kind = "mlp"

    def __init__(self, width, hidden=512, generator=None):
        super().__init__()
        self.w1 = uniform_parameter(hidden, width, fan=width, generator=generator)
        self.b1 = uniform_parameter(hidden, fan=width, generator=generator)
        self.w2 = uniform_parameter(hidden, fan=hidden, generator=generator)
        self.b2 = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        """Standardised scores [n, 2K] → rewards [n]."""
        return torch.relu(x @ self.w1.T + self.b1) @ self.w2 + self.b2

    def weights(self):
        """What the L2 penalty is on."""
        return [self.w1, self.w2]

    def output_bias(self):
        """What is added to every reward."""
        return self.b2


def uniform_parameter(*shape, fan, generator):
    """Uniform in ± 1 / √fan: how torch starts a linear layer."""
    return torch.nn.Parameter((torch.rand(*shape, generator=generator) * 2 - 1) / fan**0.5)


def start_head(width, kind="linear", hidden=512, generator=None):
    """→ a head that has not seen any pair."""
    return LinearHead(width) if kind == "linear" else MLPHead(width, hidden, generator)


def head_from(tensors):
    """The tensors of reward_head.safetensors → its head."""
    if "w2" in tensors:
        hidden, width = tensors["w1"].shape
        head = MLPHead(width, hidden)
    else:
        head = LinearHead(len(tensors["w1"]))
    head.load_state_dict({name: tensors[name].float() for name in head.state_dict()})
    return head.requires_grad_(False)


def trained_parameters(head):
    """How many numbers of a head were trained."""
    return sum(parameter.numel() for parameter in head.parameters())


# ---------------------------------------------------------------- training

DEFAULTS = {"kind": "linear", "loss": "bt", "margin": 1.0, "hidden": 512, "lr": 0.01,
            "weight_decay": 0.1, "epochs": 200, "patience": 20}


def loss_named(name, margin=1.0):
    """bt, margin or bce → the function of (reward_chosen, reward_rejected)."""
    if name == "margin":
        return functools.partial(margin_loss, margin=margin)
    return {"bt": bradley_terry_loss, "bce": bce_loss}[name]


def fit_head(chosen, rejected, split, columns=slice(None), kind="linear", loss="bt", margin=1.0,
             hidden=512, lr=0.01,
             weight_decay=0.1, epochs=200, patience=20, batch=256, seed=0):
    """Train one head on some columns of the standardised scores [n, m] of both sides → (head, its
    loss on dev).

    Adam on mini-batches of train pairs; after each epoch the loss on dev; the weights of the best
    epoch are what is returned. weight_decay is an L2 penalty, weight_decay/2 · ‖w‖² added to the
    loss. An epoch is EPOCH_PAIRS random pairs where there are more: a few hundred weights need no
    more, so a million pairs take hardly longer than ten thousand.
    """
    pair_loss = loss_named(loss, margin)
    generator = torch.Generator().manual_seed(seed)
    head = start_head(chosen[:1, columns].shape[1], kind, hidden, generator)
    adam = torch.optim.Adam(head.parameters(), lr=lr, fused=True)
    train_rows = (split == TRAIN).nonzero().flatten()
    dev_chosen = chosen[split == DEV][:, columns]
    dev_rejected = rejected[split == DEV][:, columns]

    best_loss = float("inf")
    best_weights = None
    epochs_since = 0
    for epoch in range(epochs + 1):  # dev is looked at before the first step and after each epoch
        with torch.no_grad():
            dev_loss = float(pair_loss(head(dev_chosen), head(dev_rejected)))
        if dev_loss < best_loss - 1e-6:
            best_loss = dev_loss
            best_weights = {name: weight.clone() for name, weight in head.state_dict().items()}
            epochs_since = 0
        else:
            epochs_since += 1
        if epochs_since > patience or epoch == epochs:
            break

        order = torch.randperm(len(train_rows), generator=generator)[:EPOCH_PAIRS]
        for pick in train_rows[order].split(batch):
            penalty = sum(weight.square().sum() for weight in head.weights())
            reward_chosen = head(chosen[pick][:, columns])              # [b]
            reward_rejected = head(rejected[pick][:, columns])          # [b]
            objective = pair_loss(reward_chosen, reward_rejected) + weight_decay / 2 * penalty
            adam.zero_grad()
            objective.backward()
            adam.step()

    head.load_state_dict(best_weights)
    return head.requires_grad_(False), best_loss


def fit_temperature(difference):
    """The T > 0 for which σ(Δr / T) has the least negative log-likelihood on dev → float.

    Each pair counts 1 / (n + 2) the other way (Platt, 1999): a small dev set that is all right
    would ask for T = 0.
    """
    d, other = difference[:, None].float(), 1 / (len(difference) + 2)
    if not d.any():
        return 1.0
    grid = torch.logspace(-2, 2, 401)
    nll = ((1 - other) * F.softplus(-d / grid) + other * F.softplus(d / grid)).mean(0)
    return float(grid[nll.argmin()])


def fit_best(chosen, rejected, split, options, seeds, **settings):
    """The same search for the method and for every control: the option with the lowest dev loss,
    then all seeds.

    options: {name: {"columns": which scores, and settings that differ}}. → (name, heads, dev
    losses, {name: dev loss}).
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
    """Rewards of all rows of one side's scores [n, m] → [n], some rows at a time."""
    return torch.cat([head(part[:, columns]) for part in side.split(2**16)])


# ---------------------------------------------------------------- using it

class RewardModel:
    """Score text with a trained head. A plain class, so that trainers take it for a function, not
    for a module."""

    def __init__(self, tensors, meta, backbone):
        self.tensors = tensors
        self.meta = meta
        self.backbone = backbone
        self.head = head_from(tensors)
        self.directions = tensors["directions"].float()             # [2K, d]
        self.mean = tensors["mean"].float()                         # [2K]
        self.std = tensors["std"].float()                           # [2K]
        self.temperature = float(tensors["temperature"])
        self.__name__ = "sparserm_reward"       # trainers log a reward function by its name

    @classmethod
    def load(cls, path, model=None, device="auto"):
        """A reward_head.safetensors → RewardModel. Errors: UserError.

        model: another copy of the backbone (name, folder, or a Backbone of stage 1); else the
        recorded one is opened, never with remote code.
        """
        tensors, meta = load_stage(path, "03_train_head.py")
        missing = {"directions", "mean", "std", "w1", "b1", "temperature"} - set(tensors)
        if missing:
            raise UserError(f"not a reward head: {', '.join(sorted(missing))} missing · {path} · "
                            "pass reward_head.safetensors")

        if isinstance(model, stage1.Backbone):
            backbone = model
        elif model:
            backbone = stage1.load_backbone(model, None, meta["dtype"], device)
        else:
            backbone = stage1.load_backbone(meta["model"], meta["revision"], meta["dtype"], device)
        check_backbone(meta, backbone.meta, path)
        return cls(tensors, meta, backbone)

    # from text to the residual stream

    def render(self, prompt, response):
        """A prompt and a response as the head was trained on them → Text of parts/chat.py."""
        return render(self.backbone.tokenizer, prompt, response, self.meta["max_length"])

    def read(self, texts):
        """Rendered texts → [n, d] float32."""
        return stage1.residuals(self.backbone, texts, [self.meta["layer"]],
                                self.meta["token"])[0].float()

    def hidden(self, prompts, responses):
        """The residual-stream vectors that the reward is read from, [n, d] float32."""
        both = zip(prompts, responses, strict=True)
        return self.read([self.render(prompt, response) for prompt, response in both])

    def token_range(self, text):
        """The tokens of a rendered conversation that the reward is read from → (first, one past the
        last)."""
        return stage1.token_range(text, self.meta["token"])

    # from the residual stream to the reward

    def scores_of(self, hidden):
        """Residual vectors [n, d] → standardised alignment scores [n, 2K]."""
        return (hidden @ self.directions.T - self.mean) / self.std

    def vector(self):
        """A linear head folded to one vector: r = <z, u> + c, with u = Σ_j w_j d_j / std_j → (u
        [d], c)."""
        weight = self.head.w1.double() / self.std.double()
        u = weight @ self.directions.double()
        c = self.head.b1.double() - weight @ self.mean.double()
        return u.float(), float(c)

    def reward_of(self, hidden):
        """Residual vectors [n, d] → rewards [n]."""
        if self.head.kind == "linear":
            u, c = self.vector()
            return hidden @ u + c
        return self.head(self.scores_of(hidden))

    def contributions(self, hidden):
        """What each direction adds to the reward of residual vectors [n, d] → [n, 2K].

        Linear head: w_j x_j, exact. MLP: the change when score j is set to its mean. The difference
        of two responses is the difference of their rows.
        """
        x = self.scores_of(hidden)
        if self.head.kind == "linear":
            return x * self.head.w1
        whole = self.head(x)
        parts = []
        for column in range(x.shape[1]):
            without = x.index_fill(1, torch.tensor([column]), 0.0)
            parts.append(whole - self.head(without))
        return torch.stack(parts, 1)

    # what a user calls

    def score(self, prompts, responses):
        """Raw rewards, 0 on average over the training responses: lists of n prompts and n responses
        → list of n floats."""
        if isinstance(prompts, str) or isinstance(responses, str):
            raise UserError("score takes lists · a single string was given · write score([prompt], "
                            "[response])")
        if len(prompts) != len(responses):
            raise UserError(f"{len(prompts)} prompts, {len(responses)} responses · score · pass "
                            "one response for each prompt")
        return self.reward_of(self.hidden(prompts, responses)).tolist() if prompts else []

    def prefer(self, prompt, a, b):
        """Probability that response a is preferred to b: σ((r_a - r_b) / T), T fitted on dev."""
        r_a, r_b = self.score([prompt, prompt], [a, b])
        return float(torch.sigmoid(torch.tensor((r_a - r_b) / self.temperature)))

    def explain(self, prompt, response):
        """What each latent's direction adds → {reward, bias, contributions: [{latent, side, score,
        contribution}]}.

        Linear head: w_j (v_j - mean_j) / std_j; with the bias they add up to the reward. MLP: the
        change when score j is set to its mean (an ablation of the head's input; these do not add
        up). Neither says what causes a preference.
        """
        hidden = self.hidden([prompt], [response])
        scores = self.scores_of(hidden)[0].tolist()
        parts = self.contributions(hidden)[0].tolist()
        rows = []
        for n, latent in enumerate(self.tensors["latents"].tolist()):
            side = "chosen" if n < len(parts) // 2 else "rejected"
            rows.append({"latent": latent, "side": side, "score": scores[n],
                         "contribution": parts[n]})
        rows.sort(key=lambda row: -abs(row["contribution"]))
        bias = float(self.head.b1) if self.head.kind == "linear" else None
        return {"reward": float(self.reward_of(hidden)), "bias": bias, "contributions": rows}

    def __call__(self, prompts, completions, **_):
        """A TRL reward function: strings or chat messages → list of float, None for a text longer
        than max_length."""
        texts = {}
        for n, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            response = completion if isinstance(completion, str) else completion[-1]["content"]
            try:
                texts[n] = self.render(prompt, response)
            except UserError:
                continue

        rewards = [None] * len(prompts)
        if texts:
            found = self.reward_of(self.read(list(texts.values()))).tolist()
            for n, reward in zip(texts, found):
                rewards[n] = reward
        return rewards


def check_backbone(wanted, found, where):
    """Refuse a backbone that is not a copy of the one the head was trained on."""
    for key, what in (("backbone", "shape"), ("template", "chat template")):
        if wanted[key] != found[key]:
            raise UserError(f"the head was trained on {wanted['model']} ({what} {wanted[key]}), "
                            f"this is {found['model']} "
                            f"({found[key]}) · {where} · pass the same backbone")
    if not same_weights(wanted["weights"], found["weights"]):
        raise UserError(f"the weights of {found['model']} are not those of {wanted['model']} · "
                        f"{where} · pass the same backbone")


# ---------------------------------------------------------------- the stage

def standardised(t):
    """features.safetensors → chosen, rejected [n, 2K] with mean 0 and standard deviation 1 on
    train.

    In place, because they may be large.
    """
    return [t[side].sub_(t["mean"]).div_(t["std"]) for side in ("chosen", "rejected")]


def parse_args():
    """The flags, checked as far as that needs no file."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", default="runs/demo",
                   help="folder of the run (default runs/demo)")
    p.add_argument("--head", choices=("linear", "mlp"), default=DEFAULTS["kind"],
                   help="(default linear)")
    p.add_argument("--hidden", type=int, default=DEFAULTS["hidden"],
                   help="units of the MLP's hidden layer (default 512)")
    p.add_argument("--loss", choices=("bt", "margin", "bce"), default=DEFAULTS["loss"],
                   help="bt Bradley-Terry, margin, bce (default bt)")
    p.add_argument("--margin", type=float, default=DEFAULTS["margin"],
                   help="γ of the margin loss (default 1)")
    p.add_argument("--k", default="auto",
                   help="auto (the best on dev) or N: the first N of each side (default auto)")
    p.add_argument("--lr", type=float, default=DEFAULTS["lr"],
                   help="learning rate of Adam (default 0.01)")
    p.add_argument("--weight-decay", type=float, default=DEFAULTS["weight_decay"],
                   help="L2 penalty (default 0.1)")
    p.add_argument("--epochs", type=int, default=DEFAULTS["epochs"],
                   help="at most (default 200)")
    p.add_argument("--patience", type=int, default=DEFAULTS["patience"],
                   help="epochs without a lower dev loss before it stops (default 20)")
    p.add_argument("--seeds", type=int, default=5,
                   help="heads to train; the one with the lowest dev loss is kept (default 5)")
    p.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--debug", action="store_true",
                   help="show the traceback of an error")
    args = p.parse_args()
    if args.check:
        raise UserError("moved · 03_train_head.py --check · use python -m tools.self_check --run "
                        f"{args.run}")
    check_settings(args)
    return args


def check_settings(args):
    """Refuse values that cannot train."""
    least_of = {"--seeds": 1, "--epochs": 1, "--hidden": 1, "--patience": 0, "--lr": 1e-12,
                "--weight-decay": 0, "--margin": 0}
    for flag, least in least_of.items():
        value = getattr(args, flag[2:].replace("-", "_"))
        if not least <= value < float("inf"):
            raise UserError(f"{flag} {value} is out of range · {flag} · pass a number from "
                            f"{least:g}")


def settings_of(args):
    """What fit_head needs of the arguments (stage 4 gives its controls the same)."""
    return {"kind": args.head, **{name: getattr(args, name) for name in DEFAULTS if name != "kind"}}


def check_split(split, path):
    """Refuse a run without train or dev pairs, warn where dev is small."""
    for number, name in ((TRAIN, "train"), (DEV, "dev")):
        if not (split == number).any():
            raise UserError(f"no pair is in the {name} split · {path} · more pairs, or another "
                            "--split in 01_extract.py")
    dev_pairs = int((split == DEV).sum())
    if dev_pairs < 30:
        print(f"note: only {dev_pairs} dev pairs, which choose K, when to stop and the "
              "temperature: more would be safer")


def main():
    """Stage 3 from the command line."""
    args = parse_args()
    path = Path(args.run) / "features.safetensors"
    t, meta = load_stage(path, "02_select_features.py", "select")
    check_finite(t, path)
    check_split(t["split"], path)
    total = meta["k"]
    if args.k != "auto" and not (args.k.isdigit() and 1 <= int(args.k) <= total):
        raise UserError(f"--k must be auto or 1 to {total} · --k {args.k} · {total} latents a side "
                        "were selected in stage 2")

    parent = {"features": file_hash(path), "pairs": meta["parent"]["pairs"],
              "sae": meta["parent"]["sae"]}
    asked = {"k": args.k, "seeds": args.seeds}
    record = {**meta, "stage": "head", "asked": asked, "settings": settings_of(args),
              "parent": parent}
    out = Path(args.run) / "reward_head.safetensors"
    seconds = None
    if not up_to_date(out, {name: value for name, value in record.items() if name != "k"}):
        seconds = train(args, t, record, out)
    report(args, seconds, *load_stage(out))


def train(args, t, record, out):
    """Search K on dev, train all seeds, keep the one with the lowest dev loss → seconds taken."""
    started = time.perf_counter()
    chosen, rejected = standardised(t)
    split = t["split"]
    options = k_options(record["k"], args.k)
    k, heads, dev_losses, curve = fit_best(chosen, rejected, split, options, range(args.seeds),
                                           **settings_of(args))
    columns = options[k]["columns"]

    differences = []                        # r_chosen - r_rejected of each seed's head
    for head in heads:
        reward_chosen = rewards_of(head, chosen, columns)
        reward_rejected = rewards_of(head, rejected, columns)
        on_train = torch.cat([reward_chosen[split == TRAIN], reward_rejected[split == TRAIN]])
        head.output_bias().sub_(on_train.mean())        # 0 on average over the train responses
        differences.append(reward_chosen - reward_rejected)

    best = min(range(len(heads)), key=lambda seed: dev_losses[seed])
    dev_of_seeds = [share_right(difference[split == DEV]) for difference in differences]
    found = {"train": share_right(differences[best][split == TRAIN]), "dev": dev_of_seeds[best],
             "dev_of_seeds": dev_of_seeds,
             "dev_loss": dev_losses[best]}

    tensors = {name: t[name][columns] for name in ("latents", "directions", "mean", "std")}
    tensors |= heads[best].state_dict()
    tensors["temperature"] = torch.tensor([fit_temperature(differences[best][split == DEV])])
    save_stage(out, tensors, {**record, "k": k, "seed_kept": best, "accuracy": found,
                              "k_curve": {str(option): loss for option, loss in curve.items()}})
    return time.perf_counter() - started


def share_right(differences):
    """r_chosen - r_rejected [n] → the share above 0."""
    return float((differences > 0).float().mean())


def report(args, seconds, t, meta):
    """The table at the end."""
    found = meta["accuracy"]
    trained = trained_parameters(head_from(t))
    if meta["k_curve"]:
        curve = [f"{k}: {meta['k_curve'][k]:.3f}" for k in sorted(meta["k_curve"], key=int)]
        print("\ndev loss by K   " + "   ".join(curve))
    print()
    print(f"head         {args.head}, loss {args.loss}, K = {meta['k']} a side ({2 * meta['k']} "
          "directions)")
    print(f"accuracy     train {found['train']:.3f} · dev {found['dev']:.3f} (all {args.seeds} "
          "seeds: "
          f"{min(found['dev_of_seeds']):.3f} to {max(found['dev_of_seeds']):.3f}; test is read by "
          "stage 4 only)")
    print(f"parameters   {trained:,} trained, {trained / meta['parameters']:.2e} of the backbone's "
          f"{meta['parameters']:,}")
    print(f"temperature  {float(t['temperature']):.3f}")
    print("time         "
          f"{'found complete, not trained again' if seconds is None else f'{seconds:.1f} s'}")
    print(f"written      {args.run}/reward_head.safetensors")
    print(f"\nnext: python 04_evaluate.py --run {args.run}")


if __name__ == "__main__":
    run_main(main)
