# `make help` lists the targets. Set-up leaves stamps behind: what is there is not installed again.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BROWSER ?= 1
KILLS ?= 20
HOST_REQUIREMENTS ?= tests/requirements/comfyui-0.3.75.txt
ifdef COMFYUI_PATH
HOST :=
else
COMFYUI_PATH := build/comfyui
HOST := build/comfyui/.complete
endif
export BROWSER COMFYUI_PATH HELIOS_MODELS HELIOS_WORKFLOW

# A path may hold spaces: make wants them escaped in a target, the shell in quotes.
space := $(subst ,, )
escaped = $(subst $(space),\ ,$(1))
ENVIRONMENT := $(call escaped,$(VENV))/.installed
PY := "$(VENV)/bin/python"
BIN := "$(VENV)/bin"

.PHONY: bench bench-quant bench-gpu help setup browser demo test test-core test-host test-gpu bench-memory bench-memory-gpu pictures soak fuzz lint format clean

help:
	@echo "make setup        environment, a ComfyUI to test with, a browser"
	@echo "make demo         a video through a real ComfyUI server, by the small model that comes with the pack"
	@echo "                    HELIOS_MODELS=<ComfyUI models folder>  weights of your own instead"
	@echo "                    HELIOS_WORKFLOW=<json>                 another workflow (UI or API format)"
	@echo "make test         all tests; also test-core, test-host, test-server, test-page"
	@echo "                    BROWSER=0                              without the browser tests"
	@echo "                    COMFYUI_PATH=<checkout>                against another ComfyUI; HOST_REQUIREMENTS and"
	@echo "                                                           VENV name its requirements and environment"
	@echo "make bench-memory host memory of offloading, ours beside diffusers'"
	@echo "make soak         a server, then workers, killed 20 times (KILLS) at random moments: resumed runs give the same"
	@echo "make soak-live    an hour of video (CHUNKS chunks) at 16 times its speed, watched and steered: memory stays flat"
	@echo "make meaning      how often Helios-Tiny's videos show what they were asked for: 64 prompts a variant, hours of a"
	@echo "                  core; a further run goes on, and build/meaning.md has the table"
	@echo "make sabotage     which tests of tests/meaning notice what is broken, one thing at a time"
	@echo "make fuzz         spoilt files, widgets, sockets and saved chunks for FUZZ_SECONDS (600), by FUZZ_SEED"
	@echo "make bench        speed against diffusers on this CPU; rows go to build/bench.json"
	@echo "make bench-quant  what each format of the weights costs and saves, on this CPU; build/quantised.md has the table"
	@echo "make gpu          all that needs a CUDA card: tests, the 14B model's shape, decoding, offloading, each with a"
	@echo "                  file in build/gpu; a further run goes on with what is not finished. PYTHON_GPU names a"
	@echo "                  Python with torch. Parts of it: test-gpu, bench-gpu, bench-memory-gpu"
	@echo "                    COMFYUI_PATH=<checkout>                inside it too; PYTHON_GPU has its requirements"
	@echo "                    GPU_SECONDS=540                        leave out what takes longer in all"
	@echo "                    FRESH=1                                run what is finished, too"
	@echo "                    TINY=1                                 rehearse on toy sizes, on any machine"
	@echo "make gpu-summary  its table, from the files that are there"
	@echo "make pictures     the pictures of workflows and help pages anew, from runs of Helios-Tiny in the page"
	@echo "make lint         ruff and mypy; make format applies ruff's formatting"
	@echo "make clean        remove what was built, and the environment if make setup has made it"

setup: $(ENVIRONMENT) $(HOST) browser

$(ENVIRONMENT): requirements.txt tests/requirements/common.txt $(call escaped,$(HOST_REQUIREMENTS)) scripts/setup_env.sh
	scripts/setup_env.sh "$(PYTHON)" "$(VENV)" "$(HOST_REQUIREMENTS)"
	@touch "$@"

build/comfyui/.complete: scripts/setup_host.sh | $(ENVIRONMENT)
	scripts/setup_host.sh $(PY) build/comfyui

browser: $(ENVIRONMENT)
ifneq ($(BROWSER),0)
	@$(PY) scripts/setup_browser.py
endif

demo: $(ENVIRONMENT) $(HOST)
	@$(PY) scripts/demo.py

test: setup
	@$(PY) scripts/run_tests.py

