"""The README cannot rot: its commands are run, its code is the scripts', its tables and figures are those of benchmarks/results."""

import ast
import importlib
import importlib.util
import inspect
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
          ("README.md", "headline", "reward_models", lambda script, found: script.headline(found)),
          ("benchmarks/README.md", "reward_models", "reward_models", lambda script, found: script.table(found)),
          ("benchmarks/README.md", "other_sets", "does_it_hold", lambda script, found: script.other_tables(found)),
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
    np.savez(gemma / "params.npz", W_enc=w.T.numpy(), W_dec=w.numpy(), b_enc=wide.numpy(), b_dec=zero.numpy(), threshold=wide.numpy() + 0.1)
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
    found, there = [], hub(folder / "hub")
    make = (tiny.ROOT / "Makefile").read_text().replace("$(SAE)", "assets/sae-smollm2-135m-layer16.safetensors")
    demo = [line.replace("$(RUN)", "python") for line in re.search(r"^demo: .*\n((?:\t.*\n)+)", make, re.M)[1].split("\n")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(models, "locate_model", lambda name: stand_in.get(name, name))
        patch.setattr(sae, "fetch", lambda name, revision=None: str(there[name]))
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
    for script, rest in re.findall(r"`(?:python )?(benchmarks/\w+\.py)((?:\s[^`]*)?)`", README):
        text = (tiny.ROOT / script).read_text(encoding="utf-8")
        for flag in re.findall(r"--[\w-]+", rest):
            assert f'"{flag}"' in text, (script, flag)


# ---------------------------------------------------------------- code

def test_python_of_the_readme_is_run_or_is_a_passage_of_a_script(played):
    folder, _ = played
    sources = [(tiny.ROOT / script).read_text(encoding="utf-8") for script in SCRIPTS]
    passages = [text for kind, text in BLOCKS if kind == "python" and not text.startswith("import ") and "your/policy" not in text]
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


def test_what_the_readme_hands_to_a_trainer_are_arguments_of_it():
    """tests/test_trainers.py trains with them; here only the names."""
    trl = pytest.importorskip("trl")
    calls = [node for kind, text in BLOCKS if kind == "python" and "your/policy" in text for node in ast.walk(ast.parse(text))
             if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("DPOTrainer", "DPOConfig", "GRPOTrainer")]
    assert len(calls) == 3
    for call in calls:
        assert {keyword.arg for keyword in call.keywords} <= set(inspect.signature(getattr(trl, call.func.id)).parameters)


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


def test_the_picture_is_drawn_from_the_committed_figures(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    with tiny.argv("--tables", "--picture", tmp_path / "k-curve.png"):
        load(tiny.ROOT / "benchmarks/does_it_hold.py").main()
    drawn, committed = (image.imread(folder / "k-curve.png") for folder in (tmp_path, tiny.ROOT / "assets"))
    assert drawn.shape == committed.shape and abs(drawn - committed).mean() < 0.01


def test_every_file_of_the_repository_that_the_readme_names_exists():
    names = re.findall(r"`((?:data|assets|benchmarks|tests|parts)/[\w./-]+)`", README) + re.findall(r"\]\((?!http|#)([\w./-]+)", README)
    assert len(names) > 8
    for name in names:
        assert (tiny.ROOT / name).exists(), name
    headings = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^##+ (.*)", README, re.M)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) <= headings


# ---------------------------------------------------------------- figures in the prose

def claims():
    """What the prose says of results, written from the results → sentences and phrases that must stand in the README."""
    cell = load(tiny.ROOT / "benchmarks/does_it_hold.py").interval
    number = lambda x: f"{x:.3f}".replace("0.", ".", 1)
    hold, heads, align = results("does_it_hold"), results("heads"), results("align")
    clear = {name: ", ".join(sorted((k for k, row in r["curves"]["k"]["random_directions"].items() if row["behind"]["low"] > 0), key=int))
             for name, r in hold.items()}
    yield (f"on TruthfulQA at K = {clear['TruthfulQA']}, on RM-Bench safety at K = {clear['RM-Bench-safety']}, on `truthful` at K = "
           f"{clear['truthful']}, on `safe` at K = {clear['safe']}. From K = 32 on")
    assert not clear["HH-harmless"] and not clear["PyRIT"]
    yield f"PyRIT ({hold['PyRIT']['accuracy']['sparserm']['n']} test pairs) no K is clear"
    yield "Dev chooses K = {} or {}".format(*sorted({r["accuracy"]["sparserm"]["choice"] for r in hold.values()}))
    better = lambda control: [n for n, r in hold.items() if r["differences"][control]["low"] > 0]
    worse = lambda control: [n for n, r in hold.items() if r["differences"][control]["high"] < 0]
    assert not better("random_directions") and not worse("random_directions")
    least = min((r["differences"]["random_directions"]["high"], name) for name, r in hold.items())
    yield f"its upper end is {least[0]:+.3f} on {least[1]}".replace("+0.", "+.")
    ours = hold["TruthfulQA"]["curves"]["k"]["sparserm"]
    dense = hold["TruthfulQA"]["accuracy"]["dense"]["accuracy"]
    yield f"({number(ours['4']['ties_half'])} at K = 4, {number(ours['16']['ties_half'])} at 16; dense {number(dense)})"
    yield "Projection beats activation*: clearly on {} and `{}`".format(*better("activations"))
    assert not worse("activations") and len(hold) == 6
    yield "on {} and {} activations are the ones ahead, not clearly".format(
        *(n for n, r in hold.items() if r["differences"]["activations"]["mean"] < 0))
    assert hold["truthful"]["differences"]["shuffled_labels"]["low"] < 0            # said under "Limits"
    far = lambda r: r["accuracy"]["dense"]["accuracy"] - r["curves"]["k"]["sparserm"]["4"]["ties_half"] > 0.08
    assert [n for n, r in hold.items() if far(r)] == ["RM-Bench-safety", "PyRIT", "safe"]
    assert worse("dense") == ["RM-Bench-safety"] and not better("dense")
    yield f"level elsewhere (TruthfulQA {cell(hold['TruthfulQA']['differences']['dense'], 'mean', '+')})".replace("-0", "-")
    yield "More than the wording*: clearly on `{}` and `{}`".format(*better("words"))
    across = [row for r in hold.values() for row in r["other"].values()]
    yield "of {} couples the accuracy is clearly above one half on {} and clearly below on {}".format(
        len(across), sum(row["low"] > 0.5 for row in across), sum(row["high"] < 0.5 for row in across))
    best = max((row["accuracy"], a, b) for a, r in hold.items() for b, row in r["other"].items())
    yield f"the best is {best[1]} → {best[2]}, {number(best[0])}"
    def won_and_lost(control):
        behind = [row["controls"][control]["behind"] for row in across]
        return sum(b["low"] > 0 for b in behind), sum(b["high"] < 0 for b in behind)
    yield "SparseRM is clearly better than the dense head on {} and worse on {}, than random directions on {} and {}".format(
        *won_and_lost("dense"), *won_and_lost("random_directions"))
    yield "linear heads give {} (Bradley–Terry), {} (margin) and {} (BCE), an MLP {}, {} and {}".format(
        *(number(heads[f"{kind} {loss}"]["accuracy"]) for kind in ("linear", "mlp") for loss in ("bt", "margin", "bce")))
    assert all(row["minus_linear_bt"]["low"] <= 0 <= row["minus_linear_bt"]["high"] for row in heads.values())
    stable = [hold[name]["stability"] for name in ("truthful", "safe")]
    yield "{:.0%} (`truthful`) and {:.0%} (`safe`) of the latents would be chosen again, by chance alone {:.0%} and {:.0%}".format(
        *(s[key] for key in ("mean", "chance") for s in stable)).replace("%", " %")
    yield f"the wording alone gets {number(hold['TruthfulQA']['accuracy']['words']['ties_half'])} on TruthfulQA"
    kept, none = align["filters"]["sparserm"], align["filters"]["none"]
    flipped, right = 1 - sum(kept["flipped"]) / sum(none["flipped"]), 1 - (sum(kept["kept"]) - sum(kept["flipped"])) / (
        sum(none["kept"]) - sum(none["flipped"]))
    yield f"takes out {flipped:.0%} of the flipped labels and {right:.0%} of the right ones".replace("%", " %")
    yield (f"flips {align['noise']:.0%} of the labels of {align['counts']['policy']} pairs, filters them by a SparseRM trained on "
           f"{align['counts']['reward']} *other*").replace("%", " %")
    yield f"({align['counts']['test']} pairs, {align['counts']['questions']} multiple-choice questions"
    yield from fine_tuning(results("reward_models"))
    yield from (row["says"] for row in results("read_off") if "faults" not in row["command"])


def fine_tuning(found):
    """What the prose says of SparseRM against fine-tuned reward models."""
    sets = {name: sizes[max(sizes, key=int)]["methods"] for name, sizes in found["sets"].items()}
    ours = {name: rows["sparserm"] for name, rows in sets.items()}
    word = lambda row: "ahead" if row["behind"]["low"] > 0 else "behind" if row["behind"]["high"] < 0 else "not told apart"
    for method, name in (("full", "full fine-tuning"), ("lora", "LoRA"), ("dense", "a dense head on the same z"), ("mlp", "an MLP on z"),
                         ("swift", "a SWIFT-style head"), ("words", "the words"),
                         ("searched", "itself with L2 penalty and learning rate chosen by dev too")):
        verdicts = {of: word(rows[method]) for of, rows in sets.items() if method in rows}
        on = lambda verdict, verdicts=verdicts: " and ".join([of for of in verdicts if verdicts[of] == verdict])
        every = [f"{verdict} on {on(verdict)}" for verdict in dict.fromkeys(verdicts.values())]
        yield f"{name}: " + (", ".join(every) if len(every) > 1 else every[0].partition(" on ")[0] + " on any set")
    first = ours["TruthfulQA"]
    yield f"{first['trained']:,.0f} weights on TruthfulQA, {100 * first['trained'] / found['backbone_parameters']:.2g} % of the backbone's"
    for name in ("TruthfulQA", "HH-harmless"):
        full, lora = (sets[name][m]["seconds"] for m in ("full", "lora"))
        yield "{:.0f} times as long on {}, LoRA {:.0f} times".format(full / ours[name]["seconds"], name, lora / ours[name]["seconds"])
        padded = ours[name]["seconds_padded"]
        yield f"{full / padded:.1f} and {lora / padded:.1f} times on {name}"
    yield "({full:g} and {lora:g};".format(**found["rates"]["TruthfulQA"])
    dense = [f"{run['methods']['dense']['ties_half']:.3f}"[1:] for run in found["sets"]["TruthfulQA"].values()]
    yield "a dense head gets {}, {} and {} from {}, {} and {} pairs".format(
        *dense, *(run["pairs"]["train"] for run in found["sets"]["TruthfulQA"].values()))


PUBLISHED = ["(arXiv 2511.07896, AAAI-26)", "*SparseRM*, arXiv 2511.07896", "2508.08746", "2507.00665", "2505.12225", "1.4 to 2.9 points",
             "top-K directions 94.4 / 90.2 / 93.6, random directions 93.0 / 88.0 / 90.7", "SAE activations 92.4 / 88.4 / 91.4",
             "Bradley–Terry 94.0 / 88.7 / 91.4", "BCE 85.7 / 83.1 / 86.3", "dense hidden state 94.7",
             "dense 78.7, fine-tuned 78.7, SparseRM 79.9", "about 0.63 is what two annotators share"]
SETTINGS = ["Python 3.11+", "Apache-2.0", "95 % intervals", "Adam 0.01, L2 0.1", "70 % of the set", "Llama-3.1-8B", "about a minute",
            "below 0.2 (stage 2 warns)"]


def test_no_placeholder_is_left():
    for name in ("README.md", "benchmarks/README.md", "data/README.md", "assets/README.md"):
        text = re.sub(r"`[^`]*`", "", (tiny.ROOT / name).read_text("utf-8"))
        assert not re.findall(r"\b[A-Z]{2,}_[A-Z]+\b|<!-- \w+ -->\s*<!-- end -->", text)


def test_every_figure_in_the_prose_is_that_of_a_result():
    prose = re.sub(r"<!-- (\w+) -->.*?<!-- end -->|```.*?```", "", README, flags=re.S)
    prose = " ".join(prose.split())
    for claim in [*claims(), *PUBLISHED, *SETTINGS]:
        assert claim in prose, claim
    for claim in [*claims(), *PUBLISHED, *SETTINGS]:
        prose = prose.replace(claim, "")
    prose = re.sub(r"`[^`]*`", "", prose)
    assert not re.findall(r"(?:\w+ ){0,4}(?<!\w)[-−+]?(?:\d*\.\d+|\d+ %)", prose)
