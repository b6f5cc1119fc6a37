"""What the scripts are built from and SparseRM adds nothing to.

files       whole or absent, with their lineage; errors of one line        chat        prompt and response → token ids
rows        layouts of preference data                                     models      opening a model
explain     what the latents are, why A beat B                             report      tables, pictures, the page
self_check  03 --check                                                     sae_tools   the commands of sae.py, training an SAE

The method itself is in the numbered scripts and sae.py.
"""
