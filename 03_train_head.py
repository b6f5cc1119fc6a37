"""Stage 3: a reward head on the alignment scores.

reads   features.safetensors    chosen, rejected [n, 2K] · mean, std [2K] · split, fold [n]
                                search_latents, search_chosen, search_rejected: see stage 2
writes  reward_head.safetensors     all that scoring new text needs:
            latents [2K'] · directions [2K', d] · mean, std [2K'] · temperature [1] · range [1]
            linear: w1 [2K'] · b1 [1]
            mlp: w1 [hidden, 2K'] · b1 [hidden] · w2 [hidden] · b2 [1]

    python 03_train_head.py --run runs/demo-safe
    python 03_train_head.py --run runs/demo-safe --head mlp --loss margin --k 128 --name paper

    reward(z) = head((<z, d_j> - mean_j) / std_j)       trained so that chosen is above rejected

A linear head with an L2 penalty is a convex problem: Newton's method solves it to the last digit,
so there is no seed, learning rate or early stopping. K and the penalty are chosen by
cross-validation over five folds of the train and dev pairs, each with latents that were selected
without it. The paper trains an MLP with a margin loss, and publishes neither the margin nor
learning rate nor epochs; it uses one K. Bradley-Terry and a linear head are the default here,
because a linear head can be explained.
"""

import argparse
import importlib
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from parts.chat import render
from parts.contexts import read_names
from parts.devices import one_thread
from parts.files import (
    UserError,
    check_finite,
    file_hash,
    load_stage,
    run_main,
    save_stage,
    up_to_date,
)
from parts.latents import pieces, side_of
from parts.messages import Unreadable, read_prompt, with_last_turn
from parts.models import same_weights

stage1 = importlib.import_module("01_extract")
stage2 = importlib.import_module("02_select_features")
TEST = stage1.TEST
FOLDS = stage2.FOLDS
PENALTIES = (1.0, 0.1, 0.01, 0.001, 0.0001)         # of L2, the largest first: each starts the next
RANGE = 0.999                                       # quantile of the training responses


# ---------------------------------------------------------------- the three losses

def bradley_terry_loss(reward_chosen, reward_rejected):
    """-log σ(r_chosen - r_rejected) of each pair [n] → [n]. Bradley & Terry (1952)."""
    # softplus(-x) = -log σ(x), stable for large |x|
    return F.softplus(reward_rejected - reward_chosen)


CORNER = 0.05               # half of the rounded corner of the margin loss, in γ


def margin_loss(reward_chosen, reward_rejected, margin=1.0):
    """max(0, γ - (r_chosen - r_rejected)) of each pair [n] → [n]; γ is the margin.

    The paper's choice; its γ is not published. The corner is rounded over ± 0.05 γ, a parabola in
    place of the kink, so that Newton's method has a second derivative.
    """
    value, _, _ = margin_curve(margin)(reward_chosen - reward_rejected)
    return value


def bce_loss(reward_chosen, reward_rejected):
    """Binary cross-entropy of single responses, chosen = 1, rejected = 0, mean of both [n] → [n].

    The paper's weak baseline.
    """
    return (F.softplus(-reward_chosen) + F.softplus(reward_rejected)) / 2


def loss_named(name, margin=1.0):
    """bt, margin or bce → the function of (reward_chosen, reward_rejected)."""
    def with_margin(reward_chosen, reward_rejected):
        return margin_loss(reward_chosen, reward_rejected, margin)
    return {"bt": bradley_terry_loss, "margin": with_margin, "bce": bce_loss}[name]


# ---------------------------------------------------------------- the heads

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


class MLPHead(torch.nn.Module):
    """One hidden layer of ReLU, 256·512 + 512 + 512 + 1 numbers in the paper."""
    kind = "mlp"

    def __init__(self, width, hidden=512, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape, fan):               # how torch starts a linear layer
            values = torch.rand(*shape, generator=generator) * 2 - 1
            return torch.nn.Parameter(values / fan**0.5)
        self.w1 = uniform(hidden, width, fan=width)
        self.b1 = uniform(hidden, fan=width)
        self.w2 = uniform(hidden, fan=hidden)
        self.b2 = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        """Standardised scores [n, 2K] → rewards [n]."""
        return torch.relu(x @ self.w1.T + self.b1) @ self.w2 + self.b2


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


# ---------------------------------------------------------------- training a linear head

