"""A frozen backbone and one vector → a sequence classifier that any tool loads.

    backbone   embedding → block 0 … block L … → norm → lm_head
    classifier embedding → block 0 … block L   → norm with neutral weights → score: one vector u

transformers computes score(norm(z)) at the rightmost token that is not padding. A norm without
weights is z / √(mean z² + eps), so the logit is <z / √(mean z² + eps), u>, and no code of ours is
needed to load it.
"""

import copy
import os
import re
import shutil
import string
from pathlib import Path

import torch

from parts.chat import TODAY, chat_string, control_tokens
from parts.files import UserError
from parts.models import SHORT_TALK

# ---------------------------------------------------------------- the model

def sequence_classifier(backbone, layer, u, eps, dtype):
    """Blocks 0 to `layer` of a Backbone and a vector u [d] → its …ForSequenceClassification.

    Its logit is <z / √(mean z² + eps), u>, z at the output of block `layer`. The weights are shared
    with the backbone where the dtype is the same. Errors: UserError, of a family for which
    transformers has no such class, or that ends in another norm.
    """
    model_class, config = class_and_config(backbone, layer, dtype)
    with torch.device("meta"):                      # no memory: all weights are put in below
        model = model_class(config)
    decoder = decoder_of(backbone)
    norm = neutral_norm(decoder, eps, backbone.meta["model"])
    source = {f"norm.{name}": weight for name, weight in norm.state_dict().items()}
    source = {**decoder.state_dict(), **source}
    weights = {name: source[name].to(dtype) for name in model.base_model.state_dict()}
    model.base_model.load_state_dict(weights, assign=True)
    model.score.weight = torch.nn.Parameter(u[None].to(dtype), requires_grad=False)
    return model


