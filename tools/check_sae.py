"""How well does an SAE fit a model on your texts: ordinary tokens, ends and means of answers?

    python -m tools.check_sae PATH --model M --texts FILE
"""

import argparse
import importlib

import numpy as np

from parts.files import run_main
from sae import SAEError, describe, warnings_of
from tools.train_sae import (
    ManualPage,
    add_text_flags,
    check_counts,
    check_layer,
    health_of_pools,
    read_texts,
    sample_activations,
)

stage1, stage2 = (importlib.import_module(name) for name in ("01_extract", "02_select_features"))


def parse_args():
    """The flags."""
    p = argparse.ArgumentParser(prog="python -m tools.check_sae", description=__doc__,
                                formatter_class=ManualPage)
    p.add_argument("path", help="SAE file or folder, hub:REPO[:SUBFOLDER]")
    p.add_argument("--k-sae", type=int, help="k of a TopK SAE whose files lack it (Qwen-Scope)")
    p.add_argument("--revision", help="branch, tag or commit on the hub")
    p.add_argument("--sae-dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                   help="in memory")
    add_text_flags(p, limit=400)
    args = p.parse_args()
    check_counts(args)
    return args


def main():
    """Check an SAE from the command line."""
    args = parse_args()
    sae = stage2.open_sae(args.path, args.sae_dtype, args.k_sae, args.revision)
    backbone = stage1.load_backbone(args.model)
    width = backbone.model.config.get_text_config().hidden_size
    if sae.d_model != width:
        raise SAEError(f"the SAE reads width {sae.d_model}, {args.model} has width {width} · "
                       f"{args.path} · pass the SAE of this model, or its --model")
    layer = args.layer if args.layer is not None else sae.info.get("layer")
    if layer is None:
        raise SAEError(f"the SAE does not say its layer · {args.path} · pass --layer")
    check_layer(backbone, layer, args.model)

    texts = read_texts(args.texts)
    chosen = np.random.default_rng(args.seed).permutation(len(texts))[:args.limit]
    found = sample_activations(backbone, [texts[i] for i in chosen], layer, args.max_length)
    figures = health_of_pools(sae, found)

    print(f"{describe(sae)}\n")
    for pool, fit in figures.items():
        print(f"{pool:<8} explained variance {fit['explained_variance']:.3f} · "
              f"L0 {fit['l0']:.1f} · "
              f"never fire here {fit['silent']:.1%} · {fit['n']} vectors")
    for warning in warnings_of(sae, figures["tokens"], figures.get("means")):
        print(f"warning: {warning}")


if __name__ == "__main__":
    run_main(main, SAEError)