def fit_linear(chosen, rejected, loss="bt", l2=0.1, margin=1.0, start=None):
    """The linear head with the least mean loss + l2/2 · ‖w‖² → LinearHead.

    chosen, rejected: scores of both sides [n, m], torch or NumPy, any float type. l2 > 0. The mean
    reward of the pairs is 0. start: a weight vector [m] near the solution, to be quicker.
    """
    chosen = at_least_float32(chosen)
    rejected = at_least_float32(rejected)
    if loss == "bce":  # single responses need a bias, which is not penalised
        weights, bias = newton_of_responses(chosen, rejected, l2)
    else:
        weights = start
        for curve in curves_of(loss, margin):
            weights = newton(chosen - rejected, curve, l2, weights)
        rewards = (chosen @ weights.to(chosen) + rejected @ weights.to(chosen)) / 2
        bias = -rewards.double().mean()
    head = LinearHead(len(weights))
    head.w1.data = weights.float()
    head.b1.data = bias.reshape(1).float()
    return head.requires_grad_(False)


def at_least_float32(scores):
    """Scores, NumPy or torch, any float type → torch, float32 or float64."""
    # the pairs' differences of half-precision scores would lose digits
    scores = torch.as_tensor(scores)
    return scores if scores.dtype == torch.float64 else scores.float()


def curves_of(loss, margin):
    """What Newton's method minimises, one after the other, each from the end of the one before.

    The margin loss is nearly a kink: from a wide corner to the narrow one it takes a few steps a
    corner, and from nowhere hundreds.
    """
    if loss == "bt":
        return [bradley_terry_curve]
    return [margin_curve(margin, corner) for corner in (0.8, 0.4, 0.2, 0.1, CORNER)]


def newton(rows, curve, l2, start=None, steps=500, chunk=2**14):
    """The w [m] with the least mean of φ(rows · w) + w · diag(l2) w / 2, in float64.

    rows [n, m]; curve(t) → φ, φ', φ'' of numbers [n]; l2: one number, or one for each column [m].
    Newton's method: each step solves H s = g, with the gradient g and the Hessian H of the
    objective, and is halved until the objective falls. The problem is convex, so the end does not
    depend on where it starts.
    """
    n, m = rows.shape
    l2 = torch.as_tensor(l2, dtype=torch.float64).expand(m)
    w = torch.zeros(m, dtype=torch.float64) if start is None else start.double()

    def objective(w):
        total = sum(curve(part.double() @ w)[0].sum() for part in rows.split(chunk))
        return total / n + (l2 * w * w).sum() / 2

    value = objective(w)
    for _ in range(steps):
        gradient = l2 * w
        hessian = torch.diag(l2)
        for part in rows.split(chunk):          # a million rows stay within memory
            part = part.double()
            _, slope, bend = curve(part @ w)
            gradient = gradient + part.T @ slope / n
            hessian = hessian + (part.T * bend) @ part / n
        step = torch.linalg.solve(hessian, gradient)
        decrease = gradient @ step              # twice what the step is expected to gain
        if decrease < 1e-16:
            break
        size = 1.0
        while (new := objective(w - size * step)) > value - size * decrease / 4 and size > 1e-6:
            size /= 2
        w, value = w - size * step, min(value, new)
    return w


def bradley_terry_curve(t):
    """φ(t) = -log σ(t) with its first and second derivative."""
    wrong = torch.sigmoid(-t)
    return F.softplus(-t), -wrong, wrong * (1 - wrong)


def margin_curve(margin, corner=CORNER):
    """φ of the margin loss, its first and second derivative → function of r_chosen - r_rejected."""
    width = corner * margin

    def curve(t):
        short = margin - t
        parabola = (short + width).clamp(0, 2 * width).square() / (4 * width)
        value = torch.where(short > width, short, parabola)
        slope = -((short + width) / (2 * width)).clamp(0, 1)
        in_the_corner = short.abs() < width
        return value, slope, in_the_corner.double() / (2 * width)
    return curve


def newton_of_responses(chosen, rejected, l2):
    """BCE on single responses → (w [m], bias []): Newton on signed rows with a 1 behind."""
    one = torch.ones(len(chosen), 1, dtype=chosen.dtype)
    signed = torch.cat([torch.cat([chosen, one], 1), -torch.cat([rejected, one], 1)])
    penalties = torch.full((signed.shape[1],), float(l2), dtype=torch.float64)
    penalties[-1] = 1e-9                        # none on the bias, but for a solution that is there
    solution = newton(signed, bradley_terry_curve, penalties)
    return solution[:-1], solution[-1]


# ---------------------------------------------------------------- training an MLP

EPOCH_PAIRS = 2**14         # at most: a random part of more pairs says as much


