"""The README cannot rot: its commands are run, its code is the scripts', its tables and figures are
those of benchmarks/results."""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_templates import tokenizer_of

from parts import models
from parts.files import read_meta

sae = importlib.import_module("sae")


def read(name):
    """The text of a file of the project."""
    return (tiny.ROOT / name).read_text(encoding="utf-8")


def results(name):
    """The committed figures of a benchmark."""
    return json.loads(read(f"benchmarks/results/{name}.json"))


def benchmark(name):
    """A script of benchmarks/ as a module."""
    path = tiny.ROOT / f"benchmarks/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines_of(text):
    """The lines of a shell script, each with its continuations."""
    return text.replace("\\\n", " ").split("\n")


README = read("README.md")
SCRIPTS = ["01_extract.py", "02_select_features.py", "03_train_head.py", "04_evaluate.py",
           "05_best_of_n.py", "sae.py"]

BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.S)
BASH = lines_of("\n".join(text for kind, text in BLOCKS if kind == "bash"))
PYTHON = [text for kind, text in BLOCKS if kind == "python"]

# three sorts of Python: whole programs, what is handed to TRL, and passages of the scripts
PROGRAMS = [text for text in PYTHON if text.startswith("import ")]
TRAINERS = [text for text in PYTHON if "your/policy" in text]
PASSAGES = [text for text in PYTHON if text not in PROGRAMS + TRAINERS]


# ---------------------------------------------------------------- tables

# mark in the text: (file, benchmark, its function that writes the text)
TABLES = {
    "does_it_hold": ("docs/results.md", "does_it_hold", "tables"),
    "export cost": ("docs/results.md", "does_it_hold", "export_table"),
    "export": ("docs/results.md", "export", "table"),
    "second model": ("docs/results.md", "second_model", "table"),
    "sizes": ("docs/results.md", "sizes", "table"),
    "claims": ("docs/results.md", "does_it_hold", "claims"),
    "headline": ("benchmarks/README.md", "reward_models", "headline"),
    "align": ("benchmarks/README.md", "align", "table"),
    "reward_models": ("benchmarks/README.md", "reward_models", "table"),
    "extract": ("benchmarks/README.md", "extract", "table"),
    "rank": ("benchmarks/README.md", "rank_answers", "table"),
    "quiz": ("docs/results.md", "quiz", "table"),
    "quiz claim": ("docs/results.md", "quiz", "claim"),
    "steer": ("benchmarks/README.md", "steer", "table"),
}


@pytest.mark.parametrize("mark", TABLES)
def test_a_table_is_the_committed_figures(mark):
    file, name, function = TABLES[mark]
    shown = re.search(rf"<!-- {mark} -->\n(.*?)<!-- end -->", read(file), re.S)[1]

    found = results(name)
    if name == "extract":
        found = found["speed"]
    table = getattr(benchmark(name), function)(found)

    assert shown.strip() == table.strip()


def test_what_the_demo_prints_first_is_the_verdict_of_the_committed_figures():
    shown = re.search(r"<!-- demo -->\n```\n(.*?)```\n<!-- end -->", README, re.S)[1]
    verdict = results("does_it_hold")["mean"]["safe"]["verdict"]
    assert [line.removeprefix("• ") for line in shown.splitlines()] == verdict


@pytest.mark.parametrize("file", ["README.md", "benchmarks/README.md", "data/README.md",
                                  "assets/README.md", "docs/results.md", "docs/paper.md"])
def test_no_placeholder_is_left(file):
    text = read(file)
    assert not re.findall(r"<!-- \w+ -->\s*<!-- end -->", text)
    assert not re.findall(r"\b[A-Z]{2,}_[A-Z]+\b", re.sub(r"`[^`]*`", "", text))


# ---------------------------------------------------------------- manual pages

COMMANDS = [*SCRIPTS, "05_best_of_n.py sample", "05_best_of_n.py rank", "05_best_of_n.py pairs",
            "05_best_of_n.py export",
            "sae.py info", "-m tools.train_sae", "-m tools.check_sae", "-m tools.self_check"]


