"""The README cannot rot: its commands are run, its code is the scripts', its tables and figures are
those of benchmarks/results."""

import ast
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys

import pytest
import tiny
import torch
from played import (
    SCRIPTS,
    bash_of,
    is_of_the_project,
    lines_of_make_demo,
    path_of,
    play,
    read,
    run_code,
    world,
)
from safetensors.torch import load_file

from benchmarks import printed
from parts import report
from parts.files import read_meta


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


README = read("README.md")
BASH = bash_of(README)
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)

# three sorts of Python: whole programs, what is handed to TRL, and passages of the scripts
PROGRAMS = [text for text in PYTHON if "from sparserm import" in text]
SERVERS = [text for text in re.findall(r"```python\n(.*?)```", read("docs/formats.md"), re.S)
           if "FastAPI" in text]
TRAINERS = [text for text in PYTHON if "your/policy" in text]
PASSAGES = [text for text in PYTHON if text not in PROGRAMS + TRAINERS]


# ---------------------------------------------------------------- tables

# mark in the text: (file, benchmark, its function that writes the text)
TABLES = {
    "finding": ("README.md", "does_it_hold", "finding"),
    "does_it_hold": ("docs/results.md", "does_it_hold", "tables"),
    "export cost": ("docs/results.md", "does_it_hold", "export_table"),
    "export": ("docs/results.md", "export", "table"),
    "export claim": ("docs/results.md", "does_it_hold", "export_claim"),
    "second model SAE": ("docs/results.md", "second_model", "sae_claim"),
    "second model claim": ("docs/results.md", "second_model", "claim"),
    "second model": ("docs/results.md", "second_model", "table"),
    "sizes": ("docs/results.md", "sizes", "table"),
    "claims": ("docs/results.md", "does_it_hold", "claims"),
    "headline": ("benchmarks/README.md", "reward_models", "headline"),
    "reward_models claim": ("benchmarks/README.md", "reward_models_tables", "claim"),
    "align": ("benchmarks/README.md", "align", "table"),
    "reward_models": ("benchmarks/README.md", "reward_models", "table"),
    "extract": ("benchmarks/README.md", "extract", "table"),
    "rank": ("benchmarks/README.md", "rank_answers", "table"),
    "align claim": ("benchmarks/README.md", "align", "claim"),
    "rounds": ("benchmarks/README.md", "align", "rounds_table"),
    "rounds claim": ("benchmarks/README.md", "align", "rounds_claim"),
    "memory": ("benchmarks/README.md", "extract", "memory_claim"),
    "best_of_n": ("benchmarks/README.md", "best_of_n", "claim"),
    "parity": ("benchmarks/README.md", "sae_parity", "claim"),
    "sae speed": ("benchmarks/README.md", "sae_parity", "speed_table"),
    "scale": ("benchmarks/README.md", "scale", "table"),
    "names": ("README.md", "quiz", "held_names"),
    "quiz": ("docs/results.md", "quiz", "table"),
    "quiz claim": ("docs/results.md", "quiz", "claim"),
    "steer": ("benchmarks/README.md", "steer", "table"),
}


@pytest.mark.parametrize("mark", TABLES)
def test_a_table_is_the_committed_figures(mark):
    file, name, function = TABLES[mark]
    shown = re.search(rf"<!-- {mark} -->\n(.*?)<!-- end -->", read(file), re.S)[1]

    table = getattr(benchmark(name), function)(results(name.removesuffix("_tables")))

    assert shown.strip() == table.strip()


def test_what_the_demo_prints_first_is_the_verdict_of_the_committed_figures():
    shown = re.search(r"<!-- demo -->\n```\n(.*?)```\n<!-- end -->", README, re.S)[1]
    verdict = results("does_it_hold")["mean"]["safe"]["verdict"]
    assert [line.removeprefix("• ") for line in shown.splitlines()] == verdict


def test_what_the_first_program_prints_was_printed_by_it():
    shown = re.search(r"<!-- printed -->\n```\n(.*?)```\n<!-- end -->", README, re.S)[1]
    assert shown == results("printed")["readme"]
    code = printed.fingerprint([printed.first_program(README)])
    assert results("printed")["readme_code"] == code


@pytest.mark.parametrize("name", ["does_it_hold", "second_model"])
def test_a_committed_verdict_is_what_stage_4_says_of_the_figures_beside_it(name):
    found = results(name)
    for reading in ("mean", "last", "export"):
        for row in found[reading].values():
            assert row["verdict"] == report.verdict(row)


@pytest.mark.parametrize("file", ["README.md", "benchmarks/README.md", "data/README.md",
                                  "assets/README.md", "docs/results.md", "docs/paper.md",
                                  "EXERCISES.md"])
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
    """command → its --help."""
    found = {}
    for command in COMMANDS:
        script, *words = command.removeprefix("-m ").split()
        code, found[command], _ = tiny.command(path_of(script), *words, "--help")
        assert code == 0, command
    return found


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

@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """The commands of `make demo`, then those of the README and of docs/ → (folder, [(command, exit
    code, stderr)])."""
    folder = tmp_path_factory.mktemp("readme")
    of_docs = [line for name in ("results", "formats") for line in bash_of(read(f"docs/{name}.md"))]
    with world(folder):
        yield folder, play([*lines_of_make_demo(), *BASH, *of_docs])


