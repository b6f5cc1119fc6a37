"""Kinds of damage to an SAE checkpoint, for test_sae_damaged.py.

A kind is a function (checkpoint, generator, turn) that changes the files in place; turns go through
its variants. What may come of it (EQUAL, FITS, REFUSED) the function returns, or else KINDS says.
"""

import functools
import io
import json
import os
import re
import zipfile
from dataclasses import dataclass

import numpy as np
import test_sae as T
import torch

EQUAL = "the very SAE or a refusal"
FITS = "an SAE that holds together or a refusal"
REFUSED = "a refusal"
BOMB = 512 << 20        # bytes that a small archive unpacks to


def pick(rng, among):
    """One of some things."""
    things = list(among)
    return things[rng.integers(len(things))]


def variant(variants, turn):
    """The variant whose turn it is."""
    return variants[turn % len(variants)]


# ---------------------------------------------------------------- bits and lengths

def flip(data, places, rng):
    """Flip 1 to 64 bits at some places of a bytearray → the same."""
    for _ in range(int(2 ** rng.uniform(0, 6.01))):
        data[pick(rng, places)] ^= 1 << int(rng.integers(8))
    return data


def places_of(part, data):
    """Where a part stands in data, each byte of it."""
    places = set()
    for found in re.finditer(re.escape(part), data):
        places.update(range(*found.span()))
    return places


def places_of_weights(c, data):
    """The bytes of all tensors that are no scalars."""
    places = set()
    for tensor in c.tensors.values():
        if tensor.dim():
            places |= places_of(tensor.numpy().tobytes(), data)
    return places


def structure_flipped(c, rng, turn):
    data = bytearray(c.file.read_bytes())
    within_a_string = json.dumps(json.dumps(c.settings, sort_keys=True))    # our own layout
    settings = places_of(within_a_string.encode(), data)
    places = set(range(len(data))) - places_of_weights(c, data) - settings
    c.file.write_bytes(flip(data, sorted(places), rng))


def weights_flipped(c, rng, turn):
    data = bytearray(c.file.read_bytes())
    c.file.write_bytes(flip(data, sorted(places_of_weights(c, data)), rng))
    return FITS if c.format == ".safetensors" else EQUAL        # a zip has checksums


def settings_flipped(c, rng, turn):
    text = bytearray(json.dumps(c.settings).encode())
    flipped = flip(text, range(len(text)), rng)
    c.save(flipped.decode("utf-8", "surrogateescape" if c.config else "ignore"))


def truncated(c, rng, turn):
    """At the very end, or anywhere."""
    size = c.file.stat().st_size
    os.truncate(c.file, size - 1 - turn // 2 if turn % 2 else rng.integers(size))


# a zip: how a record begins, and where in it lengths stand
ZIP_RECORDS = {
    b"PK\1\2": (20, 24, 28, 30, 32, 42),        # in its directory
    b"PK\5\6": (8, 10, 12, 16, 20),             # its end
    b"PK\3\4": (18, 22, 26, 28),                # the header of a member
}
HUGE = [2 ** 64 - 1, 2 ** 63, 2 ** 40, 2 ** 31, 10 ** 8, 65535]


def huge_length(c, rng, turn):
    """In the first 8 bytes of a safetensors file; in a record of a zip."""
    data = bytearray(c.file.read_bytes())
    if c.format == ".safetensors":
        at, width = 0, 8
    else:
        mark = pick(rng, ZIP_RECORDS)
        record = pick(rng, [found.start() for found in re.finditer(re.escape(mark), data)])
        at, width = record + pick(rng, ZIP_RECORDS[mark]), 4
    huge = pick(rng, HUGE) % 256 ** width
    data[at:at + width] = huge.to_bytes(width, "little")
    c.file.write_bytes(data)


# ---------------------------------------------------------------- shapes that no memory holds

def npy(shape, numbers=b""):
    """A .npy of float32 whose header says `shape`."""
    member = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)}
    np.lib.format.write_array_header_1_0(member, header)
    return member.getvalue() + numbers


def write_zip(path, mode, parts, compression=zipfile.ZIP_STORED):
    """Write or append {name: bytes}."""
    with zipfile.ZipFile(path, mode, compression, compresslevel=1) as file:
        for name, part in parts.items():
            file.writestr(name, part)


SHAPES = [(10 ** 12, 10 ** 6), (2 ** 63, 2 ** 63), (10 ** 9,), (T.D, 10 ** 8), (0, 10 ** 15),
          (-1, T.D), (2 ** 32, 2 ** 32)]


def huge_shape(c, rng, turn):
    name = pick(rng, c.needed)
    shape = variant(SHAPES, turn)
    if c.format == ".npz":
        shapes = {n: tensor.shape for n, tensor in c.tensors.items()} | {name: shape}
        arrays = {f"{n}.npy": npy(shapes[n], c.tensors[n].numpy().tobytes()) for n in shapes}
        write_zip(c.file, "w", arrays)
    elif c.format == ".pt":
        see_one_number_as_many(c, turn)
    else:
        change_header(c, name, shape, rng)


