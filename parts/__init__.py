"""What the scripts are built from and SparseRM adds nothing to. A part imports parts only.

rows        layouts of preference data              messages    one form for what rows hold
candidates  prompts and candidates of stage 5       chat        prompt and response → token ids
files       whole or absent, with their lineage     contents    what each stage file must hold
models      opening a model                         devices     several processes, out of memory
packing     many texts in one forward pass          sampled     a reward read off the sampling
latents     what is said of a head's latents        contexts    where they fire; the quiz
explain     why A beat B                            report      tables, pictures, the page
statistics  intervals

The method itself is in the numbered scripts and sae.py.
"""
