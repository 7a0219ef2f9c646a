# `make` alone lists the targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
WORK   ?= .demo

# What the extension is built from: a change rebuilds it. So does a Python file that comes or goes,
# since the installed package knows them by name.
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc -type f) \
  $(shell find kt_kernel/. convert/. deploy/. -type d -not -name __pycache__)

# Where it is set, as in some machines' images, each start of SGLang compiles what it imports again:
# 25 s of processor time for each of its three processes.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: compose-there help venv demo tiny quality test test-fast test-system test-all sanitize numa-test amx-test amx-report gpu-test \
        lint style tidy types mutants docs docs-check sbom bench rehearsal lock download convert serve check smoke health status bundle unbundle doctor \
        clean clean-demo image image-there image-test up up-cpu follow down logs ps chat

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z -]+:.*## / {printf "  %-42s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

HAS_COMPOSE := $(shell docker compose version 2>/dev/null)

# ---- the environment -------------------------------------------------------------------------------

# With STRICT=1, as in CI, a warning of the C++ compiler is an error; tests compile so, too.
STRICT ?= $(CI)
override STRICT := $(filter-out 0 false,$(STRICT))
export STRICT
BUILT  := $(VENV)/.built$(STRICT:%=-strict)

venv: $(BUILT) $(VENV)/.bytecode ## install all packages into .venv and build the extension; STRICT=1: without warnings

$(VENV)/.installed: requirements/bootstrap.txt requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1): expected Python 3.11 to 3.13 (SGLang has no wheels for others); set PYTHON=..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot make virtual environments: install the package python3-venv" >&2; exit 2; }
	@$(PYTHON) -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no headers: install the package python3-dev" >&2; exit 2; }
	@command -v c++ >/dev/null || \
	  { echo "error: no C++ compiler found: install the package g++" >&2; exit 2; }
	@echo 'Packages into $(VENV), 11 GB: some 5 minutes, by the network and the disk; nothing is printed meanwhile.'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt
	$(BIN)/uv pip install -q --python $(BIN)/python --require-hashes -r requirements/dev.txt
	touch $@

# Else each of a server's three processes compiles what it imports when the first one starts. It only
# saves time, so a failure is for those to report who need the import.
$(VENV)/.bytecode: $(VENV)/.installed
	@echo 'Compiling the Python files that SGLang imports, once: a minute or two.'
	-$(BIN)/python -W ignore -c 'import sglang.launch_server, sglang.srt.managers.scheduler' >/dev/null 2>&1
	touch $@

$(BUILT): $(VENV)/.installed $(SOURCES)
	@echo 'Building the extension: a minute or two on two cores.'
	$(BIN)/uv pip install -q --python $(BIN)/python --no-build-isolation --no-deps --editable . \
	  --config-settings cmake.define.WARNINGS_AS_ERRORS=$(if $(STRICT),ON,OFF)
	touch $@

