# Two commands for a fresh clone: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Additional packages: EXTRA="torch==2.13.0 transformers==5.24.0 gguf==0.19.0" also runs the comparisons with the plain
# PyTorch form and with transformers.
EXTRA ?=
# Options for `make mutants`, such as MUTANTS="--count=200 --seed=1".
MUTANTS ?=
# One stamp per set of packages: a new EXTRA is installed even if the environment exists.
STAMP := $(VENV)/.installed-$(shell printf '%s' '$(EXTRA)' | cksum | cut -d' ' -f1)

.PHONY: demo test mutants lint lock clean

demo: $(STAMP)  ## all of EViP in miniature; run again after an interruption, it resumes
	JAX_PLATFORMS=cpu $(BIN)/python experiments/evip.py --config=experiments/configs/demo.py --workdir=runs/demo

test: $(STAMP)  ## lint and all tests except the slow ones
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 -q

mutants: $(STAMP)  ## plants small faults in the core modules and lists those that no test detects; resumes
	JAX_PLATFORMS=cpu $(BIN)/python -m tests.mutants $(MUTANTS)

lint: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

LOCK := $(BIN)/uv pip compile setup.cfg --quiet --upgrade --universal --python-version 3.11 --no-annotate --custom-compile-command "make lock"

lock: $(STAMP)  ## the newest versions that fit setup.cfg, for each target, into requirements/
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9,<1'
	$(LOCK) --extra demo --extra dev --extra fast -o requirements/cpu.txt
	$(LOCK) --extra gpu --extra cloud -o requirements/gpu_cuda13.txt
	$(LOCK) --extra gpu_cuda12 --extra cloud -o requirements/gpu_cuda12.txt
	$(LOCK) --extra tpu --extra cloud -o requirements/tpu.txt

$(STAMP): requirements.txt requirements/cpu.txt setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "error: $(PYTHON) is $$($(PYTHON) --version); use Python 3.11 to 3.13: make PYTHON=python3.12 ..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt $(EXTRA)
	touch $@

clean:  ## removes the environment and the runs
	rm -rf $(VENV) runs
