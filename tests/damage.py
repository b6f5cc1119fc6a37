"""Kinds of damage to an SAE checkpoint, for test_sae_damaged.py.

A kind is a function (checkpoint, generator, turn) that changes the files in place; turns go through its variants. What may come of
it (EQUAL, FITS, REFUSED) the function returns, or else KINDS says it.
"""

import functools
import io
import json
import os
import re
import zipfile

import numpy as np
import test_sae as T
import torch

EQUAL, FITS, REFUSED = "the very SAE or a refusal", "an SAE that holds together or a refusal", "a refusal"
BOMB = 512 << 20


def pick(rng, among):
    return list(among)[rng.integers(len(among))]


def flip(data, places, rng):
    for _ in range(int(2 ** rng.uniform(0, 6.01))):             # 1 to 64 bits
        data[pick(rng, places)] ^= 1 << int(rng.integers(8))
    return data


def bits_flipped(c, rng, turn, of_weights=False):
    data = bytearray(c.file.read_bytes())
    span = lambda part: {at for found in re.finditer(re.escape(part), data) for at in range(*found.span())}
    weights = set().union(*(span(t.numpy().tobytes()) for t in c.tensors.values() if t.dim()))
    settings = span(json.dumps(json.dumps(c.settings, sort_keys=True)).encode())            # within our own layout
    c.file.write_bytes(flip(data, sorted(weights if of_weights else set(range(len(data))) - weights - settings), rng))
    return FITS if of_weights and c.format == ".safetensors" else EQUAL                     # a zip has checksums


def settings_flipped(c, rng, turn):
    text = bytearray(json.dumps(c.settings).encode())
    c.save(flip(text, range(len(text)), rng).decode("utf-8", "surrogateescape" if c.config else "ignore"))


