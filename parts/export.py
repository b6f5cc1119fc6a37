"""A frozen backbone and one vector → a sequence classifier that any tool loads.

    backbone   embedding → block 0 … block L … → norm → lm_head
    classifier embedding → block 0 … block L   → norm with neutral weights → score: one vector u

transformers computes score(norm(z)) at the rightmost token that is not padding. A norm without
weights is z / √(mean z² + eps), so the logit is <z / √(mean z² + eps), u>, and no code of ours is
needed to load it.
"""

import copy
import re
import string
from pathlib import Path

import torch
from tokenizers import processors

from parts.chat import PINNED, TODAY, chat_string, control_tokens, takes_system_turn
from parts.files import UserError
from parts.messages import as_turns
from parts.models import SHORT_TALK

# ---------------------------------------------------------------- the model

UNQUANTISED = (torch.float32, torch.bfloat16, torch.float16)


def sequence_classifier(backbone, layer, u, eps, dtype):
    """Blocks 0 to `layer` of a Backbone and a vector u [d] → its …ForSequenceClassification.

    To be saved: once loaded again its logit is <z / √(mean z² + eps), u>, z at the output of block
    `layer`. As it is it cannot run, its rotary tables are not made. Weights are shared with the
    backbone where the dtype is the same. Errors: UserError, of a family for which transformers has
    no such class, that ends in another norm, or whose weights are quantised.
    """
    model_class, config = class_and_config(backbone, layer, dtype)
    with torch.device("meta"):                      # no memory: all weights are put in below
        model = model_class(config)
    names = model.base_model.state_dict()
    model.base_model.load_state_dict(weights_of(backbone, names, eps, dtype), assign=True)
    model.score.weight = torch.nn.Parameter(u[None].to(dtype), requires_grad=False)
    return model


def weights_of(backbone, names, eps, dtype):
    """The backbone's weights of these names, the final norm's neutral → {name: tensor}."""
    model_name = backbone.meta["model"]
    decoder = decoder_of(backbone)
    norm = neutral_norm(decoder, eps, model_name)
    source = decoder.state_dict()
    source |= {f"norm.{name}": weight for name, weight in norm.state_dict().items()}
    weights = {}
    for name in names:
        if name not in source or source[name].dtype not in UNQUANTISED:
            raise UserError(f"the backbone has no plain weight {name} (quantised?) · "
                            f"{model_name} · load it in float32 or bfloat16")
        weights[name] = source[name].to(dtype)
    return weights


def class_and_config(backbone, layer, dtype):
    """→ (the …ForSequenceClassification of the backbone's family, its config for L + 1 blocks)."""
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    config = copy.deepcopy(backbone.model.config.get_text_config())     # without a vision tower
    model_class = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if model_class is None:
        raise UserError(f"transformers has no sequence classifier for {config.model_type} · "
                        f"{backbone.meta['model']} · use RewardModel, or 05_best_of_n.py rank")
    blocks = config.num_hidden_layers
    # a list with one item a block (layer_types, no_rope_layers …), whatever a family calls it
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == blocks:
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


