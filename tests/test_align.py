"""benchmarks/align.py, rank_answers.py and likelihood.py: what their figures are made of."""

import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

sys.path.append(str(tiny.ROOT / "benchmarks"))
align, likelihood = importlib.import_module("align"), importlib.import_module("likelihood")
stage1 = align.stage1


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_log_likelihoods_are_those_of_each_text_alone(family, backbone_of):
    backbone = backbone_of(family)
    prompts = ["Is water wet?", "Is water wet?", "Is water blue?", [{"role": "user", "content": "One"}]]
    responses = ["Yes, it is.", "Yes, no.", "No", "two three four five six seven eight nine ten"]
    sums, counts = likelihood.log_likelihoods(backbone, prompts, responses)
    for prompt, response, found, count in zip(prompts, responses, sums, counts, strict=True):
        text = stage1.render(backbone.tokenizer, prompt, response)
        with torch.inference_mode():
            logits = backbone.model(torch.tensor([text.ids])).logits[0].log_softmax(-1)
        wanted = sum(float(logits[n - 1, text.ids[n]]) for n in range(text.first, text.eot + 1))
        assert found == pytest.approx(wanted, rel=1e-4) and count == text.eot + 1 - text.first


def rows(n):
    question = lambda i: {"question": f"q{i // 2}", "prompt": f"q{i // 2}"}
    return [{"id": str(i), **question(i), "chosen": f"right {i}", "rejected": f"wrong {i}"} for i in range(n)]


def test_flipping_swaps_the_sides_of_the_asked_share_and_no_others():
    noisy = align.flipped(rows(20), 0.3, seed=1)
    assert sum(r["flipped"] for r in noisy) == 6
    assert all(r["chosen"].startswith("wrong" if r["flipped"] else "right") for r in noisy)
    assert [r["flipped"] for r in noisy] == [r["flipped"] for r in align.flipped(rows(20), 0.3, 1)]
    assert [r["flipped"] for r in noisy] != [r["flipped"] for r in align.flipped(rows(20), 0.3, 2)]


def test_a_cut_never_puts_a_question_on_both_sides():
    first, rest = align.cut(rows(20), 7)
    assert len(first) == 8 and not {r["question"] for r in first} & {r["question"] for r in rest}
    assert align.cut(rows(4), 9) == (rows(4), [])


def test_each_filter_keeps_what_it_says(tmp_path):
    noisy = align.flipped(rows(10), 0.3, 0)
    (tmp_path / "kept-0.jsonl").write_text("".join(json.dumps(r) + "\n" for r in noisy[:6]))
    dense, length = np.array([1.0, -1] * 5), np.array([0.0, -2, 3, 1, 1, 1, 1, 1, 1, 1])
    kept = lambda name: [r["id"] for r in align.kept_by(name, noisy, dense, length, tmp_path, SimpleNamespace(), 0)]
    assert kept("none") == [r["id"] for r in noisy] and kept("dense") == ["0", "2", "4", "6", "8"]
    assert kept("oracle") == [r["id"] for r in noisy if not r["flipped"]]
    assert kept("length") == [r["id"] for r in noisy if r["id"] != "1"]                  # a tie is kept
    assert len(kept("random")) == 6 and kept("random") == kept("random")


def test_what_a_policy_gets_right_is_read_as_written():
    base, found = {"chosen": [-5, -5, -5], "rejected": [-4, -6, -5]}, {"chosen": [-4, -5, -6], "rejected": [-4, -7, -5], "mc1": [1, 0]}
    right = align.right(found, base)
    assert right["likelihood"].tolist() == [False, True, False]         # a tie is not right
    assert right["implicit"].tolist() == [True, True, False]            # log-ratios 1 > 0, 0 > -1, -1 < 0
    assert right["mc1"].tolist() == [1, 0]


def test_candidates_that_share_the_highest_score_share_the_label():
    best = importlib.import_module("rank_answers").label_of_best
    assert best([1, 3, 2], [0, 1, 0]) == 1 and best([0, 0, 0, 0], [0, 1, 0, 0]) == 0.25 and best([2, 2, 1], [1, 0, 0]) == 0.5
