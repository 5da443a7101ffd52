# make demo: evaluate two bundled checkpoints on yoco_needle and compare them on an HTML page.
# make test: lint, check types, run the tests; make test-fast: without those marked slow, in two
# minutes.
# make docs: the site of README.md and docs/, in build/docs; a link that leads nowhere fails, in
# make test, too.
# make fuzz CASES=5000 SEED=1: so many damaged files, of which the tests try 600 of seed 0.
# All create .venv with $(PYTHON), 3.10 or later, and install into it what is missing.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --constraint constraints.txt
DEMO := results/demo
CASES ?= 600
SEED ?= 0

.PHONY: demo test test-fast docs fuzz

demo: .venv/installed
	rm -rf $(DEMO)
	for model in demo-4k demo-1m; do \
		HF_HUB_OFFLINE=1 $(BIN)/lm_eval --model yoco --model_args pretrained=$$model,max_length=16k \
			--tasks yoco_needle --log_samples --output_path $(DEMO)/$$model \
			--metadata '{"context_lengths": ["1k", "4k", "16k"], "depths": 11, "samples": 4}' || exit; \
	done
	$(BIN)/yoco-eval compare $(DEMO)/demo-4k $(DEMO)/demo-1m -o $(DEMO)/comparison.html

# One thread for each of the two processes: more would wait for each other on two cores.
test test-fast: docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(if $(filter test-fast,$@),-m 'not slow')

docs: .venv/installed-test
	$(BIN)/sphinx-build -qWEa --keep-going -c docs . build/docs

fuzz: .venv/installed-test
	$(BIN)/python tests/faults/fuzz.py --cases $(CASES) --seed $(SEED)

# torch comes first and alone, so that its pin decides which build is taken.
.venv/installed: setup.cfg setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) --editable '.[docs,test]'
	touch $@