def class_and_config(backbone, layer, dtype):
    """→ (the …ForSequenceClassification of the backbone's family, its config for L + 1 blocks)."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    config = copy.deepcopy(backbone.model.config.get_text_config())     # without a vision tower
    model_class = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if model_class is None:
        raise UserError(f"transformers has no sequence classifier for {config.model_type} · "
                        f"{backbone.meta['model']} · use RewardModel, or 05_best_of_n.py rank")
    blocks = config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == blocks:            # layer_types: one a block
            setattr(config, name, value[:layer + 1])
    config.num_hidden_layers = layer + 1
    config.num_labels = 1
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}
    config.problem_type = "regression"              # no sigmoid behind it
    config.use_cache = False
    config.dtype = dtype
    return model_class, config


def decoder_of(backbone):
    """The module that holds embedding, blocks and final norm."""
    for module in backbone.model.modules():
        if any(child is backbone.blocks for child in module.children()):
            return module
    raise UserError(f"no decoder around the blocks · {backbone.meta['model']} · use RewardModel")


def neutral_norm(decoder, eps, name):
    """A copy of the final norm with weights that change nothing: x → x / √(mean x² + eps).

    Llama's norm multiplies with w, Gemma's with 1 + w: which of 1 and 0 is neutral is tried out.
    """
    if hasattr(decoder, "norm"):
        norm = copy.deepcopy(decoder.norm).float().cpu()
        x = torch.randn(2, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
        wanted = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        for neutral in (1.0, 0.0):
            for weight in norm.parameters():
                torch.nn.init.constant_(weight, neutral)
            if torch.allclose(norm(x), wanted, atol=1e-5):
                return norm
    raise UserError("the model's last norm is not x / √(mean x² + eps) · "
                    f"{name} · such a model cannot hold the head: use RewardModel")


# ---------------------------------------------------------------- the tokenizer

def with_pad_token(tokenizer, rows, name):
    """Give the tokenizer a pad token that never ends a conversation. In place → its id.

    rows: of the embedding. The token that is read is the rightmost one that is not padding. Where
    the padding is what ends a turn, that token would be missed.
    """
    if is_fit_to_pad(tokenizer, tokenizer.pad_token_id, rows):
        return tokenizer.pad_token_id
    tokens = tokenizer.convert_ids_to_tokens(sorted(control_tokens(tokenizer)[1]))
    reserved = [token for token in tokens if re.search(RESERVED, token, re.IGNORECASE)]
    reserved.sort(key=lambda token: "pad" not in token.lower())
    for token in filter(None, [*reserved, tokenizer.unk_token]):
        if is_fit_to_pad(tokenizer, tokenizer.convert_tokens_to_ids(token), rows):
            tokenizer.pad_token = token
            return tokenizer.pad_token_id
    raise UserError("no token is left to pad with, batches could not be read · "
                    f"{name} · add a pad token to its tokenizer and embedding")


# what makers of tokenizers call the tokens that they keep for later
RESERVED = "pad|reserved|unused|placeholder|control|extra|dummy"


def is_fit_to_pad(tokenizer, number, rows):
    """Has it a row of the embedding, and does a conversation end in another token?"""
    if number is None or number >= rows:
        return False
    written = tokenizer(chat_string(tokenizer, SHORT_TALK), add_special_tokens=False)["input_ids"]
    return number != written[-1]


def pin_date(tokenizer):
    """Write the day that stage 1 reads into the chat template. In place."""
    # +%}: else the template's own newline behind it would be lost
    pinned = ("{% macro strftime_now(form) %}" + TODAY + "{% endmacro +%}"
              "{% set date_string = \"" + TODAY + "\" +%}")
    tokenizer.chat_template = pinned + tokenizer.get_chat_template()


def cut_at_the_beginning(tokenizer):
    """Let a text that is too long lose its beginning: what is read stands at its end. In place."""
    tokenizer.truncation_side = "left"
    tokenizer.init_kwargs["truncation_side"] = "left"       # save_pretrained names what is in there


# ---------------------------------------------------------------- the folder

def write_folder(out, model, tokenizer, card, check):
    """Save model, tokenizer and README.md → check(folder), called before it is moved to `out`."""
    out = Path(out)
    if out.exists():
        raise UserError(f"the folder exists · --out {out} · remove it, or name another")
    part = out.with_name(f".{out.name}.{os.urandom(4).hex()}.part")
    part.mkdir(parents=True)
    try:
        (part / "README.md").write_text(card, encoding="utf-8")
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        mode = (part / "README.md").stat().st_mode
        for path in part.iterdir():                 # safetensors leaves them to their owner alone
            path.chmod(mode)
        found = check(part)
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return found


def logits_of_folder(folder, conversations):
    """What a folder gives for (prompt, response) pairs, read as its users do → logits [n] float32.

    One batch, padded by its tokenizer; the texts by its chat template.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = [rendered(tokenizer, *conversation) for conversation in conversations]
    # the template writes BOS itself
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return model(**batch).logits[:, 0].float()


def rendered(tokenizer, prompt, response):
    """A prompt (str or messages) and a response → the text that the chat template makes of them."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": response}],
                                         tokenize=False)


# ---------------------------------------------------------------- the model card

def model_card(facts, pad):
    """The README.md of an exported folder. facts: see facts_of in 05_best_of_n.py."""
    head = ["library_name: transformers", "pipeline_tag: text-classification",
            "tags: [reward-model, sparserm]"]
    if facts["hub_name"]:
        head.append(f"base_model: {facts['hub_name']}")
    if facts["licence"]:
        head.append(f"license: {facts['licence']}")
    values = {
        **facts,
        "head": "\n".join(head),
        "licence": facts["licence"] or "not stated in its files: look before you pass this on",
        "accuracy": accuracy_in_words(facts),
        "constant": f"{facts['constant']:.6g}",
        "temperature": f"{facts['temperature']:.4g}",
        "pad": pad,
    }
    template = Path(__file__).with_name("model_card.md").read_text("utf-8")
    return string.Template(template).substitute(values)


def accuracy_in_words(facts):
    """Test accuracy with its interval, or what training itself measured."""
    test = facts["test"]
    if test and test.get("low") is not None:
        return (f"{test['accuracy']:.3f} [{test['low']:.3f}, {test['high']:.3f}] of {test['n']} "
                f"test pairs ({test['groups']} prompts; 95 % interval)")
    if facts["accuracy_out_of_fold"] is not None:
        return (f"{facts['accuracy_out_of_fold']:.3f} of the training pairs, by heads that had not "
                "seen them; not evaluated on a test split")
    return "not measured"
