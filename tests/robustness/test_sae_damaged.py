"""1,000 damaged SAE checkpoints of every layout: each is read right or refused in one line, soon,
and in little memory.

Case n is made from n alone: n % len(KINDS) is the kind of damage, a generator seeded with n draws
the rest. A child process with a memory limit reads them, so a crash or a hang is the verdict on one
case. SPARSERM_FAULTS=all takes 1,000 of them, otherwise 300.

    python tests/robustness/test_sae_damaged.py FOLDER 17 18    # case 17 into FOLDER/17, and
                                                                # what came of it
"""

import contextlib
import copy
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent)]      # as conftest.py does for pytest

import damage  # noqa: E402
import test_sae as T  # noqa: E402

import sae as S  # noqa: E402
from tools.train_sae import save_sae  # noqa: E402

CASES = 1000 if os.environ.get("SPARSERM_FAULTS") == "all" else 300
SECONDS = 5
MEGABYTES = 300
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited in Linux's way")

# (family, is it saved in our own layout)
OURS = ("SAELens topk", "SAELens gated", "SAELens token norm", "sparsify groupmax", "Gemma Scope",
        "dl AutoEncoder")
FAMILIES = [(family, False) for family in T.FAMILIES]
FAMILIES += [(family, True) for family in T.FAMILIES if family.name in OURS]


class Checkpoint:
    """An intact checkpoint on disk.

    file      the weights
    config    its configuration, a path, or None: in our own layout the settings are in the weights
    tensors   what is in the file; needed: the names of those that no reader can do without
    settings  what is in the configuration; None: there is none
    original  the SAE
    """

    def __init__(self, root, family, ours):
        extra = copy.deepcopy(family.extra)
        settings = copy.deepcopy(family.config)
        file, config, _ = T.LAYOUTS[family.layout]
        self.config = T.write(root, family.layout, settings, extra) / str(config)
        self.file = root / file
        self.settings = settings
        if ours:
            self.save_as_ours(root / "ours" / "sae.safetensors")
        self.format = self.file.suffix

        read = {".safetensors": load_file, ".pt": torch.load, ".npz": np.load}[self.format]
        stored = read(self.file)
        self.tensors = {name: torch.as_tensor(stored[name]).clone() for name in stored}
        self.original = copy.deepcopy(S.load_sae(self.file))    # no views of the file
        spared = ("scaling_factor", "group_sizes", "log_jumprelu_threshold")
        self.needed = [name for name, tensor in self.tensors.items()
                       if tensor.numel() > 1 and not name.endswith(spared)]

    def save_as_ours(self, file):
        """Read it, and save it in our own layout."""
        sae = S.load_sae(self.file)
        sae.info.pop("weights")         # a path: the same file wherever the case is written
        save_sae(sae, file)
        self.file = file
        self.config = None
        _, self.settings = S.read_tensors(file)

    def save(self, text=None):
        """Write it again, as changed; text: the configuration as it shall stand there."""
        if text is None:
            text = json.dumps(self.settings)
        if self.format == ".safetensors":
            save_file(self.tensors, self.file, None if self.config else {"sparserm": text})
        elif self.format == ".pt":
            torch.save(self.tensors, self.file)
        else:
            np.savez(self.file, **self.tensors)
        if self.config and self.settings:
            self.config.write_bytes(text.encode("utf-8", "surrogateescape"))


# ---------------------------------------------------------------- in the child: a case, a verdict

def draw(number, root):
    """Write case `number` and damage it → (its name, checkpoint, what may come of it)."""
    name, kind = list(damage.KINDS.items())[number % len(damage.KINDS)]
    turn = number // len(damage.KINDS)
    rng = np.random.default_rng(number)

    of_format = {wanted: [] for wanted in kind.formats}
    for family, ours in FAMILIES:
        suffix = ".safetensors" if ours else Path(T.LAYOUTS[family.layout][0]).suffix
        has_settings = ours or family.config
        if suffix in of_format and (has_settings or not kind.with_settings):
            of_format[suffix].append((family, ours))
    family, ours = damage.pick(rng, of_format[damage.pick(rng, of_format)])

    checkpoint = Checkpoint(root / str(number), family, ours)
    may = kind.damage(checkpoint, rng, turn) or kind.may
    return f"{number} {name} · {family.name}{' in our layout' * ours}", checkpoint, may


OF_LATENTS = {
    "relu": ["b_enc"],
    "topk": ["b_enc"],
    "groupmax": ["b_enc"],
    "jumprelu": ["b_enc", "threshold"],
    "gated": ["b_gate", "b_mag", "r_mag"],
}


