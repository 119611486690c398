# make demo   trains on an embedded data set and shows that it learned (CPU or GPU)
# make test   lint, type check and the CPU tests
# make test-slow   the CPU tests that take longest
# make test-avx2   what computes once more, as on a CPU that has AVX2 alone
# make container-test   build the image without Docker, run demo and tests in it (tests/container.sh)
# make cluster-test   runs on four hosts of network namespaces (root; says why where it cannot)
# ARGS="..."  goes to the program:  make demo ARGS="--seed 1"
# PIP_ARGS    goes to pip, e.g. an index with CPU builds of torch

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
	&& { echo $$p; break; }; done)
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)

.PHONY: demo test test-slow test-avx2 check cluster-test test-gpu container-test clean

demo: $(VENV)/.ready
	$(RUN) train/main.py --config configs/demo.yaml $(ARGS)

# a worker that a hanging test ended is not started again: it would run the same test
DISTRIBUTE := --dist loadfile --max-worker-restart=0

# two processes of two threads on two cores: threads that wait must not spin; where there are GPUs they
# are hidden, so that kernels run in the interpreter as everywhere else
test: check
	CUDA_VISIBLE_DEVICES= OMP_WAIT_POLICY=passive $(RUN) -m pytest -n 2 $(DISTRIBUTE) --no-loadscope-reorder $(ARGS)

test-slow: $(VENV)/.ready-dev
	CUDA_VISIBLE_DEVICES= OMP_WAIT_POLICY=passive $(RUN) -m pytest -n 2 -m slow $(DISTRIBUTE) $(ARGS)

# oneDNN and ATen choose other code there; tests/convolutions.py has both settings in `make test-slow`
AVX2 := ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2
COMPUTES := train learning checkpoint resnet optim precision methods simclr byol moco swav vicreg switches \
	sync_norm norm_kernels loss_kernels cosine two_views evaluate knn probes

test-avx2: $(VENV)/.ready-dev
	@if $(RUN) -c 'import torch; raise SystemExit(torch.backends.cpu.get_cpu_capability() != "AVX2")'; then \
		echo "this CPU has AVX2 alone: make test has run this"; \
	else \
		CUDA_VISIBLE_DEVICES= OMP_WAIT_POLICY=passive $(AVX2) $(RUN) -m pytest -n 2 $(DISTRIBUTE) \
			--no-loadscope-reorder $(COMPUTES:%=tests/test_%.py) $(ARGS); \
	fi

check: $(VENV)/.ready-dev
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/codespell README.md CONTRIBUTING.md docs pipeline kernels train profiling tests configs deploy
	$(VENV)/bin/shellcheck deploy/slurm.sh deploy/entrypoint.sh tests/container.sh
	$(VENV)/bin/basedpyright --pythonpath $(RUN)

# mostly waits: more processes than cores
cluster-test: $(VENV)/.ready-dev
	CUDA_VISIBLE_DEVICES= OMP_WAIT_POLICY=passive $(RUN) -m pytest -m cluster -n 3 $(DISTRIBUTE) -rs $(ARGS)

# the kernels for real, and what needs a CUDA device
KERNEL_TESTS := $(shell sed -n 's/^KERNEL_TESTS = "\(.*\)".*/\1/p' profiling/suite/extras.py)

test-gpu: $(VENV)/.ready-dev
	$(RUN) -m pytest $(KERNEL_TESTS:%=tests/test_%.py) $(ARGS)
	$(RUN) -m pytest -m gpu $(ARGS)

container-test:
	PIP_ARGS="$(PIP_ARGS)" ARGS="$(ARGS)" tests/container.sh

$(VENV)/.ready: requirements.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found: install one, or make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	@# DALI's wheel must be of torch's CUDA: that in requirements.txt is for 12
	$(RUN) -c 'import torch; raise SystemExit((torch.version.cuda or "").startswith("13"))' || { \
		$(RUN) -m pip uninstall --quiet --yes nvidia-dali-cuda120; \
		$(PIP) "$$(sed -n s/dali-cuda120/dali-cuda130/p requirements.txt)"; }
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready requirements-dev.txt requirements-peers.txt
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-deps -r requirements-peers.txt
	touch $@

clean:
	rm -rf $(VENV) runs .ruff_cache
