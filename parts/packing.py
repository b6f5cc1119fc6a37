"""Many texts in one forward pass, and no token computed twice.

A row of a forward pass is a tree. Texts that begin alike share the nodes of their beginning:

    node    0  1  2  3  4  5  6  7        "S Q a b" "S Q a c d" "S Q e f"   (sorted)
    token   S  Q  a  b  c  d  e  f
    depth   0  1  2  3  3  4  2  3        the position id is the depth

            S ── Q ─┬─ a ─┬─ b
                    │     └─ c ── d       d attends to S Q a c d: itself and its ancestors,
                    └─ e ── f             not to b (a cousin), nor to e, f

so eight tokens are computed instead of thirteen, and each text gets the hidden states that it would
have alone. Models that do not honour such a mask read length-sorted batches with padding instead.
"""

from dataclasses import dataclass

import numpy as np
import torch


def forward_passes(model, sequences, pack, budget):
    """Token sequences → yield (inputs of the model, members) a forward pass of at most `budget`
    tokens.

    pack: "tree" or "pad". members: (index of the sequence, places of its tokens [T]) for each
    sequence of this pass; the places count in the hidden states [B, T, d] of the pass, flattened to
    [B · T, d].
    """
    device = model.get_input_embeddings().weight.device
    if pack == "tree":
        for row in tree_rows(sequences, budget):
            yield tree_inputs(model, row, device), row.members
    else:
        for batch in padded_batches(sequences, budget):
            yield padded_inputs(sequences, batch, device)


# ---------------------------------------------------------------- trees

@dataclass
class Row:
    """One tree: `ids` and `depth` [T], who `sees` whom, bool [T, T], and `members`: (index of a
    sequence, its nodes)."""
    ids: np.ndarray
    depth: np.ndarray
    sees: np.ndarray
    members: list


class GrowingRow:
    """A tree to which sequences are added in sorted order, so that each one branches off the one
    before."""

    def __init__(self):
        self.ids = []
        self.depth = []
        self.branches = []                      # (first node, one past the last, nodes of the stem)
        self.members = []
        self.path = np.zeros(0, int)            # nodes of the sequence added last

    def add(self, index, sequence, shared):
        """Append what the sequence does not share with the one before; `shared`: how many tokens
        that is."""
        stem = self.path[:shared]
        first = len(self.ids)
        self.ids.extend(sequence[shared:])
        self.depth.extend(range(shared, len(sequence)))
        self.branches.append((first, len(self.ids), stem))

        self.path = np.concatenate([stem, np.arange(first, len(self.ids))])
        self.members.append((index, self.path))

    def finish(self):
        """→ Row. A branch sees the stem that it grows from, and itself up to each node."""
        sees = np.zeros((len(self.ids), len(self.ids)), bool)
        for first, last, stem in self.branches:
            sees[first:last, stem] = True
            sees[first:last, first:last] = np.tri(last - first, dtype=bool)
        return Row(np.array(self.ids), np.array(self.depth), sees, self.members)


def tree_rows(sequences, budget):
    """Token sequences → yield Rows of at most `budget` nodes (a longer sequence has a row of its
    own)."""
    row = GrowingRow()
    before = []
    for index in sorted(range(len(sequences)), key=lambda i: sequences[i]):
        sequence = sequences[index]
        # the longest that any earlier one has: they are sorted
        shared = common_prefix(before, sequence)
        if row.ids and len(row.ids) + len(sequence) - shared > budget:
            yield row.finish()
            row = GrowingRow()
            shared = 0
        row.add(index, sequence, shared)
        before = sequence
    if row.ids:
        yield row.finish()


def common_prefix(a, b):
    """Length of the common beginning of two token lists."""
    n = min(len(a), len(b))
    differs = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(differs[0]) if len(differs) else n


def tree_inputs(model, row, device):
    """A Row → keyword arguments of the model."""
    return {"input_ids": torch.from_numpy(row.ids)[None].to(device),
            "position_ids": torch.from_numpy(row.depth)[None].to(device),
            "attention_mask": attention_masks(model, row, device)}


def attention_masks(model, row, device):
    """Row → additive mask [1, 1, T, T]; a dictionary of two where the layers differ in kind
    (Gemma-2 and others)."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])

    near = row.sees
    if window:
        distance = row.depth[:, None] - row.depth[None, :]      # in the text, not in the row
        near = row.sees & (distance < window)

    everywhere = additive_mask(row.sees, model.dtype).to(device)
    nearby = additive_mask(near, model.dtype).to(device)
    if len(kinds) > 1:
        return {"full_attention": everywhere, "sliding_attention": nearby}
    return everywhere if kinds == {"full_attention"} else nearby


def additive_mask(sees, dtype):
    """Who sees whom, bool [T, T] or [B, T, S] → what is added to the attention logits, [.., 1, T,
    S]: 0 or the dtype's minimum.

    Additive, because eager attention adds the mask: a boolean one would pass silently and do
    nothing.
    """
    sees = torch.as_tensor(sees)
    if sees.dim() == 2:
        sees = sees[None]
    mask = torch.zeros(sees.shape, dtype=dtype)
    return mask.masked_fill_(~sees, torch.finfo(dtype).min)[:, None]


# ---------------------------------------------------------------- padding

def padded_batches(sequences, budget):
    """Yield lists of indices, longest sequences first: batches of at most `budget` tokens with
    their padding."""
    batch = []
    for index in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        if batch and len(sequences[batch[0]]) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded_inputs(sequences, batch, device):
    """The sequences of one batch → (keyword arguments of the model, members). Padded on the right:
    positions stay plain."""
    longest = len(sequences[batch[0]])
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros(len(batch), longest, dtype=torch.long)
    members = []
    for line, index in enumerate(batch):
        length = len(sequences[index])
        ids[line, :length] = torch.tensor(sequences[index])
        mask[line, :length] = 1
        members.append((index, line * longest + np.arange(length)))
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}, members


# ---------------------------------------------------------------- does this model honour it

def packing_holds(backbone):
    """Does a tree give the same hidden states as each text alone? Tried on three short texts that
    branch."""
    generator = np.random.default_rng(0)
    vocabulary = backbone.model.config.get_text_config().vocab_size
    stem, *tails = (generator.integers(10, vocabulary, length).tolist() for length in (6, 4, 5, 3))
    sequences = [stem + tail for tail in tails]
    try:
        packed = last_states(backbone, sequences)
    # a model that takes no such mask or positions
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError):
        return False
    alone = torch.cat([last_states(backbone, [sequence]) for sequence in sequences])
    tolerance = 1e-4 if backbone.model.dtype == torch.float32 else 3e-2
    return bool((packed - alone).norm() <= tolerance * alone.norm())


def last_states(backbone, sequences):
    """The last token's hidden state of each sequence after all blocks, [n, d] float32."""
    found = [None] * len(sequences)
    top = len(backbone.blocks) - 1
    for members, (hidden,) in backbone.hidden_rows(sequences, [top]):
        for index, places in members:
            found[index] = hidden[places[-1]].float().cpu()
    return torch.stack(found)
