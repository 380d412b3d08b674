# The two commands most people need: make run, make test.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: run test lab results bench adapters clean

run: $(VENV)/installed     ## execute all notebooks, top to bottom, in place
	$(BIN)/python notebooks/run.py && $(BIN)/python notebooks/readme.py

test: $(VENV)/installed    ## style, unit tests, and the notebooks through nbval (profile smoke)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	BINLLM_PROFILE=smoke $(BIN)/pytest tests
	BINLLM_PROFILE=smoke $(BIN)/pytest --nbval --nbval-current-env --nbval-cell-timeout 600 notebooks/02_*.ipynb notebooks/03_*.ipynb
	BINLLM_PROFILE=smoke $(BIN)/pytest --nbval-lax --nbval-current-env --nbval-cell-timeout 600 notebooks/0[01456]_*.ipynb

lab: $(VENV)/installed     ## JupyterLab, on this machine only, behind its token
	$(BIN)/jupyter lab --ip=127.0.0.1 --notebook-dir=.

results: $(VENV)/installed ## rewrite data/results, and the figures and tables made from it; hours, goes on where it was
	$(BIN)/python notebooks/results.py
	$(BIN)/python notebooks/run.py 01 05 && $(BIN)/python notebooks/readme.py

bench: $(VENV)/installed   ## rewrite data/results/bench.csv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	$(BIN)/python benchmarks/bench.py && $(BIN)/python notebooks/readme.py

adapters: $(VENV)/installed ## train what data/adapters holds, two hours; goes on where it was stopped
	for what in literacy pairs codes long; do $(BIN)/python notebooks/adapters.py $$what || exit 1; done

clean:                     ## forget data, models and adapters that can be fetched or made again
	rm -rf data/cache

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