def fit_mlp(chosen, rejected, loss="margin", l2=0.01, margin=1.0, hidden=512, lr=0.001, epochs=100,
            patience=10, seed=0, held=None, steps=None, batch=256):
    """An MLP trained with Adam on standardised scores [n, m] → (MLPHead, steps taken, loss on
    held).

    held: (chosen, rejected) of other pairs, on which it stops: the head of the epoch with the least
    loss there is returned. steps: train for so many steps instead.
    """
    pair_loss = loss_named(loss, margin)
    head = MLPHead(chosen.shape[1], hidden, seed)
    adam = torch.optim.Adam(head.parameters(), lr=lr, fused=True)
    generator = torch.Generator().manual_seed(seed)
    taken = 0
    best_loss, best_steps, best_weights = float("inf"), 0, None
    since = 0
    while steps is None or taken < steps:
        order = torch.randperm(len(chosen), generator=generator)[:EPOCH_PAIRS]
        for pick in order.split(batch):
            penalty = head.w1.square().sum() + head.w2.square().sum()
            value = pair_loss(head(chosen[pick]), head(rejected[pick])).mean() + l2 / 2 * penalty
            adam.zero_grad()
            value.backward()
            adam.step()
            taken += 1
            if taken == steps:
                break
        if held is None:
            continue

        with torch.no_grad():
            held_loss = float(pair_loss(head(held[0]), head(held[1])).mean())
        since += 1
        if held_loss < best_loss:
            best_loss, best_steps, since = held_loss, taken, 0
            best_weights = {name: weight.clone() for name, weight in head.state_dict().items()}
        epochs -= 1
        if since > patience or epochs <= 0:
            break
    if best_weights:
        head.load_state_dict(best_weights)
    return head.requires_grad_(False), best_steps or taken, best_loss


def mlp_settings(settings):
    """The settings of a head → those that fit_mlp takes."""
    return {name: value for name, value in settings.items() if name != "kind"}


# ----------------------------------------------------------- K and the penalty by cross-validation

def k_values(total):
    """1, 2, 4 … and `total`."""
    return sorted({2**i for i in range(20) if 2**i < total} | {total})


def columns_of(k, total):
    """The first K directions of each side, of `total` a side → column numbers [2K]."""
    return torch.cat([torch.arange(k), total + torch.arange(k)])


def penalty_path(chosen, rejected, penalties, loss="bt", margin=1.0):
    """Yield (l2, LinearHead) for each penalty, the largest first; each solution starts the next."""
    n, m = chosen.shape
    basis = row_basis(chosen - rejected) if m > n and loss != "bce" else None
    if basis is not None:
        chosen, rejected = chosen.double() @ basis, rejected.double() @ basis
    start = None
    for l2 in penalties:
        head = fit_linear(chosen, rejected, loss, l2, margin, start)
        start = head.w1
        if basis is not None:
            whole = LinearHead(m).requires_grad_(False)
            whole.w1.copy_(basis @ head.w1.double())
            whole.b1.copy_(head.b1)
            head = whole
        yield l2, head


def row_basis(rows):
    """Orthonormal columns that span the rows [n, m] → [m, r], r <= n.

    With an L2 penalty the best weights lie in that span, so with more columns than pairs the
    problem is solved there: as large as the number of pairs, not of columns.
    """
    rows = rows.double()
    values, vectors = torch.linalg.eigh(rows @ rows.T)          # the Gram matrix [n, n]
    kept = values > 1e-10 * values.max()
    return rows.T @ (vectors[:, kept] / values[kept].sqrt())


def choose(losses, groups, rule="auto"):
    """{(K, L2): loss of each pair [n] by heads that have not seen it} → the (K, L2) to take.

    best: the least mean loss. auto: the smallest K, with its best L2, whose mean loss is within one
    standard error of that, SE = √(G · var D_g) / n, with D_g a group's summed difference of the two
    losses and G groups: pairs of one prompt are not independent.
    """
    best = least_mean(losses, losses)
    if rule == "best":
        return best
    _, group_of = np.unique(groups, return_inverse=True)
    for k in sorted({k for k, _ in losses}):
        option = best_of_k(losses, k)
        difference = (losses[option] - losses[best]).double().numpy()
        of_group = np.bincount(group_of, difference)
        error = np.sqrt(len(of_group) * of_group.var(ddof=1)) / len(difference)
        if difference.mean() <= error:
            return option
    return best


def least_mean(losses, options):
    """The option with the least mean loss, the first of equal ones."""
    return min(options, key=lambda option: float(losses[option].mean()))


def best_of_k(losses, k):
    """The (K, L2) of this K with the least mean loss."""
    return least_mean(losses, [option for option in losses if option[0] == k])


@dataclass
class Search:
    """What cross-validation found."""
    k: int
    l2: float
    losses: dict            # {(K, L2): mean loss}
    differences: object     # r_chosen - r_rejected of the pairs by heads that have not seen them


