"""What stage 4 draws, prints and says in words, against numbers worked by hand."""

import base64
import re
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from parts import report
from parts.statistics import side_by_side

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
    return {"accuracy": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.2, "ties": ties,
            "ties_half": accuracy + ties / 2, "method": "bootstrap", "n": 60, "groups": 40}


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


def test_curves_are_drawn_by_rising_size():
    curve = {"sparserm": {"16": row(0.9), "2": row(0.1, ties=1), "1": row(0.5)},
             "dense": {"1": row(0.7)}}
    axes, lines = drawn(report.curve_plot, curve, "K")
    assert lines == [([1, 2, 16], [0.5, 0.1, 0.9]), ([1], [0.7])]
    assert axes.get_xlabel() == "K"


def test_a_curve_that_is_not_there_is_not_drawn():
    curve = {"sparserm": {"1": row(0.5)}, "words": {"1": row(0.7)}}
    _, lines = drawn(report.curve_plot, curve, "K")
    assert lines == [([1], [0.5])]


def test_a_band_is_drawn_for_sparserm_and_for_random_directions_only():
    curve = {name: {"1": row(0.5), "2": row(0.6)} for name in report.IN_CURVE}
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
CANNOT_TELL = {"mean": 0.1, "low": None, "high": None}
SPOKEN_OF = [*report.QUESTIONS, "length", "shuffled_labels"]


def said(differences=None, repeated=0.0, curves=None, correlation=0.84, **rows):
    """The verdict where SparseRM is clearly better than every control, but for what is given."""
    ours = row(0.8) | {"choices": [(16, 0.1), (4, 0.1), (16, 1.0)], "groups": 240}
    accuracy = {"sparserm": ours, "words": row(0.6), "length": row(0.5)}
    behind = dict.fromkeys(SPOKEN_OF, CLEAR)
    return report.verdict({"accuracy": accuracy | rows, "repeated_answers": repeated,
                           "differences": behind | (differences or {}), "curves": curves or {},
                           "length": {"correlation": correlation} if correlation else {}})


def test_where_all_is_well_the_verdict_is_the_accuracy_and_what_each_part_adds():
    first, *rest = said()
    assert first == ("SparseRM ranks 0.800 of the pairs right [0.700, 1.000]; the folds took "
                     "K = 4 to 16 directions a side.")
    assert len(rest) == len(report.QUESTIONS)
    for sentence, (better, *_) in zip(rest, report.QUESTIONS.values(), strict=True):
        assert sentence == f"{better} (+0.100 [+0.001, +0.200])."


@pytest.mark.parametrize("groups, small", [(5, True), (19, True), (20, False)])
def test_a_set_of_fewer_than_20_prompts_is_too_small_and_nothing_else_is_said(groups, small):
    ours = row(0.8) | {"groups": groups, "choices": [(4, 0.1)]}
    found = said(sparserm=ours, words=row(1.0))
    assert (found[0].startswith(f"Too small: {groups} prompts") and len(found) == 1) is small


@pytest.mark.parametrize("share, easy", [(0.85, True), (0.84, False)])
@pytest.mark.parametrize("name", ["words", "length"])
def test_a_set_that_words_or_length_alone_get_right_is_too_easy(name, share, easy):
    found = said({name: TOUCHING}, **{name: row(share)})
    assert any(text.startswith(f"Too easy: {name} alone get") for text in found) is easy


def test_a_set_is_not_too_easy_where_sparserm_is_clearly_better_than_the_words():
    assert not any("Too easy" in text for text in said(words=row(0.9)))


def test_words_and_length_that_are_both_right_are_one_sentence_with_the_larger_share():
    level = {"words": TOUCHING, "length": CANNOT_TELL}
    first, *_ = said(level, words=row(0.9), length=row(0.95))
    assert first.startswith("Too easy: words and length alone get 0.95.")


def test_a_tie_of_the_words_counts_half_where_a_set_is_too_easy():
    assert said({"words": BELOW}, words=row(0.8, ties=0.1))[0].startswith("Too easy: words")
    assert not said({"words": BELOW}, words=row(0.8))[0].startswith("Too easy")


