# make demo: evaluate the bundled checkpoint on yoco_needle and draw the heatmap.
# make test: lint and run the tests.
# Both create .venv with $(PYTHON), 3.10 or later, and install into it what is missing.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --constraint constraints.txt
DEMO := results/demo

.PHONY: demo test

demo: .venv/installed
	rm -rf $(DEMO)
	HF_HUB_OFFLINE=1 $(BIN)/lm_eval --model yoco --tasks yoco_needle --output_path $(DEMO) \
		--metadata '{"context_lengths": [1024, 2048, 4096, 8192, 16384], "depths": 11, "samples": 2}'
	$(BIN)/yoco-eval heatmap $(DEMO) -o $(DEMO)/needle.png
	$(BIN)/yoco-eval heatmap $(DEMO)

# One thread for each of the two processes: more would wait for each other on two cores.
test: .venv/installed-test
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# torch comes first and alone, so that its pin decides which build is taken.
.venv/installed: setup.cfg setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) --editable '.[test]'
	touch $@
