"""Commands beside the five stages: training and checking an SAE, checking a finished reward
model."""

import os

# Threads that wait for each other at full speed take the cores from those they wait for, where
# others work on this machine too: ten times as long. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
