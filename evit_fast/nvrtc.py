"""CUDA C++ to cubin with NVRTC, found at run time and opened at the first use. Needs no GPU.

    cubin = compile(source, "cga.cu", 70, options=["-DWIN=7"], headers={"tile.cuh": text})
    cubin.code, cubin.log, cubin.resources["cga_kernel"].registers

Each architecture takes the first NVRTC that can target it, in this order: one that the process has
loaded already; the wheel nvidia-cuda-nvrtc-cu12; the wheel of CUDA 13 (sm_75 and later); the
system's. So a process that runs CUDA 13 compiles for a V100 where the wheel of CUDA 12 is
installed too. NVRTC is thread-safe and ctypes releases Python's lock: compile in threads.
https://docs.nvidia.com/cuda/nvrtc/

Errors: ValueError, a name that is no architecture or an option that NVRTC does not know;
RuntimeError, nothing here compiles for the architecture; CompileError, the source is wrong.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

WHEEL = "nvidia-cuda-nvrtc-cu12"
CUDA_13_STARTS_AT = 75
INVALID_OPTION = 5  # NVRTC_ERROR_INVALID_OPTION


class CompileError(RuntimeError):
    """The source does not compile. The message holds the first error, `log` all of them."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Resources:
    """What one kernel takes, as ptxas reports it."""

    registers: int  # per thread
    spill_bytes: int  # per thread, stores plus loads
    stack_bytes: int  # local memory per thread, the functions it calls included
    shared_bytes: int  # per block, the static part only


@dataclass(frozen=True)
class Cubin:
    """`resources` by kernel, under its name in the cubin (mangled unless extern "C")."""

    code: bytes
    log: str
    resources: dict[str, Resources]


def arch_name(arch: int | str) -> str:
    """70, "70" and "sm_70" are "sm_70"; "90a" is "sm_90a"."""
    match = re.fullmatch(r"(?:sm_)?(\d{2,3}[af]?)", str(arch))
    if not match:
        raise ValueError(
            f"arch: expected a number such as 70 or a name such as sm_90, got {arch!r}"
        )
    return f"sm_{match[1]}"


def compile(
    source: str,
    name: str,
    arch: int | str,
    options: Sequence[str] = (),
    headers: Mapping[str, str] | None = None,
) -> Cubin:
    """Compiles one source as C++17. `name` stands for it in messages; `headers` are the texts that
    #include finds, by name.
    """
    return find(arch).compile(source, name, arch, options, headers)


def version(arch: int | str | None = None) -> str:
    """The version, "12.9", of the NVRTC that compiles for `arch` (None: of the first found)."""
    return find(arch).version


# --- one library