def search(t, ks, penalties, settings, rule="auto"):
    """K and L2 of a linear head by cross-validation over the folds of stage 2 → Search.

    t: features.safetensors. The latents of each fold were selected without it, and so are its mean
    and std: latents chosen on the pairs that judge them would flatter a large K.
    """
    fold = t["fold"][t["search_pair"]]                          # [m]
    groups = t["group"][t["search_pair"]].numpy()
    pair_loss = loss_named(settings["loss"], settings["margin"])
    losses = {}
    differences = {}
    for number in range(FOLDS):
        held = fold == number
        train, tested = without_fold(t, number)
        total = train[0].shape[1] // 2
        for k in ks:
            columns = columns_of(k, total)
            chosen, rejected = [side[:, columns] for side in train]
            for l2, head in penalty_path(chosen, rejected, penalties, settings["loss"],
                                         settings["margin"]):
                reward_chosen, reward_rejected = [head(side[:, columns]) for side in tested]
                for table, values in ((losses, pair_loss(reward_chosen, reward_rejected)),
                                      (differences, reward_chosen - reward_rejected)):
                    table.setdefault((k, l2), torch.zeros(len(fold)))[held] = values
    k, l2 = choose(losses, groups, rule)
    means = {option: float(loss.mean()) for option, loss in losses.items()}
    return Search(k, l2, means, differences[k, l2])


def without_fold(t, number):
    """Scores on the latents that were selected without a fold, standardised without it.

    t: features.safetensors. → ([chosen, rejected] of the other folds, the same of that fold)
    """
    held = t["fold"][t["search_pair"]] == number
    at = torch.searchsorted(t["search_union"], t["search_latents"][number])
    sides = [t[f"search_{side}"][:, at] for side in ("chosen", "rejected")]
    mean, std = stage2.standardisation(sides, ~held)
    scaled = [(side - mean) / std for side in sides]
    return [side[~held] for side in scaled], [side[held] for side in scaled]


def fit_temperature(differences):
    """The T > 0 for which σ(Δr / T) has the least negative log-likelihood → float.

    differences [n] of pairs that the head has not seen. Each pair counts 1 / (n + 2) the other way
    (Platt, 1999): a small set that is all right would ask for T = 0.
    """
    d = differences[:, None].float()
    other = 1 / (len(d) + 2)
    if not d.any():
        return 1.0
    grid = torch.logspace(-2, 2, 401)
    nll = ((1 - other) * F.softplus(-d / grid) + other * F.softplus(d / grid)).mean(0)
    return float(grid[nll.argmin()])


# ---------------------------------------------------------------- using it

