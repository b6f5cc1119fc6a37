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
    """Token sequences → yield (inputs of the model, members), a forward pass each.

    pack: "tree" or "pad". budget: tokens a pass at most. members: (index of the sequence, places of
    its tokens [T]) for each sequence of this pass; the places count in the hidden states [B, T, d]
    of the pass, flattened to [B · T, d].
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
    """One tree of T nodes."""
    ids: np.ndarray                 # [T]
    depth: np.ndarray               # [T]
    sees: np.ndarray                # bool [T, T], who sees whom
    members: list                   # (index of a sequence, its nodes)


class GrowingRow:
    """A tree to which sequences are added in sorted order: each branches off the one before."""

    def __init__(self):
        self.ids = []
        self.depth = []
        self.branches = []                      # (first node, one past the last, nodes of the stem)
        self.members = []
        self.path = np.zeros(0, int)            # nodes of the sequence added last

    def add(self, index, sequence, shared):
        """Append a sequence but for its first `shared` tokens, which the one before has too."""
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
    """Token sequences → yield Rows of at most `budget` nodes.

    A longer sequence has a row of its own.
    """
    row = GrowingRow()
    before = []
    for index in sorted(range(len(sequences)), key=lambda i: sequences[i]):
        sequence = sequences[index]
        # they are sorted: no earlier one has more in common with it than the one before
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
    """A Row → keyword arguments of the model. A text alone needs no mask but the model's own."""
    if len(row.members) == 1:
        return {"input_ids": torch.from_numpy(row.ids)[None].to(device)}
    return {"input_ids": torch.from_numpy(row.ids)[None].to(device),
            "position_ids": torch.from_numpy(row.depth)[None].to(device),
            "attention_mask": attention_masks(model, row, device)}


def attention_masks(model, row, device):
    """Row → additive mask [1, 1, T, T]; a dictionary of two where layers differ (Gemma-2)."""
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
    """Who sees whom, bool [T, T] or [B, T, S] → what is added to the attention logits.

    [.., 1, T, S]: 0 or the dtype's minimum. Additive, because eager attention adds the mask: a
    boolean one would pass silently and do nothing.
    """
    sees = torch.as_tensor(sees)
    if sees.dim() == 2:
        sees = sees[None]
    mask = torch.zeros(sees.shape, dtype=dtype)
    return mask.masked_fill_(~sees, torch.finfo(dtype).min)[:, None]


# ---------------------------------------------------------------- padding

def padded_batches(sequences, budget):
    """Yield lists of indices, longest sequences first: at most `budget` tokens with padding."""
    batch = []
    for index in sorted(range(len(sequences)), key=lambda i: -len(sequences[i])):
        if batch and len(sequences[batch[0]]) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded_inputs(sequences, batch, device):
    """The sequences of one batch → (keyword arguments of the model, members).

    Padded on the right: positions stay plain.
    """
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
    """Does a tree give the hidden states that the model itself gives to each text alone?

    Tried on three texts that branch, of several lengths: a position that is counted in the row
    instead of the text shows at the later ones. Their common beginning is as long as the longest
    window of attention that a row of `budget` tokens can reach beyond.
    """
    config = backbone.model.config.get_text_config()
    reachable = [window for window in windows(config) if window < backbone.budget]
    generator = np.random.default_rng(0)
    lengths = (max(6, *reachable), 20, 5, 15)
    stem, *tails = [generator.integers(10, config.vocab_size, n).tolist() for n in lengths]
    sequences = [stem + tail for tail in tails]
    try:
        packed = last_states(backbone, sequences)
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError):
        return False                            # the model takes no such mask or positions
    alone = torch.stack([last_state_alone(backbone, sequence) for sequence in sequences])
    tolerance = 1e-4 if backbone.model.dtype == torch.float32 else 3e-2
    return bool((packed - alone).norm() <= tolerance * alone.norm())


def windows(config):
    """Every window that a configuration names, in tokens: sliding_window, GPT-Neo's window_size,
    attention_chunk_size … Another number of that name costs a longer trial, no more."""
    found = []
    for name, value in config.to_dict().items():
        is_window = "window" in name or "chunk" in name or name.startswith("local_")
        if is_window and type(value) is int:
            found.append(value)
    return found


def last_states(backbone, sequences):
    """The last token's hidden state of each sequence after all blocks, in one tree: [n, d]."""
    (row,) = tree_rows(sequences, budget=sum(map(len, sequences)))
    inputs = tree_inputs(backbone.model, row, backbone.device)
    (hidden,) = backbone.forward_to([len(backbone.blocks) - 1], **inputs)
    found = [None] * len(sequences)
    for index, places in row.members:
        found[index] = hidden[0, places[-1]].float().cpu()
    return torch.stack(found)


def last_state_alone(backbone, sequence):
    """The same of one sequence, where the model makes its own mask and positions: [d]."""
    ids = torch.tensor([sequence], device=backbone.device)
    (hidden,) = backbone.forward_to([len(backbone.blocks) - 1], input_ids=ids)
    return hidden[0, -1].float().cpu()