def assert_holds_together(sae):
    """Shapes, numbers, settings and an encoding, judged without sae.py's own checks."""
    d, m = sae.W_enc.shape
    shapes = {"W_enc": (d, m), "W_dec": (m, d), "b_dec": (d,), "b_in": (d,)}
    shapes |= dict.fromkeys(OF_LATENTS[sae.activation], (m,))
    for name, shape in shapes.items():
        tensor = getattr(sae, name)
        assert tensor.shape == shape and tensor.dtype == torch.float32, name
        assert tensor.isfinite().all(), name
    assert d and m, (d, m)
    assert sae.norm in ("none", "constant_norm_rescale", "layer_norm"), sae.norm
    if sae.activation in ("topk", "groupmax"):
        assert type(sae.k) is int and 1 <= sae.k <= m, sae.k
    z = torch.randn(3, d, generator=torch.Generator().manual_seed(2))
    assert sae.encode(z).shape == (3, m)
    assert sae.reconstruct(z).shape == (3, d)


def what_is_wrong(checkpoint, may):
    """Read it → (what load_sae did, what is wrong with that or "")."""
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            sae = S.load_sae(checkpoint.file)
    except S.SAEError as error:
        return str(error), what_is_wrong_with(str(error), checkpoint.format)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}", "not an SAEError"
    try:
        assert may != damage.REFUSED and not said, said
        assert_holds_together(sae)
        if may == damage.EQUAL:
            T.assert_same(sae, checkpoint.original)
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        return "read", f"{type(error).__name__} {first_line}, where may come {may}"
    return "read", ""


def what_is_wrong_with(refusal, form):
    """Is it one line, and the right reason? "": both."""
    if refusal.count(" · ") != 2 or not refusal.isprintable():
        return "not one line of three parts"
    if "the pickle" in refusal and form != ".pt":
        return "not the right reason"
    if re.search("MemoryError|llocate memory", refusal):
        return "not the right reason"
    return ""


def memory(field):
    """A line of Linux's account of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+)", status)[1]) << 10


def child(root, start, stop):
    """Judge cases start … stop - 1 and print a line for each.

    Each within SECONDS, or the alarm ends this process.
    """
    import resource  # not on every system
    most = memory("VmSize") + (4 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for number in range(start, stop):
        case, checkpoint, may = draw(number, root)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")       # the peak begins anew
        before = memory("VmHWM")
        signal.alarm(SECONDS)
        did, wrong = what_is_wrong(checkpoint, may)
        signal.alarm(0)

        grown = (memory("VmHWM") - before) >> 20
        if grown > MEGABYTES:
            wrong += f", took {grown} MB"
        if (checkpoint.file.parent / "executed").exists():
            wrong += ", ran the pickle"
        print(json.dumps({"case": case, "did": did, "wrong": wrong}), flush=True)


# ---------------------------------------------------------------- in pytest

CRASHED = "crashed or hung"


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """kind → verdicts on its cases."""
    root = tmp_path_factory.mktemp("damaged")
    lines = []
    while len(lines) < CASES:
        command = [sys.executable, __file__, root, str(len(lines)), str(CASES)]
        ran = subprocess.run(command, capture_output=True, text=True)
        lines += [json.loads(line) for line in ran.stdout.splitlines()]
        if ran.returncode:
            crashes = sum(line["wrong"] == CRASHED for line in lines)
            assert len(lines) < CASES and crashes < 30, ran.stderr
            did = f"exit code {ran.returncode} {ran.stderr[-500:]}"
            lines.append({"case": str(len(lines)), "did": did, "wrong": CRASHED})
    return {kind: lines[first::len(damage.KINDS)] for first, kind in enumerate(damage.KINDS)}


@pytest.mark.parametrize("kind", damage.KINDS)
def test_a_damaged_checkpoint_is_read_right_or_refused_in_one_line(verdicts, kind):
    wrong = [verdict for verdict in verdicts[kind] if verdict["wrong"]]
    assert not wrong, "\n".join(f"{v['case']}: {v['wrong']} ({v['did'][:300]})" for v in wrong)


def test_most_damage_is_noticed(verdicts):
    refused = {kind: np.mean([verdict["did"] != "read" for verdict in of_kind])
               for kind, of_kind in verdicts.items()}
    assert np.mean(list(refused.values())) > 0.7, refused       # else the cases say little


@pytest.mark.parametrize("family, ours", [
    pytest.param(family, ours, id=f"{family.name}{' in our layout' * ours}")
    for family, ours in FAMILIES
])
def test_an_undamaged_checkpoint_written_again_is_read_as_it_was(tmp_path, family, ours):
    checkpoint = Checkpoint(tmp_path, family, ours)
    checkpoint.save()
    assert what_is_wrong(checkpoint, damage.EQUAL) == ("read", "")


if __name__ == "__main__":
    child(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
