"""NVRTC: what a compile returns, which library is taken for which architecture, the error texts."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from evit_fast import nvrtc
from evit_fast.nvrtc import CompileError, Resources
from tests.native_build import run

ARCHS = (70, 75, 80, 86, 89, 90, 100, 120)
HALF = """
#include "scale.h"
template <int N> __device__ float local(const float* x, int n) {
  float a[N];
  for (int i = 0; i < n; ++i) a[i % N] = x[i] * kScale;
  return a[n % N];
}
extern "C" __global__ void small(float* y, const float* x) { y[threadIdx.x] = x[threadIdx.x] * F; }
extern "C" __global__ void stack(float* y, const float* x, int n) {
  __shared__ float s[100];
  s[threadIdx.x] = local<32>(x, n);
  __syncthreads();
  y[threadIdx.x] = s[99 - threadIdx.x];
}
"""
HEADERS = {"scale.h": "constexpr float kScale = 0.5f;\n"}


def compile_half(arch: int | str, factor: int = 1) -> nvrtc.Cubin:
    return nvrtc.compile(HALF, "half.cu", arch, [f"-DF={factor}"], HEADERS)


# --- a compile


@pytest.mark.parametrize("arch", [*ARCHS, "sm_90a"])
def test_cubin_and_resources(arch):
    cubin = compile_half(arch)
    assert cubin.code[:4] == b"\x7fELF"
    assert nvrtc.arch_name(arch) in cubin.log
    assert cubin.resources.keys() == {"small", "stack"}
    small, stack = cubin.resources["small"], cubin.resources["stack"]
    assert (small.spill_bytes, small.stack_bytes, small.shared_bytes) == (0, 0, 0)
    assert (stack.spill_bytes, stack.stack_bytes, stack.shared_bytes) == (0, 128, 400)
    assert 4 <= small.registers <= 16 and 8 <= stack.registers <= 64


def test_spills_are_counted():
    body = "".join(f"float a{i} = x[{i}];" for i in range(64)) + "__syncthreads();"
    body += "".join(f"x[{i}] = a{i} * a{(29 * i + 11) % 64};" for i in range(64))
    source = f'extern "C" __global__ void wide(volatile float* x) {{ {body} }}'
    free = nvrtc.compile(source, "wide.cu", 80).resources["wide"]
    tight = nvrtc.compile(source, "wide.cu", 80, ["--maxrregcount=32"]).resources["wide"]
    assert free.spill_bytes == 0 and free.registers > 64
    assert tight.spill_bytes > 0 and tight.stack_bytes > 0 and tight.registers <= 32


def test_resources_of_a_log():
    # Two kernels and a function that one of them calls, from NVRTC 12.9 and, last, from 11.8.
    log = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'caller' for 'sm_70'
ptxas info    : Function properties for caller
ptxas         .     128 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Function properties for called
ptxas         .     32 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 160 bytes cumulative stack size, 400 bytes smem
ptxas info    : Compiling entry function '_Z1tILi3EEvPf' for 'sm_70'
ptxas info    : Function properties for _Z1tILi3EEvPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, 360 bytes cmem[0]
"""
    assert nvrtc.parse_resources(log) == {
        "caller": Resources(registers=32, spill_bytes=12, stack_bytes=160, shared_bytes=400),
        "_Z1tILi3EEvPf": Resources(registers=8, spill_bytes=0, stack_bytes=0, shared_bytes=0),
    }


def test_deprecation_of_sm_70_is_no_error():
    assert "deprecated" in compile_half(70).log


def test_eight_kernels_in_two_threads_are_those_of_one():
    jobs = [(arch, factor) for arch in (70, 80) for factor in range(4)]
    serial = [compile_half(*job).code for job in jobs]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda job: compile_half(*job).code, jobs)) == serial
    assert len(set(serial)) == len(jobs)


class Timed:
    """A library that notes when its compile began and ended."""

    def __init__(self, lib) -> None:
        self.lib, self.start, self.end = lib, 0.0, 0.0

    def __getattr__(self, name: str):
        return getattr(self.lib, name)

    def nvrtcCompileProgram(self, *arguments) -> int:
        self.start = time.perf_counter()
        status = self.lib.nvrtcCompileProgram(*arguments)
        self.end = time.perf_counter()
        return status


