# Everything a person types. Every target sets up .venv first; the second time that takes no time.
#
#   make demo       phantoms -> prepare -> tune -> train -> evaluate -> report.html
#   make prepare    SOURCE=folder STORE=url
#   make train      STORE=url [RUN=url] [ARGS="--recipe fast --train.epochs 3"]
#   make tune       STORE=url [RUN=url] [ARGS=…]
#   make evaluate   STORE=url RUN=url [ARGS=…]
#   make predict    SOURCE=folder of pictures RUN=url OUTPUT=folder [ARGS=…]
#   make export     RUN=url OUTPUT=folder: the model as ONNX, with what scores a DICOM file
#   make leave-one-out  STORES=url,url,… RUN=url [ARGS=…]: each set left out of a training, evaluated on it
#   make track      RUN=url: the run or search to W&B from its folder, as often as you like
#   make dashboards      W&B workspaces as JSON;  ARGS="--save --entity TEAM" saves them, with a key
#
#   Jobs run on this machine; with RAY_ADDRESS=http://head:8265 on that Ray cluster, with TARGET=k8s
#   OVERLAY=gpu-spot on Kubernetes: docs/cluster.md.
#
#   make watch      all your runs on the cluster, live, until they have ended
#   make up         PROVIDER=aws|gcp|onprem: a Ray cluster of VMs;  make forward: its dashboard, here
#   make down       PROVIDER=…: the VMs are given back;  make down TARGET=k8s: your runs are cancelled
#   make image      [IMAGE=name:tag] [BASE_IMAGE=…]: the container image, with podman or docker
#   make setup-k8s  OVERLAY=…: as a namespace's administrator, once: rights, policies, accounts
#
#   make check      format, lint, types, import rules: never writes;  make fix: mends what it can
#   make test       what needs neither a cluster nor a server: minutes;  make test-ray: on a Ray cluster,
#                   which it starts;  make test-wandb: sends runs to a W&B backend, which it starts;
#                   make test-slow: what takes longer
#   make test-processors  what computes, as if on several processors, and on busy cores: minutes; some
#                   of them: ARGS='"AVX2, AMD" SSE4'
#   make test-s3    the tests against a real S3 server, which it starts
#   make test-cluster  as root: faults on Ray clusters of several nodes
#   make test-kubernetes  on the cluster that PNEUMO_TEST_KUBECONFIG names, or one that it starts;
#                   make test-kubernetes-faults: what waits for minutes;  make test-all: all but that
#   make debian     as root: for the tests Debian's dcmtk (a DICOM decoder) and Chromium
#   make bench      what decoding, preparing, explaining, scoring and loading cost, as ratios of one run
#   make bench-train [ARGS="--rounds 5"]: images/s of the bare step, from a store, under Ray, as ratios
#   make bench-verdicts [ARGS="--sets 200"]: how often intervals cover and sentences are false

SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

STORE ?= $(if $(filter demo,$(MAKECMDGOALS)),data/demo/store)
ARGS ?=

