"""What the stage files hold, as a table, and what is wrong with one that does not.

A file that is cut short is refused by safetensors. This finds what is whole and yet not what a
later stage reads: of an older version, put together by another program, or damaged.
"""

import torch

FLOATS = ("F32", "BF16", "F16")
CARRIED = {
    "pair": ("I64", "n"), "group": ("I64", "n"), "split": ("U8", "n"),
    "chosen_tokens": ("I32", "n"), "rejected_tokens": ("I32", "n"),
}
DIRECTIONS = {
    "latents": ("I64", "2K"), "directions": ("F32", "2K", "d"),
    "mean": ("F32", "2K"), "std": ("F32", "2K"),
}
# stage → {tensor: (type, *shape)}; a letter stands for one size in the whole file
TENSORS = {
    "extract": {"chosen": ("float", "n", "d"), "rejected": ("float", "n", "d"), **CARRIED},
    "select": {
        **DIRECTIONS, **CARRIED, "fold": ("I8", "n"),
        "chosen": ("F32", "n", "2K"), "rejected": ("F32", "n", "2K"),
        "frequency_chosen": ("F32", "d_sae"), "frequency_rejected": ("F32", "d_sae"),
    },
    "select, with a search": {
        "search_latents": ("I64", "5", "2K'"), "search_union": ("I64", "U"),
        "search_pair": ("I64", "m"),
        "search_chosen": ("F32", "m", "U"), "search_rejected": ("F32", "m", "U"),
    },
    "head": {**DIRECTIONS, "temperature": ("F32", "1"), "range": ("F32", "1")},
    "head, linear": {"w1": ("F32", "2K"), "b1": ("F32", "1")},
    "head, mlp": {
        "w1": ("F32", "hidden", "2K"), "b1": ("F32", "hidden"),
        "w2": ("F32", "hidden"), "b2": ("F32", "1"),
    },
}
NAMES = {"extract": "activations", "select": "a features file", "head": "a reward head"}
FORMATS = ("float32", "bfloat16", "float16")
CHOICES = {"dtype": FORMATS, "sae_dtype": FORMATS, "normalise": ("none", "rms")}
# settings of every stage file, and the types of those that later stages read
NEEDED = ("model", "layer", "token", "norm_eps", "parent")
SETTINGS = {
    str: ("stage", "model", "backbone", "template", "token", "sae"),
    int: ("layer", "max_length", "parameters", "k", "k_asked", "search_k"),
    (int, float): ("norm_eps", "l2"),
    dict: ("parent", "settings", "asked", "search", "health"),
    list: ("weights", "warnings"),
}


def what_is_wrong(meta, tensors):
    """Settings and {tensor: (type, shape)} of a stage file → what is wrong with them, or None."""
    for kind, names in SETTINGS.items():
        for name in names:
            if name in meta and not isinstance(meta[name], kind):
                return f"setting {name} is {meta[name]!r}"
    for name, choices in CHOICES.items():
        if name in meta and meta[name] not in choices:
            return f"setting {name} is {meta[name]!r}"

    stage = meta.get("stage")
    if stage not in NAMES:
        return None
    wrong = wrong_setting(meta) or wrong_tensor(tensors_of(meta), tensors, sizes_of(meta))
    return wrong and f"not {NAMES[stage]}: {wrong}"


def wrong_setting(meta):
    """A setting that every stage file has, and this one has not → str, or None."""
    for name in NEEDED:
        if name not in meta:
            return f"setting {name} missing"
    return None


def tensors_of(meta):
    """What a file with these settings must hold → a table like those of TENSORS."""
    wanted = TENSORS[meta["stage"]]
    if meta["stage"] == "select" and meta["search_k"]:
        wanted = wanted | TENSORS["select, with a search"]
    if meta["stage"] == "head":
        kind = "mlp" if meta["settings"]["kind"] == "mlp" else "linear"
        wanted = wanted | TENSORS[f"head, {kind}"]
    return wanted


def sizes_of(meta):
    """The sizes that the settings say → {letter: size}."""
    sizes = {"1": 1, "5": 5}
    if meta["stage"] != "extract":
        sizes |= {"2K": 2 * meta["k"], "2K'": 2 * meta["search_k"]}
    return sizes


def wrong_tensor(wanted, tensors, sizes):
    """The first tensor that is missing, or of another type or shape → str, or None."""
    for name, (kind, *shape) in wanted.items():
        if name not in tensors:
            return f"{name} missing"
        found_kind, found = tensors[name]
        for letter, size in zip(shape, found):
            sizes.setdefault(letter, size)
        expected = [sizes.get(letter, letter) for letter in shape]
        is_kind = found_kind in FLOATS if kind == "float" else found_kind == kind
        if found != expected or not is_kind:
            return f"{name} is {found_kind} {found}, expected {kind} {expected}"
    return None


def wrong_numbers(tensors):
    """A tensor of a stage file that numbers rows of another which are not there → str, or None."""
    among = {}
    if "search_union" in tensors:
        among["search_latents"] = tensors["search_union"]
        among["search_pair"] = torch.arange(len(tensors["pair"]))
    if "frequency_chosen" in tensors:
        among["latents"] = torch.arange(len(tensors["frequency_chosen"]))
    for name, there in among.items():
        if not torch.isin(tensors[name], there).all():
            return f"{name} holds numbers that it cannot hold"
    return None