@pytest.mark.parametrize("repeated, spoken_of", [(0.11, True), (0.1, False)])
def test_answers_that_stand_under_several_prompts_are_spoken_of(repeated, spoken_of):
    found = said(repeated=repeated)
    assert found[0].startswith("11% of the answers stand under several prompts") is spoken_of
    assert "SparseRM ranks" in found[spoken_of]


@pytest.mark.parametrize("difference", [TOUCHING, BELOW, CANNOT_TELL])
def test_no_better_than_with_shuffled_labels_there_is_nothing_to_learn(difference):
    found = said({"shuffled_labels": difference})
    assert len(found) == 1
    assert found[0].startswith("Nothing to learn here")


def test_of_a_set_that_is_too_easy_it_is_not_said_that_there_is_nothing_to_learn():
    found = said({"words": TOUCHING, "shuffled_labels": CANNOT_TELL}, words=row(1.0))
    assert not any("Nothing to learn" in text for text in found)


@pytest.mark.parametrize("name", report.QUESTIONS)
def test_of_a_control_that_is_not_clearly_behind_no_difference_is_told(name):
    _, level, _ = report.QUESTIONS[name]
    changed = dict.fromkeys(report.QUESTIONS, CLEAR) | {name: TOUCHING}
    sentence = report.what_helps(changed)[list(report.QUESTIONS).index(name)]
    assert sentence.startswith(level)


def test_controls_of_which_nothing_can_be_told_are_one_sentence():
    changed = dict.fromkeys(report.QUESTIONS, CLEAR)
    changed |= {"random_directions": CANNOT_TELL, "dense": CANNOT_TELL}
    *others, last = report.what_helps(changed)
    assert last == "Cannot tell, too few pairs are ranked otherwise: random directions, dense."
    assert len(others) == len(report.QUESTIONS) - 2


@pytest.mark.parametrize("low, spoken_of", [(0.51, True), (0.5, False)])
def test_a_length_that_is_clearly_above_one_half_is_spoken_of_with_what_follows_it(low, spoken_of):
    found = said(length=row(0.7) | {"low": low})
    sentence = ("Length alone ranks 0.70 of the pairs right (on the test split the reward's "
                "correlation with it is +0.84): balance it, or the reward may pay for it.")
    assert (found[0] == sentence) is spoken_of


def test_without_a_test_split_length_is_spoken_of_without_its_correlation():
    found = said(length=row(0.7), correlation=None)
    assert found[0].startswith("Length alone ranks 0.70 of the pairs right: balance it")


def test_a_length_that_makes_a_set_too_easy_is_spoken_of_once():
    found = said({"length": TOUCHING}, length=row(0.95))
    assert [text for text in found if "ength" in text] == found[:1]


@pytest.mark.parametrize("groups, spoken_of", [(199, True), (200, False)])
def test_of_fewer_than_200_prompts_it_is_said_that_they_are_few(groups, spoken_of):
    ours = row(0.8) | {"groups": groups, "choices": [(4, 0.1)]}
    found = said(sparserm=ours)
    assert found[0].startswith(f"Only {groups} prompts: the intervals are wide") is spoken_of


@pytest.mark.parametrize("name", report.QUESTIONS)
def test_a_control_that_is_clearly_better_is_named(name):
    _, _, worse = report.QUESTIONS[name]
    changed = dict.fromkeys(report.QUESTIONS, CLEAR) | {name: BELOW}
    sentence = report.what_helps(changed)[list(report.QUESTIONS).index(name)]
    assert sentence.startswith(worse)
    assert "-0.100" in sentence


@pytest.mark.parametrize("behind, sentence", [
    ([CLEAR, TOUCHING, CLEAR], "With K = 1, 16 directions a side the SAE's choice is clearly"),
    ([BELOW, CANNOT_TELL], "At no K the SAE's choice is clearly better"),
])
def test_the_verdict_says_at_which_k_the_saes_choice_is_better_than_random(behind, sentence):
    assert said(curves={"k": k_curve(*behind)})[1].startswith(sentence)


