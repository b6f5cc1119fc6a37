"""A reward at no cost: read off the sampling.

While an answer is sampled the backbone computes the hidden state of every token, so a second pass
for the reward is a waste. With token rule `mean` the hidden states of block L are added up on their
way. With the other rules the answer's last token and the template's end are run on top of the
cached keys. An answer whose tokens are not those that `score` would read is scored by `score`,
and the reason is counted.
"""

import collections
from dataclasses import dataclass

import torch

from parts.packing import additive_mask


@dataclass
class Sampled:
    """What sampling n answers to each of some prompts leaves behind; a row is an answer."""
    prompt_ids: list        # of each prompt, with the generation prompt
    n: int                  # answers to each
    rows: list              # sampled token ids, without the token that ends an answer
    ended: list             # did the answer end by itself, bool
    cache: object           # keys and values of prompt and answers
    padding: list           # keys in front of each row that are of no token
    sums: torch.Tensor  # [rows, d] hidden states of the answer's tokens that were read, added up

    def prompt_of(self, row):
        """The prompt's token ids of an answer."""
        return self.prompt_ids[row // self.n]


class HiddenSums:
    """Adds up the output of block L over the tokens of each answer while they are sampled."""

    def __init__(self, block, rows):
        self.rows = rows
        self.sums = None
        self.counted = None         # which rows the next token belongs to an answer in, bool [rows]
        self.hook = block.register_forward_hook(self.add)

    def add(self, block, args, output):
        """The forward hook: one new token a row."""
        hidden = output[0] if isinstance(output, tuple) else output
        if self.counted is None:                                    # the prompt
            return
        new = hidden[:, -1].float()                                 # [rows, d]
        if self.sums is None:
            self.sums = torch.zeros_like(new)
        self.sums += new * self.counted[:, None]

    def finish(self):
        """→ sums [rows, d], or None where no token was read."""
        self.hook.remove()
        return self.sums


def score_sampled(reward, prompts, texts, sampled):
    """Rewards of answers just sampled from the reward's backbone, in the order of the rows.

    prompts, texts: of each row. → (rewards, bools: outside of what training saw, why an answer has
    no reward; Counter of the reasons for which an answer was scored the ordinary way). The first
    three are those of score_each.
    """
    rendered, unreadable = reward.render_each(prompts, texts)
    hidden = {}
    others = collections.Counter()
    readable = []
    if rendered:
        first = next(iter(rendered.values()))
        reasons = {n: reason_against(reward, n, text, first, sampled)
                   for n, text in rendered.items()}
        readable = [n for n, reason in reasons.items() if not reason]
        others = collections.Counter(reason for reason in reasons.values() if reason)
    if readable:
        read = read_mean if reward.meta["token"] == "mean" else read_end
        found = read(reward, [rendered[n] for n in readable], readable, sampled)
        hidden.update(zip(readable, reward.normalise(found)))
    rest = {n: text for n, text in rendered.items() if n not in hidden}
    if rest:
        hidden.update(zip(rest, reward.read(list(rest.values()))))
    return *reward.rewards_each(len(texts), hidden), unreadable, others


def reason_against(reward, n, text, first, sampled):
    """Why an answer cannot be read off → str, or None. text, first: this and the first answer."""
    row = sampled.rows[n]
    prompt = sampled.prompt_of(n)
    if text.ids[:len(prompt)] != prompt:
        return "the template renders the prompt differently"
    if text.ids[len(prompt):text.stop] != row:
        return "tokenised anew it differs"
    if reward.meta["token"] == "mean":
        return None
    if reward.backbone.pack == "pad":
        return "the model does not honour a 4D mask"
    if getattr(reward.backbone.model.config.get_text_config(), "sliding_window", None):
        return "a sliding window evicts keys"
    if text.ids[text.stop:] != first.ids[first.stop:]:
        return "another end of the turn"
    return None


def read_mean(reward, texts, which, sampled):
    """The mean over each answer's tokens → z [m, d]."""
    lengths = torch.tensor([len(sampled.rows[n]) for n in which])
    return sampled.sums[which].cpu() / lengths[:, None]


def read_end(reward, texts, which, sampled):
    """The hidden state of the token that the rule names → z [m, d]."""
    new_ids = []
    places = []                             # of that token in new_ids
    for n, text in zip(which, texts):
        new_ids.append([sampled.rows[n][-1], *text.ids[text.stop:]])
        first, _ = reward.token_range(text)
        places.append(first - (text.stop - 1))
    hidden = run_on_cache(reward, new_ids, which, sampled)
    return hidden[range(len(which)), places]


def run_on_cache(reward, new_ids, which, sampled):
    """Run new tokens of some rows on top of the cache, up to block L → [m, t, d] float32.

    The first new token is the answer's last one; what was cached from there on is masked. In place:
    the cache of the other rows is thrown away.
    """
    backbone = reward.backbone
    device = backbone.device
    cached = sampled.cache.get_seq_length()
    new_ids = torch.tensor(new_ids)                                         # [m, t]
    count, steps = new_ids.shape
    padding = torch.tensor([sampled.padding[n] for n in which])             # [m]
    own = torch.tensor([len(sampled.prompt_of(n)) + len(sampled.rows[n]) - 1 for n in which])

    place = torch.arange(cached)
    is_own = (place >= padding[:, None]) & (place < (padding + own)[:, None])       # [m, cached]
    sees_cached = is_own[:, None].expand(count, steps, cached)
    sees_new = torch.ones(steps, steps, dtype=torch.bool).tril().expand(count, steps, steps)
    mask = additive_mask(torch.cat([sees_cached, sees_new], 2), backbone.model.dtype)
    positions = own[:, None] + torch.arange(steps)

    sampled.cache.batch_select_indices(torch.tensor(which, device=device))
    [hidden] = backbone.forward_to([reward.meta["layer"]], input_ids=new_ids.to(device),
                                   position_ids=positions.to(device),
                                   attention_mask=mask.to(device),
                                   cache=sampled.cache, use_cache=True)
    return hidden.float().cpu()
