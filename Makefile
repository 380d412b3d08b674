# The two commands most people need: make run, make test.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# A file's tests stay together: they share what is made once.
TWO = BINLLM_PROFILE=smoke OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile
NBVAL = PYTHONPATH=tests $(TWO) -p kernels --nbval-current-env --nbval-cell-timeout 600

.PHONY: run test fuzz lab explorer results release bench adapters address lock audit clean

run: $(VENV)/installed     ## execute all notebooks into executed/; no tracked file changes
	$(BIN)/python scripts/run.py

test: $(VENV)/installed    ## style, unit tests, and the notebooks through nbval (profile smoke)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(TWO) -m "not e2e" tests
	BINLLM_PROFILE=smoke $(BIN)/pytest -m e2e tests
	$(NBVAL) --nbval notebooks/02_*.ipynb notebooks/03_*.ipynb
	$(NBVAL) --nbval-lax notebooks/0[01456789]_*.ipynb notebooks/1*.ipynb notebooks/solutions/*.ipynb

fuzz: $(VENV)/installed    ## the drills of tests/ in their long form, over 100,000 cases; kept in data/results/drills.csv
	$(TWO) --fuzz tests/test_drill.py tests/test_own.py tests/test_faults.py

lab: $(VENV)/installed     ## JupyterLab, on this machine only, behind its token
	$(BIN)/jupyter lab --ip=127.0.0.1 --notebook-dir=.

explorer: $(VENV)/installed ## the bit explorer of all films as one page: executed/explorer.html
	$(BIN)/python scripts/explorer.py

results: $(VENV)/installed ## make what is missing of data/results, and the tables from it; hours, goes on where it was
	for what in results families cold controls verdict readme; do $(BIN)/python scripts/$$what.py || exit 1; done

release: $(VENV)/installed ## execute the notebooks in place, renew figures, run times, tables and the page
	$(BIN)/python scripts/run.py --release && $(BIN)/python scripts/readme.py && $(BIN)/python scripts/explorer.py --public

bench: $(VENV)/installed   ## rewrite data/results/bench.csv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements.txt
	$(BIN)/python benchmarks/bench.py && $(BIN)/python scripts/readme.py

adapters: $(VENV)/installed ## teach the adapters that ship anew, hours (the last wants a GPU); goes on where it was stopped
	for what in literacy pairs titles all_titles one_step; do $(BIN)/python scripts/adapters.py $$what || exit 1; done

address: $(VENV)/installed ## make address REPO=owner/name: rewrite the repository's public address everywhere
	$(BIN)/python scripts/address.py $(REPO)

lock: $(VENV)/tools/installed        ## renew requirements.lock from requirements.txt: every package of every platform, with hashes
	$(VENV)/tools/bin/uv pip compile requirements.txt --generate-hashes --universal --python-version 3.11 -q -o requirements.lock

audit: $(VENV)/tools/installed       ## ask the public databases for known weaknesses; write a bill of materials
	$(VENV)/tools/bin/pip-audit -r requirements.lock --disable-pip --require-hashes
	mkdir -p executed && $(VENV)/tools/bin/cyclonedx-py requirements requirements.lock -o executed/sbom.json

clean:                     ## forget data, models and adapters that can be fetched or made again, and outputs
	rm -rf data/cache executed

$(VENV)/installed: requirements.txt requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; say make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	sed -n 's/ *\\$$//; /^[A-Za-z0-9]/p' requirements.lock >$(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c $(VENV)/constraints.txt
	touch $@

$(VENV)/tools/installed: $(VENV)/installed
	$(PYTHON) -m venv $(VENV)/tools
	$(VENV)/tools/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9 pip-audit==2.10.1 cyclonedx-bom==7.5.0
	touch $@
