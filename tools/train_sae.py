"""Train a TopK SAE on the residual stream of a model, reading your texts.

    python -m tools.train_sae --model demo --layer 16 --texts FILE --width 4608 --k 64 \\
        --out my-sae.safetensors

The shipped SAE was made by it (assets/README.md). Not part of the method: SparseRM takes the SAE as
it finds it.

TopK with AuxK (Gao et al. 2024): latents that have not fired lately learn to explain what is left.
Decoder rows have norm 1; Adam with warm-up and linear decay. A batch is mixed from three pools, and
the error of each counts over its own variance:

    ordinary tokens
    ends            the last token of a conversation (--end-share), what rule `last` reads; an
                    answer cut at any word and closed with the template's own end gives a new one
                    for the price of two tokens
    running means   of an answer's tokens up to any of them (--mean-share), what rule `mean` reads

A training that was stopped goes on from its last checkpoint, a twentieth of the way back at most.
"""

import argparse
import importlib
import json
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from parts.chat import render
from parts.files import run_main, save_stage
from parts.messages import Unreadable, is_conversation
from parts.rows import pairs_or_reason, read_rows
from sae import SAE, TENSORS, SAEError, describe, health, load_sae

stage1 = importlib.import_module("01_extract")
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")
AUX_WEIGHT = 1 / 32     # of AuxK in the loss


# ---------------------------------------------------------------- texts

def read_texts(path, limit=None):
    """Texts of a JSONL file (also .gz): rows with `text`, with `messages`, or pairs.

    → list of str or messages, `limit` at most.
    """
    texts = []
    without = 0
    for _, row in read_rows(path):
        found = texts_of_row(row)
        texts += found
        without += not found
    if not texts:
        raise SAEError(f"no texts · {path} · rows need text, messages, or prompt, chosen, rejected")
    if without:
        print(f"note: {without} rows of {path} hold nothing that can be read: left out")
    return texts[:limit]


def texts_of_row(row):
    """One row → its texts: one, both sides of a pair, or none."""
    if not isinstance(row, dict):
        return []
    if isinstance(row.get("text"), str):
        texts = [row["text"]]
    elif is_conversation(row.get("messages")):
        texts = [row["messages"]]
    else:
        texts = conversations_of_pairs(row)
    return [text for text in texts if is_readable(text)]


def conversations_of_pairs(row):
    """Both sides of the pairs of a row → conversations; none where it holds no pairs."""
    pairs = pairs_or_reason(row, "better")
    if isinstance(pairs, str):
        return []
    conversations = []
    for prompt, *answers in pairs:
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        for answer in answers:
            conversations.append([*turns, {"role": "assistant", "content": answer}])
    return [conversation for conversation in conversations if is_conversation(conversation)]


def is_readable(text):
    """A text, or a conversation that ends with an answer; half of a UTF-16 pair is in neither."""
    if isinstance(text, list):
        roles = [turn["role"] for turn in text]
        if len(text) < 2 or roles[-1] != "assistant" or not all(isinstance(r, str) for r in roles):
            return False
        text = "".join(turn["content"] for turn in text)
    return not re.search("[\ud800-\udfff]", text)


def note_on_conversations(texts, path):
    """What an SAE of plain texts will not know → a note, or None."""
    if any(not isinstance(text, str) for text in texts):
        return None
    return (f"note: {path} holds plain texts only, no conversation: a reward is read from the mean "
            "or the end of an answer, and this SAE will have seen neither; "
            "add rows with messages, or with prompt, chosen, rejected")


@dataclass
class Sequence:
    """Tokens to read; of a conversation also where its answer stands."""
    ids: list
    answer: tuple = None    # first token of the answer, one past its last; None: plain text


def sequences_of(backbone, texts, max_length, cuts=0, rng=None):
    """Texts → list of Sequence.

    cuts: each conversation also ends so many times at a random place of its answer, closed with the
    template's own end. In the tree that is a branch of two tokens.
    """
    sequences = []
    for text in texts:
        if isinstance(text, str):
            ids = backbone.tokenizer(text)["input_ids"]
            parts = [ids[start:start + max_length] for start in range(0, len(ids), max_length)]
            sequences += [Sequence(part) for part in parts if len(part) > 1]
        else:
            sequences += endings_of(backbone, text, max_length, cuts, rng)
    return sequences


