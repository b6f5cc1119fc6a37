"""What can be read in an afternoon: the top level has at most 2,500 lines, a function at most 60, and nothing stands there twice."""

import ast
import collections

import pytest
import tiny

TOP = sorted(tiny.ROOT.glob("*.py"))
ALL = TOP + sorted((tiny.ROOT / "parts").glob("*.py"))


def test_the_scripts_at_the_top_level_have_at_most_2500_lines():
    lines = lambda paths: sum(len(path.read_text("utf-8").splitlines()) for path in paths)
    assert len(TOP) == 6 and lines(TOP) <= 2500 and lines(ALL) <= 4050          # with parts/, which a reader may leave out


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_no_function_is_longer_than_60_lines_and_each_says_what_it_does(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name}, line {node.lineno}"
            assert node.col_offset or ast.get_docstring(node), f"{node.name}, line {node.lineno}"


def test_no_block_of_six_lines_stands_twice():
    seen = collections.defaultdict(list)
    for path in ALL:
        lines = [(n, line.strip()) for n, line in enumerate(path.read_text("utf-8").splitlines(), 1) if line.strip()]
        for at in range(len(lines) - 5):
            seen["\n".join(text for _, text in lines[at:at + 6])].append(f"{path.name}:{lines[at][0]}")
    assert not [places for places in seen.values() if len(places) > 1]
