# Two commands: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
DEMO ?= full
RUNS ?= runs
PORT ?= 5000
VENV := .venv
PY := $(VENV)/bin/python
TORCH := torch==2.13.0
CPU_WHEELS := https://download.pytorch.org/whl/cpu

.PHONY: demo ui test test-quick check setup clean

demo: setup                    ## render videos, train stages 1-3 on 4 local processes, ask about held-out videos
	$(PY) launchers/demo.py --size $(DEMO)

ui: setup                      ## MLflow's page of the runs in RUNS, at http://127.0.0.1:PORT
	MLFLOW_DISABLE_TELEMETRY=true $(PY) -m mlflow ui --host 127.0.0.1 --port $(PORT) --workers 1 \
	  --backend-store-uri sqlite:///$(abspath $(RUNS))/mlflow.db \
	  --default-artifact-root $(abspath $(RUNS))/mlflow_artifacts

# Test files side by side, one on each core; many of them wait more than they compute.
AT_ONCE := -n $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) --maxprocesses 4 --dist loadfile

# Many tests are about processes and time, and a busy machine fails one now and then: it gets a second try, and the summary
# counts it as rerun. What is broken fails twice.
test: setup                    ## all tests, the slow ones too
	$(PY) -m pytest $(AT_ONCE) --reruns 1 -r aR

test-quick: setup              ## without the slow ones
	$(PY) -m pytest $(AT_ONCE) -m "not slow"

check: setup                   ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

setup: $(VENV)/.installed

# The CPU build of torch where it is offered, and otherwise the ordinary one.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 13) else "Python 3.11 or 3.12 is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -c 'import torch' 2>/dev/null \
	  || $(PY) -m pip install --quiet --retries 0 --timeout 15 --index-url $(CPU_WHEELS) $(TORCH) 2>/dev/null \
	  || $(PY) -m pip install --quiet $(TORCH)
	$(PY) -m pip install --quiet -e '.[test]'
	touch $@

clean:                         ## the environment and all runs
	rm -rf $(VENV) runs