class RewardModel:
    """Score text with a trained head.

    A plain class, so that trainers take it for a function, not for a module.
    """

    def __init__(self, tensors, meta, backbone, names=None):
        self.tensors = tensors
        self.meta = meta
        self.backbone = backbone
        self.names = names or {}                # {latent: {name, right, tasks}}
        self.head = head_from(tensors)
        self.directions = tensors["directions"].float()             # [2K, d]
        self.mean = tensors["mean"].float()                         # [2K]
        self.std = tensors["std"].float()                           # [2K]
        self.temperature = float(tensors["temperature"])
        self.range = float(tensors["range"])
        self.__name__ = "sparserm_reward"       # trainers log a reward function by its name

    @classmethod
    def load(cls, path, model=None, device="auto", names=None):
        """A reward_head.safetensors → RewardModel. Errors: UserError.

        model: another copy of the backbone (name, folder, or a Backbone of stage 1); else the
        recorded one is opened, never with remote code. names: a file of names of latents, as the
        report saves it.
        """
        tensors, meta = load_stage(path, "03_train_head.py")
        if meta.get("stage") != "head":         # of one that is, load_stage has checked the tensors
            raise UserError(f"not a reward head but a file of stage {meta.get('stage')} · {path} · "
                            "pass reward_head.safetensors, made by this version of "
                            "03_train_head.py")
        if isinstance(model, stage1.Backbone):
            backbone = model
        elif model:
            backbone = stage1.load_backbone(model, None, meta["dtype"], device)
        else:
            backbone = stage1.load_backbone(meta["model"], meta["revision"], meta["dtype"], device)
        check_backbone(meta, backbone.meta, path)
        if not 0 <= meta["layer"] < len(backbone.blocks):
            raise UserError(f"layer {meta['layer']} does not exist · {path} · {meta['model']} has "
                            f"blocks 0 to {len(backbone.blocks) - 1}: run 03 again")
        return cls(tensors, meta, backbone, read_names(names, meta) if names else None)

    # from text to the residual stream

    def render(self, prompt, response):
        """A prompt and a response as the head was trained on them → Text of parts/chat.py.

        Errors: Unreadable, of a text that cannot be read as it is meant.
        """
        if isinstance(response, str) and not response.strip():
            raise Unreadable("an empty response · score · it has no token that could be read")
        prompt = read_prompt(prompt)
        return render(self.backbone.tokenizer, prompt, response, self.meta["max_length"])

    def read(self, texts, normalised=True):
        """Rendered texts → z [n, d] float32, as the head takes it."""
        layer, rule = self.meta["layer"], self.meta["token"]
        z = stage1.residuals(self.backbone, texts, [layer], [rule])[layer, rule].float()
        return self.normalise(z) if normalised else z

    def normalise(self, z):
        """What stage 2 did with z before the projection."""
        return stage2.normalise(z, self.meta["normalise"], self.meta["norm_eps"])

    def hidden(self, prompts, responses):
        """The residual-stream vectors that the reward is read from, [n, d] float32."""
        texts = []
        for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            try:
                texts.append(self.render(prompt, response))
            except Unreadable as error:
                if len(prompts) == 1:
                    raise
                raise Unreadable(f"{error.reason} · number {number} of {len(prompts)} texts, from "
                                 "0 · leave it out, or call the reward model itself, which gives "
                                 "None for it") from None
        return self.read(texts)

    def token_range(self, text):
        """The tokens of a Text that the reward is read from → (first, one past the last)."""
        return stage1.token_range(text, self.meta["token"])

    # from the residual stream to the reward

    def scores_of(self, hidden):
        """Residual vectors [n, d] → standardised alignment scores [n, 2K]."""
        return (hidden @ self.directions.T - self.mean) / self.std

    def vector(self):
        """A linear head folded to one vector: r = <z, u> + c, with u = Σ_j w_j d_j / std_j.

        → (u [d], c)
        """
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

    def outside(self, hidden):
        """Which residual vectors lie outside of what training saw → bool [n].

        Outside is where the largest |x_j| of the standardised scores is above the 99.9 % quantile
        of the training responses.
        """
        return self.scores_of(hidden).abs().amax(1) > self.range

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

    def score(self, prompts, responses, check=False):
        """Raw rewards, 0 on average over the training responses: n prompts, n responses → n floats.

        check=True: → (rewards, outside), with a bool for each: does the text lie outside of what
        training saw? Then the reward is a guess.
        """
        if isinstance(prompts, str) or isinstance(responses, str):
            raise UserError("score takes lists · a single string was given · write "
                            "score([prompt], [response])")
        if len(prompts) != len(responses):
            raise UserError(f"{len(prompts)} prompts, {len(responses)} responses · score · "
                            "pass one response for each prompt")
        if not prompts:
            return ([], []) if check else []
        hidden = self.hidden(prompts, responses)
        rewards = self.reward_of(hidden).tolist()
        return (rewards, self.outside(hidden).tolist()) if check else rewards

    def prefer(self, prompt, a, b):
        """Probability that a is preferred to b: σ((r_a - r_b) / T), T fitted out of fold."""
        r_a, r_b = self.score([prompt, prompt], [a, b])
        return float(torch.sigmoid(torch.tensor((r_a - r_b) / self.temperature)))

    def explain(self, prompt, response):
        """What each latent's direction adds → {reward, bias, outside, contributions}.

        contributions: rows of latent, name, side, score, contribution. Linear head: w_j (v_j -
        mean_j) / std_j; with the bias they add up to the reward. MLP: the change when score j is
        set to its mean (an ablation of the head's input; these do not add up). Neither says what
        causes a preference.
        """
        hidden = self.hidden([prompt], [response])
        scores = self.scores_of(hidden)[0].tolist()
        parts = self.contributions(hidden)[0].tolist()
        rows = []
        for n, latent in enumerate(self.tensors["latents"].tolist()):
            rows.append({"latent": latent, "name": self.names.get(latent, {}).get("name"),
                         "side": side_of(n, len(parts)), "score": scores[n],
                         "contribution": parts[n]})
        rows.sort(key=lambda row: -abs(row["contribution"]))
        return {"reward": float(self.reward_of(hidden)),
                "bias": float(self.head.b1) if self.head.kind == "linear" else None,
                "outside": bool(self.outside(hidden)),
                "contributions": rows}

    def reads_tokens(self):
        """Is the reward a sum over the tokens: rule mean, a linear head, z as it is?"""
        plain = self.meta["token"] == "mean" and self.meta["normalise"] == "none"
        return plain and self.head.kind == "linear"

    def token_states(self, text, stop):
        """The residual stream of a Text's tokens from the response's first to `stop` → [n, d]."""
        [(members, [hidden])] = self.backbone.hidden_rows([text.ids], [self.meta["layer"]])
        _, places = members[0]
        return hidden[torch.from_numpy(places[text.first:stop]).to(hidden.device)].float().cpu()

    def parts_of(self, z):
        """What each of a response's tokens adds to the reward: z [n, d] → parts [n].

        part_t = Σ_j w_j (<z_t, d_j> - mean_j) / (n std_j). With the bias b1 they add up to the
        reward, because z of the rule mean is the mean of the z_t.
        """
        u, c = self.vector()
        without_bias = c - float(self.head.b1)
        return (z.double() @ u.double() + without_bias) / len(z)

    def tokens(self, prompt, response):
        """The exact part of each token of a response → {tokens, parts, bias, reward}.

        The parts and the bias add up to the reward. The head was trained on means over responses,
        not on single tokens. Errors: UserError, where the reward is no such sum.
        """
        if not self.reads_tokens():
            raise UserError("the reward is a sum over tokens only with token rule mean, a linear "
                            "head and z as it is · tokens · train such a head: 01 --token mean, "
                            "02 --normalise none, 03 --head linear")
        text = self.render(prompt, response)
        parts = self.parts_of(self.token_states(text, text.stop))
        bias = float(self.head.b1)
        return {"tokens": pieces(self.backbone.tokenizer, text.ids[:text.stop], text.first),
                "parts": parts.tolist(), "bias": bias, "reward": float(parts.sum()) + bias}

    def __call__(self, prompts, completions, **_):
        """A TRL reward function: strings or chat messages → list of float.

        Of a completion of several messages the last is scored, which has to be the assistant's; the
        ones before it are its context. None for what cannot be scored, see score_each.
        """
        rewards, _, _ = self.score_each(prompts, completions)
        return rewards

    def score_each(self, prompts, responses):
        """As score(…, check=True), but one bad text spoils nothing but its own reward.

        → (rewards, outside, reasons): of a text that cannot be scored None, None and why: it is
        empty, longer than max_length, half of a UTF-16 pair, refused by the chat template … A
        response may be messages, of which the last is the answer.
        """
        texts, reasons = self.render_each(prompts, responses)
        hidden = dict(zip(texts, self.read(list(texts.values())))) if texts else {}
        return *self.rewards_each(len(prompts), hidden), reasons

    def render_each(self, prompts, responses):
        """→ ({number: Text} of what can be read, for all: why not, or None)."""
        texts = {}
        reasons = [None] * len(prompts)
        for n, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            try:
                texts[n] = self.render(*with_last_turn(prompt, response))
            except Unreadable as error:
                reasons[n] = error.reason
        return texts, reasons

    def rewards_each(self, count, hidden):
        """{number: residual vector [d]} → (count rewards, count bools: outside), else None."""
        rewards = [None] * count
        outside = [None] * count
        if hidden:
            z = torch.stack(list(hidden.values()))
            found = zip(hidden, self.reward_of(z).tolist(), self.outside(z).tolist())
            for n, reward, is_outside in found:
                rewards[n] = reward
                outside[n] = is_outside
        return rewards, outside


