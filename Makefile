# The two commands most people need: make run, make test.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
NBVAL = BINLLM_PROFILE=smoke $(BIN)/pytest --nbval-current-env --nbval-cell-timeout 600

.PHONY: run test lab results release bench adapters address clean

run: $(VENV)/installed     ## execute all notebooks into executed/; no tracked file changes
	$(BIN)/python scripts/run.py

test: $(VENV)/installed    ## style, unit tests, and the notebooks through nbval (profile smoke)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	BINLLM_PROFILE=smoke $(BIN)/pytest tests
	$(NBVAL) --nbval notebooks/02_*.ipynb notebooks/03_*.ipynb
	$(NBVAL) --nbval-lax notebooks/0[01456789]_*.ipynb notebooks/solutions/*.ipynb

lab: $(VENV)/installed     ## JupyterLab, on this machine only, behind its token
	$(BIN)/jupyter lab --ip=127.0.0.1 --notebook-dir=.

results: $(VENV)/installed ## make what is missing of data/results, and the tables from it; hours, goes on where it was
	$(BIN)/python scripts/results.py && $(BIN)/python scripts/readme.py

release: $(VENV)/installed ## execute the notebooks in place, renew figures, run times and tables
	$(BIN)/python scripts/run.py --release && $(BIN)/python scripts/readme.py

bench: $(VENV)/installed   ## rewrite data/results/bench.csv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	$(BIN)/python benchmarks/bench.py && $(BIN)/python scripts/readme.py

adapters: $(VENV)/installed ## teach the adapters of Part II anew, two hours; goes on where it was stopped
	for what in literacy pairs codes long; do $(BIN)/python scripts/adapters.py $$what || exit 1; done

address: $(VENV)/installed ## make address REPO=owner/name: rewrite the repository's public address everywhere
	$(BIN)/python scripts/address.py $(REPO)

clean:                     ## forget data, models and adapters that can be fetched or made again, and outputs
	rm -rf data/cache executed

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