@pytest.mark.parametrize("behind, spoken_of", [
    ([BELOW, CLEAR, BELOW], "With K = 1, 16 random directions picked by the labels are clearly"),
    ([TOUCHING, CANNOT_TELL, CLEAR], None),
])
def test_the_verdict_says_at_which_k_picked_directions_are_better(behind, spoken_of):
    curve = k_curve(CLEAR) | {"picked_directions": k_curve(*behind)["random_directions"]}
    [_, _, third, *_] = said(curves={"k": curve})
    assert third.startswith(spoken_of or report.QUESTIONS["random_directions"][0])


def test_the_verdict_says_at_which_k_random_directions_are_better():
    found = said(curves={"k": k_curve(BELOW, CLEAR, BELOW)})
    assert "With K = 1, 16 random directions are clearly better." in found
    assert "random directions are clearly better." not in said(curves={"k": k_curve(CLEAR)})[2]


@pytest.mark.parametrize("ks, said_of_them", [([8, 8, 8], "8"), ([64, 4, 16], "4 to 64")])
def test_the_values_of_k_that_the_folds_chose_are_told_from_least_to_most(ks, said_of_them):
    assert report.ks_of({"choices": [(k, 0.1) for k in ks]}) == said_of_them


@pytest.mark.parametrize("share, spoken_of", [(0.66, True), (0.65, False)])
def test_what_the_answer_gives_away_without_its_question_is_said_last(share, spoken_of):
    *_, last = said(blind=row(share))
    assert last.startswith(f"The answer without its question gives {share:.2f}") is spoken_of


@pytest.mark.parametrize("difference, text", [
    (CLEAR, "+0.100 [+0.001, +0.200]"),
    (BELOW, "-0.100 [-0.300, -0.010]"),
    (CANNOT_TELL, "+0.100, too few prompts differ to tell"),
])
def test_a_difference_is_shown_with_its_interval_or_with_why_there_is_none(difference, text):
    assert report.difference_text(difference) == text


# ---------------------------------------------------------------- what is printed

def printed(capsys, show, *what):
    show(*what)
    return capsys.readouterr().out.splitlines()


def test_the_table_shows_sparserm_then_the_controls_by_accuracy(capsys):
    rows = {"words": row(0.5) | {"behind": CANNOT_TELL},
            "sparserm": row(0.55), "dense": row(0.7) | {"behind": BELOW}}
    assert printed(capsys, report.print_accuracy, "5 folds", rows) == [
        "",
        "5 folds: 60 pairs of 40 prompts, 95 % intervals",
        "                         accuracy                    SparseRM minus it",
        "  sparserm              0.550  [0.450, 0.750]",
        "  dense                 0.700  [0.600, 0.900]      -0.100 [-0.300, -0.010]",
        "  words                 0.500  [0.400, 0.700]      +0.100, too few prompts differ to tell",
    ]


def test_a_row_with_ties_says_how_many_there_are_and_what_they_are_as_half(capsys):
    rows = {"sparserm": row(0.55), "words": row(0.5, ties=0.25), "length": row(0.3, ties=0.004)}
    *_, words, length = printed(capsys, report.print_accuracy, "5 folds", rows)
    assert words.startswith("  words                 0.500  [0.400, 0.700]")
    assert words.endswith("   ties 25.0%, as half 0.625")
    assert "ties" not in length


def test_a_printed_accuracy_lies_within_its_printed_interval(capsys):
    rng = np.random.default_rng(0)
    differences = {"sparserm": rng.normal(size=60), "length": rng.choice([0.0, 0.0, 1.0], 60)}
    rows = side_by_side(differences, np.arange(60))
    lines = printed(capsys, report.print_accuracy, "5 folds", rows)[3:]
    assert len(lines) == 2
    for line in lines:
        share, low, high = map(float, re.findall(r"\d\.\d{3}", line)[:3])
        assert low <= share <= high, line