def see_one_number_as_many(c, turn):
    """Tensors with a stride of 0."""
    wide = {T.D: 10 ** (3 + turn % 3), T.M: 10 ** (6 + turn % 3)}
    for name in c.needed:
        tensor = c.tensors[name]
        shape = [wide[size] for size in tensor.shape]
        c.tensors[name] = tensor.flatten()[:1].expand(shape)
    c.save()


def change_header(c, name, shape, rng):
    """Another shape, and an end far away or at the end of the file, in a safetensors header."""
    data = c.file.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    first, _ = header[name]["data_offsets"]
    last = pick(rng, [10 ** 18, len(data) - begin])
    header[name] |= {"shape": shape, "data_offsets": [first, last]}
    text = json.dumps(header).encode()
    c.file.write_bytes(len(text).to_bytes(8, "little") + text + data[begin:])


# ---------------------------------------------------------------- tensors and settings

def tensor(*changes):
    """One of `changes` is done to a tensor that the layout needs; None removes it."""
    def damage(c, rng, turn):
        name = pick(rng, c.needed)
        change = variant(changes, turn)
        old = c.tensors.pop(name)
        if change:
            c.tensors[name] = change(old).contiguous()
        c.save()
    return damage


def transposed(t):
    return t.T if t.dim() == 2 else t[None]


def scalar(t):
    return t.flatten()[0]


