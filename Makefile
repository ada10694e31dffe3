# Everything runs through .venv/bin; nothing needs an activated environment.
PY := .venv/bin/python
LOCK := $(PY) -m uv pip compile pyproject.toml --extra dev --extra notebook \
	--universal --python-version 3.12 --generate-hashes --no-header \
	--no-annotate --quiet

# Workers get whole files, those that take longest first; one needs up to 4 GB.
SPREAD := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
LEVEL := fast
TESTS ?=
RECORD ?=

.PHONY: help setup demo test test-all test-kernels lint format bench notebooks results kernels device device-pack lock build clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: ## make .venv from requirements.lock (does nothing when it is up to date)
	@python3 tools/setup.py

demo: setup ## the bundled model with and without a compressed cache
	@.venv/bin/kvjax demo

test: setup ## the tests of every change, minutes (LEVEL=ci: what .ci/run takes)
	@$(PY) -m pytest -q $(SPREAD) --level $(LEVEL) --durations 10 $(RECORD) $(TESTS)

test-all: setup ## all tests, hours (JAX=newest: under the newest JAX of our range)
	@$(PY) tools/tests.py $(JAX)

test-kernels: setup ## every kernel in its interpreter against its reference
	$(PY) -m pytest -q $(SPREAD) --level all tests/kernels

lint: setup ## ruff and pyright
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright

format: setup ## let ruff rewrite what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: setup ## every script of benchmarks/, an hour or more
	@$(PY) benchmarks/run.py

notebooks: setup ## notebooks as .ipynb, executed, in dist/notebooks; minutes
	@mkdir -p dist/notebooks
	@for file in notebooks/*.py; do $(PY) -m jupytext --quiet --to ipynb --execute \
		--output dist/notebooks/$$(basename $$file .py).ipynb $$file || exit 1; done

results: setup ## train and measure what docs/results/ shows, hours
	@$(PY) tools/results.py

kernels: setup ## compile all kernels for TPU v5e, v6e, v7x and the H200; print the table
	@$(PY) tools/kernels.py

device: ## all that needs a GPU, in nine minutes; DRY=1, OUT=, BUDGET=, STAGES=, PYTHON=
	@$(or $(PYTHON),python3) tools/device.py $(if $(PYTHON),--python $(PYTHON)) \
		$(if $(DRY),--dry) $(if $(OUT),--out $(OUT)) \
		$(if $(BUDGET),--budget $(BUDGET)) $(if $(STAGES),--stages $(STAGES))

device-pack: setup ## wheels in .wheels/ that `make device` needs where there is no network
	@$(PY) tools/device_pack.py

lock: setup ## resolve the dependencies again
	echo 'jax==0.11.2' | UV_SYSTEM_CERTS=1 $(LOCK) --constraint - --upgrade -o requirements.lock

build: setup ## wheel and sdist in dist/
	$(PY) -m build --no-isolation

clean: ## remove what a build or a run leaves behind (.venv* stay)
	rm -rf build dist .cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