def test_the_accuracy_of_a_category_lies_within_its_printed_interval(capsys):
    ties = np.random.default_rng(0).choice([0.0, 0.0, 1.0], 60)
    rows = side_by_side({"sparserm": ties}, np.arange(60))
    line, = [line for line in report_of(capsys, categories={"harm": rows["sparserm"]})
             if line.startswith("  harm")]
    share, low, high = map(float, re.findall(r"\d\.\d{3}", line)[:3])
    assert low <= share <= high


def test_a_curve_lies_within_its_band():
    rng = np.random.default_rng(0)
    ties = rng.choice([0.0, 0.0, 1.0], 60)
    rows = side_by_side({"sparserm": ties}, np.arange(60))
    axes, [(_, ys)] = drawn(report.curve_plot, {"sparserm": {"1": rows["sparserm"]}}, "K")
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() <= ys[0] <= band.max()


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
    assert lines[1:4] == ["  K a side                   1      2     16",
                          "  sparserm               0.750  0.750  0.750",
                          "  random_directions      0.250  0.250  0.250"]


@pytest.mark.parametrize("behind, words", [
    ([TOUCHING, CLEAR, CLEAR], "clearly above random directions at K = 2, 16"),
    ([TOUCHING, BELOW, CANNOT_TELL], "at no K clearly above random directions"),
])
def test_the_curve_of_k_says_where_sparserm_is_clearly_above_random_directions(
        behind, words, capsys):
    *_, last = printed(capsys, report.print_k_curve, k_curve(*behind))
    assert words in last


def evaluation(**changes):
    """As much of evaluation.json as is printed."""
    found = {
        "verdict": ["One thing.", "Another."],
        "test": row(0.65) | {"n": 9, "groups": 8},
        "accuracy": {"sparserm": row(0.6), "words": row(0.5)},
        "differences": {"words": CLEAR},
        "categories": {},
        "curves": {},
        "other": {"new": {"sparserm": row(0.7), "words": row(0.4) | {"behind": BELOW}}},
        "calibration": {"temperature": 1.5, "nll": 0.6, "brier": 0.2, "ece": 0.05},
        "length": {"correlation": -0.25},
        "cost": {"trained_parameters": 1017, "share": 1.3e-07},
        "run": {"folds": 5, "k": 8},
        "sae": {"warnings": ["odd"]},
        "wrong": [{"id": "a b"}],
        "latents": [{"latent": latent, "side": "chosen", "adds_firing": -0.05}
                    for latent in (5, 40, 300)],
    }
    return found | changes


def report_of(capsys, name=None, written=(), names=None, **changes):
    """What is printed of an evaluation in runs/x, or with a name in runs/x/name."""
    folder = report.Path("runs/x", name or "")
    return printed(capsys, report.print_report, folder, evaluation(**changes), written, name,
                   names)


def test_the_report_begins_with_the_head_on_the_test_split_and_the_verdict(capsys):
    assert report_of(capsys)[:5] == [
        "",
        "this head, test split, 9 pairs of 8 prompts: 0.650 right [0.550, 0.850]",
        "",
        "• One thing.",
        "• Another.",
    ]


def test_the_report_prints_the_figures_beside_the_accuracy(capsys):
    lines = report_of(capsys, written=["report.html", "a.png"])
    for wanted in [
        "calibration  T 1.50 · NLL 0.600 · Brier 0.200 · ECE 0.050 (test split)",
        "length       correlation with the reward -0.25",
        "parameters   1,017 trained (K = 8 a side), 1.3e-07 of the backbone",
        "written      runs/x/evaluation.json, report.html, a.png",
        "note: SAE: odd",
    ]:
        assert wanted in lines


def test_without_test_pairs_the_report_speaks_of_no_test_split(capsys):
    found = evaluation(test=None)
    del found["calibration"], found["length"], found["wrong"]
    lines = printed(capsys, report.print_report, report.Path("runs/x"), found, [])
    assert not any("test split" in line for line in lines)
    assert any(line.endswith("--explain ID") for line in lines)


