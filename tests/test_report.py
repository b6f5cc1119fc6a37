"""What stage 4 draws, prints and says in words, against numbers worked by hand."""

import base64
import sys

import pytest
from matplotlib.figure import Figure

from parts import report

CONTROLS = ["dense", *report.SAYS]


# ---------------------------------------------------------------- pictures

def two_points(axes):
    axes.plot([1, 2])


def test_a_picture_is_a_png_the_same_at_every_drawing(tmp_path):
    first, second = [report.picture(tmp_path / name, two_points) for name in ("1.png", "2.png")]
    written = (tmp_path / "1.png").read_bytes()
    assert first == second
    assert base64.b64decode(first) == written
    assert written.startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.picture(tmp_path / "no.png", two_points) is None
    assert not (tmp_path / "no.png").exists()


def row(accuracy, ties=0.0):
    """A summary whose interval is [accuracy - 0.1, accuracy + 0.2]."""
    half = accuracy + ties / 2
    return {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.2, "ties": ties,
            "ties_half": half, "half_low": half - 0.1, "half_high": half + 0.2,
            "n": 60, "groups": 40}


def drawn(draw, *what):
    """→ (axes, the lines on it as lists of x and of y)."""
    axes = Figure().subplots()
    draw(axes, *what)
    lines = []
    for found in axes.lines:
        lines.append(([float(x) for x in found.get_xdata()], [float(y) for y in found.get_ydata()]))
    return axes, lines


def test_accuracies_are_drawn_with_sparserm_on_top_and_the_controls_by_accuracy():
    axes, _ = drawn(report.accuracy_plot,
                    {"sparserm": row(0.6), "dense": row(0.7), "words": row(0.5)})
    names = [text.get_text() for text in axes.get_yticklabels()]            # bottom up
    assert names == ["words", "dense", "SparseRM"]


def test_an_accuracy_is_a_dot_and_its_interval_and_a_ring_where_ties_count_half():
    _, lines = drawn(report.accuracy_plot, {"sparserm": row(0.6), "words": row(0.5, ties=0.25)})
    assert [x for x, _ in lines] == [
        [0.4, 0.7], [0.5], [0.625],                         # words: interval, dot, ring
        [pytest.approx(0.5), pytest.approx(0.8)], [0.6],    # SparseRM
        [0.5, 0.5],                                         # a coin
    ]


def test_curves_are_drawn_by_rising_size_with_a_tie_as_half():
    curve = {"sparserm": {"16": row(0.9), "2": row(0.1, ties=1), "1": row(0.5)},
             "dense": {"1": row(0.7)}}
    axes, lines = drawn(report.curve_plot, curve, "K")
    assert lines == [([1, 2, 16], [0.5, 0.6, 0.9]), ([1], [0.7])]
    assert axes.get_xlabel() == "K"


def test_a_band_is_drawn_for_sparserm_and_for_random_directions_only():
    curve = {name: {"1": row(0.5), "2": row(0.6)} for name in
             ("sparserm", "random_directions", "random_latents", "activations", "dense")}
    axes, _ = drawn(report.curve_plot, curve, "K")
    assert len(axes.collections) == 2
    corners = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (corners.min(), corners.max()) == (pytest.approx(0.4), pytest.approx(0.8))


def test_reliability_is_drawn_bin_by_bin_beside_the_diagonal():
    bins = [{"confidence": 0.6, "accuracy": 0.5}, {"confidence": 0.9, "accuracy": 1.0}]
    _, lines = drawn(report.reliability_plot, {"bins": bins})
    assert lines == [([0.5, 1], [0.5, 1]), ([0.6, 0.9], [0.5, 1.0])]


# ---------------------------------------------------------------- in words

CLEAR = {"mean": 0.1, "low": 0.001, "high": 0.2}
TOUCHING = {"mean": 0.1, "low": 0.0, "high": 0.2}
BELOW = {"mean": -0.1, "low": -0.3, "high": -0.01}
FINE = {"sparserm": {"low": 0.6, "n": 50}, "shuffled_labels": {"low": 0.4}, "words": {"high": 0.6}}


def said(accuracy=FINE, warnings=(), **differences):
    """in_words where all is fine but for what is given."""
    every = dict.fromkeys(CONTROLS, CLEAR) | differences
    return report.in_words({"differences": every, "accuracy": accuracy}, list(warnings))


def test_where_every_difference_is_clear_of_0_nothing_is_said():
    assert said() == []


@pytest.mark.parametrize("name", report.SAYS)
def test_a_control_is_spoken_of_unless_the_interval_of_the_difference_is_clear_of_0(name):
    sentence, = said(**{name: TOUCHING})
    shown = name.replace("_", " ")
    assert sentence == f"{shown} (+0.100 [+0.000, +0.200]): {report.SAYS[name]}"


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_that_is_better_is_named(name):
    sentence, = said(**{name: BELOW})
    shown = name.replace("_", " ")
    assert sentence == f"{shown} (-0.100): measurably better than SparseRM here"


def test_the_dense_control_may_be_as_good():
    assert said(dense={"mean": -0.1, "low": -0.3, "high": 0.0}) == []


def test_every_control_that_is_not_behind_has_its_own_sentence():
    assert len(said(words=TOUCHING, dense=BELOW, length=BELOW)) == 3


@pytest.mark.parametrize("name, found, words", [
    ("sparserm", {"low": 0.5, "n": 50}, "coin"),
    ("sparserm", {"low": 0.6, "n": 49}, "only 49 test pairs"),
    ("shuffled_labels", {"low": 0.51}, "leak"),
    ("words", {"high": 0.49}, "below one half"),
])
def test_a_row_that_is_odd_by_itself_is_spoken_of(name, found, words):
    sentence, = said(FINE | {name: found})
    assert words in sentence