def truncated(c, rng, turn):
    size = c.file.stat().st_size
    os.truncate(c.file, size - 1 - turn // 2 if turn % 2 else rng.integers(size))


def huge_length(c, rng, turn):
    """In the first 8 bytes of a safetensors file; in the directory of a zip, its end or the header of a member."""
    zips = [(b"PK\1\2", (20, 24, 28, 30, 32, 42)), (b"PK\5\6", (8, 10, 12, 16, 20)), (b"PK\3\4", (18, 22, 26, 28))]
    mark, places, width = (b"^", (0,), 8) if c.format == ".safetensors" else (*pick(rng, zips), 4)
    data, huge = bytearray(c.file.read_bytes()), pick(rng, [2 ** 64 - 1, 2 ** 63, 2 ** 40, 2 ** 31, 10 ** 8, 65535]) % 256 ** width
    at = pick(rng, [m.start() for m in re.finditer(mark, data)]) + pick(rng, places)
    data[at:at + width] = huge.to_bytes(width, "little")
    c.file.write_bytes(data)


def npy(shape, numbers=b""):
    """A .npy of float32 whose header says `shape`."""
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": tuple(shape)})
    return member.getvalue() + numbers


def write_zip(path, mode, parts, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, mode, compression, compresslevel=1) as file:
        for name, part in parts.items():
            file.writestr(name, part)


def huge_shape(c, rng, turn):
    shapes = [(10 ** 12, 10 ** 6), (2 ** 63, 2 ** 63), (10 ** 9,), (T.D, 10 ** 8), (0, 10 ** 15), (-1, T.D), (2 ** 32, 2 ** 32)]
    name, shape = pick(rng, c.needed), shapes[turn % 7]
    if c.format == ".npz":
        write_zip(c.file, "w", {f"{n}.npy": npy(shape if n == name else t.shape, t.numpy().tobytes()) for n, t in c.tensors.items()})
    elif c.format == ".pt":                                     # one number, seen as very many
        wide = {T.D: 10 ** (3 + turn % 3), T.M: 10 ** (6 + turn % 3)}
        c.tensors |= {n: c.tensors[n].flatten()[:1].expand([wide[s] for s in c.tensors[n].shape]) for n in c.needed}
        c.save()
    else:
        data, at = c.file.read_bytes(), 8 + int.from_bytes(c.file.read_bytes()[:8], "little")
        header = json.loads(data[8:at])
        header[name] |= {"shape": shape, "data_offsets": [header[name]["data_offsets"][0], pick(rng, [10 ** 18, len(data) - at])]}
        c.file.write_bytes(len(json.dumps(header)).to_bytes(8, "little") + json.dumps(header).encode() + data[at:])


def tensor(*changes):
    """One of `changes` is done to a tensor that the layout needs; None removes it."""
    def damage(c, rng, turn):
        name, change = pick(rng, c.needed), changes[turn % len(changes)]
        old = c.tensors.pop(name)
        if change:
            c.tensors[name] = change(old).contiguous()
        c.save()
    return damage


def setting(values=None):
    """A setting, of the configuration or of a table within it, gets one of `values` or is removed."""
    def damage(c, rng, turn):
        table = pick(rng, [c.settings, *(v for v in c.settings.values() if isinstance(v, dict) and v)])
        del table[key := pick(rng, table)]
        if values:
            table[key] = values[turn % len(values)]
        c.save()
    return damage


def wrong_k(c, rng, turn):
    ks = [0, -1, T.M + 1, 1e30, 10 ** 30, "five", None, [5], float("inf"), float("nan"), 2 ** 31, -2 ** 63]
    k, settings = ks[turn % 12], c.settings or {}
    if "k" in c.tensors:
        c.tensors["k"] = torch.tensor(float(k)) if isinstance(k, (int, float)) else torch.tensor([5, 6])
    else:
        (settings.get("activation_fn_kwargs") or settings)["top_k" if "top_k" in settings else "k"] = k
    c.save()
    return REFUSED if c.original.activation in ("topk", "groupmax") and ("k" in c.tensors or settings) else FITS


def other_pickle(c, rng, turn):
    """A .pt of other things than strided tensors, or packed otherwise."""
    t, trap, W = c.tensors, T.Trap(c.file.parent / "executed"), next(n for n, t in c.tensors.items() if t.dim() == 2)
    more = {"nested": {"x": [torch.ones(1)]}, "none": None, "text": "x", "flag": True, "bytes": b"x", 3: torch.ones(3)}
    roots = [(trap, REFUSED), ({**t, "trap": trap}, REFUSED), ({**t, **more}, EQUAL), ({**t, "step": 10 ** 30}, EQUAL),
             (t, EQUAL), (t, EQUAL), ({"a\nb": t[W]}, REFUSED), ({3: t[W], **t, W: 1.0}, REFUSED), ({"state_dict": t}, REFUSED),
             (list(t.values()), REFUSED), ({}, REFUSED), ({**t, W: t[W].to_sparse()}, EQUAL), ({**t, W: t[W].to("meta")}, REFUSED),
             ({**t, W: t[W].to(torch.float8_e5m2)}, FITS)]
    torch.save(roots[turn % 14][0], c.file, _use_new_zipfile_serialization=turn % 14 != 4)
    if turn % 14 == 5:                                          # torch.save does not compress
        with zipfile.ZipFile(c.file) as file:
            parts = {n: file.read(n) for n in file.namelist()}
        write_zip(c.file, "w", parts, zipfile.ZIP_DEFLATED)
    return roots[turn % 14][1]


def other_array(c, rng, turn):
    a = c.tensors[name := pick(rng, c.needed)].numpy()
    arrays = [a.astype(">f4"), np.asfortranarray(a), a.astype(object), a.astype("U8"), a.astype("S8"), a.astype("V4"),
              a.astype(np.longdouble), np.zeros(a.shape, "M8[s]"), np.array({"x": 1}), a.astype(np.uint16), a.astype("f8") * 1e300]
    np.savez(c.file, **{**c.tensors, name: arrays[turn % 11]})
    return EQUAL if turn % 11 < 2 else REFUSED


@functools.cache
def packed_zeros():
    """An npz of w_enc.npy alone: BOMB bytes in two megabytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed, packed.open("w_enc.npy", "w") as member:
        member.writelines([npy((T.D, BOMB // 4 // T.D)), *[bytes(1 << 20)] * (BOMB >> 20)])
    return file.getvalue()


def bomb(c, rng, turn):
    """A small file that unpacks to much: it says so, or says 4096 bytes, or it is an array that nobody asks for."""
    said, says = [(b"PK", b"PK"), ((BOMB + 128).to_bytes(4, "little"), b"\0\x10\0\0"), (b"w_enc", b"other")][turn % 3]
    c.file.write_bytes(packed_zeros().replace(said, says))
    write_zip(c.file, "a", {f"{n}.npy": npy(t.shape, t.numpy().tobytes()) for n, t in c.tensors.items() if n != "w_enc" or turn % 3 == 2})
    return EQUAL if turn % 3 == 2 else REFUSED


def another_file(c, rng, turn):
    """In place of the weights: nothing, a pointer of git-lfs, a login page, another format."""
    others = [b"", bytes(4096), b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1073741824\n", b"<!DOCTYPE html><html>",
              npy((16,), bytes(64)), b"PK\5\6" + bytes(18), b"\x80\2}.", b"\x1f\x8b" + bytes(99)]
    c.file.write_bytes(others[turn % 8])


SIZES = [lambda t: t[:-1], lambda t: t[..., :-1], lambda t: t[None], lambda t: torch.cat([t, t]), lambda t: t[..., None]]
TYPES = [functools.partial(torch.Tensor.to, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.uint8, torch.complex64)]
NOT_FINITE = [lambda t, x=x: t.flatten().index_fill(0, torch.tensor(t.numel() // 3), x).view_as(t) for x in (float("nan"), float("inf"))]
STRANGE = ["x", "a\nb", "", None, True, 0, -1, 2.5, float("nan"), 10 ** 30, 1e30, 1e-320, [1], [], {"a": {"b": 1}}, {}]
JSON = ["[" * 100000, '{"a":' * 100000, '{"k": [' + "[" * 5000 + "]" * 5000 + "]}", "", "null", '"x"', "3", "{", "\0" * 64, "\ufeff{}",
        '{"k": ' + "9" * 5000 + "}", '{"k": 1e999}', '{"k": "\\ud800"}', '{"architecture": "a\\nb", "activation": "a\\nb"}']
ANY, SET, NPZ, PT = (".safetensors", ".pt", ".npz"), (".safetensors", ".pt", "settings"), (".npz",), (".pt",)
KINDS = {       # name: (kind, what may come of it, formats; "settings": only of checkpoints that have some)
    "truncated": (truncated, EQUAL, ANY),
    "bits of the structure flipped": (bits_flipped, EQUAL, ANY),
    "bits of the weights flipped": (functools.partial(bits_flipped, of_weights=True), EQUAL, ANY),
    "bits of the settings flipped": (settings_flipped, FITS, SET),
    "huge length": (huge_length, EQUAL, ANY),
    "huge shape": (huge_shape, REFUSED, ANY),
    "transposed": (tensor(lambda t: t.T if t.dim() == 2 else t[None]), REFUSED, ANY),
    "of another size": (tensor(*SIZES), REFUSED, ANY),
    "of another type": (tensor(*TYPES), REFUSED, ANY),
    "0-dim": (tensor(lambda t: t.flatten()[0]), FITS, ANY),         # a threshold may be one number
    "empty": (tensor(lambda t: t[:0], lambda t: t[..., :0]), REFUSED, ANY),
    "removed": (tensor(None), REFUSED, ANY),
    "NaN or Inf": (tensor(*NOT_FINITE), REFUSED, ANY),
    "setting removed": (setting(), FITS, SET),
    "strange setting": (setting(STRANGE), FITS, SET),
    "settings replaced": (lambda c, rng, turn: c.save(JSON[turn % len(JSON)]), FITS, SET),
    "wrong k": (wrong_k, REFUSED, SET),
    "other pickle": (other_pickle, REFUSED, PT),
    "other array": (other_array, REFUSED, NPZ),
    "bomb": (bomb, REFUSED, NPZ),
    "another file": (another_file, REFUSED, ANY),
}
