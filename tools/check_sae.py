"""How well does an SAE fit a model on your texts?

    python -m tools.check_sae PATH --model M --texts FILE
"""

import argparse
import importlib

import numpy as np

from parts.files import run_main
from sae import SAEError, describe, health, warnings_of
from tools.train_sae import ManualPage, add_text_flags, read_texts, sample_activations

stage1, stage2 = (importlib.import_module(name) for name in ("01_extract", "02_select_features"))


def parse_args():
    """The flags."""
    p = argparse.ArgumentParser(prog="python -m tools.check_sae", description=__doc__,
                                formatter_class=ManualPage)
    p.add_argument("path", help="SAE file or folder, hub:REPO[:SUBFOLDER]")
    p.add_argument("--k-sae", type=int, help="k of a TopK SAE whose files do not hold it "
                                             "(Qwen-Scope)")
    p.add_argument("--revision", help="branch, tag or commit on the hub")
    p.add_argument("--sae-dtype", choices=("float32", "bfloat16", "float16"), default="float32",
                   help="in memory")
    add_text_flags(p, limit=400)
    return p.parse_args()


def main():
    """Check an SAE from the command line."""
    args = parse_args()
    sae = stage2.open_sae(args.path, args.sae_dtype, args.k_sae, args.revision)
    backbone = stage1.load_backbone(args.model)
    width = backbone.model.config.get_text_config().hidden_size
    layer = args.layer if args.layer is not None else sae.info.get("layer")
    if layer is None or sae.d_model != width:
        raise SAEError(f"the SAE reads width {sae.d_model}, layer {layer}; {args.model} has width "
                       f"{width} · {args.path} · "
                       "pass the right SAE, --model and --layer")

    texts = read_texts(args.texts)
    chosen = np.random.default_rng(args.seed).permutation(len(texts))[:args.limit]
    every, ends = sample_activations(backbone, [texts[i] for i in chosen], layer, args.max_length)
    of_every = health(sae, every)
    of_ends = health(sae, ends) if len(ends) > 1 else None

    print(describe(sae), "", sep="\n")
    for name, figures in (("all tokens", of_every), ("scored token", of_ends)):
        if figures:
            print(f"{name:<14} explained variance {figures['explained_variance']:.3f} · L0 "
                  f"{figures['l0']:.1f} · "
                  f"latents that never fire here {figures['silent']:.1%} · {figures['n']} vectors")
    for warning in warnings_of(sae, of_every, of_ends):
        print(f"warning: {warning}")


if __name__ == "__main__":
    run_main(main, SAEError)