test-core: $(ENVIRONMENT)
	@$(PY) scripts/run_tests.py core

test-host: $(ENVIRONMENT) $(HOST)
	@$(PY) scripts/run_tests.py host

test-%: setup  # any other folder of tests/
	@$(PY) scripts/run_tests.py $*

soak: $(ENVIRONMENT) $(HOST)
	HELIOS_KILLS=$(KILLS) $(BIN)/pytest -c tests/pytest.ini --rootdir tests -s tests/server/test_stream.py tests/server/test_cluster.py -k killed

CHUNKS ?= 2618
.PHONY: soak-live
soak-live: setup
	HELIOS_CHUNKS=$(CHUNKS) $(BIN)/pytest -c tests/pytest.ini --rootdir tests -s tests/server/test_live_steering.py -k soak

# FUZZ_CASE=<number> runs one case of a seed again, FUZZ_FAMILY=<name> only those of a family (tests/faults/cases.py).
FUZZ_SECONDS ?= 600
FUZZ_SEED ?= helios
fuzz: $(ENVIRONMENT) $(HOST)
	FUZZ_SECONDS="$(FUZZ_SECONDS)" FUZZ_SEED="$(FUZZ_SEED)" "$(BIN)/pytest" -c tests/pytest.ini --rootdir tests -s \
	    tests/faults -k every_fault

# MEANING=--table: of the videos that are there.
.PHONY: meaning sabotage
meaning: $(ENVIRONMENT) $(HOST)
	@OMP_NUM_THREADS=1 $(PY) benchmarks/meaning.py $(MEANING)

sabotage: $(ENVIRONMENT) $(HOST)
	@$(PY) scripts/sabotage.py

bench: $(ENVIRONMENT) $(HOST)
	@$(PY) benchmarks/speed.py

# Needs no environment of ours: any Python with PyTorch for the card. The three others are parts of it, run anew.
PYTHON_GPU ?= $(PYTHON)
GPU := "$(PYTHON_GPU)" benchmarks/gpu.py $(if $(TINY),--tiny) $(if $(GPU_SECONDS),--seconds $(GPU_SECONDS))
.PHONY: gpu gpu-summary
gpu:
	@$(GPU) $(if $(FRESH),--fresh)
gpu-summary:
	@$(GPU) --summary
test-gpu:
	@$(GPU) --fresh --only tests
bench-gpu:
	@$(GPU) --fresh --only network compiled
bench-memory-gpu:
	@$(GPU) --fresh --only offload

pictures: setup
	UPDATE_PICTURES=1 $(BIN)/pytest -c tests/pytest.ini --rootdir tests tests/server/test_page.py
	@$(PY) scripts/draw_help.py

bench-quant: $(ENVIRONMENT)
	@$(PY) benchmarks/quantised.py

bench-memory: $(ENVIRONMENT)
	@$(PY) benchmarks/memory.py

# Scripts and benchmarks are programs that import what lies beside them, scripts/harness/ and the core.
TYPES := MYPYPATH=.:..:../scripts:../tests:../training:../build/typing $(abspath $(VENV)/bin/mypy) \
    --explicit-package-bases --follow-imports silent --config-file ../pyproject.toml --cache-dir ../build/mypy-scripts

# make -j2 lint has them side by side.
.PHONY: style types-pack types-windows types-programs
lint: style types-pack types-windows types-programs

style: $(ENVIRONMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# nodes/ imports ..helios_core: types are checked in the package, under the name the tests give it.
build/typing/comfyui_helios:
	@mkdir -p build/typing && ln -sfn ../.. $@

PACK_TYPES := MYPYPATH=build/typing $(BIN)/mypy
types-pack: $(ENVIRONMENT) | build/typing/comfyui_helios
	$(PACK_TYPES) -p comfyui_helios.helios_core -p comfyui_helios.nodes -p comfyui_helios.host

types-windows: $(ENVIRONMENT) | build/typing/comfyui_helios
	$(PACK_TYPES) --platform win32 --cache-dir build/mypy-windows -p comfyui_helios.helios_core -p comfyui_helios.host

types-programs: $(ENVIRONMENT) | build/typing/comfyui_helios
	cd scripts && $(TYPES) $$(find . -name "*.py")
	cd benchmarks && $(TYPES) *.py

format: $(ENVIRONMENT)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build .pytest_cache .ruff_cache .mypy_cache
	@scripts/remove_env.sh "$(VENV)"
