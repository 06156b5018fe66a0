# What a clone needs: `make demo` and `make test`. Only Python 3.11+, make and a package index are assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS ?= dev

.PHONY: demo test test-reliability test-reliability-full check clean wheels gpu gpu-more
.DELETE_ON_ERROR:

$(VENV)/.run-installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "semi_fast needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable .
	touch $@

$(VENV)/.dev-installed: $(VENV)/.run-installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

demo: $(VENV)/.run-installed  ## three methods on the bundled digits, compared on one page
	$(BIN)/semi-fast demo

test: $(VENV)/.dev-installed  ## all tests, on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

FAULTS := tests/reliability tests/test_preemption.py tests/test_processes.py

test-reliability: $(VENV)/.dev-installed  ## a share of the faults, as CI makes them
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(FAULTS)

test-reliability-full: $(VENV)/.dev-installed  ## all faults, one after the other; writes benchmarks/results/reliability.csv
	OMP_NUM_THREADS=1 SEMI_FAST_RELIABILITY=full $(BIN)/python -m pytest --timeout 7200 $(FAULTS)

check: $(VENV)/.dev-installed  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# All that needs a GPU, where one is lent: plain steps, the weightiest first and each with its seconds. OUT/<step>.log is
# what a step said, OUT/*.csv its rows as soon as they were known. A step that fails ends no other one, but make with an
# error; without what the first one looks for nothing begins. Nothing is fetched, and $(VENV)
# is not touched: PYTHON is the machine's own, with .whl of `make wheels` on top. COMMIT=... names the commit of a copy
# without its history, SMALL=1 tries everything out on a CPU, LIMIT=0 takes the seconds away.
OUT ?= runs/gpu
WORK ?= build/gpu
WHEELS ?= jsonargparse
GPU = env PYTHONPATH=$(CURDIR):$(abspath $(WORK)) PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 $(PYTHON) -m
INSTALL = $(PYTHON) -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target $(WORK)
PYTEST = $(GPU) pytest -m gpu -v -p no:cacheprovider
FASTEST := graph-compile-bf16
ifdef SMALL
DEVICE := --device cpu
WRN := $(DEVICE) --small --model wrn_10_1 --side 16 --labeled 8 --repeats 1 --rungs $(FASTEST),eager-bf16
RESNET := $(WRN)
OURS := $(DEVICE) --small --model.name=wrn_10_1 --batch.labeled=8 --repeats 1 --steps 1
DIGITS := $(DEVICE) --optim.steps=4 --eval.every=2 --method.semi.warmup_epochs=0
OPS := $(DEVICE) --repeats 1 --only draw_views
KERNELS := -n 0 tests/kernels/test_bank_push_kernel.py -k nothing
CAPTURE := -n 0 tests/test_levels.py -k "no_trace and fp32"
BESIDE := 2
else
WRN := --rungs $(FASTEST),eager-bf16,graph-bf16,compile-bf16,eager-fp32
RESNET := --model resnet50_cifar --repeats 5 --rungs graph-bf16,eager-bf16
OURS := --model.name=wrn_28_2 --batch.labeled=64 --precision=bf16 --repeats 9 --steps 50
DIGITS := --device cuda --precision=bf16 --seeds 0,1,2
KERNELS := -n 12 tests/kernels
CAPTURE := -n 4 tests/test_levels.py
BESIDE := 1 2 3
endif
RESUME := "tests/test_engine.py::test_resuming_equals_running_through_bit_for_bit[6]"
END_TO_END = $(GPU) semi_fast.cli prepare digits --out $(WORK)/digits && $(GPU) benchmarks.end_to_end \
	--data $(WORK)/digits --config configs/digits/semi.yaml --out $(OUT)/end_to_end.csv $(DIGITS)
PACKING = for n in $(BESIDE); do seq $$n | xargs -P $$n -I@ $(GPU) benchmarks.step $(WRN) --rungs $(FASTEST) --repeats 40 \
	--cut none --beside $$((n - 1)) --out $(WORK)/packing_$${n}_@.csv || exit; done; \
	awk "FNR > 1 || NR == 1" $(WORK)/packing_*.csv >$(OUT)/packing.csv

# $(call step,NAME,SECONDS,COMMAND): interrupted when its seconds, and what earlier steps left of theirs, are over, so that
# it still says what it has found
define step
	@began=$$(date +%s); limit=$$(($(2) + $$(cat $(WORK)/left))); \
	timeout --signal=INT --kill-after=5 $(or $(LIMIT),$$limit) sh -c '$(3)' >$(OUT)/$(1).log 2>&1; code=$$?; \
	took=$$(($$(date +%s) - began)); echo $$((limit > took ? limit - took : 0)) >$(WORK)/left; \
	echo "$(1): exit $$code after $$took of $$limit s" | tee -a $(WORK)/ends
endef
define begin
	@rm -rf $(WORK) && mkdir -p $(WORK) $(OUT)
	@timeout $(or $(LIMIT),40) sh -c 'set -e; for wheel in .whl/*.whl; do ! test -e $$wheel || $(INSTALL) $$wheel; done; \
	$(GPU) benchmarks.machine $(DEVICE)' 2>&1
	@echo 0 >$(WORK)/left
endef
define end
	@! grep "exit [1-9]" $(WORK)/ends
endef

wheels:  ## what a lent machine lacks, into the ignored folder .whl
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --constraint constraints.txt --dest .whl $(WHEELS)

gpu:  ## what a GPU must show, in at most 8 minutes
	$(begin)
	$(call step,kernels,75,$(PYTEST) $(KERNELS))
	$(call step,capture,60,$(PYTEST) $(CAPTURE))
	$(call step,step,205,$(GPU) benchmarks.step --out $(OUT)/step.csv $(WRN))
	$(call step,reference,60,$(GPU) benchmarks.reference --out $(OUT)/reference.csv $(OURS))
	$(call step,resume,40,$(PYTEST) $(RESUME))
	$(end)

gpu-more:  ## accuracy, several runs on one GPU, operations, ResNet-50
	$(begin)
	$(call step,end_to_end,90,$(END_TO_END))
	$(call step,packing,110,$(PACKING))
	$(call step,ops,80,$(GPU) benchmarks.ops --out $(OUT)/ops.csv $(OPS))
	$(call step,resnet,90,$(GPU) benchmarks.step --out $(OUT)/resnet.csv $(RESNET))
	$(end)

clean:
	rm -rf $(VENV) build dist *.egg-info