def test_what_the_sae_was_warned_of_is_repeated():
    assert said(warnings=["odd"]) == ["SAE: odd"]


def test_what_undoes_all_the_rest_is_said_first():
    accuracy = FINE | {"shuffled_labels": {"low": 0.51}, "sparserm": {"low": 0.5, "n": 49}}
    found = said(accuracy, ["odd"], length=TOUCHING)
    first_words = [sentence.split()[0] for sentence in found]
    assert first_words == ["with", "only", "the", "length", "SAE:"]


# ---------------------------------------------------------------- what is printed

def printed(capsys, show, *what):
    show(*what)
    return capsys.readouterr().out.splitlines()


def test_the_table_shows_sparserm_then_the_controls_by_accuracy(capsys):
    rows = {"words": row(0.5, ties=0.25) | {"behind": TOUCHING},
            "sparserm": row(0.55), "dense": row(0.7) | {"behind": BELOW}}
    assert printed(capsys, report.print_accuracy, "accuracy", rows) == [
        "",
        "accuracy on 60 test pairs of 40 prompts              SparseRM minus it",
        "  sparserm           0.550  [0.450, 0.750]",
        "  dense              0.700  [0.600, 0.900]   -0.100  [-0.300, -0.010]",
        "  words              0.500  [0.400, 0.700]   +0.100  [+0.000, +0.200]"
        "   ties 25.0%, as half 0.625",
    ]


def k_curve(*behind):
    """A curve of K = 1, 2, 16 … with these differences to random directions."""
    ks = ["1", "2", "16"][:len(behind)]
    curve = {}
    for name in ("sparserm", "random_directions", "random_latents", "activations", "dense"):
        curve[name] = {k: row(0.5, ties=0.5) for k in reversed(ks)}
    for k, difference in zip(ks, behind):
        curve["random_directions"][k] = row(0.25) | {"behind": difference}
    return curve


def test_the_curve_of_k_is_printed_by_rising_k_with_a_tie_as_half(capsys):
    lines = printed(capsys, report.print_k_curve, k_curve(TOUCHING, CLEAR, CLEAR))
    assert lines[1:4] == ["  K a side, ties half      1      2     16",
                          "  sparserm             0.750  0.750  0.750",
                          "  random_directions    0.250  0.250  0.250"]


@pytest.mark.parametrize("behind, words", [
    ([TOUCHING, CLEAR, CLEAR], "clearly above random directions at K = 2, 16"),
    ([TOUCHING, BELOW], "at no K clearly above random directions"),
])
def test_the_curve_of_k_says_where_sparserm_is_clearly_above_random_directions(
        behind, words, capsys):
    *_, last = printed(capsys, report.print_k_curve, k_curve(*behind))
    assert words in last


def evaluation(**changes):
    """As much of evaluation.json as is printed."""
    found = {
        "accuracy": {"sparserm": row(0.6) | {"choice": 8}, "words": row(0.5)},
        "differences": {"words": CLEAR},
        "curves": {},
        "other": {"new": row(0.7) | {"controls": {"words": row(0.4) | {"behind": BELOW}}}},
        "calibration": {"temperature": 1.5, "nll": 0.6, "brier": 0.2, "ece": 0.05},
        "length": {"correlation": -0.25},
        "cost": {"trained_parameters": 1017, "share": 1.3e-07},
        "stability": {"mean": 0.75, "chance": 0.5},
        "warnings": ["SAE: odd"],
        "wrong": [{"id": "a b"}],
    }
    return found | changes


def test_the_report_prints_the_figures_beside_the_accuracy(capsys):
    lines = printed(capsys, report.print_report, "runs/x", evaluation(), ["report.html", "a.png"])
    for wanted in [
        "calibration  T 1.50 · NLL 0.600 · Brier 0.200 · ECE 0.050",
        "length       correlation with the reward -0.25",
        "parameters   1,017 trained (K = 8 a side), 1.3e-07 of the backbone",
        "written      runs/x/evaluation.json, report.html, a.png",
        "note: SAE: odd",
    ]:
        assert wanted in lines
    chosen_again, = [line for line in lines if line.startswith("selection")]
    assert "75%" in chosen_again
    assert "by chance 50%" in chosen_again


def test_the_report_prints_a_table_for_the_run_and_one_for_every_other_set(capsys):
    lines = printed(capsys, report.print_report, "runs/x", evaluation(), [])
    titles = [line.split(" on 60 ")[0] for line in lines if " on 60 test pairs" in line]
    assert titles == ["accuracy", "new: the same heads"]
    assert [line.split()[0] for line in lines if line.startswith("  ")][:4] == [
        "sparserm", "words", "sparserm", "words"]
    assert any("+0.100  [+0.001, +0.200]" in line for line in lines)        # on the run
    assert any("-0.100  [-0.300, -0.010]" in line for line in lines)        # on the other set


@pytest.mark.parametrize("wrong, example", [([{"id": "a b"}], "--explain 'a b'"), ([], "ID")])
def test_the_report_ends_with_a_command_that_explains_the_most_wrong_pair(wrong, example, capsys):
    lines = printed(capsys, report.print_report, "runs/x", evaluation(wrong=wrong), [])
    command, = [line for line in lines if "--explain" in line]
    assert "04_evaluate.py --run runs/x" in command
    assert command.endswith(example)
