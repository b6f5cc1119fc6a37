"""The README cannot rot: its commands are run, its code is the scripts', its tables and figures are
those of benchmarks/results."""

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
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

# mark in the text: (file, benchmark, its function that writes the table)
TABLES = {
    "does_it_hold": ("README.md", "does_it_hold", "tables"),
    "headline": ("README.md", "reward_models", "headline"),
    "align": ("README.md", "align", "table"),
    "reward_models": ("benchmarks/README.md", "reward_models", "table"),
    "other_sets": ("benchmarks/README.md", "does_it_hold", "other_tables"),
    "extract": ("benchmarks/README.md", "extract", "table"),
    "rank": ("benchmarks/README.md", "rank_answers", "table"),
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


@pytest.mark.parametrize("file", ["README.md", "benchmarks/README.md", "data/README.md",
                                  "assets/README.md"])
def test_no_placeholder_is_left(file):
    prose = re.sub(r"`[^`]*`", "", read(file))
    assert not re.findall(r"\b[A-Z]{2,}_[A-Z]+\b|<!-- \w+ -->\s*<!-- end -->", prose)


# ---------------------------------------------------------------- manual pages

COMMANDS = [*SCRIPTS, "05_best_of_n.py sample", "05_best_of_n.py rank", "05_best_of_n.py pairs",
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
QWEN_SCOPE = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50:layer14.sae.pt"

DEPTH = 18                              # above every layer that a command names
FULL = {"layer_types": ["full_attention"] * DEPTH}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * (DEPTH // 2)}
MODELS = {
    "demo": ("llama", {}),
    "google/gemma-2-2b-it": ("gemma2", ALTERNATING),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", {}),
    "Qwen/Qwen3-1.7B": ("qwen3", FULL),
}

# flags that only make a command quicker
QUICKER = {
    "tools.train_sae": ["--tokens", 600, "--batch", 64],
    "sample": ["--max-new-tokens", 3],
    "04_evaluate.py": ["--seeds", 1, "--sweeps", "none"],
}


def save_tiny_models(folder):
    """→ {name of a model in the README: folder of a tiny one of its family}."""
    made = {}
    for name, (family, changes) in MODELS.items():
        place = folder / name.replace("/", "-")
        made[name] = tiny.save_model(place, family, num_hidden_layers=DEPTH, **changes)
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

    return {GEMMA_SCOPE: gemma, LLAMA_SCOPE: llama, QWEN_SCOPE: qwen / "layer14.sae.pt"}


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
    assert len(found) > 28

    failed = [(line, err[-600:]) for line, code, err in found if code]
    assert not failed


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
    assert len(PASSAGES) >= 6

    for text in PASSAGES:
        assert text in sources, text


def test_every_program_of_the_readme_is_run_here():
    run = {program(word) for word in ("sys.argv", "reward.explain", "fastapi")}
    assert set(PROGRAMS) == run
    assert len(run) == 3


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

    assert len(handed) == 3
    for name, arguments in handed:
        assert arguments <= set(inspect.signature(getattr(trl, name)).parameters)


# ---------------------------------------------------------------- files

PEEKS = dict(re.findall(r"```\n\$ python peek\.py (\S+)\n(.*?)```", README, re.S))
ACTIVATIONS, FEATURES, HEAD = PEEKS


def entries(text):
    """What peek.py prints → [(name, dtype, commas of the shape)], by name."""
    found = []
    for line in sorted(text.strip().split("\n")):
        name, dtype, shape = re.match(r"(\w+) +(torch\.\w+) +\[(.*)\]", line).groups()
        found.append((name, dtype, shape.count(",")))
    return found


@pytest.mark.parametrize("path", PEEKS, ids=["activations", "features", "head"])
def test_a_file_holds_what_peek_shows_of_it(played, path):
    folder, _ = played
    (folder / "peek.py").write_text(program("sys.argv"))

    done = subprocess.run([sys.executable, "peek.py", path], cwd=folder, capture_output=True,
                          text=True, check=True)
    assert entries(done.stdout) == entries(PEEKS[path])


@pytest.mark.parametrize("path", [ACTIVATIONS, FEATURES], ids=["activations", "features"])
def test_the_rows_that_peek_shows_are_the_pairs_of_the_data(path):
    pairs = len(read("data/truthful.jsonl").splitlines())
    assert f"chosen               torch.float32  [{pairs}, " in PEEKS[path]


def test_the_weights_that_peek_shows_are_as_many_as_dev_chose():
    latents = 2 * results("does_it_hold")["truthful"]["run"]["k"]
    assert f"w1                   torch.float32  [{latents}]" in PEEKS[HEAD]


def test_the_picture_is_drawn_from_the_committed_figures(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    with tiny.argv("--tables", "--picture", tmp_path / "k-curve.png"):
        benchmark("does_it_hold").main()

    drawn = image.imread(tmp_path / "k-curve.png")
    committed = image.imread(tiny.ROOT / "assets/k-curve.png")
    assert drawn.shape == committed.shape
    assert abs(drawn - committed).mean() < 0.01


def test_every_file_of_the_repository_that_the_readme_names_exists():
    quoted = re.findall(r"`((?:data|assets|benchmarks|tests|parts|tools)/[\w./-]+)`", README)
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


# ---------------------------------------------------------------- verdicts in the prose

HOLD = results("does_it_hold")


def better_than(control):
    """The sets on which SparseRM is clearly better than a control."""
    return [name for name, row in HOLD.items() if row["differences"][control]["low"] > 0]


def worse_than(control):
    """The sets on which it is clearly worse."""
    return [name for name, row in HOLD.items() if row["differences"][control]["high"] < 0]


def clear_k(name):
    """The K at which the SAE's directions are clearly better than random ones, by size."""
    curve = HOLD[name]["curves"]["k"]["random_directions"]
    return sorted((k for k, row in curve.items() if row["behind"]["low"] > 0), key=int)


def at_k(name, k):
    """The accuracy of SparseRM with K directions a side."""
    return HOLD[name]["curves"]["k"]["sparserm"][str(k)]["ties_half"]


def accuracy(name, method):
    return HOLD[name]["accuracy"][method]["accuracy"]


def test_there_are_six_data_sets():
    assert len(HOLD) == 6


def test_no_k_is_clear_on_two_sets():
    assert [name for name in HOLD if not clear_k(name)] == ["HH-harmless", "PyRIT"]


def test_at_the_k_of_dev_random_directions_are_told_apart_on_no_set():
    assert not better_than("random_directions")
    assert not worse_than("random_directions")


def test_activations_are_clearly_ahead_on_no_set():
    assert not worse_than("activations")


def test_the_dense_head_is_clearly_ahead_on_one_set_and_behind_on_none():
    assert worse_than("dense") == ["RM-Bench-safety"]
    assert not better_than("dense")


def test_four_latents_a_side_are_far_below_the_dense_head_on_three_sets():
    far = [name for name in HOLD if accuracy(name, "dense") - at_k(name, 4) > 0.08]
    assert far == ["RM-Bench-safety", "PyRIT", "safe"]


def test_shuffled_labels_are_not_beaten_on_truthful():
    """Said under "Limits"."""
    assert HOLD["truthful"]["differences"]["shuffled_labels"]["low"] < 0


def test_no_loss_and_head_is_told_apart_from_bradley_terry():
    for row in results("heads").values():
        difference = row["minus_linear_bt"]
        assert difference["low"] <= 0 <= difference["high"]


# ---------------------------------------------------------------- figures in the prose

def number(x):
    """0.586 → .586"""
    return f"{x:.3f}".replace("0.", ".", 1)


def percent(x):
    return f"{100 * x:.0f} %"


def claims_about_k():
    """How many directions, and whether the SAE has to choose them."""
    on = {name: ", ".join(clear_k(name)) for name in HOLD}
    yield (f"on TruthfulQA at K = {on['TruthfulQA']}, on RM-Bench safety at K = "
           f"{on['RM-Bench-safety']}, on `truthful` at K = {on['truthful']}, on `safe` at K = "
           f"{on['safe']}. From K = 32 on")

    yield f"PyRIT ({HOLD['PyRIT']['accuracy']['sparserm']['n']} test pairs) no K is clear"

    chosen = sorted({row["accuracy"]["sparserm"]["choice"] for row in HOLD.values()})
    yield "Dev chooses K = {} or {}".format(*chosen)

    ends = [(row["differences"]["random_directions"]["high"], name) for name, row in HOLD.items()]
    end, name = min(ends)
    yield f"its upper end is {end:+.3f} on {name}".replace("+0.", "+.")

    few = number(at_k("TruthfulQA", 4))
    more = number(at_k("TruthfulQA", 16))
    dense = number(accuracy("TruthfulQA", "dense"))
    yield f"({few} at K = 4, {more} at 16; dense {dense})"


def claims_about_controls():
    """SparseRM against activations, the dense head and the words."""
    yield "Projection beats activation*: clearly on {} and `{}`".format(*better_than("activations"))

    means = {name: row["differences"]["activations"]["mean"] for name, row in HOLD.items()}
    ahead = [name for name, mean in means.items() if mean < 0]
    yield "on {} and {} activations are the ones ahead, not clearly".format(*ahead)

    dense = HOLD["TruthfulQA"]["differences"]["dense"]
    shown = benchmark("does_it_hold").interval(dense, "mean", "+")
    yield f"level elsewhere (TruthfulQA {shown})"

    yield "More than the wording*: clearly on `{}` and `{}`".format(*better_than("words"))

    words = HOLD["TruthfulQA"]["accuracy"]["words"]["ties_half"]
    yield f"the wording alone gets {number(words)} on TruthfulQA"


def claims_about_other_sets():
    """A head of one set on the test pairs of another."""
    couples = {}
    for name, found in HOLD.items():
        for other, row in found["other"].items():
            couples[name, other] = row
    rows = couples.values()

    above = sum(row["low"] > 0.5 for row in rows)
    below = sum(row["high"] < 0.5 for row in rows)
    yield (f"of {len(rows)} couples the accuracy is clearly above one half on {above} and clearly "
           f"below on {below}")

    best = max(couples, key=lambda couple: couples[couple]["accuracy"])
    yield f"the best is {best[0]} → {best[1]}, {number(couples[best]['accuracy'])}"

    counts = []
    for control in ("dense", "random_directions"):
        differences = [row["controls"][control]["behind"] for row in rows]
        counts.append(sum(difference["low"] > 0 for difference in differences))
        counts.append(sum(difference["high"] < 0 for difference in differences))
    yield ("SparseRM is clearly better than the dense head on {} and worse on {}, than random "
           "directions on {} and {}").format(*counts)


def claims_about_heads():
    """Losses and heads."""
    heads = results("heads")
    linear = [number(heads[f"linear {loss}"]["accuracy"]) for loss in ("bt", "margin", "bce")]
    mlp = [number(heads[f"mlp {loss}"]["accuracy"]) for loss in ("bt", "margin", "bce")]
    yield ("linear heads give {} (Bradley–Terry), {} (margin) and {} (BCE), an MLP {}, {} and {}"
           ).format(*linear, *mlp)


def claims_about_stability():
    """The share of the latents that a resample would choose again."""
    ours = HOLD["truthful"]["stability"]
    safe = HOLD["safe"]["stability"]
    yield (f"{percent(ours['mean'])} (`truthful`) and {percent(safe['mean'])} (`safe`) of the "
           f"latents would be chosen again, by chance alone {percent(ours['chance'])} and "
           f"{percent(safe['chance'])}")


def claims_about_alignment():
    """Filtering pairs before DPO."""
    align = results("align")
    counts = align["counts"]
    yield (f"flips {percent(align['noise'])} of the labels of {counts['policy']} pairs, filters "
           f"them by a SparseRM trained on {counts['reward']} *other*")
    yield f"({counts['test']} pairs, {counts['questions']} multiple-choice questions"

    kept = {}
    for name in ("sparserm", "none"):
        row = align["filters"][name]
        flipped = sum(row["flipped"])
        kept[name] = np.array([flipped, sum(row["kept"]) - flipped])
    flipped, right = 1 - kept["sparserm"] / kept["none"]
    yield (f"takes out {percent(flipped)} of the flipped labels and {percent(right)} of the right "
           "ones")


FINE_TUNED = {
    "full": "full fine-tuning",
    "lora": "LoRA",
    "dense": "a dense head on the same z",
    "mlp": "an MLP on z",
    "swift": "a SWIFT-style head",
    "words": "the words",
    "searched": "itself with L2 penalty and learning rate chosen by dev too",
}


def verdict(row):
    """SparseRM minus another method, in words."""
    if row["behind"]["low"] > 0:
        return "ahead"
    if row["behind"]["high"] < 0:
        return "behind"
    return "not told apart"


def claims_about_fine_tuned_models():
    """SparseRM against each of them, by set, as a list under "What came out"."""
    sets = largest_plans(results("reward_models"))

    for method, name in FINE_TUNED.items():
        sets_with = {}
        for of, rows in sets.items():
            if method in rows:
                sets_with.setdefault(verdict(rows[method]), []).append(of)

        if len(sets_with) == 1:
            says = f"{next(iter(sets_with))} on any set"
        else:
            says = ", ".join(f"{word} on {' and '.join(of)}" for word, of in sets_with.items())
        yield f"{name}: {says}"


def largest_plans(found):
    """Figures of reward_models → {set: methods with the most train pairs}."""
    return {name: plans[max(plans, key=int)]["methods"] for name, plans in found["sets"].items()}


def claims_about_cost():
    """What is saved: weights and time."""
    found = results("reward_models")
    sets = largest_plans(found)

    trained = sets["TruthfulQA"]["sparserm"]["trained"]
    share = 100 * trained / found["backbone_parameters"]
    yield f"{trained:,.0f} weights on TruthfulQA, {share:.2g} % of the backbone's"

    for name in ("TruthfulQA", "HH-harmless"):
        ours = sets[name]["sparserm"]
        full = sets[name]["full"]["seconds"]
        lora = sets[name]["lora"]["seconds"]
        yield (f"{full / ours['seconds']:.0f} times as long on {name}, LoRA "
               f"{lora / ours['seconds']:.0f} times")

        padded = ours["seconds_padded"]
        yield f"{full / padded:.1f} and {lora / padded:.1f} times on {name}"


def claims_about_the_plan():
    """What the comparison does not show: its learning rates, and what other train pairs change."""
    found = results("reward_models")
    yield "({full:g} and {lora:g};".format(**found["rates"]["TruthfulQA"])

    plans = found["sets"]["TruthfulQA"].values()
    dense = [number(plan["methods"]["dense"]["ties_half"]) for plan in plans]
    pairs = [plan["pairs"]["train"] for plan in plans]
    yield "a dense head gets {}, {} and {} from {}, {} and {} pairs".format(*dense, *pairs)


def claims_read_off():
    """What was read off by hand; the faults stand in benchmarks/README.md."""
    for row in results("read_off"):
        if "faults" not in row["command"]:
            yield row["says"]


CLAIMS = [claims_about_k, claims_about_controls, claims_about_other_sets, claims_about_heads,
          claims_about_stability, claims_about_alignment, claims_about_fine_tuned_models,
          claims_about_cost, claims_about_the_plan, claims_read_off]

PUBLISHED = ["(arXiv 2511.07896, AAAI-26)", "*SparseRM*, arXiv 2511.07896", "2508.08746",
             "2507.00665", "2505.12225", "1.4 to 2.9 points",
             "top-K directions 94.4 / 90.2 / 93.6, random directions 93.0 / 88.0 / 90.7",
             "SAE activations 92.4 / 88.4 / 91.4", "Bradley–Terry 94.0 / 88.7 / 91.4",
             "BCE 85.7 / 83.1 / 86.3", "dense hidden state 94.7",
             "dense 78.7, fine-tuned 78.7, SparseRM 79.9",
             "about 0.63 is what two annotators share"]
SETTINGS = ["Python 3.11+", "Apache-2.0", "95 % intervals", "Adam 0.01, L2 0.1", "70 % of the set",
            "Llama-3.1-8B", "about a minute", "below 0.2 (stage 2 warns)"]


def prose():
    """The README without tables of results and code, on one line."""
    text = re.sub(r"<!-- (\w+) -->.*?<!-- end -->|```.*?```", "", README, flags=re.S)
    return " ".join(text.split())


@pytest.mark.parametrize("claims", CLAIMS)
def test_the_prose_says_what_the_results_say(claims):
    said = list(claims())
    assert said

    for claim in said:
        assert claim in prose(), claim


@pytest.mark.parametrize("claim", PUBLISHED + SETTINGS)
def test_the_prose_has_the_published_figures_and_the_settings(claim):
    assert claim in prose()


def test_no_other_figure_stands_in_the_prose():
    known = PUBLISHED + SETTINGS
    for claims in CLAIMS:
        known = [*known, *claims()]

    rest = prose()
    for claim in known:
        rest = rest.replace(claim, "")
    rest = re.sub(r"`[^`]*`", "", rest)

    assert not re.findall(r"(?:\w+ ){0,4}(?<!\w)[-−+]?(?:\d*\.\d+|\d+ %)", rest)
