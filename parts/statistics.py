"""Accuracy with intervals: one bootstrap over groups, and what is made of it.

Everywhere below a *difference* is r_chosen - r_rejected of a pair, and a *group* is a prompt: the
pairs of one prompt are drawn together. An interval is the middle 95 % of 2,000 draws; it covers the
tested prompts, not the draw of the training pairs. Where values have several rows, one for each
seed, seeds are drawn too: which random directions a control got is as much chance as which prompts
were tested.
"""

import numpy as np
import torch
import torch.nn.functional as F

DRAWS = 2000
LIMITS = (0.025, 0.975)


# ---------------------------------------------------------------- the bootstrap

def group_draws(groups, draws=DRAWS, seed=0, rows=1):
    """Groups [n] → yield (times, drawn_rows) a draw: how often each different group is drawn, and
    which of `rows` seeds are."""
    count = len(np.unique(groups))
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        times = np.bincount(rng.integers(count, size=count), minlength=count)
        drawn_rows = rng.integers(rows, size=rows)
        yield times, drawn_rows


def bootstrap(values, groups, draws=DRAWS, seed=0):
    """Mean of values [n], or [seeds, n] over seeds and pairs → (mean, low, high): percentile
    bootstrap over groups, 95 %."""
    values = np.atleast_2d(values)
    _, group_of = np.unique(groups, return_inverse=True)
    pairs_of_group = np.bincount(group_of)
    total = np.stack([np.bincount(group_of, row) for row in values])            # [seeds, groups]
    means = []
    for times, rows in group_draws(groups, draws, seed, len(values)):
        sums = total[rows] @ times                                              # [seeds]
        means.append(sums.mean() / (pairs_of_group @ times))
    low, high = np.quantile(means, LIMITS)
    return float(values.mean()), float(low), float(high)


def bootstrap_weights(groups, draws, seed=0):
    """How often each pair comes in each draw of groups with replacement → [draws, n] float32."""
    _, group_of = np.unique(groups, return_inverse=True)
    weights = [times[group_of] for times, _ in group_draws(groups, draws, seed)]
    return torch.from_numpy(np.stack(weights).astype(np.float32))


# ---------------------------------------------------------------- accuracy

def points(differences):
    """Differences → 1 where right, 0 where wrong, 1/2 for a tie (a control that says nothing is a
    coin)."""
    return (differences > 0) + (differences == 0) / 2


def summary(differences, groups):
    """Differences of each seed [seeds, n] → accuracy, low, high (a tie is wrong), the share of
    ties, and the same with a tie as
    half: ties_half, half_low, half_high."""
    right = (differences > 0).astype(float)
    ties = float((differences == 0).mean())
    strict = bootstrap(right, groups)
    half = bootstrap(points(differences), groups) if ties else strict
    return {
        **dict(zip(("accuracy", "low", "high"), strict)),
        "ties": ties,
        **dict(zip(("ties_half", "half_low", "half_high"), half)),
        "n": len(groups),
        "groups": len(np.unique(groups)),
        "seeds": right.mean(1).tolist(),
    }


def gap(ours, theirs, groups):
    """SparseRM minus a control, pair by pair, ties as half → {mean, low, high}."""
    advantage = points(ours).mean(0) - points(theirs)
    return dict(zip(("mean", "low", "high"), bootstrap(advantage, groups)))


def side_by_side(differences_of, groups):
    """{name: differences [seeds, n]} → {name: summary}; of a control also `behind`: SparseRM minus
    it."""
    ours = differences_of["sparserm"]
    rows = {}
    for name, differences in differences_of.items():
        rows[name] = summary(differences, groups)
        if name != "sparserm":
            rows[name]["behind"] = gap(ours, differences, groups)
    return rows


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
    """Correlation of reward and response length; accuracy on the pairs whose lengths differ by at
    most a tenth."""
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