lock: ## recompile requirements/*.txt from requirements/*.in
	for name in bootstrap run dev build test router bench; do \
	  (cd requirements && ../$(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes \
	    --no-header --no-emit-index-url --no-emit-find-links $$name.in -o $$name.txt) || exit 1; done

# ---- try it ----------------------------------------------------------------------------------------

demo: venv ## the whole pipeline on a tiny checkpoint, no GPU: download, convert, serve, ask
	$(BIN)/python -m examples.tiny.demo --work $(WORK)

# glibc would give memory back to the kernel after each operation, and fetch it again.
tiny: venv ## train a tiny model that answers, on 2 cores; goes on where it was stopped
	MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=16000000000 \
	  $(BIN)/python -m examples.tiny.train

clean-demo: ## remove what the demo made
	rm -rf $(WORK)

# ---- one stage, configured by KT_* variables (docs/configuration.md) -------------------------------

# Files of settings for the stages on the host: make serve ENV_FILE=my.env. Compose's .env is none of
# them: its paths are a container's.
ENV_FILE ?=
OF_FILES  = $(if $(ENV_FILE), $(strip $(ENV_FILE:%=--env-file %)))

download serve check smoke health status: venv ## run one stage on the host, from KT_* variables and ENV_FILE=my.env
	$(BIN)/python entrypoint.py$(OF_FILES) $@

# In the container where Compose is there; on the host with LOCAL=1 or ENV_FILE, or without Compose.
ifneq ($(LOCAL)$(ENV_FILE)$(if $(HAS_COMPOSE),,1),)
convert: venv ## convert in the container; on the host with LOCAL=1 or ENV_FILE, or where there is no Compose
	$(BIN)/python entrypoint.py$(OF_FILES) $@
else
convert: image-there
	$(COMPOSE) run --rm --no-deps convert
endif

# For a host without a network: docs/clusters.md. PARTS="weights image" takes these only.
BUNDLE ?= bundle
PARTS  ?=
# Compose reads it from .env, too. Not `bundle: IMAGE ?=`: with that, make empties an IMAGE of the
# environment for every other target.
BUNDLED_IMAGE = $(or $(IMAGE),$(if $(HAS_COMPOSE),$(shell docker compose -f docker-compose.yml config --images preflight 2>/dev/null)))
bundle: venv ## all that a host without a network needs, in BUNDLE, with checksums; PARTS="model weights image wheels source"
	$(BIN)/python entrypoint.py$(OF_FILES) bundle "$(BUNDLE)" $(PARTS:%=--part %) $(BUNDLED_IMAGE:%=--image %)

unbundle: ## check what is in BUNDLE and install it, without a network
	$(PYTHON) entrypoint.py$(OF_FILES) unbundle "$(BUNDLE)" $(PARTS:%=--part %)

# ---- in containers: docs/operations.md -------------------------------------------------------------

# Overrides by name: make up WITH="speciale monitoring". If it is not given, those that the containers
# were started with; they are looked up when a target needs them.
ifeq ($(origin WITH),undefined)
WITH     = $(eval WITH := $$(shell sh compose/overrides.sh))$(WITH)
endif
COMPOSE  = docker compose -f docker-compose.yml $(WITH:%=-f compose/%.yml)
FOLLOW   = $(COMPOSE) exec status python /app/entrypoint.py status --follow
# Each image is built for one service; the others use it.
SERVICES = preflight $(if $(filter cpu,$(WITH)),hub) $(if $(filter replicas,$(WITH)),router)
BUILD    = COMPOSE="$(COMPOSE)" sh docker/build.sh

image image-there image-test up up-cpu follow down logs ps chat: compose-there

compose-there:
	@$(if $(HAS_COMPOSE),,echo "error: 'docker compose' does not run here: install Docker Engine 20.10 and Compose 2.24 or later, or run the stages on the host (make download, convert, serve)" >&2; exit 2)

image: ## build the image of all stages, the local Hub's with WITH=cpu, the router's with WITH=replicas
	$(BUILD) $(SERVICES)

image-there:
	@$(BUILD) --missing $(SERVICES)

# The tests run while it is built; the image itself is of no use.
image-test: ## test the kernels on the wheel, in the image's own Python
	IMAGE=$${TEST_IMAGE:-deepseek-v32-test:local} IMAGE_TARGET=test docker compose -f docker-compose.yml build preflight

# First in a container that is thrown away: a mistake shall not take down what runs.
up: image-there ## download, convert and serve in containers; WITH="speciale monitoring" adds overrides
	$(COMPOSE) run --rm --no-deps preflight check --first
	$(COMPOSE) up -d
	@echo 'It goes on without this terminal; Ctrl-C ends this view only, and `make follow` is the view again.'
	@$(FOLLOW)

up-cpu: ## the same on the tiny checkpoint, with no GPU
	@$(MAKE) --no-print-directory up WITH=cpu

follow: ## what the stages are doing, until the server is ready or a stage has failed
	@$(FOLLOW)

down: ## stop and remove the containers; the volumes stay
	$(COMPOSE) down --remove-orphans

logs: ## follow the logs of all stages
	$(COMPOSE) logs -f --tail 100

ps: ## what each stage is doing, and why one failed
	$(COMPOSE) ps -a
	@$(COMPOSE) exec -T status python /app/entrypoint.py status --each || true

chat: ## ask the server that runs in the container
	$(COMPOSE) run --rm --no-deps client

# Not venv: what a machine lacks is asked before 11 GB are installed on it.
doctor: ## what this machine has and lacks; neither .venv nor model nor weights are needed
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) entrypoint.py$(OF_FILES) check --host

