"""The reward model for your own code: `from sparserm import RewardModel, load_sae`.

In the project's folder, or anywhere with that folder on PYTHONPATH.
"""

import importlib

from sae import load_sae

RewardModel = importlib.import_module("03_train_head").RewardModel

__all__ = ["RewardModel", "load_sae"]
