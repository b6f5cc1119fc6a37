"""Log-likelihoods of responses under a causal language model, a shared prompt computed once. Imported by the other benchmarks."""

import dataclasses
import importlib
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
stage1 = importlib.import_module("01_extract")


def log_likelihoods(backbone, prompts, responses, max_length=2048):
    """Σ log p(token | what precedes it) over each response and its end-of-turn mark → (sums [n], numbers of tokens [n]), numpy.

    The prompt's own tokens do not count. Texts are packed as in stage 1, with the output matrix in the place of block L.
    """
    texts = [stage1.render(backbone.tokenizer, p, r, max_length) for p, r in zip(prompts, responses, strict=True)]
    sums, counts = np.zeros(len(texts)), np.array([t.eot + 1 - t.first for t in texts])
    cap = getattr(backbone.model.config.get_text_config(), "final_logit_softcapping", None)
    whole = dataclasses.replace(backbone, blocks=[backbone.model.get_output_embeddings()])
    for members, (logits,) in stage1.hidden_rows(whole, [t.ids for t in texts], [0]):
        logits = cap * torch.tanh(logits.float() / cap) if cap else logits.float()
        total = logits.logsumexp(-1)                                                                # [T]
        for i, path in members:
            before = torch.from_numpy(path[texts[i].first - 1:texts[i].eot]).to(logits.device)      # each token is told by the one before
            wanted = torch.tensor(texts[i].ids[texts[i].first:texts[i].eot + 1], device=logits.device)
            sums[i] = float((logits[before, wanted] - total[before]).double().sum())
    return sums, counts