def endings_of(backbone, conversation, max_length, cuts, rng):
    """A conversation, and `cuts` beginnings of it closed with the end of the turn → Sequences."""
    try:
        text = render(backbone.tokenizer, conversation[:-1], conversation[-1]["content"])
    except Unreadable as error:
        raise SAEError(f"a conversation of --texts cannot be read ({error.reason}) · "
                       f"{conversation[0]['content'][:60]!r} … · leave it out; if only the joined "
                       "ones are refused: --turns 1") from None
    ends = [text.stop]
    if cuts:
        longest = max(text.first + 1, min(text.stop, max_length))
        ends += rng.integers(text.first + 1, longest + 1, cuts).tolist()
    closing = text.ids[text.stop:]
    sequences = []
    for end in dict.fromkeys(ends):
        if end <= max_length:
            sequences.append(Sequence(text.ids[:end] + closing, answer=(text.first, end)))
    return sequences


# ---------------------------------------------------------------- activations

@dataclass
class Activations:
    """Residual vectors of some texts, by pool."""
    tokens: torch.Tensor            # [n, d], without position 0
    ends: torch.Tensor              # [e, d], last tokens of conversations
    means: torch.Tensor             # [e, d], of the same conversations: over their answer's tokens

    def __iter__(self):
        return iter((self.tokens, self.ends, self.means))


def activations(backbone, texts, layer, max_length, cuts=0, rng=None, repeats=False):
    """Yield Activations, a forward pass each.

    A token that texts share (a system prompt) comes once a pass, or with `repeats` as often as it
    stands in the texts. Position 0 is left out: the first token is an attention sink, its vector is
    huge, the same in every text, and says nothing.
    """
    sequences = sequences_of(backbone, texts, max_length, cuts, rng)
    for members, (hidden,) in backbone.hidden_rows([s.ids for s in sequences], [layer]):
        hidden = hidden.float().cpu()
        tokens = np.concatenate([places[1:] for _, places in members])
        if not repeats:
            tokens = np.unique(tokens)
        ends = []
        means = []
        for index, places in members:
            if sequences[index].answer:
                first, last = sequences[index].answer
                ends.append(hidden[places[-1]])
                means.append(hidden[torch.from_numpy(places[first:last])].mean(0))
        nothing = hidden[:0]
        ends = torch.stack(ends) if ends else nothing
        means = torch.stack(means) if means else nothing
        yield Activations(hidden[torch.from_numpy(tokens)], ends, means)


def sample_activations(backbone, texts, layer, max_length=512):
    """→ Activations of some texts as they are, for sae.health()."""
    passes = list(activations(backbone, texts, layer, max_length, repeats=True))
    if sum(len(found.tokens) for found in passes) < 2:
        raise SAEError(NO_TOKEN)
    tokens, ends, means = zip(*passes)
    return Activations(torch.cat(tokens), torch.cat(ends), torch.cat(means))


NO_TOKEN = ("no text gives a token to read · --texts · longer texts, or a larger --max-length: "
            "a conversation whose prompt is longer gives none")


def stream_batches(backbone, texts, layer, args, generator, tell=None):
    """Yield Activations of --batch vectors for ever.

    Tokens are mixed by a shuffle buffer, ends and means drawn from the newest `--buffer` of each.
    tell: takes the number of tokens in the buffer, after each forward pass.
    """
    rng = np.random.default_rng(args.seed)
    conversations = [text for text in texts if not isinstance(text, str)]
    pool = Pool(args.buffer, args.batch, generator)
    ends = Newest(args.buffer, generator)
    means = Newest(args.buffer, generator)
    end_count = int(args.batch * args.end_share) if conversations else 0
    mean_count = int(args.batch * args.mean_share) if conversations else 0
    while True:
        for start in range(0, len(texts), 64):
            some = []
            for text in texts[start:start + 64]:
                some.append(longer_conversation(text, conversations, args.turns, rng))
            for found in activations(backbone, some, layer, args.max_length, args.cuts, rng):
                pool.add(found.tokens)
                ends.add(found.ends)
                means.add(found.means)
                if tell:
                    tell(pool.size)
            for tokens in pool.batches(args.batch - end_count - mean_count):
                yield Activations(tokens, ends.draw(end_count), means.draw(mean_count))
        if not pool.size:
            raise SAEError(NO_TOKEN)
        pool.settle_for_less()


