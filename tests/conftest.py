"""What every test shares: the project on the path, no network, one thread, and tiny models made
once a session."""

import importlib
import os
import sys
import tempfile
from pathlib import Path

import hypothesis
import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1",
                  TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")      # sums in one order, and no fight for the cores
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY",
                      str(Path(tempfile.gettempdir()) / "sparserm-hypothesis"))
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny  # noqa: E402  (torch reads OMP_NUM_THREADS when it is imported)

hypothesis.settings.register_profile("same every time", derandomize=True, deadline=None,
                                     max_examples=60)
hypothesis.settings.load_profile("same every time")


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """family → folder of a tiny model, made at its first use."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tiny.save_model(tmp_path_factory.mktemp("model") / family, family)
        return made[family]
    return get


@pytest.fixture(scope="session")
def backbone_of(folder_of):
    """family → Backbone of stage 1, opened at its first use."""
    stage1, opened = importlib.import_module("01_extract"), {}

    def get(family):
        if family not in opened:
            opened[family] = stage1.load_backbone(folder_of(family))
        return opened[family]
    return get


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Path of a run with stages 1 to 3 done; model, pairs.jsonl and sae.safetensors lie beside it.
    Copy it to change it."""
    return tiny.make_run(tmp_path_factory.mktemp("finished"))
