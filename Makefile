# `make help` lists the targets. Everything runs in .venv, which `make setup` makes.
PYTHON ?= python3
BIN := .venv/bin
BENCH := artifacts/bench
SHAPE ?= tiny
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)

.DEFAULT_GOAL := help
.PHONY: help setup export-all parity nightly test lint types bench bench-peers compression-table clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

setup: .venv/.all  ## make .venv and install every target's converter and runtime

.venv/.pip:
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip -c constraints.txt
	touch $@

.venv/.all: .venv/.pip pyproject.toml constraints.txt
	$(BIN)/pip install --quiet -c constraints.txt -e '.[all]'
	touch $@

.venv/.test: .venv/.all
	$(BIN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

.venv/.lab: .venv/.all
	$(BIN)/pip install --quiet -c constraints.txt -e '.[compress,train]'
	touch $@

export-all: setup  ## export the carried checkpoint to every target and precision, then compare each with PyTorch
	@status=0; \
	$(BIN)/asr-export --target all --jobs $(JOBS) --out artifacts || status=$$?; \
	$(BIN)/asr-parity --artifacts artifacts --json artifacts/parity.json --html artifacts/parity.html || status=$$?; \
	exit $$status

parity: setup  ## compare the artifacts at hand with PyTorch
	$(BIN)/asr-parity --artifacts artifacts --json artifacts/parity.json --html artifacts/parity.html

nightly: setup  ## export and compare everything anew, append to artifacts/history.sqlite and judge against this machine's past
	@status=0; \
	$(BIN)/asr-export --target all --out artifacts || status=$$?; \
	$(BIN)/asr-parity --artifacts artifacts --fresh --suite full --json artifacts/nightly.json --html artifacts/nightly.html \
		--history artifacts/history.sqlite || { parity=$$?; test $$status -ne 0 || status=$$parity; }; \
	exit $$status

test: .venv/.test lint types  ## lint, types and tests
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: .venv/.test
	$(BIN)/mypy

bench: setup $(BENCH)/$(SHAPE)/config.json  ## speed of every runner on a random checkpoint of a SHAPE, as ratios to PyTorch and to the memory's floor
	$(BIN)/asr-export --model $(BENCH)/$(SHAPE) --target all --out $(BENCH)/artifacts
	$(BIN)/asr-bench --model $(BENCH)/$(SHAPE) --artifacts $(BENCH)/artifacts --json $(BENCH)/$(SHAPE).json

$(BENCH)/%/config.json: | setup
	$(BIN)/python -m reference.shapes $* $(BENCH)/$*

PEERS := $(BENCH)/peers
SHAPES := tiny base small

.venv-peers/.done: constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet -c constraints.txt torch transformers safetensors faster-whisper openvino-genai \
		openai-whisper sherpa-onnx pywhispercpp
	touch $@

.venv-optimum/.done:
	$(PYTHON) -m venv .venv-optimum
	.venv-optimum/bin/pip install --quiet optimum-onnx==0.1.0 onnxruntime==1.31.1 torch==2.13.0
	touch $@

bench-peers: setup .venv-peers/.done .venv-optimum/.done $(SHAPES:%=$(BENCH)/%/config.json)  ## speed of our runners beside other programs'; ASR_EXPORT_WHISPER_CPP names a checkout of whisper.cpp
	@for model in reference $(SHAPES:%=$(BENCH)/%); do \
		for target in onnx "onnx --layout sherpa" ctranslate2 openvino tflite ncnn; do \
			$(BIN)/asr-export --model $$model --target $$target --out $(BENCH)/artifacts || exit; \
		done; \
	done
	ASR_EXPORT_PEERS_PYTHON=.venv-peers/bin/python ASR_EXPORT_OPTIMUM_PYTHON=.venv-optimum/bin/python \
	$(BIN)/python -m asr_export.bench_peers $(SHAPES:%=--model $(BENCH)/%) --judged reference reference/clips/manifest.jsonl \
		--artifacts $(BENCH)/artifacts --json $(PEERS).json --markdown $(PEERS).md --plot $(PEERS).png

compression-table: .venv/.lab  ## every compression technique on every runtime that carries it; takes up an interrupted run
	$(BIN)/asr-compress table --out artifacts/compression

clean:  ## remove the artifacts and the virtual environment
	rm -rf .venv .venv-peers .venv-optimum
	git clean -fdXq artifacts
