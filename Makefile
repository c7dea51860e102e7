# From a hardware profile to a proven bundle. `make help` lists the targets and variables.
profile ?= cpu
model ?= examples/debian-tiny
wise_alpha ?= 1.0
target ?= auto
device ?=
set ?=
max_memory ?=
PYTHON ?= python3

# The default data belongs to the default model: with another one, name your own.
ifeq ($(origin data)$(model),undefinedexamples/debian-tiny)
data := examples/debian-sections/train.jsonl
valid ?= examples/debian-sections/valid.jsonl
test_data ?= examples/debian-sections/test.jsonl
example := 1
endif

# Results of the example lie in build/PROFILE, of any other job in a folder of its own, as `edgeft plan` names it: no job
# writes over another one's.
space := $(empty) $(empty)
last = $(or $(filter-out .,$(notdir $(patsubst %/,%,$(subst $(space),_,$(1))))),$(notdir $(subst $(space),_,$(CURDIR))))
stem = $(patsubst %.parquet,%,$(patsubst %.csv,%,$(patsubst %.json,%,$(patsubst %.jsonl,%,$(patsubst %.gz,%,$(1))))))
told = $(if $(filter train training data rows,$(call stem,$(call last,$(1)))),$(call last,$(dir $(subst $(space),_,$(1)))),$(call stem,$(call last,$(1))))
machine := $(subst :,-,$(patsubst %.toml,%,$(call last,$(profile))))
own := $(call last,$(model))-$(if $(data),$(call told,$(data))-)$(machine)
out ?= build/$(if $(example),$(machine),$(own))

py := .venv/bin/python
# what a stage says of the next one is for the stage that was asked for
edgeft = $(if $(filter $@,$(lastword $(MAKECMDGOALS))),,EDGEFT_NEXT=0 )$(py) -m edgeft
option = $(if $(strip $(2)),--$(1) '$(2)')

.PHONY: help setup optimum plan train merge export run verify check test-fast test test-targets test-slow test-mutants test-gpu test-browser arm64 test-arm64 bench bench-closed-form bench-planner bench-time bench-trainer bench-lisa bench-prefix bench-stream bench-ranks bench-sparse bench-methods bench-methods-time bench-methods-smollm2 bench-rates bench-example bench-large bench-stages bench-same-bytes bench-decode bench-decode-profile bench-cuda bench-published bench-groups bench-sweep bench-smollm2 bench-emulated bench-kv-cache bench-answers bench-proof bench-bakeoff bench-house bench-plots first-page planner-page report schemas pretrain release clean
.DEFAULT_GOAL := help

help:  ## show this
	@grep -E '^[a-z][a-z-]*:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14
	@echo
	@echo "variables: profile=$(profile) model=$(model) data=FILE valid=FILE test_data=FILE wise_alpha=$(wise_alpha)"
	@echo "           target=$(target) device=PROFILE max_memory=9GiB set='key=value key=value' out=$(out)"
	@echo "example:   make profile=t4 model=Qwen/Qwen2.5-1.5B-Instruct data=my.jsonl train export"

# Installed once, and again when what is to be installed changes.
.venv/installed: pyproject.toml constraints.txt
	@test -x $(py) || $(PYTHON) -m venv .venv
	$(py) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[export,report]'
	@touch $@

.venv/installed-dev: .venv/installed
	$(py) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: .venv/installed  ## create .venv and install edgeft (every other target does it when needed)

# The stages decide by content whether they are up to date, so file dates, spaces in paths and changed variables need
# no rules here: each verb compares its inputs with what its output was made from.
plan: .venv/installed  ## choose how to train inside the profile's memory
	@$(edgeft) plan '$(model)' --on '$(profile)' --out '$(out)/plan.json' $(call option,data,$(data)) \
	  $(call option,valid,$(valid)) $(call option,test,$(test_data)) $(call option,max-memory,$(max_memory)) \
	  $(foreach pair,$(set),--set '$(pair)')

train: plan  ## carry the plan out; a killed run goes on where it stopped
	@$(edgeft) train '$(out)/plan.json' --target '$(target)' --out '$(out)/train'

