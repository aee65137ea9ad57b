# Everything a person types. Every target sets up .venv first; the second time that takes no time.
#
#   make demo       phantoms -> prepare -> tune -> train -> evaluate -> report.html
#   make test       the tests that take minutes;  make test-slow: the others
#   make test-s3    the tests against a real S3 server, which it starts;  make test-all: all three
#   make debian     as root: Debian's dcmtk, an independent DICOM decoder for the tests
#   make check      format, lint, types, import rules: never writes;  make fix: mends what it can
#   make bench      what decoding, preparing, explaining, judging and loading cost, as ratios of one run
#   make prepare    SOURCE=folder STORE=url
#   make train      STORE=url [RUN=url] [ARGS="--recipe fast --train.epochs 3"]
#   make tune       STORE=url [RUN=url] [ARGS=…]
#   make evaluate   STORE=url RUN=url [ARGS=…]
#   make dashboards      W&B workspaces as JSON;  ARGS="--save --entity TEAM" saves them, with a key
#   make predict    SOURCE=folder of DICOM files RUN=url OUTPUT=folder [ARGS=…]
#
# With RAY_ADDRESS=http://head:8265 the five jobs run on that cluster instead of this machine.

SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

STORE ?= $(if $(filter demo,$(MAKECMDGOALS)),data/demo/store)
ARGS ?=

# Where a job runs: here, or submitted to the cluster of RAY_ADDRESS.
ifneq ($(filter http://% https://%,$(RAY_ADDRESS)),)
job = $(BIN)/python -m cluster submit $(1)
else
job = $(BIN)/python -m jobs.$(1)
endif
needs = $(if $($(1)),,$(error make $@: say $(1)=…, see make help))

.PHONY: help setup debian demo prepare train tune evaluate predict dashboards check fix test test-slow test-s3 test-all bench lock clean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(READY)

# pip before 24 does not finish resolving this set; hashes make the lock the only source of versions.
$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
	  || { echo "error: Python 3.11 or 3.12 is needed; say make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "setting up .venv: 200 packages, 6 GB with torch; some minutes the first time" >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip==26.3'
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY)
	@$(BIN)/python -m jobs.demo --store $(STORE) $(ARGS)

prepare: $(READY)
	$(call needs,SOURCE)$(call needs,STORE)
	@$(call job,prepare) --source $(SOURCE) --store $(STORE) $(ARGS)

train tune: $(READY)
	$(call needs,STORE)
	@$(call job,$@) --store $(STORE) $(if $(RUN),--run $(RUN)) $(ARGS)

evaluate: $(READY)
	$(call needs,STORE)$(call needs,RUN)
	@$(call job,evaluate) --store $(STORE) --run $(RUN) $(ARGS)

predict: $(READY)
	$(call needs,SOURCE)$(call needs,RUN)$(call needs,OUTPUT)
	@$(call job,predict) --source $(SOURCE) --run $(RUN) --output $(OUTPUT) $(ARGS)

dashboards: $(READY)
	@$(BIN)/python -m pneumo.dashboards $(ARGS)

# The decoder that some tests compare ours with; where it cannot be had they skip, and say so.
debian:
	@command -v dcm2pnm > /dev/null || { test "$$(id -u)" = 0 && apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends dcmtk; } > /dev/null \
	  || echo "make debian: no DCMTK here (apt-get install dcmtk, as root); the tests that need it skip" >&2

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(READY)
	$(BIN)/python -m pytest -m "not slow and not s3"

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow and not s3"

test-s3: $(READY)
	$(BIN)/python -m tests.s3.server -- $(BIN)/python -m pytest -m s3

test-all: test test-slow test-s3

bench: $(READY)
	$(BIN)/python -m tests.benchmarks.decode
	$(BIN)/python -m tests.benchmarks.prepare rate
	$(BIN)/python -m tests.benchmarks.prepare memory
	$(BIN)/python -m tests.benchmarks.prepare index
	$(BIN)/python -m tests.benchmarks.metrics
	$(BIN)/python -m tests.benchmarks.explain cost
	$(BIN)/python -m tests.benchmarks.explain memory
	$(BIN)/python -m tests.s3.server -- $(BIN)/python -m tests.benchmarks.loader $(ARGS)

lock: $(READY)
	CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet --extra dev --extra codecs --allow-unsafe \
	  --generate-hashes --strip-extras --no-emit-index-url --no-emit-find-links \
	  --no-emit-trusted-host --output-file requirements.lock pyproject.toml

clean:
	rm -rf data/demo .ruff_cache .mypy_cache .pytest_cache .import_linter_cache