class Newest:
    """The newest `size` vectors, to draw from with replacement.

    A ring: each new one takes the place of the oldest, and the others stay where they are.
    """

    def __init__(self, size, generator):
        self.size = size
        self.generator = generator
        self.vectors = None         # [size, d]
        self.added = 0

    def add(self, vectors):
        """Put [n, d] in; the oldest fall out."""
        vectors = vectors[-self.size:]
        if self.vectors is None:
            self.vectors = vectors.new_empty(self.size, vectors.shape[1])
        places = torch.arange(self.added, self.added + len(vectors)) % self.size
        self.vectors[places] = vectors
        self.added += len(vectors)

    def draw(self, count):
        """→ [count, d], or nothing while nothing is there."""
        there = min(self.added, self.size)
        drawn = torch.randint(max(1, there), (count if there else 0,), generator=self.generator)
        return self.vectors[drawn]


class Pool:
    """A shuffle buffer of activations."""

    def __init__(self, buffer, batch, generator):
        self.buffer = buffer        # vectors that fill it
        self.batch = batch          # it is never made smaller than this
        self.generator = generator
        self.parts = []
        self.size = 0

    def add(self, vectors):
        """Put [n, d] in."""
        self.parts.append(vectors)
        self.size += len(vectors)

    def batches(self, size):
        """Yield [size, d] while the buffer is more than half full, once it has been full."""
        if self.size < self.buffer:
            return
        order = torch.randperm(self.size, generator=self.generator)
        mixed = torch.cat(self.parts)[order]
        while len(mixed) > max(self.buffer // 2, size):
            yield mixed[:size]
            mixed = mixed[size:]
        self.parts = [mixed]
        self.size = len(mixed)

    def settle_for_less(self):
        """All texts were read and the buffer is not full: a smaller one will do."""
        if self.size < self.buffer:
            self.buffer = max(self.batch, self.size)


def longer_conversation(text, conversations, turns, rng):
    """Half of the conversations go on from up to `turns` - 1 others.

    The end of a later turn is not the end of a first one.
    """
    if isinstance(text, str) or turns < 2 or rng.random() < 0.5:
        return text
    earlier = rng.integers(len(conversations), size=rng.integers(1, turns))
    longer = []
    for conversation in [*(conversations[n] for n in earlier), text]:
        longer += [turn for turn in conversation if turn["role"] != "system"]
    return longer


# ---------------------------------------------------------------- training

@dataclass
class State:
    """What training changes. The parameters work on inputs scaled to norm √d; folded at the end."""
    W_enc: torch.Tensor             # [d, m]
    b_enc: torch.Tensor             # [m]
    W_dec: torch.Tensor             # [m, d], rows of norm 1
    b_dec: torch.Tensor             # [d]
    scale: torch.Tensor             # input scale
    variance: list                  # of tokens, ends and means, scaled
    idle: torch.Tensor              # [m], activations since a latent fired last
    adam: torch.optim.Optimizer = None
    step: int = 0

    def parameters(self):
        """What Adam changes, in the order of PARAMETERS."""
        return [getattr(self, name) for name in PARAMETERS]


def train(backbone, texts, layer, args, say=print):
    """Train on streamed activations through a shuffle buffer → SAE, written to args.out.

    say: takes the lines on how it goes.
    """
    generator = torch.Generator().manual_seed(args.seed)
    texts, held_texts = hold_out(texts, args, generator)
    width = backbone.model.config.get_text_config().hidden_size
    if args.start:
        open_start(args, width)                 # what is wrong is said before the texts are read
    checkpoint = read_checkpoint(args, width)
    held = sample_activations(backbone, held_texts, layer, args.max_length)

    steps = steps_of(args)
    progress = Progress(say)
    progress.begin("buffer", args.buffer)
    if checkpoint:
        state = start_state(held, args, generator)      # for its shapes
        resume(state, checkpoint, args)
        say(f"note: going on behind step {state.step} of {steps}, from {checkpoint_path(args)}")
        generator.manual_seed(args.seed + state.step)   # other texts first than those already seen
        texts = shuffled(texts, generator)
    stream = stream_batches(backbone, texts, layer, args, generator, progress.fill)
    if not checkpoint:
        state = start_state(next(stream), args, generator)

    sae = train_steps(state, stream, held, steps, layer, args, progress)
    settings = ("k", "end_share", "mean_share", "cuts", "turns", "lr", "batch", "buffer", "seed",
                "max_length")
    sae.info.update(
        model=backbone.meta["model"],
        template=backbone.meta["template"],
        texts=Path(args.texts).name,
        tokens=steps * args.batch,
        start=args.start and Path(args.start).name,
        settings={name: getattr(args, name) for name in settings})
    save_sae(sae, args.out, torch.float16)
    checkpoint_path(args).unlink(missing_ok=True)       # only now: a kill in between loses nothing
    return sae


def hold_out(texts, args, generator):
    """→ (texts to train on, texts to measure on: a twentieth, 400 at most), in a random order."""
    if len(texts) < 3:
        raise SAEError(f"{len(texts)} texts are too few · {args.texts} · "
                       "at least 3 are needed: 2 are held out to measure on")
    texts = shuffled(texts, generator)
    count = max(2, min(400, len(texts) // 20))
    return texts[count:], texts[:count]


def shuffled(texts, generator):
    """The texts in a random order."""
    return [texts[n] for n in torch.randperm(len(texts), generator=generator).tolist()]


def train_steps(state, stream, held, steps, layer, args, progress):
    """The steps that are left; a checkpoint and a line at every twentieth → the SAE of the last."""
    every = math.ceil(steps / 20)
    first = state.step + 1
    for step, batch in enumerate(stream, start=first):
        if step == first:                       # the buffer is full, training begins
            progress.begin("step", steps, state.step)
        set_learning_rate(state, step, steps, args.lr)
        train_step(state, batch, args)
        state.step = step
        progress.reach(step)
        if step % every == 0 or step >= steps:
            check_converges(state, args)
            sae = finish(state, args, layer)
            sae.info["held_out"] = health_of_pools(sae, held)
            save_checkpoint(state, args)
            progress.tell(figures_of(sae.info["held_out"]))
        if step >= steps:
            progress.bar.close()
            return sae


def check_converges(state, args):
    """Refuse to go on with parameters that are no numbers any more."""
    if not all(parameter.isfinite().all() for parameter in state.parameters()):
        raise SAEError(f"training has diverged, by step {state.step} · --lr {args.lr} · "
                       "a smaller one")


class Progress:
    """How far it is and how long that will take: a bar on a terminal, and lines everywhere."""

    def __init__(self, say):
        self.say = say
        self.bar = None

    def begin(self, what, total, done=0):
        """A part of the work: `total` units, of which `done` were done earlier."""
        if self.bar is not None:
            self.bar.close()
        self.what, self.total, self.done, self.earlier = what, total, done, done
        self.bar = tqdm(desc=what, total=total, initial=done, leave=False, disable=None)
        self.started = self.told = time.monotonic()

    def reach(self, done):
        """So many units are done."""
        self.bar.update(done - self.done)
        self.done = done

    def fill(self, size):
        """So many vectors are in the buffer; a line a minute, until training begins."""
        if self.what == "buffer":
            self.reach(min(size, self.total))
            if time.monotonic() - self.told > 60:
                self.tell("vectors read before the first step")

    def tell(self, text):
        """A line with the text, and the time gone and left."""
        self.told = time.monotonic()
        gone = self.told - self.started
        left = gone * (self.total - self.done) / max(1, self.done - self.earlier)
        self.say(f"{self.what} {self.done}/{self.total}  {text}  "
                 f"{tqdm.format_interval(gone)} gone, {tqdm.format_interval(left)} left")


def steps_of(args):
    """How many batches --tokens are."""
    return max(1, args.tokens // args.batch)


def set_learning_rate(state, step, steps, peak):
    """Linear warm-up over the first twentieth, linear decay over the last three tenths."""
    warm = min(1, step / max(1, steps // 20))
    left = min(1, (steps - step + 1) / max(1, steps * 0.3))
    for group in state.adam.param_groups:
        group["lr"] = peak * warm * max(0.0, left)


def figures_of(held_out):
    """How well each pool is explained, in one line."""
    tokens = held_out["tokens"]
    explained = []
    for name, figures in held_out.items():
        explained.append(f"{name} {figures['explained_variance']:.3f}")
    return (f"explained: {'  '.join(explained)}  "
            f"L0 {tokens['l0']:.1f}  silent {tokens['silent']:.1%}")


def health_of_pools(sae, held):
    """Health of each pool of which there are vectors → {tokens, ends, means}."""
    pools = {"tokens": held.tokens, "ends": held.ends, "means": held.means}
    return {name: health(sae, vectors) for name, vectors in pools.items() if len(vectors) > 1}


def start_state(first, args, generator):
    """The state before the first step, from random directions or from --start."""
    tokens = first.tokens
    width = tokens.shape[1]
    scale = math.sqrt(width) / tokens.norm(dim=1).mean()
    if args.start:
        parameters = parameters_of(open_start(args, width), scale)
    else:
        directions = torch.randn(args.width, width, generator=generator)
        W_dec = F.normalize(directions, dim=1)
        parameters = {
            "W_enc": W_dec.T.clone(),
            "b_enc": torch.zeros(args.width),
            "W_dec": W_dec,
            "b_dec": (tokens * scale).mean(0),
        }
    for parameter in parameters.values():
        parameter.requires_grad_()

    variance = []
    for pool in first:
        variance.append(float((pool * scale).var(0).sum()) if len(pool) > 1 else 1.0)
    state = State(**parameters, scale=scale, variance=variance, idle=torch.zeros(args.width))
    state.adam = torch.optim.Adam(state.parameters(), lr=args.lr, betas=(0.9, 0.999), fused=True)
    return state


def open_start(args, width):
    """The SAE of --start, if training can go on from it."""
    sae = load_sae(args.start)
    found = (sae.activation, sae.k, sae.norm, *sae.W_enc.shape)
    wanted = ("topk", args.k, "none", width, args.width)
    other_layer = sae.info.get("layer") not in (None, args.layer)
    if found != wanted or other_layer or not torch.equal(sae.b_in, sae.b_dec):
        layer = sae.info.get("layer")
        raise SAEError(f"training cannot go on from this SAE {found}, layer {layer} · "
                       f"--start {args.start} · "
                       f"needed are {wanted}, layer {args.layer} and b_dec subtracted")
    return sae


def parameters_of(sae, scale):
    """An SAE as training holds it: decoder rows of norm 1, inputs scaled."""
    norm = sae.W_dec.norm(dim=1)
    return {"W_enc": sae.W_enc * norm, "b_enc": sae.b_enc * norm * scale,
            "W_dec": sae.W_dec / norm[:, None], "b_dec": sae.b_dec * scale}


def train_step(state, batch, args):
    """One step of Adam on a batch of three pools."""
    x = torch.cat(list(batch)) * state.scale
    pre = torch.relu((x - state.b_dec) @ state.W_enc + state.b_enc)
    f, best = largest(pre, args.k)
    error = x - (f @ state.W_dec + state.b_dec)

    squared = error.square().sum(1).split([len(pool) for pool in batch])
    loss = 0.0
    for pool_error, variance in zip(squared, state.variance):
        share = len(pool_error) / len(x)
        if share:
            loss = loss + share * pool_error.mean() / variance
    with torch.no_grad():
        state.idle += len(x)
        state.idle[best.indices[best.values > 0]] = 0
    dead = (state.idle > args.dead_after).nonzero().flatten()
    if len(dead):
        loss = loss + AUX_WEIGHT * auxiliary_loss(state, pre[:, dead], dead, error.detach())

    state.adam.zero_grad()
    loss.backward()
    state.adam.step()
    with torch.no_grad():
        norm = state.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-8)
        state.W_dec.div_(norm)


def auxiliary_loss(state, pre, dead, rest):
    """AuxK: the dead latents model what the living ones leave, `rest` [b, d]. pre [b, dead]."""
    f, _ = largest(pre, min(len(dead), rest.shape[1] // 2))
    left = f @ state.W_dec[dead] - rest
    power = rest.square().sum().clamp_min(1e-8)
    return left.square().sum() / power


def largest(pre, k):
    """As keep_largest() of sae.py, with a gradient → (latents [b, m], what topk found)."""
    best = pre.topk(k, sorted=False)
    return torch.zeros_like(pre).scatter(-1, best.indices, best.values), best


def finish(state, args, layer):
    """The trained parameters in raw units → SAE.

    z · s = f W + b  ⇔  z = (f / s) W + b / s: f in raw units, rows of W still of norm 1.
    """
    W_enc, b_enc, W_dec, b_dec = [parameter.detach().clone() for parameter in state.parameters()]
    b_dec = b_dec / state.scale
    return SAE(
        W_enc=W_enc,
        b_enc=b_enc / state.scale,
        W_dec=W_dec,
        b_dec=b_dec,
        b_in=b_dec,
        activation="topk",
        k=args.k,
        info={"layer": layer, "hook": f"model.layers.{layer}.output"})


def save_sae(sae, path, dtype=torch.float32):
    """Write our own layout: the tensors, and one metadata key `sparserm` (sorted JSON)."""
    read_from = ("file", "weights")
    info = {name: value for name, value in sae.info.items() if name not in read_from}
    info |= {"stage": "sae", "activation": sae.activation, "k": sae.k, "norm": sae.norm}
    tensors = {}
    for name in TENSORS:
        if getattr(sae, name) is not None:
            tensors[name] = getattr(sae, name).detach().to(dtype).clone()
    save_stage(path, tensors, info)


# ---------------------------------------------------------------- interrupted training goes on

def checkpoint_path(args):
    """Where an interrupted training left its state."""
    return Path(args.out).with_suffix(".checkpoint.safetensors")


def training_key(args):
    """The settings a checkpoint must share with the command that goes on from it."""
    names = ("model", "layer", "texts", "start", "width", "k", "end_share", "mean_share", "cuts",
             "turns", "tokens", "batch", "lr", "seed", "max_length", "dead_after")
    return {name: getattr(args, name) for name in names}


def save_checkpoint(state, args):
    """Parameters, Adam's moments and the step: the same command goes on from here."""
    tensors = {name: getattr(state, name).detach() for name in PARAMETERS}
    tensors |= {"idle": state.idle, "scale": state.scale, "variance": torch.tensor(state.variance),
                "step_done": torch.tensor(state.step)}
    for number, moments in state.adam.state_dict()["state"].items():
        for name, value in moments.items():
            tensors[f"adam{number}.{name}"] = value
    save_stage(checkpoint_path(args), tensors, training_key(args))


def read_checkpoint(args, width):
    """The tensors of a checkpoint of the same settings; None where there is none."""
    path = checkpoint_path(args)
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get("sparserm", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError):
        settings, tensors = None, {}
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes_of(args.width, width):
        raise SAEError(f"not a complete checkpoint · {path} · delete it: training then begins anew")
    if settings != training_key(args):
        raise SAEError(f"a checkpoint of other settings lies there · {path} · "
                       "delete it, or pass the settings it was made with")
    return tensors


def shapes_of(latents, width):
    """What a checkpoint holds → {name: shape}."""
    shapes = {"W_enc": (width, latents), "b_enc": (latents,), "W_dec": (latents, width),
              "b_dec": (width,)}
    moments = {}
    for number, name in enumerate(PARAMETERS):
        moments[f"adam{number}.step"] = ()
        moments[f"adam{number}.exp_avg"] = shapes[name]
        moments[f"adam{number}.exp_avg_sq"] = shapes[name]
    return {**shapes, **moments, "idle": (latents,), "scale": (), "variance": (3,), "step_done": ()}


def resume(state, tensors, args):
    """Take up the tensors of a checkpoint."""
    with torch.no_grad():
        for name in PARAMETERS:
            getattr(state, name).copy_(tensors[name])

    moments = {}
    for number in range(len(PARAMETERS)):
        names = ("step", "exp_avg", "exp_avg_sq")
        moments[number] = {name: tensors[f"adam{number}.{name}"] for name in names}
    state.adam.load_state_dict({**state.adam.state_dict(), "state": moments})

    state.scale = tensors["scale"]
    state.variance = tensors["variance"].tolist()
    state.idle = tensors["idle"]
    last_but_one = steps_of(args) - 1                   # killed after the last step: do it again
    state.step = min(int(tensors["step_done"]), last_but_one)


# ---------------------------------------------------------------- the command

class ManualPage(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Line breaks kept, defaults named."""


def add_text_flags(p, limit=None):
    """The flags that training and checking share."""
    p.add_argument("--model", default="demo",
                   help="demo, a hub name, a folder or a .gguf file")
    p.add_argument("--texts", required=True,
                   help="JSONL with text, messages, or prompt, chosen, rejected")
    p.add_argument("--layer", type=int,
                   help="block L, 0-based (of a finished SAE: its own)")
    p.add_argument("--max-length", type=int, default=256,
                   help="tokens of a text")
    p.add_argument("--limit", type=int, default=limit,
                   help="use only so many texts")
    p.add_argument("--seed", type=int, default=0,
                   help="of the shuffling and the start")
    p.add_argument("--debug", action="store_true",
                   help="show the traceback of an error")


def parse_args():
    """The flags."""
    p = argparse.ArgumentParser(prog="python -m tools.train_sae", description=__doc__,
                                formatter_class=ManualPage)
    add_text_flags(p)
    p.add_argument("--out", required=True,
                   help="file to write, .safetensors")
    p.add_argument("--width", type=int, default=4608,
                   help="number of latents")
    p.add_argument("--k", type=int, default=64,
                   help="latents that may fire")
    p.add_argument("--end-share", type=float, default=0.33,
                   help="share of ends of conversations in a batch")
    p.add_argument("--mean-share", type=float, default=0.33,
                   help="share of running means of answers in a batch")
    p.add_argument("--cuts", type=int, default=4,
                   help="extra scored positions a conversation, its answer cut anywhere")
    p.add_argument("--turns", type=int, default=3,
                   help="half of the conversations are joined to up to so many turns")
    p.add_argument("--start",
                   help="go on from this TopK SAE, e.g. one that has not seen your chat template")
    p.add_argument("--tokens", type=int, default=2_000_000,
                   help="activations to train on")
    p.add_argument("--batch", type=int, default=1024,
                   help="activations a step")
    p.add_argument("--lr", type=float, default=1e-3,
                   help="peak learning rate of Adam")
    p.add_argument("--buffer", type=int, default=65536,
                   help="activations in the shuffle buffer")
    p.add_argument("--dead-after", type=int, default=100_000,
                   help="activations without firing after which a latent counts as dead")
    args = p.parse_args()
    check_flags(args)
    return args


LEAST = {"max_length": 2, "limit": 1, "seed": 0, "width": 1, "k": 1, "cuts": 0, "turns": 1,
         "tokens": 1, "batch": 1, "buffer": 1, "dead_after": 1}
MOST = 2**48


def check_counts(args):
    """Refuse counts that cannot be meant, of the flags that there are."""
    for name, least in LEAST.items():
        value = getattr(args, name, None)
        if value is not None and not least <= value <= MOST:
            flag = "--" + name.replace("_", "-")
            raise SAEError(f"{flag} {value} is out of range · {flag} · "
                           f"pass a number from {least}")


def check_flags(args):
    """Refuse values that cannot train."""
    check_counts(args)
    if args.k > args.width:
        raise SAEError(f"--k {args.k} latents cannot fire · --width {args.width} · "
                       "a smaller --k or a larger --width")
    for flag in ("--end-share", "--mean-share"):
        share = getattr(args, flag[2:].replace("-", "_"))
        if not 0 <= share < 1:
            raise SAEError(f"{flag} {share} is out of range · {flag} · pass a share from 0 to 1")
    if args.end_share + args.mean_share >= 1:
        raise SAEError(f"--end-share {args.end_share} and --mean-share {args.mean_share} leave no "
                       "room for ordinary tokens · --end-share, --mean-share · together below 1")
    if not 0 < args.lr < math.inf:
        raise SAEError(f"--lr {args.lr} is out of range · --lr · pass a number above 0")
    if Path(args.out).suffix != ".safetensors" or Path(args.out).is_dir():
        raise SAEError(f"not the name of a .safetensors file · --out {args.out} · "
                       "e.g. --out my-sae.safetensors")


def check_layer(backbone, layer, name):
    """Refuse a block that the model does not have."""
    blocks = len(backbone.blocks)
    if layer is None or not 0 <= layer < blocks:
        raise SAEError(f"layer {layer} does not exist · "
                       f"{name} has blocks 0 to {blocks - 1} · pass --layer")


def main():
    """Train an SAE from the command line."""
    args = parse_args()
    texts = read_texts(args.texts, args.limit)
    note = note_on_conversations(texts, args.texts)
    if note:
        print_at_once(note)
    backbone = stage1.load_backbone(args.model)
    check_layer(backbone, args.layer, args.model)
    if Path(args.out).exists():
        print_at_once(f"note: {args.out} will be replaced")
    sae = train(backbone, texts, args.layer, args, say=print_at_once)
    print(f"\nwritten {args.out}")
    print(describe(sae))
    print(f"\nnext: python 02_select_features.py --sae {args.out}")


def print_at_once(line):
    """A line of progress, beside a bar and also where the output is a file."""
    tqdm.write(line)
    sys.stdout.flush()


if __name__ == "__main__":
    run_main(main, SAEError)