merge: train  ## merge base and fine-tune with wise_alpha
	@$(edgeft) merge '$(out)/train' --wise-alpha $(wise_alpha) --out '$(out)/merged'

export: merge  ## build the on-device bundle and prove it
	@$(edgeft) export '$(out)/merged' --target '$(target)' $(call option,for,$(device)) --out '$(out)/bundle'

run: export  ## run the bundle here: make run prompt='Package: ...'
	@$(edgeft) run '$(out)/bundle' '$(prompt)'

verify: export  ## check the bundle's hashes and golden vectors
	@$(edgeft) verify '$(out)/bundle'

check: .venv/installed-dev  ## format, lint, types
	$(py) -m ruff format --check edgeft export tests bench examples
	$(py) -m ruff check edgeft export tests bench examples
	$(py) -m mypy

# Files in their order, each in one process: what several of its tests use is made once.
pytest := OMP_NUM_THREADS=1 $(py) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
  -m 'not slow and not gpu and not targets and not arm64 and not browser'

test-fast: .venv/installed-dev  ## a minute: what starts no process, loads no runtime and trains nothing (tests/fast.py)
	$(pytest) --fast

test: .venv/installed-dev  ## every test that a CPU can pass in minutes
	$(pytest)

# optimum wants an older transformers than edgeft: it has an environment of its own, which borrows torch and all that
# fits from .venv (found after its own packages).
optimum: .venv-optimum/installed  ## install optimum in .venv-optimum, for the onnx-portable- targets

.venv-optimum/installed: .venv/installed
	@test -x .venv-optimum/bin/python || $(PYTHON) -m venv .venv-optimum
	@$(py) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  >"$$(.venv-optimum/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
	.venv-optimum/bin/python -m pip install --quiet --disable-pip-version-check \
	  'optimum-onnx[onnxruntime]==0.1.0' 'transformers==4.57.6' accelerate
	@echo "what pip may have said of edgeft's own requirements is no matter here: edgeft does not run in .venv-optimum"
	@touch $@

# llama.cpp is compiled, 11 minutes on one core: on demand. What is not run is printed.
llama ?= 0

.venv/installed-llama: .venv/installed-dev
	CMAKE_ARGS="-DLLAVA_BUILD=OFF -DMTMD_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF" $(py) -m pip \
	  install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[gguf,llama]'
	@touch $@

test-targets: .venv/installed-dev .venv-optimum/installed $(if $(filter 1,$(llama)),.venv/installed-llama)  ## run every export target (llama=1: llama.cpp's too) against torch
	OMP_NUM_THREADS=1 EDGEFT_REQUIRED_RUNTIMES='ort-genai onnxruntime $(if $(filter 1,$(llama)),llama.cpp)' \
	  $(py) -m pytest -m targets -rs -s

test-slow: .venv/installed-dev  ## the tests that take minutes each
	$(py) -m pytest -m slow

test-mutants: .venv/installed-dev  ## plant every fault into what was trained, merged and built: which rung stops it
	OMP_NUM_THREADS=1 $(py) -m pytest tests/test_mutants.py -m 'slow or not slow' -q -s

test-gpu: .venv/installed-dev  ## the tests that need a CUDA device
	$(py) -m pytest -m gpu

test-browser: .venv/installed-dev  ## look at every page in headless Chromium: phone, screen, dark, paper (apt-get install chromium)
	$(py) -m pytest -m browser -rs

arm64: .venv/installed  ## set up the emulated aarch64 machine of `edgeft verify --for` (once, in the cache)
	@$(edgeft) arm64

test-arm64: .venv/installed-dev  ## the tests that run a bundle on an emulated Raspberry Pi 5 (after make arm64)
	OMP_NUM_THREADS=1 $(py) -m pytest -m arm64

bench: bench-closed-form bench-planner bench-time bench-trainer bench-lisa bench-prefix bench-stream bench-ranks bench-sparse bench-methods bench-methods-time bench-rates bench-example bench-sweep bench-large bench-stages bench-published  ## every benchmark: writes bench/results/*.json