def test_python_runs_while_a_kernel_compiles(monkeypatch):
    library = nvrtc.find(80)
    timed = Timed(library._lib)
    monkeypatch.setattr(library, "_lib", timed)
    thread, ticks = threading.Thread(target=compile_half, args=(80,)), []
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
    quarter = (timed.end - timed.start) / 4  # at both ends of the call the lock may change hands
    assert sum(1 < (tick - timed.start) / quarter < 2 for tick in ticks) > 10


# --- errors

ERRORS = {
    "undefined": ("\n\n  int x = y;\n}", 'bad.cu:4: identifier "y" is undefined'),
    "in-a-header": ('}\n#include "wrong.h"\n', 'wrong.h:2: identifier "z" is undefined'),
    "missing-header": ('}\n#include "absent.h"\n', 'bad.cu:3: cannot open source file "absent.h"'),
    "ptx": ('asm("bogus.u32 a;"); }', "Not a name of any known instruction: 'bogus'"),
}


@pytest.mark.parametrize(("body", "sentence"), ERRORS.values(), ids=ERRORS)
def test_first_error(body, sentence):
    source = '\nextern "C" __global__ void k() {' + body
    with pytest.raises(CompileError) as error:
        nvrtc.compile(source, "bad.cu", 80, headers={"wrong.h": "\n__device__ int w = z;\n?"})
    text = str(error.value)
    assert text.startswith(
        f"nvrtc: bad.cu does not compile for sm_80 (NVRTC {nvrtc.version(80)}): "
    )
    assert sentence in text and "\n" not in text
    assert "error" in error.value.log


def test_unknown_option():
    with pytest.raises(
        ValueError, match=r"half.cu does not compile .*unrecognized option --frobnic"
    ):
        nvrtc.compile(HALF, "half.cu", 80, ["--frobnicate"], HEADERS)


@pytest.mark.parametrize("arch", [7, "sm70", "compute_70", "sm_70x", "", 7000, None, 70.0])
def test_no_architecture(arch):
    with pytest.raises(ValueError, match="expected a number such as 70 or a name such as sm_90"):
        nvrtc.compile("", "k.cu", arch)


def test_names_of_an_architecture():
    assert {nvrtc.arch_name(arch) for arch in (70, "70", "sm_70")} == {"sm_70"}
    assert nvrtc.arch_name("90a") == "sm_90a"


def test_architecture_that_no_nvrtc_knows():
    with pytest.raises(RuntimeError, match=r"NVRTC .* cannot compile for sm_42: pip install"):
        nvrtc.find(42)


# --- which library

FAKE = """
extern "C" {
int nvrtcVersion(int* major, int* minor) { *major = MAJOR; *minor = MINOR; return 0; }
int nvrtcGetNumSupportedArchs(int* n) { *n = 3; return 0; }
int nvrtcGetSupportedArchs(int* a) { a[0] = FIRST; a[1] = 80; a[2] = LAST; return 0; }
void nvrtcCreateProgram() {} void nvrtcCompileProgram() {} void nvrtcDestroyProgram() {}
void nvrtcGetProgramLogSize() {} void nvrtcGetProgramLog() {}
void nvrtcGetCUBINSize() {} void nvrtcGetCUBIN() {}
const char* nvrtcGetErrorString(int) { return "?"; }
}
"""
WHEEL_12, WHEEL_13 = "cuda_nvrtc/lib/libnvrtc.so.12", "cu13/lib/libnvrtc.so.13"
# place: major, minor, first and last architecture
FAKES = {
    f"old/{WHEEL_12}": (12, 4, 70, 90),
    f"new/{WHEEL_12}": (12, 9, 70, 120),
    f"new/{WHEEL_13}": (13, 0, 75, 121),
    f"only13/{WHEEL_13}": (13, 0, 75, 121),
    "loaded/libnvrtc.so.12.6.77": (12, 6, 70, 90),
    "toolkit/lib64/libnvrtc.so.12": (12, 3, 70, 89),
}
ASK = """
import ctypes, os, sys
from evit_fast import nvrtc
wheels, loaded, system, *archs = sys.argv[1:]
loaded = [ctypes.CDLL(path) for path in loaded.split()]
nvrtc._nvidia_folders = lambda: wheels.split()
if not system:
    places = nvrtc._places
    nvrtc._places = lambda: (p for p in places() if not p.startswith(("libnvrtc", "/usr/local/")))
for arch in archs:
    try:
        print(nvrtc.find(arch).version)
    except RuntimeError as error:
        print(error)
print(*(library.version for library in nvrtc.found()))
"""