# ---- quality ---------------------------------------------------------------------------------------

# On all cores; tests/conftest.py says which tests share a process. `python -m pytest FILE` needs none
# of this.
PYTEST = $(BIN)/python -m pytest -n $(or $(JOBS),logical) --maxprocesses 8 --dist loadscope --no-loadscope-reorder
# What needs more than a user's rights, or minutes of emulation.
SYSTEM := docker or cluster or numa or sanitizer

test: venv ## what needs no root, no engine and no emulated machine; real servers too (ten minutes)
	$(PYTEST) -m "not ($(SYSTEM))"

test-fast: venv ## the same without servers, and without what takes long (three minutes)
	$(PYTEST) -m "not (serve or slow or $(SYSTEM))"

# More processes than cores: containers and guests often wait.
test-system: JOBS = 3
test-system: venv ## containers and Slurm of their own (as root), two NUMA nodes, sanitizers
	$(PYTEST) -m "$(SYSTEM)" tests/docker tests/cluster tests/numa tests/sanitizers

test-all: test test-system ## all tests

sanitize: venv ## threads and CUDA stream calls under ThreadSanitizer and AddressSanitizer, at length
	KT_STRESS_CALLS=$${KT_STRESS_CALLS:-20000} $(BIN)/python -m pytest -m sanitizer tests/sanitizers

mutants: venv ## are the tests sharp? which test finds each of 40 small faults, one at a time in a copy; ONLY=id,...: some
	nice -n 10 $(BIN)/python -m tests.mutants $(if $(ONLY),--only $(ONLY))

numa-test: venv ## placement on two NUMA nodes, in an emulated machine; needs the package qemu-system-x86
	@command -v qemu-system-x86_64 >/dev/null || \
	  { echo "error: no qemu-system-x86_64 found: install the package qemu-system-x86" >&2; exit 2; }
	tests/numa/get_kernel.sh
	$(BIN)/python -m pytest tests/numa