bench-planner: .venv/installed  ## predicted against measured peak memory of real training runs, 72 of them random
	$(py) bench/planner.py

bench-closed-form: .venv/installed  ## the planner's closed form against the simulated step, 340 random plans
	$(py) bench/closed_form.py

bench-time: .venv/installed  ## estimated against measured seconds of a step, on a quiet machine
	$(py) bench/step_time.py

bench-trainer: .venv/installed  ## time and memory beside PEFT + Trainer, the same job by both, on a quiet machine
	$(py) bench/trainer.py

bench-lisa: .venv/installed  ## memory of layers in turn at every interval, on a 135M shape
	$(py) bench/lisa.py

bench-ranks: .venv/installed  ## memory of each of several processes against its plan, on a 135M shape, on a quiet machine
	$(py) bench/ranks.py

bench-prefix: .venv/installed  ## later epochs from kept outputs of frozen layers against without, 135M, on a quiet machine
	$(py) bench/prefix_cache.py

bench-stream: .venv/installed  ## layers that stay in their files: time beside a resident run, 1.1B in 2 GiB, on a quiet machine
	$(py) bench/stream.py

bench-sparse: .venv/installed  ## which layers to train: full, LoRA, sparse by each score, random, LISA
	$(py) bench/sparse.py

sizes ?= 100,1000,6000
bench-methods: .venv/installed  ## every tuner in all, few and alternating layers on the example task (only=lora,prefix:all sizes=100,1000)
	OMP_NUM_THREADS=1 $(py) bench/methods.py $(call option,only,$(only)) --rows $(sizes)

bench-methods-time: .venv/installed  ## seconds of a step of each of them, in turn, on a quiet machine (after make bench-methods)
	OMP_NUM_THREADS=1 $(py) bench/methods.py --time

bench-methods-smollm2: .venv/installed-dev  ## the best of them on a real 135M model from a package (after make bench-methods)
	OMP_NUM_THREADS=1 $(py) bench/methods.py --model smollm2

bench-rates: .venv/installed  ## which learning rate the default job should take, by its validation rows
	$(py) bench/rates.py

bench-example:  ## the default job from base to bundle
	@$(MAKE) --no-print-directory profile=cpu export
	$(py) bench/example.py

bench-large: .venv/installed  ## a 135M model with random weights through every stage
	$(py) bench/large.py

bench-stages: .venv/installed  ## predicted against measured peaks of merge and export, five models (large=1: of 3.2B held to 8 GiB)
	$(py) $(if $(filter 1,$(large)),bench/large_stages.py,bench/stages.py)

bench-same-bytes: .venv/installed-dev  ## bundles of 135M and 1B beside those that the runtime's builder rounds by itself, byte for byte
	$(py) bench/same_bytes.py

shape ?= 135m
bench-decode: .venv/installed  ## tokens/s of the bundle beside llama.cpp and PyTorch (needs edgeft[gguf,llama]): shape=135m, 0.5b or 1b
	$(py) bench/decode.py $(shape)

bench-decode-profile: .venv/installed  ## what a decoded token's time goes into, by kinds of operations, here and in llama.cpp (needs edgeft[gguf,llama])
	$(py) bench/decode_profile.py

bench-cuda: .venv/installed  ## planned against measured bytes on the GPU that is here
	$(py) bench/gpu.py

bench-published: .venv/installed  ## what others have published against what edgeft predicts from their settings
	$(py) bench/published.py

bench-groups:  ## shares of the fine-tune by groups of layers, on the default job
	@$(MAKE) --no-print-directory profile=cpu train
	$(py) bench/groups.py build/cpu/train 100 bounded

bench-sweep:  ## the share of the fine-tune that a sweep takes on the default job, and its int4 bundle
	@$(MAKE) --no-print-directory profile=cpu train
	$(py) bench/sweep.py build/cpu

