"""What the scripts are built from and SparseRM adds nothing to. A part imports parts only.

rows        layouts of preference data              chat        prompt and response → token ids
files       whole or absent, with their lineage     models      opening a model
packing     many texts in one forward pass          devices     several processes, out of memory
sampled     a reward read off the sampling          statistics  intervals
latents     what the latents are, why A beat B      report      tables, pictures, the page

The method itself is in the numbered scripts and sae.py.
"""
