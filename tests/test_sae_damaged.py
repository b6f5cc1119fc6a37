"""1,000 damaged SAE checkpoints of every layout: each is read right or refused in one line, soon, and in little memory.

Case n is made from n alone: n % len(KINDS) is the kind of damage, a generator seeded with n draws the rest. A child process with a
memory limit reads them, so a crash or a hang is the verdict on one case. SPARSERM_FAULTS=all takes 1,000 of them, otherwise 300.

    python tests/test_sae_damaged.py FOLDER 17 18           # writes case 17 into FOLDER/17 and prints what came of it
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))                # as conftest.py does for pytest
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import damage
import test_sae as T

import sae as S
from parts import sae_tools

CASES = 1000 if os.environ.get("SPARSERM_FAULTS") == "all" else 300
SECONDS, MEGABYTES = 5, 300
OURS = ("SAELens topk", "SAELens gated", "SAELens token norm", "sparsify groupmax", "Gemma Scope", "dl AutoEncoder")
FAMILIES = [(f, False) for f in T.FAMILIES] + [(f, True) for f in T.FAMILIES if f[0] in OURS]       # True: saved in our own layout
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and measured in Linux's way")


class Checkpoint:
    """An intact checkpoint on disk: `file`, the `tensors` in it, `settings` (None: no configuration), the `original` SAE."""

    def __init__(self, root, family, ours):
        _, layout, config, *_, extra = copy.deepcopy((*family, {}, {})[:6])
        self.config, self.file = T.write(root, layout, config, extra) / str(T.LAYOUTS[layout][1]), root / T.LAYOUTS[layout][0]
        if ours:
            sae = S.load_sae(self.file)
            sae.info.pop("weights")                                 # a path: the same file wherever the case is written
            sae_tools.save_sae(sae, root / "ours" / "sae.safetensors")
            self.config, self.file = None, root / "ours" / "sae.safetensors"
        self.format, self.settings = self.file.suffix, S.read_tensors(self.file)[1] if ours else config
        stored = {".safetensors": load_file, ".pt": torch.load, ".npz": np.load}[self.format](self.file)
        self.tensors = {n: torch.as_tensor(t).clone() for n, t in stored.items()}
        self.original = copy.deepcopy(S.load_sae(self.file))        # copies: what was read are views of the file
        spared = ("scaling_factor", "group_sizes", "log_jumprelu_threshold")        # a reader may do without
        self.needed = [n for n, t in self.tensors.items() if t.numel() > 1 and not n.endswith(spared)]

    def save(self, text=None):
        """Write it again, as changed; `text`: the configuration as it shall stand there."""
        text = json.dumps(self.settings) if text is None else text
        if self.format == ".safetensors":
            save_file(self.tensors, self.file, None if self.config else {"sparserm": text})
        elif self.format == ".pt":
            torch.save(self.tensors, self.file)
        else:
            np.savez(self.file, **self.tensors)
        if self.config and self.settings:
            self.config.write_bytes(text.encode("utf-8", "surrogateescape"))


# ---------------------------------------------------------------- in the child: one case, one verdict

def draw(number, root):
    """Write case `number` and damage it → (its name, checkpoint, what may come of it)."""
    kind, (do, usual, formats) = list(damage.KINDS.items())[number % len(damage.KINDS)]
    rng, turn, by_format = np.random.default_rng(number), number // len(damage.KINDS), {f: [] for f in formats if f != "settings"}
    for family, ours in FAMILIES:
        suffix = ".safetensors" if ours else Path(T.LAYOUTS[family[1]][0]).suffix
        if suffix in by_format and (ours or family[2] or "settings" not in formats):
            by_format[suffix].append((family, ours))
    family, ours = damage.pick(rng, by_format[damage.pick(rng, by_format)])
    checkpoint = Checkpoint(root / str(number), family, ours)
    may = do(checkpoint, rng, turn) or usual
    return f"{number} {kind} · {family[0]}{' in our layout' * ours}", checkpoint, may


def assert_holds_together(sae):
    """Shapes, numbers, settings and an encoding of random vectors, judged without sae.py's own checks."""
    d, m = sae.W_enc.shape
    per_latent = {"relu": ["b_enc"], "topk": ["b_enc"], "groupmax": ["b_enc"], "jumprelu": ["b_enc", "threshold"],
                  "gated": ["b_gate", "b_mag", "r_mag"]}[sae.activation]
    for name, shape in {"W_enc": (d, m), "W_dec": (m, d), "b_dec": (d,), "b_in": (d,), **dict.fromkeys(per_latent, (m,))}.items():
        tensor = getattr(sae, name)
        assert tensor.shape == shape and tensor.dtype == torch.float32 and tensor.isfinite().all(), name
    assert d and m and sae.norm in ("none", "constant_norm_rescale", "layer_norm"), (d, m, sae.norm)
    assert sae.activation not in ("topk", "groupmax") or (type(sae.k) is int and 1 <= sae.k <= m), sae.k
    z = torch.randn(3, d, generator=torch.Generator().manual_seed(2))
    assert sae.encode(z).shape == (3, m) and sae.reconstruct(z).shape == (3, d)


