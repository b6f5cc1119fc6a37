"""What the scripts are built from and SparseRM adds nothing to: files that are whole or absent, layouts of preference data, chat
templates, opening a model, pictures and the report page, training an SAE. The method itself is in the numbered scripts and sae.py."""