rows ?= 1000
bench-smollm2: .venv/installed-dev  ## a real 135M model from a package, two tasks, every int4 and what auto ends in (rows=200 is shorter)
	$(py) bench/smollm2.py --rows $(rows) $(call option,task,$(task)) $(call option,merged,$(merged))

bench-emulated: .venv/installed-dev  ## three bundles on an emulated Raspberry Pi 5: golden vectors, tokens that differ from here, memory (merged=FOLDER: SmolLM2, trained)
	$(py) bench/emulated.py $(call option,only,$(only)) $(call option,merged,$(merged))

bench-kv-cache: .venv/installed-dev  ## a KV cache of 8 bits beside the runtime's own on that model: memory, loss, long rows
	$(py) bench/kv_cache.py --rows $(if $(filter 1000,$(rows)),200,$(rows))

bench-answers: .venv/installed-dev  ## answers free, held, labels; caches of 32, 8, 4 bits; guesses, on that model (timed=1: speed)
	$(py) bench/answers.py --rows $(rows) $(if $(filter 1,$(timed)),--time)

bench-proof: .venv/installed-dev  ## export beside the runtime's builder, train beside its steps (whole=1: of a whole run; model=example to try it)
	$(py) bench/proof.py $(if $(filter example,$(model)),example,smollm2) $(if $(whole),--whole)

model_of_bakeoff := $(if $(filter smollm2,$(model)),smollm2,example)
bench-bakeoff: .venv/installed-dev  ## which way to 4 bits keeps most of a fine-tune: model=example (default) or model=smollm2
	$(py) bench/bakeoff.py $(model_of_bakeoff) --rows $(rows)

bench-house: .venv/installed  ## counts of the source: files, circles, places that know a tuner, now and before packages
	@$(py) bench/house.py

methods-table: .venv/installed-dev  ## the tables of docs/methods.md as the tests that run every combination find them
	OMP_NUM_THREADS=1 EDGEFT_WRITE_TABLES=1 $(py) -m pytest tests/test_methods.py -m 'slow or not slow' -q

first-page: .venv/installed  ## what README shows of a plan, text and picture, as it is now
	@$(py) bench/first_page.py

bench-plots: .venv/installed  ## draw the plots of recorded results again; nothing is measured
	$(py) bench/plots.py

planner-page: .venv/installed  ## the planner as one page that runs in a browser: build/report/planner.html
	@$(py) bench/planner_page.py

report: .venv/installed  ## which models fit which machines: build/report/matrix.html, .md, .json
	@$(edgeft) report --models examples/configs --on all --target '$(target)' \
	  $(foreach pair,$(set),--set '$(pair)') --out build/report/matrix.html

schemas: .venv/installed  ## write the JSON Schemas again after a change to what plan.json or a report holds
	@for name in plan report; do $(edgeft) show schema $$name >edgeft/reporting/schemas/.$$name.tmp && \
	  mv edgeft/reporting/schemas/.$$name.tmp edgeft/reporting/schemas/$$name.schema.json || exit 1; done

# Tensors of a fixed size come and go every step: keeping their memory mapped is worth 60% on a CPU.
pretrain: .venv/installed  ## make the example model again from its text (about an hour)
	MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456 \
	  $(py) examples/pretrain.py --out build/debian-tiny

# The tests run against the wheel alone: the folder they run in has no edgeft of its own.
release: .venv/installed-dev  ## build sdist and wheel into dist/, plan and run the pipeline's tests by the wheel alone
	rm -rf dist build/release && mkdir -p build/release
	$(py) -m build --outdir dist .
	$(PYTHON) -m venv build/release/.venv
	wheel=$$(ls dist/*.whl) && build/release/.venv/bin/python -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt "$$wheel[dev]"
	cp -r tests examples export pyproject.toml build/release/
	cd build/release && .venv/bin/edgeft plan examples/debian-tiny --data examples/debian-sections/train.jsonl
	cd build/release && OMP_NUM_THREADS=1 .venv/bin/python -P -m pytest tests/test_pipeline.py -m 'not slow and not targets'

clean:  ## remove what the stages made, not .venv
	rm -rf build
