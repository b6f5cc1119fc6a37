"""The README cannot rot: its commands are run, its code is the scripts', its tables and figures are those of benchmarks/results."""

import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file

from parts import models

README = (tiny.ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = ["01_extract.py", "02_select_features.py", "03_train_head.py", "04_evaluate.py", "05_best_of_n.py", "sae.py"]
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
BASH = "\n".join(text for kind, text in BLOCKS if kind == "bash")


def load(path):
    """A script outside the top level as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(name):
    return json.loads((tiny.ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- tables

TABLES = [("README.md", "does_it_hold", "does_it_hold", lambda script, found: script.tables(found)),
          ("benchmarks/README.md", "extract", "extract", lambda script, found: script.table(found["speed"])),
          ("benchmarks/README.md", "rank", "rank_answers", lambda script, found: script.table(found)),
          ("README.md", "align", "align", lambda script, found: script.table(found))]


@pytest.mark.parametrize("file, mark, name, table", TABLES, ids=[t[1] for t in TABLES])
def test_a_table_is_the_committed_figures(file, mark, name, table):
    text = (tiny.ROOT / file).read_text(encoding="utf-8")
    between = re.search(rf"<!-- {mark} -->\n(.*?)<!-- end -->", text, re.S)[1]
    assert between.strip() == table(load(tiny.ROOT / f"benchmarks/{name}.py"), results(name)).strip()


# ---------------------------------------------------------------- commands

@pytest.fixture(scope="module")
def helps():
    """script (and command) → its --help."""
    asked = [(s,) for s in SCRIPTS] + [("05_best_of_n.py", c) for c in ("sample", "rank", "pairs")] + \
        [("sae.py", c) for c in ("info", "check", "train")]
    running = {call: subprocess.Popen([sys.executable, tiny.ROOT / call[0], *call[1:], "--help"], stdout=subprocess.PIPE, text=True)
               for call in asked}
    return {call: process.communicate()[0] for call, process in running.items()}


def test_every_help_has_an_example_of_its_command_and_says_what_each_flag_does(helps):
    for call, text in helps.items():
        assert re.search(rf"^ +python {re.escape(' '.join(call))} .*[\w.]$", text, re.M), call
        options = text[text.index("options:"):]
        for flag in re.findall(r"^  (?:-h, )?(--[\w-]+)", options, re.M):
            said = re.search(rf"^  (?:-h, )?{flag}\b(.*?)(?=^  -|\Z)", options, re.M | re.S)[1]
            assert len(re.sub(r"[A-Z_\[\]{},.|]+\b", "", said).split()) > 1, (call, flag)


def hub(folder):
    """SAEs in the layouts of the hub, for tiny models → {hub name: local folder or file}."""
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.functional.normalize(torch.randn(64, tiny.WIDTH, generator=generator), dim=1)
    zero, wide = torch.zeros(tiny.WIDTH), torch.zeros(64)
    gemma, llama, qwen = folder / "layer_13/width_16k/average_l0_84", folder / "Llama3_1-8B-Base-L15R-8x", folder / "L0_50"
    for place in (gemma, llama / "checkpoints", qwen):
        place.mkdir(parents=True)
    np.savez(gemma / "params.npz", w_enc=w.T.numpy(), w_dec=w.numpy(), b_enc=wide.numpy(), b_dec=zero.numpy(), threshold=wide.numpy() + 0.1)
    save_file({"encoder.weight": w, "encoder.bias": wide, "decoder.weight": w.T.contiguous(), "decoder.bias": zero},
              llama / "checkpoints/final.safetensors")
    (llama / "hyperparams.json").write_text(json.dumps({
        "act_fn": "jumprelu", "jump_relu_threshold": 0.1, "norm_activation": "dataset-wise", "hook_point_in": "blocks.15.hook_resid_post",
        "dataset_average_activation_norm": {"in": 5.0, "out": 5.0}}))
    torch.save({"W_enc": w, "W_dec": w.T.contiguous(), "b_enc": wide, "b_dec": zero}, qwen / "layer14.sae.pt")
    return {"google/gemma-scope-2b-pt-res:layer_13/width_16k/average_l0_84": gemma,
            "fnlp/Llama3_1-8B-Base-LXR-8x:Llama3_1-8B-Base-L15R-8x": llama,
            "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50:layer14.sae.pt": qwen / "layer14.sae.pt"}


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """The commands of `make demo` and then those of the README, in order, in a folder of tiny files under the same names, with tiny
    models of the same families behind the same names → (folder, [(command, exit code, stderr)])."""
    folder, sae = tmp_path_factory.mktemp("readme"), importlib.import_module("sae")
    deep = {"num_hidden_layers": 18}
    stand_in = {name: tiny.save_model(folder / name.replace("/", "-"), family, **deep, **more) for name, family, more in (
        ("demo", "llama", {}), ("google/gemma-2-2b-it", "gemma2", {"layer_types": ["sliding_attention", "full_attention"] * 9}),
        ("meta-llama/Llama-3.1-8B-Instruct", "llama", {}), ("Qwen/Qwen3-1.7B", "qwen3", {"layer_types": ["full_attention"] * 18}))}
    for place in ("data", "assets"):
        (folder / place).mkdir()
    for name in ("data/truthful.jsonl", "data/safe.jsonl", "my.jsonl", "my-pairs.jsonl", "corpus.jsonl"):
        tiny.save_pairs(folder / name, 40)
    tiny.save_rows(folder / "data/prompts.jsonl", [{"prompt": "Is water wet?"}])
    tiny.save_rows(folder / "my-candidates.jsonl", [{"prompt": "Is water wet?", "candidates": ["Yes.", "No, ten."]}])
    tiny.save_sae(folder / "assets/sae-smollm2-135m-layer16.safetensors", 16, "demo")
    found, there, patch = [], hub(folder / "hub"), pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setattr(models, "locate_model", lambda name: stand_in.get(name, name))
    patch.setattr(sae, "fetch", lambda name, revision=None: str(there[name]))
    make = (tiny.ROOT / "Makefile").read_text().replace("$(SAE)", "assets/sae-smollm2-135m-layer16.safetensors")
    demo = [line.replace("$(RUN)", "python") for line in re.search(r"^demo: .*\n((?:\t.*\n)+)", make, re.M)[1].split("\n")]
    for line in [*demo, *BASH.replace("\\\n", " ").split("\n")]:
        words = shlex.split(line, comments=True)
        if words[:1] != ["python"] or words[1] not in SCRIPTS:
            continue
        more = {"train": ["--tokens", 600, "--batch", 64], "sample": ["--max-new-tokens", 3]}.get(words[2], [])     # only to be quick
        more += ["--seeds", 1, "--sweeps", "none"] if words[1] == "04_evaluate.py" else []
        if words[1] == "sae.py":
            with tiny.argv(*words[2:], *more):
                code, err = 0, importlib.import_module("parts.sae_tools").main() or ""
        else:
            code, _, err = tiny.command(words[1].removesuffix(".py"), *words[2:], *more)
        found.append((line, code, err))
    yield folder, found
    patch.undo()


def test_every_command_of_the_readme_runs_as_it_stands(played):
    _, found = played
    assert len(found) > 28
    assert not [(line, err[-600:]) for line, code, err in found if code]


def test_the_commands_that_are_not_run_are_those_of_make_and_benchmarks():
    lines = [line.split("#")[0].strip() for line in BASH.replace("\\\n", " ").split("\n") if line.strip()]
    others = {line for line in lines if not re.match(r"python (0\d_\w+|sae)\.py ", line)}
    assert others == {"make demo", "make test"}
    targets = (tiny.ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([\w-]+)`", README):
        assert re.search(rf"^{target}:", targets, re.M), target
    for script, rest in re.findall(r"`python (benchmarks/\w+\.py)((?:\s[^`]*)?)`", README):
        text = (tiny.ROOT / script).read_text(encoding="utf-8")
        for flag in re.findall(r"--[\w-]+", rest):
            assert f'"{flag}"' in text, (script, flag)


# ---------------------------------------------------------------- code

def test_python_of_the_readme_is_run_or_is_a_passage_of_a_script(played):
    folder, _ = played
    sources = [(tiny.ROOT / script).read_text(encoding="utf-8") for script in SCRIPTS]
    passages = [text for kind, text in BLOCKS if kind == "python" and not text.startswith("import ")]
    assert len(passages) >= 6
    for text in passages:
        assert any(text in source for source in sources), text
    programs = [text for kind, text in BLOCKS if kind == "python" and text.startswith("import ")]
    assert len(programs) == 3
    for text in programs:
        if "sys.argv" in text:
            continue                            # peek.py, below
        if "fastapi" in text:
            pytest.importorskip("fastapi")
        space = {}
        exec(compile(text, "README", "exec", dont_inherit=True), space)
        if "app" in space:
            assert any(route.path == "/score" for route in space["app"].routes)
        else:
            found = space["reward"].explain("Why is the sky blue?", "It reflects the sea.")
            assert found["reward"] == pytest.approx(found["bias"] + sum(c["contribution"] for c in found["contributions"]), abs=1e-4)


def test_the_files_hold_what_peek_shows_of_them(played):
    folder, _ = played
    (folder / "peek.py").write_text(next(text for kind, text in BLOCKS if "sys.argv" in text))
    shown = re.findall(r"```\n\$ python peek\.py (\S+)\n(.*?)```", README, re.S)
    assert len(shown) == 3
    entry = re.compile(r"(\w+) +(torch\.\w+) +\[(.*)\]")
    for path, text in shown:
        done = subprocess.run([sys.executable, "peek.py", path], cwd=folder, capture_output=True, text=True, check=True).stdout
        of = lambda lines: [(m[1], m[2], m[3].count(",")) for m in map(entry.match, sorted(lines.strip().split("\n")))]
        assert of(done) == of(text), path
    rows, latents = len(open(tiny.ROOT / "data/truthful.jsonl").readlines()), 2 * results("does_it_hold")["truthful"]["run"]["k"]
    assert all(f"chosen               torch.float32  [{rows}, " in text for _, text in shown[:2])
    assert f"w1                   torch.float32  [{latents}]" in shown[2][1]


def test_every_file_of_the_repository_that_the_readme_names_exists():
    names = re.findall(r"`((?:data|assets|benchmarks|tests|parts)/[\w./-]+)`", README) + re.findall(r"\]\((?!http|#)([\w./-]+)", README)
    assert len(names) > 8
    for name in names:
        assert (tiny.ROOT / name).exists(), name
    headings = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^##+ (.*)", README, re.M)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) <= headings
