# make demo      draw images, train a model, report on it in demo/report.html, compare loaders (4 minutes, CPU or GPU)
# make test      the quick tests (6 minutes on two cores); make test-slow: the others; make test-all: both
# make lint      ruff and mypy
# make docs      build the pages of docs/ in build/site
# Each installs what it needs into .venv first, with the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
# bfloat16 if the processor has instructions for it, float32 otherwise
PRECISION := $(shell grep -q -E 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null && echo bf16 || echo no)
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision $(PRECISION) --dynamo_backend no
PYTEST = if [ -e $(VENV)/without-ffcv ]; then export CROPFEED_WITHOUT=ffcv; fi; $(BIN)/python -m pytest -n 2 --dist loadfile

# These compile the kernels once. Otherwise, each of pytest's two workers would compile all of them.
COMPILE_TRANSCODER := from pipeline.convert.run import compile_transcoder; compile_transcoder()
COMPILE_ENGINE := from pipeline.engines.warm_up import warm_up; warm_up()
COMPILE_INSTALLED := from cropfeed.engines.warm_up import warm_up; warm_up()

.PHONY: demo test test-slow test-all lint docs clean

# One file for each set of packages says that it is installed.
EXTRAS_demo := train,report,bench
EXTRAS_dev := train,gpu,ffcv,ray,s3,parquet,report,export,bench,dev
EXTRAS_docs := docs

$(VENV)/installed-%: pyproject.toml constraints.txt tools/install.sh
	test -e $(BIN)/python || $(PYTHON) -m venv $(VENV)
	sh tools/install.sh $(VENV) $(EXTRAS_$*)
	touch $@

demo: $(VENV)/installed-demo
	rm -rf $(DEMO)
	mkdir $(DEMO)
	$(BIN)/python tools/make_demo_data.py $(DEMO)/images
	$(BIN)/python tools/make_shards.py $(DEMO)/images --out $(DEMO)/shards --shard-size 250
	$(LAUNCH) train.py --data $(DEMO)/shards --output $(DEMO)/run --arch resnet20 --image-size 32 --scale 32 40 --batch-size 16 \
		--epochs 8 --lr 0.03 --weight-decay 5e-4 --schedule cosine --warmup 1 --eval-every 2
	$(BIN)/python tools/report.py $(DEMO)/run --out $(DEMO)/report.html
	$(BIN)/python tools/bench/compare.py $(DEMO)/images/val --only torch-pillow:original cropfeed-cpu-lossless --repeats 3 --seconds 0.5 \
		--results $(DEMO)/loaders.csv
	@echo "The curves, the confusion matrix and a batch of images are in $(DEMO)/report.html. Next, with your own images:"
	@echo "  $(BIN)/python tools/make_shards.py FOLDER --out SHARDS         # FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg"
	@echo "  $(BIN)/accelerate launch train.py --arch resnet50 --data SHARDS"
	@echo "  $(BIN)/python tools/profile_pipeline.py SHARDS --arch resnet50 # is the input the bottleneck?"

test: $(VENV)/installed-dev
	$(BIN)/python -c "$(COMPILE_TRANSCODER)" & $(BIN)/python -c "$(COMPILE_ENGINE)"; wait
	$(PYTEST)

test-slow: $(VENV)/installed-dev
	$(BIN)/python -c "$(COMPILE_INSTALLED)"
	$(PYTEST) -m "slow and not gpu"

test-all: test test-slow

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(DEMO) build