def test_the_report_prints_a_table_for_the_run_and_one_for_every_other_set(capsys):
    lines = report_of(capsys)
    titles = [line.split(":")[0] for line in lines if ": 60 pairs of 40 prompts" in line]
    assert titles == ["5 folds", "new, by heads of this set"]
    rows = [line for line in lines if line.startswith(("  sparserm", "  words"))]
    assert [line.split()[0] for line in rows] == ["sparserm", "words", "sparserm", "words"]
    assert "+0.100 [+0.001, +0.200]" in rows[1]             # on the run
    assert "-0.100 [-0.300, -0.010]" in rows[3]             # on the other set


def test_the_report_prints_a_row_for_every_category(capsys):
    lines = report_of(capsys, categories={"harm": row(0.6) | {"n": 7}, "facts": row(0.5)})
    rows = [line for line in lines if line.startswith(("  harm", "  facts"))]
    assert [" ".join(line.split()) for line in rows] == [
        "harm 0.600 [0.500, 0.800] 7 pairs", "facts 0.500 [0.400, 0.700] 60 pairs"]


@pytest.mark.parametrize("wrong, example", [([{"id": "a b"}], "--explain 'a b'"), ([], "ID")])
def test_the_report_ends_with_a_command_that_explains_the_most_wrong_pair(wrong, example, capsys):
    command, = [line for line in report_of(capsys, wrong=wrong) if "--explain" in line]
    assert "04_evaluate.py --run runs/x" in command
    assert command.endswith(example)


def test_with_a_name_the_commands_name_it_and_the_files_lie_in_its_folder(capsys):
    lines = report_of(capsys, name="paper")
    assert any("04_evaluate.py --run runs/x --name paper --explain" in line for line in lines)
    assert any("--reward runs/x/paper/reward_head.safetensors" in line for line in lines)
    assert any("runs/x/paper/evaluation.json" in line for line in lines)


def named(name, right=None, tasks=None):
    return {"name": name, "right": right, "tasks": tasks}


@pytest.mark.parametrize("found, text", [
    (named("commas", 7, 10), "commas (7 of 10 right)"),
    (named("", 2, 9), "no name (2 of 9 right)"),
    (named("a label of others"), "a label of others"),
    (named("not tested", 0, 0), "not tested"),
])
def test_a_name_is_printed_with_its_score_where_it_has_one(found, text, capsys):
    line, = [line for line in report_of(capsys, names={40: found}) if line.startswith("      40")]
    assert line == f"      40  chosen                -0.0500   {text}"


def test_latents_are_named_in_the_order_of_the_head_and_others_left_out(capsys):
    lines = report_of(capsys, names={300: named("c"), 5: named("a")})
    found = [line.split()[0] for line in lines if "  chosen  " in line]
    assert found == ["5", "300"]
    assert not any("does not use" in line for line in lines)


def test_of_many_names_twenty_are_printed_and_the_rest_counted(capsys):
    rows = [{"latent": n, "side": "chosen", "adds_firing": 0.1} for n in range(26)]
    lines = report_of(capsys, names={n: named("x") for n in range(26)}, latents=rows)
    assert len([line for line in lines if "  chosen  " in line]) == 20
    assert "       6  more have a name" in lines


def test_names_of_latents_that_a_head_does_not_use_are_counted_in_a_note(capsys):
    lines = report_of(capsys, names={5: named("a"), 6: named("b"), 7: named("c")})
    assert ("note: 2 of the 3 names are of latents that this head does not use") in lines


def test_without_names_none_are_printed(capsys):
    for names in (None, {}):
        assert not any("name" in line for line in report_of(capsys, names=names))


@pytest.mark.parametrize("name, page", [(None, "runs/x/report.html#quiz"),
                                        ("paper", "runs/x/paper/report.html#quiz")])
def test_the_report_says_where_the_quiz_is(name, page, capsys):
    line, = [line for line in report_of(capsys, name=name, quiz={"directions": [{}] * 13})
             if line.startswith("quiz ")]
    assert "13 directions" in line and page in line and "--names" in line


@pytest.mark.parametrize("changes", [{}, {"quiz": {"directions": []}}])
def test_where_there_is_no_quiz_the_report_speaks_of_none(changes, capsys):
    assert not any("quiz" in line for line in report_of(capsys, **changes))