def one_number_is(number):
    """A change: the number a third of the way through becomes this one."""
    def change(t):
        place = torch.tensor(t.numel() // 3)
        return t.flatten().index_fill(0, place, number).view_as(t)
    return change


def to_type(dtype):
    """A change: another type."""
    return functools.partial(torch.Tensor.to, dtype=dtype)


SIZES = [
    lambda t: t[:-1],
    lambda t: t[..., :-1],
    lambda t: t[None],
    lambda t: torch.cat([t, t]),
    lambda t: t[..., None],
]
EMPTY = [lambda t: t[:0], lambda t: t[..., :0]]
TYPES = [to_type(dtype) for dtype in (torch.int64, torch.bool, torch.uint8, torch.complex64)]
NOT_FINITE = [one_number_is(float("nan")), one_number_is(float("inf"))]


def setting(values=None):
    """A setting, of the configuration or of a table in it, gets one of `values` or is removed."""
    def damage(c, rng, turn):
        tables = [v for v in c.settings.values() if isinstance(v, dict) and v]
        table = pick(rng, [c.settings, *tables])
        key = pick(rng, table)
        del table[key]
        if values:
            table[key] = variant(values, turn)
        c.save()
    return damage


STRANGE = ["x", "a\nb", "", None, True, 0, -1, 2.5, float("nan"), 10 ** 30, 1e30, 1e-320,
           [1], [], {"a": {"b": 1}}, {}]
JSON = ["[" * 100000, '{"a":' * 100000, '{"k": [' + "[" * 5000 + "]" * 5000 + "]}", "", "null",
        '"x"', "3", "{", "\0" * 64, "\ufeff{}", '{"k": ' + "9" * 5000 + "}", '{"k": 1e999}',
        '{"k": "\\ud800"}', '{"architecture": "a\\nb", "activation": "a\\nb"}']


def settings_replaced(c, rng, turn):
    c.save(variant(JSON, turn))


STRANGE_K = [0, -1, T.M + 1, 1e30, 10 ** 30, "five", None, [5], float("inf"), float("nan"),
             2 ** 31, -2 ** 63]


def wrong_k(c, rng, turn):
    """Where this checkpoint keeps k: in a tensor, or a setting."""
    k = variant(STRANGE_K, turn)
    in_tensor = "k" in c.tensors
    if in_tensor:
        is_number = isinstance(k, (int, float))
        c.tensors["k"] = torch.tensor(float(k)) if is_number else torch.tensor([5, 6])
    elif c.settings:
        table = c.settings.get("activation_fn_kwargs") or c.settings
        table["top_k" if "top_k" in c.settings else "k"] = k
    c.save()
    has_k = c.original.activation in ("topk", "groupmax") and (in_tensor or c.settings)
    return REFUSED if has_k else FITS


# ---------------------------------------------------------------- other files

def other_pickle(c, rng, turn):
    """A .pt of other things than strided tensors, or packed otherwise."""
    t = c.tensors
    W = next(name for name, tensor in t.items() if tensor.dim() == 2)
    trap = T.Trap(c.file.parent / "executed")
    more = {"nested": {"x": [torch.ones(1)]}, "none": None, "text": "x", "flag": True,
            "bytes": b"x", 3: torch.ones(3)}
    others = [
        (trap, REFUSED),
        ({**t, "trap": trap}, REFUSED),
        ({**t, **more}, EQUAL),
        ({**t, "step": 10 ** 30}, EQUAL),
        (t, EQUAL),                                     # in the format before torch 1.6
        (t, EQUAL),                                     # compressed
        ({"a\nb": t[W]}, REFUSED),
        ({3: t[W], **t, W: 1.0}, REFUSED),
        ({"state_dict": t}, REFUSED),
        (list(t.values()), REFUSED),
        ({}, REFUSED),
        ({**t, W: t[W].to_sparse()}, EQUAL),
        ({**t, W: t[W].to("meta")}, REFUSED),
        ({**t, W: t[W].to(torch.float8_e5m2)}, FITS),
    ]
    number = turn % len(others)
    content, may = others[number]
    torch.save(content, c.file, _use_new_zipfile_serialization=number != 4)
    if number == 5:
        compress(c.file)
    return may


def compress(path):
    """Compress the members of a zip."""
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    write_zip(path, "w", parts, zipfile.ZIP_DEFLATED)


def other_array(c, rng, turn):
    """An array of another kind in an npz: the first two mean the same numbers."""
    name = pick(rng, c.needed)
    a = c.tensors[name].numpy()
    arrays = [
        a.astype(">f4"), np.asfortranarray(a),
        a.astype(object), a.astype("U8"), a.astype("S8"), a.astype("V4"), a.astype(np.longdouble),
        np.zeros(a.shape, "M8[s]"), np.array({"x": 1}), a.astype(np.uint16), a.astype("f8") * 1e300,
    ]
    np.savez(c.file, **{**c.tensors, name: variant(arrays, turn)})
    return EQUAL if turn % len(arrays) < 2 else REFUSED


@functools.cache
def packed_zeros():
    """An npz of w_enc.npy alone: BOMB bytes in two megabytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        with packed.open("w_enc.npy", "w") as member:
            member.write(npy((T.D, BOMB // 4 // T.D)))
            for _ in range(BOMB >> 20):
                member.write(bytes(1 << 20))
    return file.getvalue()


BOMBS = [       # what is replaced in it, and by what
    (b"PK", b"PK"),                                             # it says what it unpacks to
    ((BOMB + 128).to_bytes(4, "little"), b"\0\x10\0\0"),        # it says 4096 bytes
    (b"w_enc", b"other"),                                       # an array that nobody asks for
]


def bomb(c, rng, turn):
    """A small file that unpacks to much."""
    replaced, by = variant(BOMBS, turn)
    nobody_asks = replaced == b"w_enc"
    c.file.write_bytes(packed_zeros().replace(replaced, by))
    arrays = {f"{name}.npy": npy(t.shape, t.numpy().tobytes()) for name, t in c.tensors.items()}
    if not nobody_asks:
        arrays.pop("w_enc.npy", None)       # in capitals it may stand beside the zeros
    write_zip(c.file, "a", arrays)
    return EQUAL if nobody_asks else REFUSED


OTHERS = [
    b"",
    bytes(4096),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1073741824\n",
    b"<!DOCTYPE html><html>",
    npy((16,), bytes(64)),
    b"PK\5\6" + bytes(18),                  # an empty zip
    b"\x80\2}.",                            # a pickle of {}
    b"\x1f\x8b" + bytes(99),                # gzip
]


def another_file(c, rng, turn):
    """In place of the weights."""
    c.file.write_bytes(variant(OTHERS, turn))


# ---------------------------------------------------------------- all kinds

@dataclass(frozen=True)
class Kind:
    """What is done, what may come of it, and to files of which formats."""
    damage: object
    may: str
    formats: tuple = (".safetensors", ".pt", ".npz")
    with_settings: bool = False             # only to checkpoints that have some


OF_SETTINGS = {"formats": (".safetensors", ".pt"), "with_settings": True}
KINDS = {
    "truncated": Kind(truncated, EQUAL),
    "bits of the structure flipped": Kind(structure_flipped, EQUAL),
    "bits of the weights flipped": Kind(weights_flipped, EQUAL),
    "bits of the settings flipped": Kind(settings_flipped, FITS, **OF_SETTINGS),
    "huge length": Kind(huge_length, EQUAL),
    "huge shape": Kind(huge_shape, REFUSED),
    "transposed": Kind(tensor(transposed), REFUSED),
    "of another size": Kind(tensor(*SIZES), REFUSED),
    "of another type": Kind(tensor(*TYPES), REFUSED),
    "0-dim": Kind(tensor(scalar), FITS),                    # a threshold may be one number
    "empty": Kind(tensor(*EMPTY), REFUSED),
    "removed": Kind(tensor(None), REFUSED),
    "NaN or Inf": Kind(tensor(*NOT_FINITE), REFUSED),
    "setting removed": Kind(setting(), FITS, **OF_SETTINGS),
    "strange setting": Kind(setting(STRANGE), FITS, **OF_SETTINGS),
    "settings replaced": Kind(settings_replaced, FITS, **OF_SETTINGS),
    "wrong k": Kind(wrong_k, REFUSED, **OF_SETTINGS),
    "other pickle": Kind(other_pickle, REFUSED, (".pt",)),
    "other array": Kind(other_array, REFUSED, (".npz",)),
    "bomb": Kind(bomb, REFUSED, (".npz",)),
    "another file": Kind(another_file, REFUSED),
}