def check_backbone(wanted, found, where):
    """Refuse a backbone that is not a copy of the one the head was trained on."""
    parts = {"backbone": "shape", "template": "chat template", "vocabulary": "vocabulary"}
    for key, what in parts.items():
        if wanted.get(key) != found[key]:
            raise UserError(f"the head was trained on {wanted['model']} "
                            f"({what} {wanted.get(key)}), this is {found['model']} "
                            f"({found[key]}) · {where} · pass the same backbone")
    if not same_weights(wanted["weights"], found["weights"]):
        raise UserError(f"the weights of {found['model']} are not those of {wanted['model']} · "
                        f"{where} · pass the same backbone")


# ---------------------------------------------------------------- the stage

DEFAULTS = {"kind": "linear", "loss": "bt", "margin": 1.0, "hidden": 512, "lr": 0.001,
            "epochs": 100, "patience": 10}
WITHOUT_SEARCH = {"k": 4, "l2": 0.1}
MLP_L2 = 0.01


def parse_args():
    """The flags, checked as far as that needs no file."""
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", required=True,
                   help="folder of the run")
    p.add_argument("--name",
                   help="keep this head beside others, in RUN/NAME/")
    p.add_argument("--head", choices=("linear", "mlp"), default=DEFAULTS["kind"],
                   help="(default linear)")
    p.add_argument("--loss", choices=("bt", "margin", "bce"), default=DEFAULTS["loss"],
                   help="bt Bradley-Terry, margin, bce (default bt)")
    p.add_argument("--margin", type=float, default=DEFAULTS["margin"],
                   help="γ of the margin loss (default 1)")
    p.add_argument("--k", default="auto",
                   help="directions a side: auto the fewest within one standard error of the "
                        "best, best the least loss, or N (default auto; of an MLP: all)")
    p.add_argument("--l2", default="auto",
                   help="penalty on the weights: auto by cross-validation, or a number above 0 "
                        f"(default auto; of an MLP: {MLP_L2})")
    p.add_argument("--hidden", type=int, default=DEFAULTS["hidden"],
                   help="mlp: units of the hidden layer (default 512)")
    p.add_argument("--lr", type=float, default=DEFAULTS["lr"],
                   help="mlp: learning rate of Adam (default 0.001)")
    p.add_argument("--epochs", type=int, default=DEFAULTS["epochs"],
                   help="mlp: at most (default 100)")
    p.add_argument("--patience", type=int, default=DEFAULTS["patience"],
                   help="mlp: epochs without a lower loss on the held-out fifth (default 10)")
    p.add_argument("--seeds", type=int, default=3,
                   help="mlp: heads to train, of which the best on that fifth is kept (default 3)")
    p.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--debug", action="store_true",
                   help="show the traceback of an error")
    args = p.parse_args()
    if args.check:
        raise UserError("moved · 03_train_head.py --check · use python -m tools.self_check "
                        f"--run {args.run}")
    check_flags(args)
    return args


