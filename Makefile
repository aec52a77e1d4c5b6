# make demo   draw images, train a model, evaluate it, and report on the run in demo/report.html (CPU or GPU)
# make test   all tests
# make lint   ruff and mypy
# Each creates .venv first, with every package pinned in constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := demo
# bfloat16 if the processor has instructions for it, float32 otherwise
PRECISION := $(shell grep -q -E 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null && echo bf16 || echo no)
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision $(PRECISION) --dynamo_backend no

.PHONY: demo test lint clean

$(INSTALLED): pyproject.toml constraints.txt tools/install.sh
	$(PYTHON) -m venv $(VENV)
	sh tools/install.sh $(VENV)
	touch $@

demo: $(INSTALLED)
	rm -rf $(DEMO)
	mkdir $(DEMO)
	$(BIN)/python tools/make_demo_data.py $(DEMO)/images
	$(BIN)/python tools/make_shards.py $(DEMO)/images --out $(DEMO)/shards --shard-size 250
	$(LAUNCH) train.py --data $(DEMO)/shards --output $(DEMO)/run --arch resnet18 --image-size 64 --scale 64 96 --batch-size 32 \
		--epochs 10 --lr 0.006 --weight-decay 5e-4 --schedule cosine --warmup 1 --eval-every 2
	$(BIN)/python tools/evaluate.py $(DEMO)/run --data $(DEMO)/shards --json $(DEMO)/figures.json --per-class $(DEMO)/classes.csv
	$(BIN)/python tools/report.py $(DEMO)/run --out $(DEMO)/report.html

test: $(INSTALLED)
	if [ -e $(VENV)/without-ffcv ]; then export CROPFEED_WITHOUT=ffcv; fi; $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(DEMO)