@pytest.fixture(scope="module")
def fakes(tmp_path_factory) -> Path:
    """A folder of libraries that report versions and architectures as FAKES says."""
    folder = tmp_path_factory.mktemp("fakes")
    (folder / "fake.cpp").write_text(FAKE)
    for place, numbers in FAKES.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        defines = [
            f"-D{k}={v}" for k, v in zip(("MAJOR", "MINOR", "FIRST", "LAST"), numbers, strict=True)
        ]
        run("g++", "-shared", "-fPIC", *defines, folder / "fake.cpp", "-o", folder / place)
    (folder / "link").symlink_to(folder / "new")
    (folder / "broken/cuda_nvrtc/lib").mkdir(parents=True)
    (folder / "broken" / WHEEL_12).write_text("no library")
    return folder


def ask(fakes: Path, wheels: str, archs: str, loaded: str = "", toolkit: str = "") -> list[str]:
    """find()'s answer for each architecture, in a process of its own, and found()'s versions."""
    wheels = " ".join(str(fakes / wheel) for wheel in wheels.split())
    loaded = " ".join(str(fakes / path) for path in loaded.split())
    env = ("env", "-u", "CUDA_PATH", f"CUDA_HOME={fakes / toolkit if toolkit else ''}")
    out = run(*env, sys.executable, "-c", ASK, wheels, loaded, toolkit, *archs.split())
    return out.replace(f"{fakes}/", "").splitlines()


LOADED = "loaded/libnvrtc.so.12.6.77"
SEARCHES = {
    # wheels, loaded, toolkit, architectures: versions, then all found
    "wheel-of-12-before-13": ("new", "", "", "121 80 70 120", ["13.0", "12.9", "12.9", "12.9"]),
    "an-old-wheel-steps-back": ("old only13", "", "", "90 100a 121", ["12.4", None, "13.0"]),
    "loaded-first": ("new", LOADED, "", "70 90 120 80", ["12.6", "12.6", "12.9", "12.6"]),
    "loaded-13-but-volta": ("new", f"only13/{WHEEL_13}", "", "121 70 80", ["13.0", "12.9", "13.0"]),
    "system-last": ("only13", "", "toolkit", "70 75 89", ["12.3", "13.0", "12.3"]),
}


@pytest.mark.parametrize(
    ("wheels", "loaded", "toolkit", "archs", "versions"), SEARCHES.values(), ids=SEARCHES
)
def test_search(fakes, wheels, loaded, toolkit, archs, versions):
    *answers, _ = ask(fakes, wheels, archs, loaded, toolkit)
    for answer, version in zip(answers, versions, strict=True):
        assert answer == version if version else "cannot compile for" in answer


def test_all_found_once_in_order(fakes):
    assert ask(fakes, "new link only13", "70", LOADED)[-1] == "12.6 12.9 13.0 13.0"


PIP = "pip install --upgrade nvidia-cuda-nvrtc-cu12"
VOLTA = f"cannot compile for sm_70; a V100 needs the NVRTC of CUDA 12: {PIP}"
SENTENCES = {
    "none": (
        "",
        "nvrtc: no NVRTC was found, which compiles the CUDA kernels: "
        "pip install nvidia-cuda-nvrtc-cu12",
    ),
    "cuda-13": ("only13", f"nvrtc: NVRTC 13 (only13/{WHEEL_13}) {VOLTA}"),
    "broken": ("broken", f"nvrtc: broken/{WHEEL_12} (broken/{WHEEL_12}: file too short) {VOLTA}"),
}


@pytest.mark.parametrize(("wheels", "sentence"), SENTENCES.values(), ids=SENTENCES)
def test_nothing_compiles_for_a_v100(fakes, wheels, sentence):
    assert ask(fakes, wheels, "70")[0] == sentence


def test_an_old_nvrtc_for_a_new_card(fakes):
    sentence = f"nvrtc: NVRTC 12.4 (old/{WHEEL_12}: sm_70 to 90) cannot compile for sm_120: {PIP}"
    assert ask(fakes, "old", "120")[0] == sentence
