"""Three pieces of SparseRM to write yourself (exercise 3 of EXERCISES.md).

    python -m pytest exercises

says which of them are right. Each takes one to five lines of torch; the docstrings say all that is
needed. The project's own are in sae.py, 02_select_features.py and 03_train_head.py: look at them
afterwards.
"""

import torch  # noqa: F401


def topk_encoder(z, W_enc, b_enc, b_dec, k):
    """What a TopK SAE says of residual vectors → latents f [n, d_sae].

    z [n, d_model] · W_enc [d_model, d_sae] · b_enc [d_sae] · b_dec [d_model]

    Take b_dec off, multiply, add b_enc. Of each row only the k largest numbers stay, and of these
    only the positive ones; all others become 0.
    """
    raise NotImplementedError


def select_latents(frequency_chosen, frequency_rejected, k):
    """Which latents tell chosen from rejected → their numbers [2K'], int64.

    frequency_chosen, frequency_rejected [d_sae]: share of the responses a latent fires in.

    First the K' latents whose frequency in chosen responses is the most above that in rejected
    ones, by falling difference; then the K' of the other side. A latent counts on a side only if
    its difference has that side's sign. K' is k, or less where one of the sides has fewer: both
    sides get as many. Of equal differences the lower number comes first.
    """
    raise NotImplementedError


def bradley_terry_loss(reward_chosen, reward_rejected):
    """-log σ(r_chosen - r_rejected) of each pair [n] → [n].

    σ(x) = 1 / (1 + exp(-x)). It must hold for differences of ± 1,000 as well, and so must its
    gradient.
    """
    raise NotImplementedError