def check_flags(args):
    """Refuse values that cannot train."""
    least_of = {"--seeds": 1, "--epochs": 1, "--hidden": 1, "--patience": 0, "--lr": 1e-12,
                "--margin": 1e-12}
    for flag, least in least_of.items():
        value = getattr(args, flag[2:])
        if not least <= value < float("inf"):
            raise UserError(f"{flag} {value} is out of range · {flag} · "
                            f"pass a number from {least:g}")
    if args.l2 != "auto":
        try:
            args.l2 = float(args.l2)
        except ValueError:
            args.l2 = 0.0
        if not 0 < args.l2 < float("inf"):
            raise UserError("the penalty must be a number above 0 · --l2 · "
                            "without one the best weights of separable pairs are infinite; "
                            "leave it out for auto")
    if args.k not in ("auto", "best") and not (args.k.isdigit() and int(args.k) > 0):
        raise UserError(f"--k must be auto, best or a number from 1 · --k {args.k} · "
                        "leave it out for auto")


def settings_of(args):
    """What training needs of the arguments; stage 4 gives its controls the same."""
    return {"kind": args.head, **{name: getattr(args, name) for name in DEFAULTS if name != "kind"}}


def main():
    """Stage 3 from the command line."""
    args = parse_args()
    path = stage2.features_path(args.run, args.name)
    t, meta = load_stage(path, "02_select_features.py", "select")
    check_finite(t, path)
    total = meta["k"]
    if args.k.isdigit() and int(args.k) > total:
        raise UserError(f"--k {args.k} is too large · --k · {total} latents a side were "
                        "selected in stage 2")
    if not (t["fold"] >= 0).any():
        raise UserError(f"all pairs are in the test split · {path} · "
                        "more pairs, or another --split in 01_extract.py")

    parent = {"features": file_hash(path), "pairs": meta["parent"]["pairs"],
              "sae": meta["parent"]["sae"]}
    asked = {"k": args.k, "l2": args.l2, "seeds": args.seeds}
    record = {**meta, "stage": "head", "asked": asked, "settings": settings_of(args),
              "parent": parent}
    out = stage2.folder_of(args.run, args.name) / "reward_head.safetensors"
    seconds = None
    if not up_to_date(out, {name: value for name, value in record.items() if name != "k"}):
        if out.exists():
            print(f"note: {out} is replaced")
        started = time.perf_counter()
        with one_thread():
            train(args, t, record, out)
        seconds = time.perf_counter() - started
    report(args, out, seconds, *load_stage(out))


def train(args, t, record, out):
    """Choose K and L2, fit on all train and dev pairs, write the head."""
    settings = record["settings"]
    choose_for = choose_mlp if args.head == "mlp" else choose_linear
    k, l2, differences, extra = choose_for(args, t, record)

    columns = columns_of(k, record["k"])
    chosen, rejected = take_train_scores(t, columns)            # [m, 2K']
    if args.head == "mlp":
        head, _, _ = fit_mlp(chosen, rejected, l2=l2, seed=extra["seed_kept"],
                             steps=extra["steps"], **mlp_settings(settings))
    else:
        head = fit_linear(chosen, rejected, settings["loss"], l2, settings["margin"])

    largest = []
    rewards = []
    for side in (chosen, rejected):
        for x in side.split(2**16):
            largest.append(x.abs().amax(1))
            rewards.append(head(x))
    output_bias = head.b1 if head.kind == "linear" else head.b2
    # 0 on average over the training responses; fit_linear has done so, bce and the MLP have not
    output_bias.sub_(torch.cat(rewards).mean())

    tensors = {name: t[name][columns] for name in ("latents", "directions", "mean", "std")}
    tensors |= head.state_dict()
    tensors["temperature"] = torch.tensor([fit_temperature(differences)])
    tensors["range"] = quantile(torch.cat(largest), RANGE).reshape(1)
    accuracy = float((differences > 0).float().mean()) if len(differences) else None
    save_stage(out, tensors,
               {**record, "k": k, "l2": l2, "accuracy_out_of_fold": accuracy, **extra})


def quantile(values, share):
    """The value [] below which a share of the values [n] lies."""
    # torch.quantile refuses more than 16 million values
    return values.sort().values[min(len(values) - 1, int(share * len(values)))]


def take_train_scores(t, columns):
    """features.safetensors → chosen, rejected [m, 2K'] of the train and dev pairs, standardised.

    The sides are taken out of t, one after the other: a million pairs stay within memory.
    """
    rows = (t["fold"] >= 0).nonzero()                           # [m, 1]
    sides = []
    for name in ("chosen", "rejected"):
        side = t.pop(name)[rows, columns]                       # [m, 1] and [2K'] → [m, 2K']
        sides.append(side.sub_(t["mean"][columns]).div_(t["std"][columns]))
    return sides


