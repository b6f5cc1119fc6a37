"""A reward at no cost: read off the keys that sampling has cached.

The backbone has seen every token of a sampled answer but the end of the turn. Each answer's last
token and the template's end are run once more on top of the cache, up to block L; what was cached
behind an answer's end is masked. An answer for which that is not the text that `score` would see is
scored by `score`, and the reason is counted.
"""

import collections
from dataclasses import dataclass

import torch

from parts.packing import additive_mask


@dataclass
class Sampled:
    """What sampling n answers to one prompt leaves behind."""
    prompt_ids: list        # of the prompt with the generation prompt
    rows: list              # n lists of sampled token ids, without the token that ends an answer
    cache: object           # keys and values of prompt and answers, a row an answer


def score_sampled(reward, prompt, texts, sampled):
    """Rewards of answers just sampled from the reward's own backbone, and why some were re-run."""
    rendered = [reward.render(prompt, text) for text in texts]
    reasons = []
    for row, text in zip(sampled.rows, rendered):
        reasons.append(reason_against(reward, row, text, rendered[0], sampled))
    readable = [n for n, reason in enumerate(reasons) if not reason]
    others = [n for n, reason in enumerate(reasons) if reason]

    scores = torch.empty(len(texts))
    if readable:
        hidden = read_off(reward, [rendered[n] for n in readable], readable, sampled)
        scores[readable] = reward.reward_of(hidden)
    if others:
        scores[others] = torch.tensor(reward.score([prompt] * len(others),
                                                   [texts[n] for n in others]))
    return scores.tolist(), collections.Counter(reasons[n] for n in others)


def reason_against(reward, row, text, first, sampled):
    """Why an answer cannot be read off the cache → str, or None. text, first: how this and the
    first answer are rendered."""
    prompt_length = len(sampled.prompt_ids)
    if reward.backbone.pack == "pad":
        return "the model does not honour a 4D mask"
    if reward.meta["token"] == "mean":
        return "token rule mean"
    if getattr(reward.backbone.model.config.get_text_config(), "sliding_window", None):
        return "a sliding window evicts keys"
    if not row:
        return "empty"
    if text.ids[:prompt_length] != sampled.prompt_ids:
        return "the template renders the prompt differently"
    if text.ids[text.last:] != first.ids[first.last:]:
        return "another end of the turn"
    if text.ids[prompt_length:text.last] != row:
        return "tokenised anew it differs"
    return None


def read_off(reward, texts, which, sampled):
    """Run the last token and the end of the turn of some answers on top of the cache → z [m, d].

    texts: how they are rendered; which: their rows in the cache, of which the others are thrown
    away.
    """
    backbone = reward.backbone
    cached = sampled.cache.get_seq_length()
    rows = [sampled.rows[n] for n in which]
    # [m, t]
    new_ids = torch.tensor([[row[-1], *text.ids[text.last:]] for row, text in zip(rows, texts)])
    # [m], before new_ids
    own_keys = torch.tensor([len(sampled.prompt_ids) + len(row) - 1 for row in rows])
    count, steps = new_ids.shape

    is_own = torch.arange(cached) < own_keys[:, None]               # [m, cached]
    sees_cached = is_own[:, None].expand(count, steps, cached)
    sees_new = torch.ones(steps, steps, dtype=torch.bool).tril().expand(count, steps, steps)
    mask = additive_mask(torch.cat([sees_cached, sees_new], 2), backbone.model.dtype)
    positions = own_keys[:, None] + torch.arange(steps)

    sampled.cache.batch_select_indices(torch.tensor(which, device=backbone.device))
    [hidden] = backbone.forward_to([reward.meta["layer"]], input_ids=new_ids.to(backbone.device),
                                   position_ids=positions.to(backbone.device),
                                   attention_mask=mask.to(backbone.device),
                                   cache=sampled.cache, use_cache=True)
    places = []                                                 # of the scored token in new_ids
    for text, before in zip(texts, own_keys.tolist()):
        first, _ = reward.token_range(text)
        places.append(first - before)
    return hidden[range(count), places].float().cpu()