class Nvrtc:
    """One opened NVRTC: its path, its version as "12.9", its targets as (50, 52, ..., 121)."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._lib = _declare(ctypes.CDLL(path))
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._check(self._lib.nvrtcVersion(major, minor))
        self.version = f"{major.value}.{minor.value}"
        self._check(self._lib.nvrtcGetNumSupportedArchs(count))
        targets = (ctypes.c_int * count.value)()
        self._check(self._lib.nvrtcGetSupportedArchs(targets))
        self.targets: tuple[int, ...] = tuple(targets)

    def __str__(self) -> str:
        return f"NVRTC {self.version} ({self.path}: sm_{min(self.targets)} to {max(self.targets)})"

    def same(self, other: Nvrtc) -> bool:
        """One library may be found in two places."""
        return self._lib._handle == other._lib._handle

    def compile(
        self,
        source: str,
        name: str,
        arch: int | str,
        options: Sequence[str] = (),
        headers: Mapping[str, str] | None = None,
    ) -> Cubin:
        """As the module's compile(), with this library."""
        target = f"--gpu-architecture={arch_name(arch)}"
        options = [target, "--std=c++17", "--ptxas-options=-v", *options]
        headers = headers or {}
        texts, names = _strings(headers.values()), _strings(headers)
        program = ctypes.c_void_p()
        self._check(
            self._lib.nvrtcCreateProgram(
                program, source.encode(), name.encode(), len(headers), texts, names
            )
        )
        try:
            status = self._lib.nvrtcCompileProgram(program, len(options), _strings(options))
            log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if status:
                what = f"{name} does not compile for {arch_name(arch)} (NVRTC {self.version})"
                message = f"nvrtc: {what}: {first_error(log) or self._error(status)}"
                raise (
                    ValueError(message) if status == INVALID_OPTION else CompileError(message, log)
                )
            return Cubin(self._read(program, "CUBIN"), log, parse_resources(log))
        finally:
            self._lib.nvrtcDestroyProgram(program)

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._lib, f"nvrtcGet{what}Size")(program, size))
        data = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._lib, f"nvrtcGet{what}")(program, data))
        return data.raw

    def _error(self, status: int) -> str:
        return self._lib.nvrtcGetErrorString(status).decode()

    def _check(self, status: int) -> None:
        if status:
            raise RuntimeError(f"nvrtc: {self.path} failed: {self._error(status)}")


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Types of the functions used. AttributeError: a library older than CUDA 11.2."""
    text, program = ctypes.c_char_p, ctypes.c_void_p
    texts, number = ctypes.POINTER(text), ctypes.POINTER(ctypes.c_int)
    programs, size = ctypes.POINTER(program), ctypes.POINTER(ctypes.c_size_t)
    for name, arguments in {
        "nvrtcVersion": [number, number],
        "nvrtcGetNumSupportedArchs": [number],
        "nvrtcGetSupportedArchs": [number],
        "nvrtcCreateProgram": [programs, text, text, ctypes.c_int, texts, texts],
        "nvrtcCompileProgram": [program, ctypes.c_int, texts],
        "nvrtcGetProgramLogSize": [program, size],
        "nvrtcGetProgramLog": [program, text],
        "nvrtcGetCUBINSize": [program, size],
        "nvrtcGetCUBIN": [program, text],
        "nvrtcDestroyProgram": [programs],
    }.items():
        getattr(lib, name).argtypes = arguments
    lib.nvrtcGetErrorString.argtypes = [ctypes.c_int]
    lib.nvrtcGetErrorString.restype = text
    return lib


def _strings(values: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [value.encode() for value in values]
    return (ctypes.c_char_p * len(encoded))(*encoded)


# --- finding it

_lock = threading.Lock()
_opened: dict[str, Nvrtc | str] = {}  # by place: the library, or why it cannot be used ("": absent)
_chosen: dict[str, Nvrtc] = {}  # by architecture
_foreign: list[str] = []  # paths that were in the process before they were looked for


def find(arch: int | str | None = None) -> Nvrtc:
    """The NVRTC that compiles for `arch` (None: the first found). RuntimeError: none does."""
    name = "" if arch is None else arch_name(arch)
    number = int(name[3:].rstrip("af")) if name else CUDA_13_STARTS_AT
    refused: list[str] = []
    with _lock:
        if name in _chosen:
            return _chosen[name]
        for place in _places():
            if place.endswith(".so.13") and number < CUDA_13_STARTS_AT:
                if os.path.exists(place):  # not opened: it would only cost 100 MB
                    refused.append(f"NVRTC 13 ({place})")
                continue
            library = _open(place)
            if isinstance(library, Nvrtc) and (not name or number in library.targets):
                _chosen[name] = library
                return library
            if library and str(library) not in refused:
                refused.append(str(library))
    if not refused:
        raise RuntimeError(
            f"nvrtc: no NVRTC was found, which compiles the CUDA kernels: pip install {WHEEL}"
        )
    why = "; a V100 needs the NVRTC of CUDA 12" if 70 <= number < CUDA_13_STARTS_AT else ""
    raise RuntimeError(
        f"nvrtc: {' and '.join(refused)} cannot compile for {name or 'any architecture'}{why}: "
        f"pip install --upgrade {WHEEL}"
    )


def found() -> list[Nvrtc]:
    """Every NVRTC that opens on this machine, in the order of the search."""
    with _lock:
        libraries = {place: _open(place) for place in _places()}
    return list(dict.fromkeys(x for x in libraries.values() if isinstance(x, Nvrtc)))


def _open(place: str) -> Nvrtc | str:
    if place not in _opened:
        try:
            library = Nvrtc(place)
            others = (x for x in _opened.values() if isinstance(x, Nvrtc))
            _opened[place] = next((x for x in others if x.same(library)), library)
        except (OSError, AttributeError, RuntimeError) as error:
            _opened[place] = f"{place} ({error})" if os.path.exists(place) else ""
    return _opened[place]


def _places() -> Iterator[str]:
    """Where an NVRTC may lie: paths, and names for the loader to find."""
    yield from _loaded()
    folders = _nvidia_folders()
    yield from (f"{folder}/cuda_nvrtc/lib/libnvrtc.so.12" for folder in folders)
    yield from (f"{folder}/cu13/lib/libnvrtc.so.13" for folder in folders)
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for name in ("libnvrtc.so.12", "libnvrtc.so.13"):
        yield from (f"{root}/lib64/{name}" for root in roots if root)
        yield name
        yield f"/usr/local/cuda/lib64/{name}"


def _loaded() -> list[str]:
    """Paths of the NVRTCs that others loaded; those opened here keep the rank of their place."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[-1].rstrip("\n") for line in maps}
    except OSError:  # not Linux
        return _foreign
    ours = {os.path.realpath(place) for place in _opened}
    names = re.compile(r"/libnvrtc\.so\.\d+(\.\d+)*$")
    _foreign.extend(sorted(p for p in paths - {*ours, *_foreign} if names.search(p)))
    return _foreign