# Where there is no network there is no pybind11 either; PyTorch brings its headers along.
HOST_BUILD := build/host
amx-test: ## on a machine with AMX and PYTHON's torch, numpy, safetensors and pytest: kernel tests, then times; no network
	cmake -S . -B $(HOST_BUILD) -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE=$$($(PYTHON) -c 'import sys; print(sys.executable)') \
	  -DPYBIND11_HEADERS=$$($(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent / "include")')
	cmake --build $(HOST_BUILD) --parallel
	cp $(HOST_BUILD)/_ext*.so kt_kernel/
	$(PYTHON) -c 'from kt_kernel import _ext; f = dict(_ext.cpu_features()); f["amx_permitted"] or exit("error: this CPU or kernel gives no AMX tiles: " + str(f))'
	# Without --strict-config: pytest-timeout, whose option is in pyproject.toml, need not be there.
	$(PYTHON) -m pytest -ra -o addopts= tests/csrc tests/kt_kernel/test_wrapper.py
	$(PYTHON) -m benchmarks.bench_moe --no-baselines --experts 64

gpu-test: venv ## on a machine with an NVIDIA GPU: layers called directly and in graphs, then whole servers, and a table of them
	@nvidia-smi -L || { echo "error: nvidia-smi finds no NVIDIA GPU" >&2; exit 2; }
	$(BIN)/python -m pytest -m gpu

lint: style tidy ## all linters

style: $(VENV)/.installed ## the quick ones: ruff, clang-format, hadolint, shellcheck and yamllint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile tests/docker/prometheus.Dockerfile
	$(BIN)/shellcheck .ci/run compose/*.sh docker/*.sh tests/numa/*.sh cluster/apptainer/stage cluster/podman/install cluster/slurm/submit cluster/slurm/*.sh cluster/slurm/*.sbatch
	$(BIN)/yamllint --strict docker-compose.yml compose cluster/kubernetes cluster/podman tests/docker .hadolint.yaml .yamllint.yaml \
	  .pre-commit-config.yaml .clang-tidy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp')

# The build leaves its compiler's commands, one for each file of csrc. Paths are followed into headers
# in one target, which has most of the kernels; in every file that would take minutes. A baseline's
# layer.cpp needs its sources, which are not here.
COMMANDS = $$(dirname $$(ls -t build/*/compile_commands.json | head -n 1))
HEADERS  := --extra-arg=-Xclang --extra-arg=-analyzer-opt-analyze-headers
tidy: venv ## clang-tidy over all C++, two minutes of one core
	{ echo csrc/targets/amx.cpp $(HEADERS) -p $(COMMANDS); \
	  git ls-files 'csrc/*.cpp' ':!csrc/targets/amx.cpp' | sed "s|$$| -p $(COMMANDS)|"; \
	  git ls-files 'tests/*.cpp' benchmarks/limits/probe.cpp | \
	    sed 's|$$| -- -std=c++20 -Wall -Wextra -Icsrc -Itests/csrc|'; } | \
	  xargs -P $$(nproc) -L 1 $(BIN)/clang-tidy --quiet

types: $(VENV)/.installed ## mypy
	$(BIN)/mypy

docs: venv ## regenerate what is generated: documents of the settings, lists in docker-compose.yml
	$(BIN)/python -m deploy.settings.docs

# As in an image, where it is /app/sbom.json: docker/sbom.py needs no package.
sbom: venv ## what is installed, as a CycloneDX document: .cache/sbom.json
	mkdir -p .cache
	$(BIN)/python docker/sbom.py > .cache/sbom.json.tmp
	mv .cache/sbom.json.tmp .cache/sbom.json

docs-check: $(VENV)/.installed ## fail when generated docs are stale
	$(BIN)/python -m deploy.settings.docs --check

# What the benchmarks need on top of .venv: the tools that build a baseline, and plots.
$(VENV)/.bench: requirements/bench.txt $(VENV)/.installed
	$(BIN)/uv pip install -q --python $(BIN)/python --require-hashes -r requirements/bench.txt
	touch $@

bench: venv $(VENV)/.bench ## time one MoE layer beside baselines and the machine's limits; QUICK=1: a minute
	mkdir -p .cache/benchmarks
	$(BIN)/python -m benchmarks.bench_moe $(if $(QUICK),--quick) \
	  --json .cache/benchmarks/moe.json --plot .cache/benchmarks/moe.png

# LAYERS=auto takes what memory, disk and card hold, LAYERS=8 at most eight, LAYERS=1,4,8 those.
LAYERS ?= auto
rehearsal: venv $(VENV)/.bench ## what V3.2 will do on this machine, before it is downloaded; LAYERS=1: without a card, too
	$(BIN)/python -m benchmarks.rehearsal --layers $(LAYERS) $(REHEARSAL) \
	  --json .cache/rehearsal/rehearsal.json --plot .cache/rehearsal/rehearsal.png

quality: venv $(VENV)/.bench ## what each format of the experts changes in the tiny model's answers
	$(BIN)/python -m benchmarks.quality tiny

amx-report: venv ## tile instructions of AMX layer calls, counted beside their closed form
	$(BIN)/python -m tests.csrc.amx.report

clean: clean-demo ## remove everything that make made
	rm -rf $(VENV) build .cache