def test_every_command_of_the_readme_and_the_docs_runs_as_it_stands(played):
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
    not_run = {line for line in commands if not is_of_the_project(line)}
    assert not_run == {"make demo", "make test"}


def test_every_target_of_make_that_is_named_exists():
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.M))
    assert set(re.findall(r"`make ([\w-]+)`", README)) <= targets


def benchmarks_named_in(text):
    """Commands of a benchmark, in backticks or in a block → [(script, the rest)]."""
    text = text.replace("\\\n", " ")
    found = re.findall(r"`(?:[\w./-]*python )?((?:benchmarks/)?\w+\.py)\b((?:\s[^`]*)?)`", text)
    found += re.findall(r"^python (benchmarks/\w+\.py)(.*)$", text, re.M)
    named = [(script if "/" in script else f"benchmarks/{script}", rest) for script, rest in found]
    return [(script, rest) for script, rest in named if (tiny.ROOT / script).is_file()]


@pytest.mark.parametrize("file", ["README.md", "EXERCISES.md", "docs/results.md",
                                  "benchmarks/README.md"])
def test_every_flag_of_a_benchmark_that_is_named_is_one_of_its_script(file):
    named = benchmarks_named_in(read(file))
    assert named or file == "README.md"
    for script, rest in named:
        source = read(script)
        for flag in re.findall(r"(?<!\w)--[\w-]+", rest):
            assert f'"{flag}"' in source, (script, flag)


# ---------------------------------------------------------------- code

def program(word):
    """The one program of the README and docs/formats.md in which a word stands."""
    [text] = [text for text in PROGRAMS + SERVERS if word in text]
    return text


def run_program(word):
    """Run that program → its names."""
    names, _ = run_code(program(word), "README.md")
    return names


def test_every_passage_of_code_stands_in_a_script_as_it_is():
    sources = "\0".join(read(script) for script in [*SCRIPTS, "parts/statistics.py"])
    assert len(PASSAGES) >= 5

    for text in PASSAGES:
        assert text in sources, text


def test_every_program_of_the_readme_is_run_here():
    assert PROGRAMS == [program("reward.tokens")]


def test_the_parts_that_the_program_prints_add_up_to_the_reward(played):
    names = run_program("reward.tokens")
    [wanted] = names["reward"].score([names["prompt"]], names["answers"][:1])
    assert sum(names["told"]["parts"]) + names["told"]["bias"] == pytest.approx(wanted, abs=1e-4)


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

# results stand between marks, made from committed figures; what may stand in the prose are settings
# and facts: versions, tolerances, names, what the paper says
MAY_STAND = {
    "README.md": "2511.07896 3.11 540MB 95% 1,000 16,384",
    "EXERCISES.md": "30minutes 99.9% 30% 16,384",
    "docs/results.md": "0.01 95% 5,120",
    "docs/formats.md": "0.001 0.5 0.22 1,024",
    "docs/paper.md": ("2508.08746 2507.00665 2505.12225 0.001 0.01 80% 1,000 3,584 4,608 "
                      "94.4 90.2 93.6 93.0 88.0 90.7 92.4 88.4 91.4 94.0 88.7 85.7 83.1 86.3 94.7 "
                      "78.7 79.9"),
    "benchmarks/README.md": "2.13.0 30% .1 0.2 0.5 10s 25points 20hours 1,000 4,608",
}
MARKED = re.compile(r"<!-- ([\w ]+) -->.*?<!-- end -->|```.*?```|^\*\*Expect\.\*\*.*?\n\n|`[^`]*`",
                    re.S | re.M)
FIGURE = re.compile(r"(?<![\w.,-])(\d*\.\d+(?:\.\d+)*(?: %)?|\d+ (?:%|s\b|×|tokens/s|GiB|MB|minutes"
                    r"|hours|points)|\d+,\d{3})")


def figures_in(text):
    """The decimals, shares, times and large counts of a text outside of marks and code."""
    prose = " ".join(MARKED.sub(" ", text).split())
    return {figure.replace(" ", "").removesuffix("%") for figure in FIGURE.findall(prose)}


@pytest.mark.parametrize("file", MAY_STAND)
def test_the_prose_holds_no_figure_of_a_result(file):
    may = {figure.removesuffix("%") for figure in MAY_STAND[file].split()}
    assert figures_in(read(file)) == may


def test_a_figure_in_the_prose_is_found_and_one_between_marks_is_not():
    text = ("It is right in .898 of the pairs, 12 % more, in 35 s.\n"
            "<!-- a b -->\n.5\n<!-- end -->\n`--l2 0.1`, K = 128, Apache-2.0")
    assert figures_in(text) == {".898", "12", "35s"}


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
    tiny.succeed("04_evaluate", "--run", run, "--texts", 0, "--sweeps", "none", "--folds", 3)
    tiny.succeed("tools/self_check", "--run", run)              # opens the head and its model
    ours, theirs = [load_file(folder / "reward_head.safetensors") for folder in (own, run)]
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], atol=1e-4, rtol=1e-4), name
    carried = [load_file(next((folder / "activations").iterdir())) for folder in (own, run)]
    for name in ("pair", "group", "split", "chosen_tokens", "rejected_tokens"):
        assert torch.equal(carried[0][name], carried[1][name])
