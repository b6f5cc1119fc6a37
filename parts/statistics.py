"""Accuracy with intervals: one bootstrap over groups, and what is made of it.

Everywhere below a *difference* is r_chosen - r_rejected of a pair, and a *group* is a prompt: the
pairs of one prompt are drawn together. An interval is the middle 95 % of 2,000 draws. It covers the
tested prompts, not the draw of the training pairs.

Where few prompts say anything the bootstrap would give an interval that is too narrow, or of width
0: then it is Wilson's, with the number of groups as the number of observations, and it says so.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

DRAWS = 2000
LIMITS = (0.025, 0.975)
FEW_GROUPS = 20             # fewer prompts: no bootstrap
FEW_THAT_DIFFER = 5         # fewer prompts that are not like the rest: no bootstrap


# ---------------------------------------------------------------- the bootstrap

def group_weights(groups, draws=DRAWS, seed=0):
    """How often each different group comes in each draw with replacement → [draws, groups] float64.

    Columns in the order of np.unique(groups).
    """
    return weights_of_count(len(np.unique(groups)), draws, seed)


@functools.lru_cache(maxsize=4)
def weights_of_count(count, draws, seed):
    """The draws of group_weights(); the same for everything that is compared."""
    rng = np.random.default_rng(seed)
    weights = np.empty((draws, count))
    for draw in range(draws):
        weights[draw] = np.bincount(rng.integers(count, size=count), minlength=count)
    return weights


def bootstrap(values, groups, draws=DRAWS, seed=0):
    """Mean of values [n] → (mean, low, high): percentile bootstrap over groups, 95 %."""
    values = np.asarray(values, dtype=float)
    _, group_of = np.unique(groups, return_inverse=True)
    weights = group_weights(groups, draws, seed)
    sums = weights @ np.bincount(group_of, values)
    pairs = weights @ np.bincount(group_of)
    low, high = np.quantile(sums / pairs, LIMITS)
    return float(values.mean()), float(low), float(high)


def wilson(share, count):
    """Wilson's 95 % interval of a share seen in `count` independent observations → (low, high)."""
    z = 1.959964
    shrink = 1 + z * z / count
    middle = (share + z * z / (2 * count)) / shrink
    variance = share * (1 - share) / count
    spread = math.sqrt(variance + z * z / (4 * count * count))
    half = z * spread / shrink
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return min(low, share), max(high, share)        # whatever rounding does at 0 and 1


def groups_that_differ(values, groups):
    """How many groups do not have the commonest mean of values [n]?"""
    _, group_of = np.unique(groups, return_inverse=True)
    means = np.bincount(group_of, values) / np.bincount(group_of)
    _, counts = np.unique(means.round(9), return_counts=True)
    return int(len(means) - counts.max())


def says_little(values, groups):
    """Too few groups, or too few that are not like the rest, for a bootstrap?"""
    few = len(np.unique(groups)) < FEW_GROUPS
    return few or groups_that_differ(values, groups) < FEW_THAT_DIFFER


# ---------------------------------------------------------------- accuracy

def points(differences):
    """Differences → 1 where right, 0 where wrong, 1/2 for a tie: as good as a coin."""
    return (differences > 0) + (differences == 0) / 2


def interval(values, groups):
    """Mean of values [n] in [0, 1] → {mean, low, high, method}."""
    count = len(np.unique(groups))
    if says_little(values, groups):
        mean = float(np.mean(values))
        low, high = wilson(mean, count)
        return {"mean": mean, "low": low, "high": high, "method": "Wilson"}
    mean, low, high = bootstrap(values, groups)
    return {"mean": mean, "low": low, "high": high, "method": "bootstrap"}


def summary(differences, groups):
    """Differences [n] → {accuracy, low, high, method, ties, ties_half, n, groups}.

    A tie is wrong in `accuracy`, and half right in `ties_half`.
    """
    found = interval((differences > 0).astype(float), groups)
    return {
        "accuracy": found["mean"],
        "low": found["low"],
        "high": found["high"],
        "method": found["method"],
        "ties": float((differences == 0).mean()),
        "ties_half": float(points(differences).mean()),
        "n": len(differences),
        "groups": len(np.unique(groups)),
    }


def gap(ours, theirs, groups):
    """SparseRM minus a control, pair by pair, ties as half → {mean, low, high}.

    low and high are None where too few prompts differ: cannot tell.
    """
    advantage = points(ours) - points(theirs)
    if says_little(advantage, groups):
        return {"mean": float(advantage.mean()), "low": None, "high": None}
    return dict(zip(("mean", "low", "high"), bootstrap(advantage, groups)))


def side_by_side(differences_of, groups):
    """{name: differences [n]} → {name: summary}; of a control also `behind`: SparseRM minus it."""
    ours = differences_of["sparserm"]
    rows = {}
    for name, differences in differences_of.items():
        rows[name] = summary(differences, groups)
        if name != "sparserm":
            rows[name]["behind"] = gap(ours, differences, groups)
    return rows


def is_clear(row):
    """Is the interval of a difference clear of 0? → 1 above, -1 below, 0 not, or cannot tell."""
    if row["low"] is None:
        return 0
    return (row["low"] > 0) - (row["high"] < 0)


# ---------------------------------------------------------------- calibration and length

def calibration(differences, temperature, pairs_a_bin=50):
    """Confidence p = σ(|Δr| / T) against the outcome Δr > 0 → nll, brier, ece, bins of equal mass.

    Binning σ(Δr) with the label "always chosen" would say nothing: every bin's outcome would be 1.
    """
    confidence = torch.sigmoid(torch.tensor(np.abs(differences)) / temperature).numpy()
    right = (differences > 0).astype(float)
    bin_count = max(1, min(10, len(confidence) // pairs_a_bin))
    bins = []
    for members in np.array_split(np.argsort(confidence, kind="stable"), bin_count):
        bins.append({"confidence": float(confidence[members].mean()),
                     "accuracy": float(right[members].mean()), "n": len(members)})
    error = sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / len(confidence)
    nll = float(F.softplus(torch.tensor(-differences / temperature)).mean())
    brier = float(((confidence - right) ** 2).mean())
    return {"temperature": temperature, "nll": nll, "brier": brier, "bins": bins, "ece": error}


def length_figures(reward_chosen, reward_rejected, chosen_tokens, rejected_tokens):
    """Correlation of reward and length; accuracy where lengths differ by a tenth at most."""
    lengths = np.concatenate([chosen_tokens, rejected_tokens]).astype(float)
    rewards = np.concatenate([reward_chosen, reward_rejected])
    varied = lengths.std() > 0 and rewards.std() > 0
    correlation = float(np.corrcoef(lengths, rewards)[0, 1]) if varied else 0.0

    longer = np.maximum(chosen_tokens, rejected_tokens)
    matched = np.abs(chosen_tokens - rejected_tokens) <= 0.1 * longer
    right = reward_chosen > reward_rejected
    accuracy = float(right[matched].mean()) if matched.any() else None
    return {"correlation": correlation, "matched_n": int(matched.sum()),
            "matched_accuracy": accuracy}
