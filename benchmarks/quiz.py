"""How well did names hold in the quiz of the report? From the files that the page saves.

    python benchmarks/quiz.py safe=names-safe.json truthful=names-truthful.json --write

prints a table: each latent with its name, tasks right out of how many, Wilson's 95 % interval, and
for each set what the random directions scored that were mixed in. A name holds where its interval
lies above chance (one in five) and above that share. --write puts all into
benchmarks/results/quiz.json.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import common
from benchmarks.common import head_line, line
from parts.files import UserError, run_main
from parts.statistics import wilson

CHANCE = 0.2


def read_saved(path):
    """A file that the page saved → {names: rows that were tested, null: {right, tasks}}."""
    try:
        saved = json.loads(Path(path).read_text("utf-8"))
        return {"names": [row for row in saved["names"] if row.get("tasks")], "null": saved["null"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"not a file of names with results ({type(error).__name__}: {error}) · "
                        f"{path} · save it from report.html after the quiz") from None


def holds(row, null):
    """Does this name tell where its latent fires, better than chance and than no meaning at all?"""
    low, _ = wilson(row["right"] / row["tasks"], row["tasks"])
    return bool(row["description"]) and low > CHANCE and low > null["right"] / null["tasks"]


def score(row):
    """8 of 10 [.49, .94]."""
    low, high = wilson(row["right"] / row["tasks"], row["tasks"])
    numbers = common.without_zeros(f"[{low:.2f}, {high:.2f}]")
    return f"{row['right']} of {row['tasks']} {numbers}"


def table(found):
    """{set: {names, null}} → markdown, in each set the best name first."""
    text = head_line("set, latent", ["name", "right", "holds"])
    for name, saved in found.items():
        for row in sorted(saved["names"], key=lambda row: -row["right"]):
            verdict = "yes" if holds(row, saved["null"]) else ""
            text += line(f"{name}, {row['index']}",
                         [row["description"] or "no name", score(row), verdict])
        text += line(f"{name}, random directions", ["", score(saved["null"]), ""])
    return text


def held_names(found, name="safe"):
    """The names of a set that held, and the random directions → markdown."""
    saved = found[name]
    text = head_line("latent", ["name", "tasks right"])
    for row in sorted(saved["names"], key=lambda row: -row["right"]):
        if holds(row, saved["null"]):
            text += line(str(row["index"]), [row["description"], score(row)])
    return text + line("random directions", ["", score(saved["null"])])


def claim(found):
    """One sentence on all sets."""
    parts = []
    for name, saved in found.items():
        named = [row for row in saved["names"] if row["description"]]
        held = [row for row in named if holds(row, saved["null"])]
        parts.append(f"{name}: {len(named)} of {len(saved['names'])} got a name, {len(held)} held")
    return "; ".join(parts) + "."


def main():
    """The command."""
    p = common.command_line(__doc__)
    p.add_argument("sets", nargs="+", metavar="NAME=FILE")
    p.add_argument("--write", action="store_true", help="into benchmarks/results/quiz.json")
    args = p.parse_args()
    sets = common.named_sets(args.sets)
    if not sets:
        p.error("name the sets: NAME=FILE …")
    found = {name: read_saved(file) for name, file in sets.items()}
    print(table(found))
    print(claim(found))
    if args.write:
        common.write_result("quiz", found, sort_keys=False)


if __name__ == "__main__":
    run_main(main)
