# Everything from a fresh machine: system packages, virtual environment, C core.
#
#   make demo      a migration on this machine, verified
#   make test      the tests; ARGS="-k wire" passes arguments on
#   make check     what can this host do?
#   make lint      ruff
#   make fuzz      all fuzz targets, TIME=600 seconds each; ARGS="ram stream" chooses some
#   make chaos     N=100 migrations over wires that break, workers that die; SEED=1 is the first one's
#   make setup     only the set-up
#   make clean     forget all of it
#
# PYTHON=python3.12 chooses the interpreter.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell tools/install-system-packages --which-python)
PIP := $(BIN)/python -m pip --disable-pip-version-check

# The editable install sees changed Python at once, but not a new package; and the extension is a
# copy: it is as new as this stamp, which is older than the C core as soon as that changes.  The stamp's time is that of
# the build's start, so that an edit during the build is not missed.
INSTALLED := $(VENV)/.installed
CORE := $(wildcard sharded_pc/native/*.[ch] sharded_pc/native/*/*.[ch] sharded_pc/native/*.txt \
                   sharded_pc/attach/guest/*.c sharded_pc/attach/guest/*.h \
                   sharded_pc/attach/preload/*.c sharded_pc/attach/preload/*.h \
                   sharded_pc/attach/monitor/*.c sharded_pc/attach/monitor/*.h \
                   sharded_pc/emulator/*.c \
                   sharded_pc/attach/program/*.c sharded_pc/attach/program/*.h \
                   sharded_pc/native/CMakeLists.txt)
PACKAGES := $(sort $(dir $(wildcard sharded_pc/*/__init__.py sharded_pc/*/*/__init__.py)))
RUFF := $(VENV)/.ruff
FUZZ := $(VENV)/.fuzz
TIME ?= 600
N ?= 100
SEED ?= 1

.PHONY: setup demo test check lint fuzz chaos clean system-packages newer-qemu packages-of-tests

setup: $(INSTALLED)

demo: setup
	$(BIN)/sharded-pc demo $(ARGS)

test: setup newer-qemu packages-of-tests
	$(BIN)/python -m pytest -n auto --dist loadgroup $(ARGS)

# Never fails: the tests that need them say so when they skip.
packages-of-tests: system-packages
	@tools/install-system-packages --tests || true

# A newer QEMU beside the distribution's, where its backports offer one.  Never fails: the tests that
# need it say so when they skip.
newer-qemu: setup
	@$(BIN)/python -m tests.qemu.backports ensure

check: setup
	$(BIN)/sharded-pc check $(ARGS)

lint: $(RUFF)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

fuzz: setup $(FUZZ)
	$(BIN)/python -m tests.fuzz --seconds $(TIME) $(ARGS)

chaos: setup
	$(BIN)/python -m tests.chaos --number $(N) --seed $(SEED) $(ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Cheap when nothing is missing, so it is asked every time: a package may have been removed.
system-packages:
	@PYTHON='$(PYTHON_GIVEN)' tools/install-system-packages

# Only a choice of the user's is passed on: before the packages are there, ours may find nothing.
PYTHON_GIVEN := $(if $(filter command environment override,$(firstword $(origin PYTHON))),$(PYTHON))

$(BIN)/python: | system-packages
	$(PYTHON) -m venv $(VENV)

# Made anew when the list of packages is another.
PACKAGES_SEEN := $(VENV)/.packages
ifneq ($(PACKAGES),$(shell cat $(PACKAGES_SEEN) 2>/dev/null))
$(INSTALLED): FORCE
endif
FORCE:

$(INSTALLED): pyproject.toml $(CORE) | $(BIN)/python
	@touch $@.new
	$(PIP) install --quiet --editable '.[test,ui]'
	@echo '$(PACKAGES)' > $(PACKAGES_SEEN)
	@mv $@.new $@

$(RUFF): Makefile | $(BIN)/python
	$(PIP) install --quiet 'ruff>=0.17'
	@touch $@

# A Python for which atheris has no wheel goes without; so does a machine without clang.
$(FUZZ): pyproject.toml | $(INSTALLED)
	-$(PIP) install --quiet --only-binary atheris --editable '.[test,ui,fuzz]'
	@touch $@
