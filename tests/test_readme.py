"""The README's tables are those of the committed figures; its code blocks name flags and files that exist."""

import importlib.util
import json
import re
import subprocess
import sys

import pytest
import tiny

README = (tiny.ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = ["01_extract.py", "02_select_features.py", "03_train_head.py", "04_evaluate.py", "05_best_of_n.py", "sae.py"]


def load(path):
    """A script outside the top level as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = [("README.md", "does_it_hold", "does_it_hold", lambda script, found: script.tables(found)),
          ("benchmarks/README.md", "extract", "extract", lambda script, found: script.table(found["speed"])),
          ("benchmarks/README.md", "rank", "rank_answers", lambda script, found: script.table(found)),
          ("README.md", "align", "align", lambda script, found: script.table(found))]


@pytest.mark.parametrize("file, mark, name, table", TABLES, ids=[t[2] for t in TABLES])
def test_a_table_is_the_committed_figures(file, mark, name, table):
    found = json.loads((tiny.ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
    text = (tiny.ROOT / file).read_text(encoding="utf-8")
    between = re.search(rf"<!-- {mark} -->\n(.*?)<!-- end -->", text, re.S)[1]
    assert between.strip() == table(load(tiny.ROOT / f"benchmarks/{name}.py"), found).strip()


@pytest.fixture(scope="module")
def helps():
    """script (and command) → its --help."""
    asked = [(s,) for s in SCRIPTS[:4]] + [("05_best_of_n.py", c) for c in ("sample", "rank", "pairs")] + \
        [("sae.py", c) for c in ("info", "check", "train")]
    running = {call: subprocess.Popen([sys.executable, tiny.ROOT / call[0], *call[1:], "--help"], stdout=subprocess.PIPE, text=True)
               for call in asked}
    return {call: process.communicate()[0] for call, process in running.items()}


def test_every_flag_of_a_command_in_the_readme_is_in_its_help(helps):
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
    commands = re.findall(r"(?:python|--) (?:\S*/)?((?:0\d_\w+|sae)\.py)([^\n#&]*)", blocks)
    assert len(commands) > 12
    for script, rest in commands:
        words = rest.split()
        call = (script, words[0]) if (script, words[0] if words else "") in helps else (script,)
        for flag in (w for w in words if w.startswith("--")):
            assert re.search(rf"{flag}\b", helps[call]), f"{flag} is not a flag of {' '.join(call)}"


def test_every_file_of_the_repository_that_the_readme_names_exists():
    for name in re.findall(r"`((?:data|assets|benchmarks|tests)/[\w./-]+)`", README):
        assert (tiny.ROOT / name).exists(), name