# Where a job runs: here, or submitted to the cluster of RAY_ADDRESS or to Kubernetes.
ifeq ($(TARGET),k8s)
job = $(call needs,OVERLAY)$(BIN)/python -m cluster submit --target k8s --overlay $(call quoted,OVERLAY) $(1)
else ifneq ($(TARGET),)
$(error TARGET=$(TARGET): say TARGET=k8s, or RAY_ADDRESS=http://head:8265, or neither)
else ifneq ($(filter http://% https://%,$(RAY_ADDRESS)),)
job = $(BIN)/python -m cluster submit $(1)
else
job = $(BIN)/python -m jobs.$(1)
endif
needs = $(if $($(1)),,$(error make $@: say $(1)=…, see make help))
# An overlay of k8s/overlays by name, or the folder of your own.
OVERLAY_FOLDER = $(if $(wildcard k8s/overlays/$(OVERLAY)/kustomization.yaml),k8s/overlays/$(OVERLAY),$(OVERLAY))
# As one word of the shell, whatever is in it; ARGS are words as they stand.
quoted = '$(subst ','\'',$($(1)))'

vms = $(if $(wildcard cluster/$(PROVIDER).yaml),cluster/$(call quoted,PROVIDER).yaml,$(error \
  make $@: PROVIDER=$(PROVIDER): no cluster/$(PROVIDER).yaml; say aws, gcp or onprem))

IMAGE ?= pneumo:dev
CONTAINERS ?= $(or $(shell command -v podman),docker)
WITHOUT_RUN := app.kubernetes.io/component!=run

.PHONY: help setup debian demo prepare train tune evaluate leave-one-out predict export track dashboards check fix test test-ray \
  test-wandb test-slow test-processors test-s3 test-cluster test-kubernetes test-kubernetes-faults test-all \
  bench bench-train bench-verdicts lock clean up down watch forward image setup-k8s

help:
	@sed -n 's/^#   //p; s/^#$$//p' Makefile

setup: $(READY)

# pip before 24 does not finish resolving this set; hashes make the lock the only source of versions.
$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" && $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
	  || { echo "error: Python 3.11 or 3.12 is needed; say make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@echo "setting up .venv: 200 packages, 6 GB with torch; some minutes the first time" >&2
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip==26.3'
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY)
	@$(BIN)/python -m jobs.demo --store $(call quoted,STORE) $(ARGS)

prepare: $(READY)
	$(call needs,SOURCE)$(call needs,STORE)
	@$(call job,prepare) --source $(call quoted,SOURCE) --store $(call quoted,STORE) $(ARGS)

train tune: $(READY)
	$(call needs,STORE)
	@$(call job,$@) --store $(call quoted,STORE) $(if $(RUN),--run $(call quoted,RUN)) $(ARGS)

evaluate: $(READY)
	$(call needs,STORE)$(call needs,RUN)
	@$(call job,evaluate) --store $(call quoted,STORE) --run $(call quoted,RUN) $(ARGS)

leave-one-out: $(READY)
	$(call needs,STORES)$(call needs,RUN)
	@$(BIN)/python -m jobs.leave_one_out --stores $(call quoted,STORES) --run $(call quoted,RUN) $(ARGS)

predict: $(READY)
	$(call needs,SOURCE)$(call needs,RUN)$(call needs,OUTPUT)
	@$(call job,predict) --source $(call quoted,SOURCE) --run $(call quoted,RUN) \
	  --output $(call quoted,OUTPUT) $(ARGS)

export: $(READY)
	$(call needs,RUN)$(call needs,OUTPUT)
	@$(BIN)/python -m jobs.export --run $(call quoted,RUN) --output $(call quoted,OUTPUT) $(ARGS)

track: $(READY)
	$(call needs,RUN)
	@$(BIN)/python -m jobs.track --run $(call quoted,RUN) $(ARGS)

dashboards: $(READY)
	@$(BIN)/python -m pneumo.dashboards $(ARGS)

# A cluster of VMs by Ray's own launcher; what it starts costs money until `make down`. Its newer
# autoscaler (the default) does not start the workers of machines that are there: of Ray 2.60 it was seen.
up: $(READY)
	$(call needs,PROVIDER)
	@$(if $(filter onprem,$(PROVIDER)),RAY_UP_enable_autoscaler_v2=0 )$(BIN)/ray up --yes $(call vms)

ifeq ($(TARGET),k8s)
down: $(READY)
	@$(BIN)/python -m cluster down --target k8s $(ARGS)
else
down: $(READY)
	$(call needs,PROVIDER)
	@$(BIN)/ray down --yes $(call vms)
endif

watch: $(READY)
	@$(BIN)/python -m cluster status --watch $(if $(TARGET),--target $(TARGET)) $(ARGS)

forward: $(READY)
	$(call needs,PROVIDER)
	@$(BIN)/ray dashboard $(call vms)

setup-k8s:
	$(call needs,OVERLAY)
	@# A team's overlay has the Role, in its own namespace.
	@kubectl kustomize $(call quoted,OVERLAY_FOLDER) | grep -qx 'kind: Role' || kubectl apply -k k8s/rbac
	@kubectl apply -k $(call quoted,OVERLAY_FOLDER) --selector '$(WITHOUT_RUN)'

image:
	$(CONTAINERS) build --tag $(call quoted,IMAGE) --build-arg REVISION=$$(git describe --always --dirty --abbrev=40) \
	  $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(call quoted,BASE_IMAGE)) .

k8s/components/monitoring/ray-train.json: $(READY)
	@$(BIN)/python -c 'import json; from ray.dashboard.modules.metrics.grafana_dashboard_factory import \
	  generate_train_grafana_dashboard as g; print(json.dumps(json.loads(g()[0]), separators=(",", ":")))' > $@

# What some tests need of Debian; where it cannot be had those tests skip, and say so.
debian:
	$(call install,chromium,chromium)
	$(call install,dcm2pnm,dcmtk)
	@# The program alone: the package would also start a server.
	@command -v promtool > /dev/null || { test "$$(id -u)" = 0 && cd "$$(mktemp -d)" && apt-get update \
	  && apt-get download prometheus && dpkg-deb -x prometheus_*.deb . && install usr/bin/promtool /usr/local/bin \
	  && rm -r "$$PWD"; } > /dev/null 2>&1 \
	  || echo "make debian: no promtool here (apt-get install prometheus, as root); its tests skip" >&2

install = @command -v $(1) > /dev/null || { test "$$(id -u)" = 0 && apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(2); } > /dev/null \
	  || echo "make debian: no $(1) here (apt-get install $(2), as root); the tests that need it skip" >&2

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Without the tests that have a target of their own.
PLAIN := not s3 and not multinode and not kubernetes and not kubernetes_faults

# One thread a process, as several run at a time; two files at a time.
PYTEST := env OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest
TWO_AT_A_TIME := -n 2 --dist loadfile --no-loadscope-reorder
test: $(READY)
	$(PYTEST) $(TWO_AT_A_TIME) -m "not ray and not wandb and not slow and $(PLAIN)"

test-ray: $(READY)
	$(PYTEST) $(TWO_AT_A_TIME) -m "ray and not slow" tests/jobs tests/cluster

test-wandb: $(READY)
	$(PYTEST) $(TWO_AT_A_TIME) -m "wandb and not ray and not slow" tests/jobs

test-slow: $(READY)
	$(PYTEST) $(TWO_AT_A_TIME) -m "slow and $(PLAIN)"

test-processors: $(READY)
	@$(BIN)/python -m tests.processors $(ARGS)

test-s3: $(READY)
	$(BIN)/python -m tests.s3.server -- $(PYTEST) -m s3

# Nodes are network namespaces on this machine; where they cannot be made the tests skip, and say so.
test-cluster: $(READY)
	$(PYTEST) -m "multinode and not slow" tests/multinode

# All jobs from beginning to end, then three files at a time. docs/cluster.md says how to name a cluster;
# where none can be had the tests skip, and say so.
ON_KUBERNETES := $(PYTEST) -m kubernetes
test-kubernetes: $(READY)
	$(BIN)/python -m tests.kubernetes.server -- sh -c '$(ON_KUBERNETES) tests/kubernetes/test_jobs.py && \
	  $(ON_KUBERNETES) -n 3 --dist loadfile --no-loadscope-reorder --ignore tests/kubernetes/test_jobs.py \
	  tests/kubernetes $(ARGS)'

test-kubernetes-faults: $(READY)
	$(BIN)/python -m tests.kubernetes.server -- $(PYTEST) -m kubernetes_faults tests/kubernetes

test-all: test test-ray test-wandb test-slow test-s3 test-cluster test-kubernetes

bench: $(READY)
	$(BIN)/python -m tests.benchmarks.decode
	$(BIN)/python -m tests.benchmarks.prepare rate
	$(BIN)/python -m tests.benchmarks.prepare memory
	$(BIN)/python -m tests.benchmarks.prepare index
	$(BIN)/python -m tests.benchmarks.metrics
	$(BIN)/python -m tests.benchmarks.explain cost
	$(BIN)/python -m tests.benchmarks.explain memory
	$(BIN)/python -m tests.s3.server --if-possible -- $(BIN)/python -m tests.benchmarks.loader $(ARGS)

# On a machine with a GPU also: python tests/benchmarks/gpu.py, which needs torch alone.
bench-train: $(READY)
	$(BIN)/python -m tests.benchmarks.train $(ARGS)

bench-verdicts: $(READY)
	@$(BIN)/python -m tests.benchmarks.verdicts $(ARGS)

lock: $(READY)
	CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet --extra dev --extra codecs --extra onnx --extra vm --allow-unsafe \
	  --generate-hashes --strip-extras --no-emit-index-url --no-emit-find-links \
	  --no-emit-trusted-host --output-file requirements.lock pyproject.toml
	CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet --extra codecs --extra vm --allow-unsafe \
	  --generate-hashes --strip-extras --no-emit-index-url --no-emit-find-links --no-emit-trusted-host \
	  --constraint requirements.lock --output-file requirements-image.lock pyproject.toml

clean:
	rm -rf data/demo .ruff_cache .mypy_cache .pytest_cache .import_linter_cache
