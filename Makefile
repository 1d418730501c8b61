# Everything this project does, by name. `make` alone lists it.

# The Python that .venv is made from (3.11 to 3.13), the versions that it gets (PINS= for the
# newest), and the notebooks that `make execute` runs.
PYTHON ?= python3
PINS   ?= -c constraints.txt
NB     ?= $(wildcard notebooks/*.ipynb)

EXTRAS := book,playground,test,cluster,track
BIN    := .venv/bin
STAMP  := .venv/.complete
PAGES   = $(shell sed -nE 's,^[ -]*(root|file): *([^ ]+).*,_build/html/\2.html,p' _toc.yml)

# One torch thread for each notebook, so that two of them share two cores and outputs repeat.
# No progress bar is stored. Freed memory is kept: MALLOC of mnistlab/runs.py says why.
KEEP   := GLIBC_TUNABLES=glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592
QUIET  := OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(KEEP)

# $(call step,name,command): say what starts; on failure stop, and say where.
define step
	@echo '==> $(1)'
	@{ $(2); } || { echo '*** make $(MAKECMDGOALS) stopped at: $(1)' >&2; exit 1; }
endef

.PHONY: help env lab book test check execute results bench constraints clean unit nbval
.NOTPARALLEL:

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(STAMP) ## Make .venv, or bring it up to date
# The stamp marks a complete installation. Without one, a .venv is the remains of a failure, and
# is made anew; with one, it is brought up to date in place.
$(STAMP): pyproject.toml constraints.txt
	$(call step,find Python 3.11 to 3.13 with venv,$(PYTHON) -c "$$CHECK_PYTHON")
	$(call step,make .venv,test -f $@ || $(PYTHON) -m venv --clear .venv)
	$(call step,install the packages (minutes),$(PIP) $(PINS) -e '.[$(EXTRAS)]')
	@touch $@
PIP := $(BIN)/python -m pip install -q --no-compile

lab: env ## Open the chapters in JupyterLab
	$(call step,JupyterLab,$(BIN)/jupyter-lab --LabApp.default_url=/lab/tree/notebooks)

book: env nbval ## Run every notebook as a test, then build the site
	@rm -rf _build
	$(call step,build the site,$(BIN)/jupyter-book build . -W -n --keep-going)
	$(call step,every page of _toc.yml is there,ls _build/html/index.html $(PAGES) >/dev/null)
	@echo 'Done: open _build/html/index.html in a browser'

test: env unit nbval ## Run the unit tests, then every notebook as a test
	@echo 'All tests passed'

unit: env
	$(call step,unit tests,OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile)

nbval: env
	$(call step,notebooks as tests,$(QUIET) $(BIN)/python -m pytest $(NBVAL) notebooks)
NBVAL := -n 2 --dist loadfile --timeout 600 --nbval --nbval-sanitize-with nbval_sanitize.cfg \
         --nbval-current-env --nbval-cell-timeout 300

check: env ## Lint and spell-check, offline
	$(call step,ruff check,$(BIN)/ruff check .)
	$(call step,ruff format,$(BIN)/ruff format --check .)
	$(call step,codespell,$(BIN)/codespell)
	$(call step,actionlint (where installed),! command -v actionlint >/dev/null || actionlint)

execute: env ## Run the notebooks and store their outputs (one: NB=notebooks/02_dense.ipynb)
	$(call step,run the notebooks,$(QUIET) $(BIN)/jupyter-nbconvert $(EXECUTE) $(NB))
	$(call step,keep "3" of the version of Python,$(BIN)/python -c "$$TRIM_VERSION" $(NB))
	$(call step,copy the figure tagged home-chart,$(BIN)/python -c "$$COPY_CHART")
EXECUTE := --to notebook --execute --inplace --ExecutePreprocessor.timeout=300 \
           --ExecutePreprocessor.record_timing=False \
           --ExecutePreprocessor.store_widget_state=False

results: env ## Print the recorded results
	@$(BIN)/mnistlab results

bench: env ## Measure training speed on this machine
	$(call step,benchmark,$(BIN)/python -m mnistlab bench)

constraints: ## Pin the newest versions (HOLD='torch==2.13.0' holds some back)
	@rm -rf .venv
	$(call step,install the newest versions,$(MAKE) env PINS='$(HOLD)')
	$(call step,write constraints.txt,($(FREEZE)) > .venv/new && mv .venv/new constraints.txt)
# The comments at the top stay; "+cpu" and the like go, for other machines have other builds.
FREEZE := sed -n '/^\#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable \
          | sed 's/+.*//'

clean: ## Remove the built site and the caches
	rm -rf _build build *.egg-info .pytest_cache .ruff_cache notebooks/.ipynb_checkpoints
	find mnistlab tests -name __pycache__ -prune -exec rm -rf {} +
	@echo 'Kept .venv: remove it with rm -rf .venv'

# Python of more than one line, which a recipe cannot hold.
define CHECK_PYTHON
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit("Python %d.%d does not serve: try make PYTHON=python3.11" % sys.version_info[:2])
try:
    import ensurepip, venv
except ImportError:
    sys.exit("This Python has no venv. On Debian and Ubuntu: apt-get install python3-venv")
endef
define TRIM_VERSION
import fileinput, re
for line in fileinput.input(inplace=True, encoding="utf-8"):
    print(re.sub(r'^(   "version": "3)[.0-9]+"', r'\1"', line), end="")
endef
define COPY_CHART
import base64, pathlib, nbformat
for path in sorted(pathlib.Path("notebooks").glob("*.ipynb")):
    for cell in nbformat.read(path, 4).cells:
        if "home-chart" in cell.metadata.get("tags", []):
            png = cell.outputs[-1].data["image/png"]
            pathlib.Path("book/assets/chart.png").write_bytes(base64.b64decode(png))
endef
export CHECK_PYTHON TRIM_VERSION COPY_CHART