def what_is_wrong(checkpoint, may):
    """Read it → (what load_sae did, what is wrong with that or "")."""
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            sae = S.load_sae(checkpoint.file)
    except S.SAEError as error:
        text = str(error)
        if text.count(" · ") != 2 or not text.isprintable():
            return text, "not one line of three parts"
        if "the pickle" in text and checkpoint.format != ".pt" or re.search("MemoryError|llocate memory", text):
            return text, "not the right reason"
        return text, ""
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}", "not an SAEError"
    try:
        assert may != damage.REFUSED and not said, said
        assert_holds_together(sae)
        if may == damage.EQUAL:
            T.assert_same(sae, checkpoint.original)
    except Exception as error:
        return "read", f"{type(error).__name__} {str(error).splitlines()[:1]}, where may come {may}"
    return "read", ""


def child(root, start, stop):
    """Judge cases start … stop - 1, each within SECONDS (or the alarm ends this process), and print a line for each."""
    import resource  # not on every system
    status = lambda field: int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + (4 << 30),) * 2)
    for number in range(start, stop):
        case, checkpoint, may = draw(number, root)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")       # the peak begins anew
        before = status("VmHWM")
        signal.alarm(SECONDS)
        did, wrong = what_is_wrong(checkpoint, may)
        signal.alarm(0)
        grown = (status("VmHWM") - before) >> 20
        wrong += f", took {grown} MB" * (grown > MEGABYTES)
        wrong += ", ran the pickle" * (checkpoint.file.parent / "executed").exists()
        print(json.dumps({"case": case, "did": did, "wrong": wrong}), flush=True)


# ---------------------------------------------------------------- in pytest

@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """kind → verdicts on its cases."""
    root, lines = tmp_path_factory.mktemp("damaged"), []
    while len(lines) < CASES:
        ran = subprocess.run([sys.executable, __file__, root, str(len(lines)), str(CASES)], capture_output=True, text=True)
        lines += [json.loads(line) for line in ran.stdout.splitlines()]
        if ran.returncode:
            assert len(lines) < CASES and sum(v["wrong"] == "crashed or hung" for v in lines) < 30, ran.stderr
            lines.append({"case": str(len(lines)), "did": f"exit code {ran.returncode} {ran.stderr[-500:]}", "wrong": "crashed or hung"})
    return {kind: lines[i::len(damage.KINDS)] for i, kind in enumerate(damage.KINDS)}


@pytest.mark.parametrize("kind", damage.KINDS)
def test_a_damaged_checkpoint_is_read_right_or_refused_in_one_line_soon_and_in_little_memory(verdicts, kind):
    wrong = [v for v in verdicts[kind] if v["wrong"]]
    assert not wrong, "\n".join(f"{v['case']}: {v['wrong']} ({v['did'][:300]})" for v in wrong)


def test_most_damage_is_noticed(verdicts):
    refused = {kind: np.mean([v["did"] != "read" for v in of_kind]) for kind, of_kind in verdicts.items()}
    assert np.mean(list(refused.values())) > 0.7, refused       # else the cases say little


if __name__ == "__main__":
    child(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
