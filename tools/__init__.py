"""Commands beside the five stages: training and checking an SAE, checking a finished reward
model."""