def _nvidia_folders() -> list[str]:
    """The folders of the nvidia namespace package, which NVIDIA's wheels share."""
    spec = importlib.util.find_spec("nvidia")
    return list(spec.submodule_search_locations or ()) if spec else []


# --- the log

_KERNEL = re.compile(r"Compiling entry function '(\S+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(.*)")
_SOURCE_ERROR = re.compile(r"^(.+)\((\d+)\): (?:catastrophic )?error(?: #\S+)?: (.*)$", re.M)
_OTHER_ERROR = re.compile(r"^.*?(?:error|fatal) *: *(.*)$", re.M)


def first_error(log: str) -> str:
    """The first error of a log as "file:line: what", or without a place; "" where there is none."""
    if match := _SOURCE_ERROR.search(log):
        return f"{match[1]}:{match[2]}: {match[3]}"
    match = _OTHER_ERROR.search(log)
    return match[0].strip() if match else ""


def parse_resources(log: str) -> dict[str, Resources]:
    """What `--ptxas-options=-v` says of each kernel."""
    frames: dict[str, tuple[int, int]] = {}
    kernels: dict[str, Resources] = {}
    kernel = function = ""
    for line in log.splitlines():
        if match := _KERNEL.search(line):
            kernel = match[1]
        elif match := _PROPERTIES.search(line):
            function = match[1]
        elif match := _FRAME.search(line):
            frames[function] = (int(match[1]), int(match[2]) + int(match[3]))
        elif match := _USED.search(line):
            stack, spills = frames.get(kernel, (0, 0))
            stack = max(stack, _bytes(match[2], "cumulative stack size"), _bytes(match[2], "lmem"))
            kernels[kernel] = Resources(int(match[1]), spills, stack, _bytes(match[2], "smem"))
    return kernels


def _bytes(text: str, what: str) -> int:
    match = re.search(rf"(\d+) bytes {what}", text)
    return int(match[1]) if match else 0