def neutral_norm(decoder, eps, model_name):
    """A copy of the final norm with weights that change nothing: x → x / √(mean x² + eps).

    Llama's norm multiplies with w, Gemma's with 1 + w: which of 1 and 0 is neutral is tried out.
    """
    if not hasattr(decoder, "norm"):
        raise UserError(f"no final norm called norm in {type(decoder).__name__} · {model_name} · "
                        "export does not know this family: use RewardModel")
    norm = copy.deepcopy(decoder.norm).float().cpu()
    x = torch.randn(2, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([[1.0], [eps**0.5]])       # where x is small eps counts
    wanted = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    for neutral in (1.0, 0.0):
        for weight in norm.parameters():
            torch.nn.init.constant_(weight, neutral)
        if torch.allclose(norm(x), wanted, atol=1e-5):
            return norm
    raise UserError(f"the model's last norm is not x / √(mean x² + eps) · {model_name} · "
                    "such a model cannot hold the head: use RewardModel")


# ---------------------------------------------------------------- the tokenizer

def exported_tokenizer(tokenizer, vocabulary_size, max_length, model_name):
    """A tokenizer → the copy that an exported folder holds.

    vocabulary_size: of the model's embedding, which may end before the tokenizer does. With the
    copy others render and encode a conversation to the ids that the head was trained on.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = exported_template(tokenizer)
    tokenizer.pad_token = pad_token(tokenizer, vocabulary_size, model_name)
    # rendered text is encoded as it stands, the template has written BOS: in the place of what
    # adds it comes a post-processor that adds nothing
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    # (save_pretrained writes init_kwargs, not attributes)
    for flag in ("add_bos_token", "add_eos_token"):
        if flag in tokenizer.init_kwargs:
            tokenizer.init_kwargs[flag] = False
    # with truncation=True a text loses its beginning: what is read stands at its end
    tokenizer.model_max_length = max_length
    tokenizer.truncation_side = "left"
    tokenizer.init_kwargs["truncation_side"] = "left"
    return tokenizer


# puts a system turn, which the template refuses or loses, in front of the first user turn
SYSTEM_INTO_USER = ("{% if messages | length > 1 and messages[0].role == 'system' "
          "and messages[1].role == 'user' %}"
          "{% set messages = [{'role': 'user', 'content': "
          "messages[0].content + '\n\n' + messages[1].content}] + messages[2:] %}{% endif +%}")


def exported_template(tokenizer):
    """The chat template with what stage 1 does beside it: the day, and where system turns go."""
    # +%}: else the template's own newline behind it would be lost
    day = PINNED + "{% set date_string = \"" + TODAY + "\" +%}"
    system = "" if takes_system_turn(tokenizer) else SYSTEM_INTO_USER
    return day + system + tokenizer.get_chat_template()


# what makers of tokenizers call the tokens that they keep for later
RESERVED = "pad|reserved|unused|placeholder|control|extra|dummy"


def pad_token(tokenizer, vocabulary_size, model_name):
    """A token to pad with that is not the last of a conversation → str.

    A classifier reads the rightmost token that is not padding: where the tokenizer's own padding is
    the last token of a conversation it would be missed, so a reserved token or unk is taken.
    """
    if is_fit_to_pad(tokenizer, tokenizer.pad_token_id, vocabulary_size):
        return tokenizer.pad_token
    _, control_ids = control_tokens(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(sorted(control_ids))
    reserved = [token for token in tokens if re.search(RESERVED, token, re.IGNORECASE)]
    reserved.sort(key=lambda token: "pad" not in token.lower())         # one called pad first
    for token in filter(None, [*reserved, tokenizer.unk_token]):
        if is_fit_to_pad(tokenizer, tokenizer.convert_tokens_to_ids(token), vocabulary_size):
            return token
    raise UserError("no token is left to pad with, batches could not be read · "
                    f"{model_name} · add a pad token to its tokenizer and embedding")


def is_fit_to_pad(tokenizer, number, vocabulary_size):
    """Has the token an embedding, and is a conversation's last token another one?"""
    if number is None or number >= vocabulary_size:
        return False
    written = tokenizer(chat_string(tokenizer, SHORT_TALK), add_special_tokens=False)["input_ids"]
    return number != written[-1]


# ---------------------------------------------------------------- the folder

def check_free(out):
    """Refuse to replace a folder."""
    if Path(out).exists():
        raise UserError(f"it exists already · --out {out} · remove it, or name another folder")


def save_classifier(folder, model, tokenizer, card):
    """Write model, tokenizer and README.md into a folder."""
    readme = folder / "README.md"
    readme.write_text(card, encoding="utf-8")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # safetensors files can be read by their owner alone; README.md got what the umask lets
    for path in folder.iterdir():
        path.chmod(readme.stat().st_mode)


def logits_of_folder(folder, conversations):
    """What a folder gives for (prompt, response) pairs, read as its users do → logits [n] float32.

    One batch, padded by its tokenizer; the texts by its chat template.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    texts = [chat_text(tokenizer, *conversation) for conversation in conversations]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return model(**batch).logits[:, 0].float()


def chat_text(tokenizer, prompt, response):
    """A prompt (str or messages) and a response → the text that the chat template makes of them."""
    messages = [*as_turns(prompt), {"role": "assistant", "content": response}]
    return tokenizer.apply_chat_template(messages, tokenize=False)


# ---------------------------------------------------------------- the model card

def model_card(facts, tokenizer):
    """The README.md of an exported folder. facts: see facts_of in 05_best_of_n.py."""
    front_matter = ["library_name: transformers", "pipeline_tag: text-classification",
                    "tags: [reward-model, sparserm]"]
    if facts["hub_name"]:
        front_matter.append(f"base_model: {facts['hub_name']}")
    if facts["licence"]:
        front_matter.append(f"license: {facts['licence']}")
    values = {
        **facts,
        "front_matter": "\n".join(front_matter),
        "licence": facts["licence"] or "not stated in its files: look before you pass this on",
        "constant": f"{facts['constant']:.6g}",
        "temperature": f"{facts['temperature']:.4g}",
        "pad": tokenizer.pad_token,
        "end": repr(end_of_conversation(tokenizer)),
    }
    template = Path(__file__).with_name("model_card.md").read_text("utf-8")
    return string.Template(template).substitute(values)


def end_of_conversation(tokenizer):
    """What the chat template writes behind an answer → str."""
    answer = "\ue000"                              # a private character, which no template writes
    return chat_text(tokenizer, "a", answer).rpartition(answer)[2]
