# `make demo` shows the system at work, `make test` runs the tests, `make test-all` the slow ones too, `make lint` checks
# style and types, `make faults` tries hostile inputs, `make breakages` looks for faults that the tests do not notice,
# `make notebooks` runs the notebooks and writes their pages in docs/, `make quality` measures how well the embedded
# model draws, `make bench` and `make bench-e2e` how fast. All set up .venv first.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Two processes of one thread each; a module's tests stay together, for what they share is made once. Why tests are
# skipped is told at the end.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -q -rs -n 2 --dist loadfile
PROMPT ?= an avocado to the left of a chair on wood

.PHONY: demo test test-all faults breakages notebooks lint quality bench bench-e2e clean

demo: $(VENV)/.installed
	@$(RUN) demo.py --text "$(PROMPT)"

test: $(VENV)/.installed-test
	$(RUN) -m ruff check .
	$(PYTEST) -m "not slow"

test-all: $(VENV)/.installed-test
	$(RUN) -m ruff check .
	$(PYTEST)

faults: $(VENV)/.installed-test
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(RUN) -m faults

breakages: $(VENV)/.installed-test
	$(RUN) tests/breakages.py

notebooks: $(VENV)/.installed-test
	OMP_NUM_THREADS=2 $(RUN) notebooks/render.py

lint: $(VENV)/.installed-lint
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright --pythonpath $(RUN)

quality: $(VENV)/.installed-benchmark
	$(RUN) benchmarks/quality.py

bench: $(VENV)/.installed-benchmark
	$(RUN) benchmarks/sampling.py

bench-e2e: $(VENV)/.installed-benchmark
	$(RUN) benchmarks/end_to_end.py

# torch goes first and alone: with it in place nothing that follows asks for another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q "$$(grep '^torch==' constraints.txt)"
	$(RUN) -m pip install -q -e . -c constraints.txt
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(RUN) -m pip install -q -e '.[test]' -c constraints.txt
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed
	$(RUN) -m pip install -q -e '.[lint]' -c constraints.txt
	@touch $@

$(VENV)/.installed-benchmark: $(VENV)/.installed
	$(RUN) -m pip install -q -e '.[benchmark]' -c constraints.txt
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
