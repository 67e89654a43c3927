# Each target makes the virtual environment it needs under .venv/ and is one line a person could type.
#   make build   the editable install, incremental        make demo    trains, accelerates and classifies, offline
#   make test    everything, in at most 13 minutes        make bench   the six models against every peer
#   make lint    ruff and clang-format, checking          make format  the same, rewriting
#   make test-triton  every Triton kernel, interpreted at every shape and compiled for every card
#   make test-emulator  the CUDA kernels on the CPU: every shape and tile family, sanitizers, seeded bugs
#   make test-report  the profile's report in headless Chromium, which it installs where apt-get can
#   make test-cuda    NVRTC's numbers and code for every CUDA kernel and card; the cache of cubins, every cold start, kill and damaged file
#   make compiled     what Triton makes of its kernels: rewrites kernels/compiled.csv
#   make compiled-cuda    what NVRTC makes of the CUDA kernels: rewrites evit_fast/cuda/compiled.csv
#   make v100         the model of a V100: rewrites profiles/results/v100-*
#   make gpu     what must be seen on a card: right, repeatable, fast; ARGS="--parts numerics"; dry-run without one
#   make bench-quick  two models in 3 minutes             make bench-ops  every op and instruction set
#   make callgrind    instructions per op: drift above 3 % from the committed counts fails
PYTHON ?= python3
PIP = -m pip --disable-pip-version-check -q install
DEV = .venv/dev/bin
DEMO = .venv/demo/bin
BENCH = .venv/bench/bin
TORCH = torch==2.13.0
TIMM = timm==1.0.31
TRITON = triton==3.7.1# the one that torch wants
NVRTC = nvidia-cuda-nvrtc-cu12==12.9.86# compiles for sm_50 to sm_121 without a GPU
VOLTA_TRITON = triton==3.6.0# the last to bring the nvdisasm of CUDA 12, which knows sm_70
NVDISASM = .venv/nvdisasm/nvdisasm
OLD_TIMM = timm==1.0.20# one of the releases that take one image size only
BUILD_TOOLS = "setuptools>=77" wheel cmake ninja "pybind11>=2.11"
INPUTS = pyproject.toml Makefile
CXX_FILES = $$(git ls-files -co --exclude-standard 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cuh' 'bench/*.cpp' 'tests/*.cpp' 'tests/*.h' 'tests/*.cuh')
# Two processes: Triton decides once, at import, whether it interprets or compiles.
INTERPRET = TRITON_INTERPRET=1 $(DEV)/pytest -q -n 2 --import-mode=importlib
COMPILE = EVIT_FAST_COMPILE_TESTS=1 $(DEV)/pytest -q -n 2 --import-mode=importlib
export OMP_NUM_THREADS ?= 1
export TRITON_CACHE_DIR ?= $(CURDIR)/build/triton

.PHONY: build test test-triton test-emulator test-cuda test-report compiled compiled-cuda v100 gpu demo bench bench-quick bench-ops callgrind lint format clean

build: .venv/dev/ready
	$(DEV)/python $(PIP) --no-build-isolation --no-deps -e .

test: build .venv/old_timm/ready
	@EVIT_FAST_OLD_TIMM=$(CURDIR)/.venv/old_timm $(DEV)/pytest -q -n 2 --import-mode=importlib -m "not full" tests
	@$(INTERPRET) -m "not full" tests/kernels/interpret
	@$(COMPILE) -m "not full" tests/kernels/compile

test-triton: build
	@$(INTERPRET) tests/kernels/interpret
	@$(COMPILE) tests/kernels/compile
	@$(DEV)/pytest -q --import-mode=importlib -m full tests/bench/test_gpu.py

test-emulator: build
	@$(DEV)/pytest -q -n 2 --import-mode=importlib tests/emulator

test-cuda: build $(NVDISASM)
	@EVIT_FAST_NVDISASM=$(CURDIR)/$(NVDISASM) $(DEV)/pytest -q -n 2 --import-mode=importlib tests/test_nvrtc.py tests/test_cubin*.py tests/test_cuda_column.py tests/cuda tests/profiles

test-report: build
	@command -v chromium >/dev/null || { apt-get update && apt-get install -y chromium; }
	@$(DEV)/pytest -q --import-mode=importlib tests/profiles/in_browser.py

compiled: build
	$(DEV)/python -m evit_fast.kernels.compiled --write

compiled-cuda: build
	$(DEV)/python -m evit_fast.cuda.compiled --write

v100: build $(NVDISASM)
	EVIT_FAST_NVDISASM=$(CURDIR)/$(NVDISASM) $(DEV)/python -m evit_fast.profiles.v100 --count --write

gpu: build
	$(DEV)/python -m evit_fast.bench.gpu $(ARGS)

demo: .venv/demo/ready
	$(DEMO)/python $(PIP) --no-build-isolation --no-deps -e .
	$(DEMO)/python -m evit_fast.demo

bench: .venv/bench/ready
	$(BENCH)/python $(PIP) --no-build-isolation --no-deps -e .
	$(BENCH)/python -m evit_fast.bench.models --threads 1,2

bench-quick: .venv/bench/ready
	$(BENCH)/python $(PIP) --no-build-isolation --no-deps -e .
	$(BENCH)/python -m evit_fast.bench.models --model m0,m5 --peers onnxruntime,openvino --rounds 7 --out out/bench

bench-ops: .venv/bench/ready
	$(BENCH)/python $(PIP) --no-build-isolation --no-deps -e .
	$(BENCH)/python -m evit_fast.bench.op_runner --peers eager,folded,compile

callgrind: build
	$(DEV)/python -m evit_fast.bench.callgrind

lint: .venv/lint/ready
	.venv/lint/bin/ruff check . && .venv/lint/bin/ruff format --check .
	.venv/lint/bin/clang-format --dry-run --Werror $(CXX_FILES)

format: .venv/lint/ready
	.venv/lint/bin/ruff check --fix . ; .venv/lint/bin/ruff format .
	.venv/lint/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist .venv *.egg-info evit_fast/_native*.so

# torch comes first and alone: whatever follows must fit it, not move it.
.venv/%/ready: $(INPUTS)
	$(PYTHON) -m venv .venv/$*
	.venv/$*/bin/python $(PIP) $(TORCH)
	.venv/$*/bin/python $(PIP) $(TORCH) $(BUILD_TOOLS) numpy safetensors pillow filelock platformdirs tqdm $(PACKAGES)
	.venv/$*/bin/python $(PIP) --no-deps $(TIMM)
	touch $@

.venv/dev/ready: PACKAGES = $(TRITON) $(NVRTC) pytest pytest-xdist pytest-timeout onnx onnxruntime scikit-learn jinja2 matplotlib
.venv/demo/ready: PACKAGES = scikit-learn matplotlib
.venv/bench/ready: PACKAGES = onnx onnxruntime openvino litert-torch ai-edge-litert matplotlib pytest pytest-benchmark

.venv/lint/ready: $(INPUTS)
	$(PYTHON) -m venv .venv/lint
	.venv/lint/bin/python $(PIP) ruff clang-format
	touch $@

.venv/old_timm/ready: .venv/dev/ready
	rm -rf .venv/old_timm
	$(DEV)/python $(PIP) --no-deps --target .venv/old_timm $(OLD_TIMM)
	touch $@

$(NVDISASM): .venv/dev/ready
	rm -rf .venv/nvdisasm
	$(DEV)/python -m pip --disable-pip-version-check -q download --no-deps -d .venv/nvdisasm $(VOLTA_TRITON)
	unzip -q -j .venv/nvdisasm/*.whl triton/backends/nvidia/bin/nvdisasm -d .venv/nvdisasm
	rm .venv/nvdisasm/*.whl
	touch $@
