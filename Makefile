# The two commands:  make pretrain   text to encoder on this machine, in ten minutes on two cores
#                    make test       lint, and every test that is fast
# and                make bench      training beside others on the same work, in some ten minutes
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/installed

TEXT ?= $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')
SHARDS := shards/quickstart
RUN := runs/quickstart
EXPORT := export/quickstart
EXCLUDED := site-packages dist-packages test tests '*.html'

# what training is measured on: BENCH_TEXT=prose.jsonl.gz, or anything else that shards/build.py reads
BENCH_TEXT ?= $(TEXT)
BENCH_OPTIONS ?= --rounds 1 --steps 8
BENCH := build/bench

export PYTHON
export WANDB_SILENT ?= true

.PHONY: pretrain bench test test-slow test-all lint format setup clean

setup: $(INSTALLED)

$(INSTALLED): requirements.txt requirements-dev.txt
	$(PYTHON) launch/check_machine.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	DS_BUILD_OPS=0 $(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

$(SHARDS)/train/manifest.json: | $(INSTALLED)
	$(PY) shards/build.py --input $(TEXT) --out $(SHARDS) --tokenizer train:4096 --valid-fraction 0.02 --exclude $(EXCLUDED)

pretrain: $(INSTALLED) $(SHARDS)/train/manifest.json
	PYTHON=$(PY) launch/local.sh launch/pretrain.py --config configs/quickstart.yaml
	$(PY) launch/evaluate.py --run $(RUN)
	$(PY) launch/export.py --run $(RUN) --out $(EXPORT) --overwrite
	$(PY) launch/fill_mask.py --model $(EXPORT) --top 3 \
	    "    def __init__([MASK], name):" "if x is not [MASK]:" "    raise [MASK]('not a number')"
	@echo
	@echo "Its report:   $(RUN)/report.html   (curves, predictions, configuration: one file, for any browser)"
	@echo "The run:      $(RUN)     (metrics.jsonl, checkpoints, the offline W&B run: wandb sync $(RUN)/wandb/offline-run-*)"
	@echo "The shards:   $(SHARDS)  ($(PY) shards/inspect.py $(SHARDS))"
	@echo "The encoder:  $(EXPORT)  (AutoModelForMaskedLM.from_pretrained(\"$(EXPORT)\"))"
	@echo "Next: your own text, see 'Your own text' in README.md"

$(BENCH)/installed: benchmarks/requirements-throughput.txt
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet -r benchmarks/requirements-throughput.txt
	touch $@

bench: $(INSTALLED) $(BENCH)/installed
	$(PY) benchmarks/throughput.py --text $(BENCH_TEXT) --peers $(BENCH)/bin/python --exclude $(EXCLUDED) $(BENCH_OPTIONS)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

test: lint
	$(PY) -m pytest -m "not slow"

test-slow: $(INSTALLED)
	$(PY) -m pytest -m slow

test-all: test test-slow

format: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(SHARDS) $(RUN) $(EXPORT)