def choose_linear(args, t, record):
    """→ (K, L2, out-of-fold differences, what else to record)."""
    total = record["k"]
    ks = [int(args.k)] if args.k.isdigit() else k_values(record["search_k"])
    penalties = PENALTIES if args.l2 == "auto" else [args.l2]
    if "search_union" in t:
        # the folds may have fewer latents than --k asks for: search with those, take what was asked
        tried = [min(k, record["search_k"]) for k in ks]
        rule = "best" if args.k == "best" else "auto"
        found = search(t, tried, penalties, record["settings"], rule)
        k = int(args.k) if args.k.isdigit() else found.k
        # the keys of JSON are texts
        losses = {f"{of_k} {of_l2:g}": loss for (of_k, of_l2), loss in found.losses.items()}
        return k, found.l2, found.differences, {"search": losses}

    k = ks[0] if args.k.isdigit() else min(WITHOUT_SEARCH["k"], total)
    l2 = WITHOUT_SEARCH["l2"] if args.l2 == "auto" else args.l2
    print(f"note: {why_no_search(t)}: no search, K = {k} and L2 = {l2:g}")
    return k, l2, torch.zeros(0), {"search": {}}


def why_no_search(t):
    """Why stage 2 wrote no tensors for a search → str."""
    groups = len(torch.unique(t["group"][t["fold"] >= 0]))
    if groups < stage2.FEWEST_GROUPS:
        return f"only {groups} prompts to train on, fewer than {stage2.FEWEST_GROUPS}"
    return "no latent separates the two sides in all five folds"


def choose_mlp(args, t, record):
    """How many steps an MLP takes: trained on four folds, with the latents that were selected
    without the fifth, it stops on the fifth; train() then takes as many steps on all.

    → (K, L2, differences of that fifth, what else to record)
    """
    if "search_union" not in t:
        raise UserError(f"{why_no_search(t)}: an MLP cannot stop on one of them · --head mlp · "
                        "more pairs, or --head linear")
    l2 = MLP_L2 if args.l2 == "auto" else args.l2
    k = int(args.k) if args.k.isdigit() else record["k"]
    train, held = without_fold(t, 0)
    searched = columns_of(min(k, record["search_k"]), record["search_k"])
    train = [side[:, searched] for side in train]
    held = [side[:, searched] for side in held]
    best_loss, kept = float("inf"), None
    for seed in range(args.seeds):
        head, steps, loss = fit_mlp(*train, l2=l2, seed=seed, held=held,
                                    **mlp_settings(record["settings"]))
        if kept is None or loss < best_loss:
            best_loss, kept = loss, (seed, steps, head)
    seed, steps, head = kept
    differences = head(held[0]) - head(held[1])
    return k, l2, differences, {"steps": steps, "seed_kept": seed, "search": {}}


def report(args, out, seconds, t, meta):
    """The table at the end."""
    trained = trained_parameters(head_from(t))
    print()
    if meta["search"]:
        print("loss out of fold, by K (with its best L2)")
        for k, (loss, l2) in losses_by_k(meta["search"]).items():
            mark = "  ← taken" if k == meta["k"] else ""
            print(f"  K = {k:<5} {loss:.4f}   L2 {l2}{mark}")
    print(f"head         {meta['settings']['kind']}, loss {meta['settings']['loss']}, "
          f"K = {meta['k']} a side ({2 * meta['k']} directions), L2 {meta['l2']:g}")
    if meta["accuracy_out_of_fold"] is not None:
        which = {"linear": "the train and dev pairs right, by heads that had not seen them",
                 "mlp": "the pairs of the fold right that training stopped on"}
        print(f"out of fold  {meta['accuracy_out_of_fold']:.3f} of "
              f"{which[meta['settings']['kind']]}")
    print(f"parameters   {trained:,} trained, {trained / meta['parameters']:.2e} of the backbone's "
          f"{meta['parameters']:,}")
    print(f"temperature  {float(t['temperature']):.3f}")
    print("time         "
          f"{'found complete, not trained again' if seconds is None else f'{seconds:.1f} s'}")
    print(f"written      {out}")
    name = f" --name {args.name}" if args.name else ""
    print(f"\nnext: python 04_evaluate.py --run {args.run}{name}")


def losses_by_k(found):
    """{"K L2": loss} → {K: (least loss, its L2)} by rising K."""
    rows = {}
    for option, loss in found.items():
        k, l2 = option.split(" ")
        rows[int(k)] = min(rows.get(int(k), (float("inf"), "")), (loss, l2))
    return dict(sorted(rows.items()))


if __name__ == "__main__":
    run_main(main)