@pytest.fixture(scope="module")
def helps():
    """command → its --help. All are asked at once, since each loads torch."""
    running = {}
    for command in COMMANDS:
        call = [sys.executable, *command.split(), "--help"]
        running[command] = subprocess.Popen(call, stdout=subprocess.PIPE, text=True, cwd=tiny.ROOT)

    return {command: process.communicate()[0] for command, process in running.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example_of_its_command(helps, command):
    text = re.sub(r" *\\\n +", " ", helps[command])                 # a continued line is one line
    assert re.search(rf"^ +python {re.escape(command)} .*[\w.]$", text, re.M), text


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_says_what_each_flag_does(helps, command):
    text = helps[command]
    options = text[text.index("options:"):]
    flags = re.findall(r"^  (?:-h, )?(--[\w-]+)", options, re.M)
    assert flags

    for flag in flags:
        says = re.search(rf"^  (?:-h, )?{flag}\b(.*?)(?=^  -|\Z)", options, re.M | re.S)[1]
        without_sets_with_values = re.sub(r"[A-Z_\[\]{},.|]+\b", "", says)
        assert len(without_sets_with_values.split()) > 1, flag


# ---------------------------------------------------------------- commands

SAE_FILE = "assets/sae-smollm2-135m-layer16.safetensors"
GEMMA_SCOPE = "google/gemma-scope-2b-pt-res:layer_13/width_16k/average_l0_84"
LLAMA_SCOPE = "fnlp/Llama3_1-8B-Base-LXR-8x:Llama3_1-8B-Base-L15R-8x"
SMOLLM_SAE = "EleutherAI/sae-SmolLM2-1.7B-layer17-32x"
QWEN_SCOPE = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50:layer14.sae.pt"

DEPTH = 18                              # above every layer that a command names
FULL = {"layer_types": ["full_attention"] * DEPTH}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * (DEPTH // 2)}
# name: family of the model, of its chat template, what its configuration says
MODELS = {
    "demo": ("llama", "SmolLM2", {}),
    "google/gemma-2-2b-it": ("gemma2", "Gemma-2", ALTERNATING),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", "Llama-3", {}),
    "Qwen/Qwen3-1.7B": ("qwen3", "Qwen3", FULL),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": ("llama", "SmolLM2", {}),
}

# flags that only make a command quicker
QUICKER = {
    "tools.train_sae": ["--tokens", 600, "--batch", 64],
    "sample": ["--max-new-tokens", 3],
    "04_evaluate.py": ["--sweeps", "none"],
}


def save_tiny_models(folder):
    """→ {name of a model in the README: folder of a tiny one of its family}."""
    made = {}
    for name, (family, template, changes) in MODELS.items():
        place = folder / name.replace("/", "-")
        made[name] = tiny.save_model(place, family, tokenizer=tokenizer_of(template),
                                     num_hidden_layers=DEPTH, **changes)
    return made


def save_tiny_data(folder):
    """The files that the commands read, under their names."""
    (folder / "data").mkdir()
    (folder / "assets").mkdir()

    for name in ("data/truthful.jsonl", "data/safe.jsonl", "my.jsonl", "my-pairs.jsonl",
                 "corpus.jsonl"):
        tiny.save_pairs(folder / name, 40)

    question = {"prompt": "Is water wet?"}
    answered = question | {"candidates": ["Yes.", "No, ten."]}
    tiny.save_rows(folder / "data/prompts.jsonl", [question])
    tiny.save_rows(folder / "my-candidates.jsonl", [answered])

    tiny.save_sae(folder / SAE_FILE, 16, "demo")


def save_tiny_hub(folder):
    """SAEs in the layouts of the hub, for tiny models → {hub name: local folder or file}."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(64, tiny.WIDTH, generator=generator), dim=1)
    columns = rows.T.contiguous()
    zero = torch.zeros(tiny.WIDTH)
    wide = torch.zeros(64)

    gemma = folder / "layer_13/width_16k/average_l0_84"
    gemma.mkdir(parents=True)
    np.savez(gemma / "params.npz", W_enc=columns.numpy(), W_dec=rows.numpy(), b_enc=wide.numpy(),
             b_dec=zero.numpy(), threshold=wide.numpy() + 0.1)

    llama = folder / "Llama3_1-8B-Base-L15R-8x"
    (llama / "checkpoints").mkdir(parents=True)
    save_file({"encoder.weight": rows, "encoder.bias": wide, "decoder.weight": columns,
               "decoder.bias": zero}, llama / "checkpoints/final.safetensors")
    (llama / "hyperparams.json").write_text(json.dumps({
        "act_fn": "jumprelu", "jump_relu_threshold": 0.1, "norm_activation": "dataset-wise",
        "hook_point_in": "blocks.15.hook_resid_post",
        "dataset_average_activation_norm": {"in": 5.0, "out": 5.0}}))

    qwen = folder / "L0_50"
    qwen.mkdir(parents=True)
    torch.save({"W_enc": rows, "W_dec": columns, "b_enc": wide, "b_dec": zero},
               qwen / "layer14.sae.pt")

    smollm = folder / "sae-SmolLM2-1.7B-layer17-32x"
    smollm.mkdir()
    save_file({"encoder.weight": rows, "encoder.bias": wide, "W_dec": rows.clone(), "b_dec": zero},
              smollm / "sae.safetensors")
    (smollm / "cfg.json").write_text(json.dumps({"activation": "topk", "expansion_factor": 2,
                                                 "k": 32, "d_in": tiny.WIDTH, "num_latents": 0,
                                                 "normalize_decoder": True, "multi_topk": False,
                                                 "skip_connection": False}))

    return {GEMMA_SCOPE: gemma, LLAMA_SCOPE: llama, QWEN_SCOPE: qwen / "layer14.sae.pt",
            SMOLLM_SAE: smollm}


def lines_of_make_demo():
    """What `make demo` runs, as commands of a user."""
    recipe = re.search(r"^demo: .*\n((?:\t.*\n)+)", read("Makefile"), re.M)[1]
    return recipe.replace("$(RUN)", "python").replace("$(SAE)", SAE_FILE).split("\n")


def run_sae(*args):
    """`python sae.py …` → (exit code, stderr). tiny.command would run a second copy of the module,
    in which nothing is patched."""
    err = io.StringIO()
    with tiny.argv(*args), contextlib.redirect_stderr(err):
        try:
            sae.main()
            code = 0
        except sae.SAEError as error:
            print(f"error: {error}", file=err)
            code = 2
        except SystemExit as stop:
            code = stop.code or 0
    return code, err.getvalue()


def run_words(words):
    """The words of a command after `python` → (exit code, stderr)."""
    if words[0] == "-m":
        words = words[1:]

    quicker = []
    for word in words[:2]:
        quicker += QUICKER.get(word, [])

    script, *flags = words
    if script == "sae.py":
        return run_sae(*flags, *quicker)

    path = script.removesuffix(".py").replace("tools.", "tools/")
    code, _, err = tiny.command(path, *flags, *quicker)
    return code, err


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """The commands of `make demo` and then those of the README, in order, in a folder of tiny files
    under the same names, with tiny models of the same families behind the same names → (folder,
    [(command, exit code, stderr)])."""
    folder = tmp_path_factory.mktemp("readme")
    model_of = save_tiny_models(folder)
    sae_of = save_tiny_hub(folder / "hub")
    save_tiny_data(folder)

    def locate_model(name):
        return model_of.get(name, name)

    def fetch(name, revision=None):
        if name not in sae_of:
            raise sae.SAEError(f"not on the hub · {name}")
        return str(sae_of[name])

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(models, "locate_model", locate_model)
        patch.setattr(sae, "fetch", fetch)

        found = []
        for line in [*lines_of_make_demo(), *BASH]:
            words = shlex.split(line, comments=True)
            if words[:1] == ["python"] and words[1] in [*SCRIPTS, "-m"]:
                found.append((line, *run_words(words[1:])))

        yield folder, found


def test_every_command_of_the_readme_runs_as_it_stands(played):
    _, found = played
    assert len(found) > 24

    failed = [(line, err[-600:]) for line, code, err in found if code]
    assert not failed


def test_the_layer_of_an_sae_is_told_by_its_repository(played):
    folder, _ = played
    meta = read_meta(folder / "runs/smollm2/features.safetensors")
    assert not [warning for warning in meta["warnings"] if "its layer" in warning]


def test_the_commands_that_are_not_run_are_those_of_make():
    commands = {line.split("#")[0].strip() for line in BASH} - {""}
    run = re.compile(r"python (0\d_\w+|sae)\.py |python -m tools\.")

    assert {line for line in commands if not run.match(line)} == {"make demo", "make test"}


def test_every_target_of_make_that_is_named_exists():
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.M))
    assert set(re.findall(r"`make ([\w-]+)`", README)) <= targets


def test_every_flag_of_a_benchmark_that_is_named_is_one_of_its_script():
    for script, rest in re.findall(r"`(?:python )?(benchmarks/\w+\.py)((?:\s[^`]*)?)`", README):
        source = read(script)
        for flag in re.findall(r"--[\w-]+", rest):
            assert f'"{flag}"' in source, (script, flag)


# ---------------------------------------------------------------- code

def program(word):
    """The one program of the README in which a word stands."""
    [text] = [text for text in PROGRAMS if word in text]
    return text


def run_program(word):
    """Run that program → its names."""
    names = {}
    exec(compile(program(word), "README", "exec", dont_inherit=True), names)
    return names


def test_every_passage_of_code_stands_in_a_script_as_it_is():
    sources = "\0".join(read(script) for script in [*SCRIPTS, "parts/statistics.py"])
    assert len(PASSAGES) >= 5

    for text in PASSAGES:
        assert text in sources, text


def test_every_program_of_the_readme_is_run_here():
    run = {program(word) for word in ("reward.explain", "fastapi")}
    assert set(PROGRAMS) == run
    assert len(run) == 2


def test_the_program_that_explains_a_reward_adds_up_to_it(played):
    reward = run_program("reward.explain")["reward"]
    found = reward.explain("Why is the sky blue?", "It reflects the sea.")

    contributions = sum(row["contribution"] for row in found["contributions"])
    assert found["reward"] == pytest.approx(found["bias"] + contributions, abs=1e-4)


def test_the_program_that_serves_answers_at_score(played):
    pytest.importorskip("fastapi")
    app = run_program("fastapi")["app"]
    assert "/score" in [route.path for route in app.routes]


def test_what_the_readme_hands_to_a_trainer_are_arguments_of_it():
    """tests/test_trainers.py trains with them; here only the names."""
    trl = pytest.importorskip("trl")

    handed = []
    for text in TRAINERS:
        for node in ast.walk(ast.parse(text)):
            name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            if name in ("DPOTrainer", "DPOConfig", "GRPOTrainer"):
                handed.append((name, {keyword.arg for keyword in node.keywords}))

    assert len(handed) == 4
    for name, arguments in handed:
        assert arguments <= set(inspect.signature(getattr(trl, name)).parameters)


# ---------------------------------------------------------------- files

def test_the_picture_is_drawn_from_the_committed_figures(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    with tiny.argv("--tables", "--picture", tmp_path / "k-curve.png"):
        benchmark("does_it_hold").main()

    drawn = image.imread(tmp_path / "k-curve.png")
    committed = image.imread(tiny.ROOT / "assets/k-curve.png")
    assert drawn.shape == committed.shape
    assert abs(drawn - committed).mean() < 0.01


def test_every_file_of_the_repository_that_the_readme_names_exists():
    quoted = re.findall(r"`((?:data|assets|benchmarks|tests|parts|tools|docs)/[\w./-]+)`", README)
    linked = re.findall(r"\]\((?!http|#)([\w./-]+)", README)
    assert len(quoted + linked) > 8

    for name in quoted + linked:
        assert (tiny.ROOT / name).exists(), name


def test_every_link_within_the_readme_leads_to_a_heading():
    headings = set()
    for heading in re.findall(r"^##+ (.*)", README, re.M):
        kept = re.sub(r"[^\w -]", "", heading)
        headings.add(kept.strip().lower().replace(" ", "-"))

    assert set(re.findall(r"\]\(#([\w-]+)\)", README)) <= headings


# ---------------------------------------------------------------- figures in the prose

def test_the_prose_of_the_readme_holds_no_figure_of_a_result():
    """Figures stand in blocks that are made from results, or in docs/."""
    prose = re.sub(r"<!-- (\w+) -->.*?<!-- end -->|```.*?```", "", README, flags=re.S)
    prose = re.sub(r"`[^`]*`", "", " ".join(prose.split()))
    for name in ("arXiv 2511.07896", "Python 3.11", "Apache-2.0"):
        prose = prose.replace(name, "")
    assert not re.findall(r"(?:\w+ ){0,4}(?<!\w)[-−+]?(?:\d*\.\d+|\d+ %)", prose)


def test_the_readme_is_read_in_one_sitting():
    assert len(README.split()) <= 3000


# ---------------------------------------------------------------- hidden states of another engine

FOREIGN = re.search(r"```python\n(# my_extract.py.*?)```", read("docs/formats.md"), re.S)[1]
ENGINE = '''
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({folder!r})

def hidden_states(ids, layer):
    """transformers counts from the embedding too: hidden_states[0]."""
    with torch.inference_mode():
        return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
'''


@pytest.mark.parametrize("rule", ["mean", "last"])
def test_the_lines_for_another_engine_lead_to_the_head_of_stage_1(rule, tmp_path):
    own = tiny.make_run(tmp_path, "--token", rule)
    (tmp_path / "my_engine.py").write_text(ENGINE.format(folder=str(tmp_path / "model")))
    (tmp_path / "my_extract.py").write_text(FOREIGN)
    run = tmp_path / "foreign"
    flags = ["--model", tmp_path / "model", "--pairs", tmp_path / "pairs.jsonl", "--layer", "1",
             "--token", rule, "--run", run]
    subprocess.run([sys.executable, tmp_path / "my_extract.py", *flags], check=True,
                   env={**os.environ, "PYTHONPATH": str(tiny.ROOT)})

    assert (run / "pairs.jsonl").read_bytes() == (own / "pairs.jsonl").read_bytes()
    assert "0 computed, 1 found complete" in tiny.succeed("01_extract", *flags)
    tiny.succeed("02_select_features", "--run", run, "--sae", tmp_path / "sae.safetensors",
                 "--k", 8)
    tiny.succeed("03_train_head", "--run", run)
    tiny.succeed("04_evaluate", "--run", run)
    ours, theirs = [load_file(folder / "reward_head.safetensors") for folder in (own, run)]
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-4, rtol=1e-4), name
    carried = [load_file(next((folder / "activations").iterdir())) for folder in (own, run)]
    for name in ("pair", "group", "split", "chosen_tokens", "rejected_tokens"):
        assert torch.equal(carried[0][name], carried[1][name])
