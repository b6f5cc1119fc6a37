"""sparserm.py, the import for other people's code, from a folder that is not the project's."""

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import tiny

stage3 = importlib.import_module("03_train_head")


def elsewhere(code, folder):
    """Run some Python in a folder, the project on PYTHONPATH → what it printed, as JSON."""
    # with another hash seed sets come in another order than here
    environment = {**os.environ, "PYTHONPATH": str(tiny.ROOT), "PYTHONHASHSEED": "3"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_reward_model_is_imported_and_used_from_another_folder(finished, tmp_path):
    head = finished / "reward_head.safetensors"
    rows = tiny.make_pairs(12)
    texts = [[row["prompt"] for row in rows] * 2,
             [row["chosen"] for row in rows] + [row["rejected"] for row in rows]]
    code = f"""
import json
from sparserm import RewardModel
reward = RewardModel.load({str(head)!r})
print(json.dumps(reward.score(*{texts!r})))
"""
    here = np.array(stage3.RewardModel.load(head).score(*texts))
    assert np.abs(elsewhere(code, tmp_path) - here).max() <= 1e-3 * here.std()


def test_an_sae_is_read_from_another_folder(finished, tmp_path):
    code = f"""
import json
from sparserm import load_sae
sae = load_sae({str(finished.parent / "sae.safetensors")!r})
print(json.dumps([sae.d_model, sae.d_sae, sae.activation]))
"""
    assert elsewhere(code, tmp_path) == [tiny.WIDTH, 64, "relu"]


def test_all_that_it_promises_is_there():
    sparserm = importlib.import_module("sparserm")
    assert sorted(sparserm.__all__) == ["RewardModel", "load_sae"]
    assert sparserm.RewardModel is stage3.RewardModel
    assert sparserm.load_sae is importlib.import_module("sae").load_sae
