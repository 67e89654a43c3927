"""The disk cache of compiled CUDA kernels: each is compiled once a machine, not once a process.

    code = get(Unit(source, "cga.cu", 70, options=("-DWIN=7",), headers={"tile.cuh": text}))

The folder is $EVIT_FAST_CACHE, else evit_fast/cubins in the user's cache folder. An entry is a
cubin that every tool reads, cga-sm_70-<hash of all that was compiled>-nvrtc12.9.cubin; the last 32
bytes of the file are the SHA-256 of its name and the bytes before. Beside it lies an empty .lock.

- The folder is made for its owner alone. One that is a symbolic link, that belongs to another user
  or that others can write could hold somebody else's code: it is not used.
- An entry appears by a rename, whole. Its SHA-256 is checked before it is handed out: a damaged one
  is compiled anew and replaced, with a warning.
- Processes and threads that miss the same entry wait for the one that compiles it.
- Where the folder cannot be used or written, kernels live in memory, with one warning.
- Past MAX_BYTES the entries unused for longest are removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from evit_fast import nvrtc

MAX_BYTES = 512 * 2**20  # M0..M5 in three dtypes for eight architectures take about 100 MiB
LOCK_SECONDS = 120.0  # a kernel compiles in 0.1 to 5 s: who holds a lock this long is stuck
TOUCH_SECONDS = 86400.0  # how finely "unused for longest" is known
DIGEST_BYTES = 32


@dataclass(frozen=True)
class Unit:
    """All that decides what NVRTC makes of a source, but its version. Fields as nvrtc.compile's."""

    source: str
    name: str
    arch: int | str
    options: Sequence[str] = ()
    headers: Mapping[str, str] = field(default_factory=dict)

    def entry(self) -> str:
        """The name of its entry in the cache, up to the version: equal for equal fields only."""
        arch = nvrtc.arch_name(self.arch)
        fields = [self.source, self.name, arch, [*self.options], sorted(self.headers.items())]
        digest = hashlib.sha256(json.dumps(fields).encode()).hexdigest()
        return f"{re.sub(r'[^A-Za-z0-9]', '_', Path(self.name).stem)[:40]}-{arch}-{digest}"


@dataclass(frozen=True)
class Outcome:
    """What became of one unit of fill(): `error` is None or says why it has no file."""

    unit: Unit
    path: Path
    compiled: bool  # False: it was there
    seconds: float
    error: Exception | None


def get(unit: Unit, cache: Cache | None = None) -> bytes:
    """The unit's cubin, from the cache or compiled now. Where no NVRTC here can compile for its
    architecture, one that any version left in the cache.

    Errors: as nvrtc.compile.
    """
    cache = cache or default()
    try:
        library = nvrtc.find(unit.arch)
    except RuntimeError:
        code = cache.any_version(unit.entry())
        if code is None:
            raise
        return code
    return cache.get(_versioned(unit, library), lambda: _compile(unit, library))


def fill(
    units: Iterable[Unit],
    cache: Cache | None = None,
    threads: int | None = None,
    report: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Compiles whatever the cache lacks, in threads (None: one per processor), and tells `report`
    of each as it is done. A unit that fails does not stop the others.

    RuntimeError: the folder cannot be used.
    """
    cache = cache or default()
    if cache.why:
        raise RuntimeError(f"cubins: {cache.why}")

    def one(unit: Unit) -> Outcome:
        start, compiled, error, path = time.perf_counter(), False, None, cache.folder

        def compile_it() -> bytes:
            nonlocal compiled
            compiled = True
            return _compile(unit, library)

        try:
            library = nvrtc.find(unit.arch)
            path = cache.path(_versioned(unit, library))
            cache.get(path.stem, compile_it)
            if not path.exists():
                error = RuntimeError(f"cubins: {path} could not be written")
        except (RuntimeError, ValueError) as raised:
            error = raised
        outcome = Outcome(unit, path, compiled, time.perf_counter() - start, error)
        if report:
            report(outcome)
        return outcome

    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(one, units))


def _versioned(unit: Unit, library: nvrtc.Nvrtc) -> str:
    return f"{unit.entry()}-nvrtc{library.version}"


def _compile(unit: Unit, library: nvrtc.Nvrtc) -> bytes:
    return library.compile(unit.source, unit.name, unit.arch, unit.options, unit.headers).code


def default() -> Cache:
    """The cache of this process: in $EVIT_FAST_CACHE, else in the user's cache folder."""
    return _cache(os.environ.get("EVIT_FAST_CACHE") or "")


def folder() -> Path:
    """Of the default cache, there or not."""
    return _folder(os.environ.get("EVIT_FAST_CACHE") or "")


def _folder(chosen: str) -> Path:
    if chosen:
        return Path(chosen).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("evit_fast", appauthor=False) / "cubins"


@lru_cache
def _cache(chosen: str) -> Cache:
    return Cache(_folder(chosen))


os.register_at_fork(after_in_child=_cache.cache_clear)  # its locks may be held by absent threads


class Cache:
    """One folder of entries. `why` says why the folder is not used; "" where it is."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder = Path(folder).absolute()
        self.max_bytes = max_bytes
        self._memory: dict[str, bytes] = {}  # what could not be written
        self._turns: dict[str, threading.Lock] = {}  # by entry, for the threads of this process
        self._said: set[str] = set()
        self.why = _refusal(self.folder)
        if self.why:
            self._warn(f"{self.why}; kernels are compiled in every process")

    def path(self, entry: str) -> Path:
        """The entry's file."""
        return self.folder / f"{entry}.cubin"

    def get(self, entry: str, compile_fn: Callable[[], bytes]) -> bytes:
        """The entry's bytes. Where it is missing or damaged, those of compile_fn(), which one
        process calls while the others wait. What compile_fn raises is passed on, nothing is kept.
        """
        with self._turns.setdefault(entry, threading.Lock()):
            code = self._memory.get(entry)
            if code is None and not self.why:
                code = self._read(entry)
            if code is not None:
                return code
            with self._locked(entry) as locked:
                code = self._read(entry, warn=True) if locked else None  # another process's
                if code is None:
                    code = compile_fn()
                    if not (locked and self._write(entry, code)):
                        self._memory[entry] = code
                return code

    def any_version(self, unversioned: str) -> bytes | None:
        """The entry that the newest version of NVRTC left, or None."""
        names = [path.stem for path in self.folder.glob(f"{unversioned}-nvrtc*.cubin")]
        names = [] if self.why else names
        newest_first = sorted(names, key=lambda n: [int(x) for x in re.findall(r"\d+", n)[-2:]])
        return next((code for n in newest_first[::-1] if (code := self._read(n, warn=True))), None)

    def holds(self, arch: int | str) -> bool:
        """Whether there is any entry for an architecture."""
        pattern = f"*-{nvrtc.arch_name(arch)}-*.cubin"
        return not self.why and next(self.folder.glob(pattern), None) is not None

    def _read(self, entry: str, warn: bool = False) -> bytes | None:
        """None: missing, damaged, or not a plain file of this user."""
        path = self.path(entry)
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
                status = os.fstat(file.fileno())
                if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                    data = file.read()
                    code = data[:-DIGEST_BYTES]
                    if data[len(code) :] == _digest(entry, code):
                        self._touch(path, status.st_mtime)
                        return code
        except FileNotFoundError:
            return None
        except OSError:  # a link, a folder, a bad disk: an entry as damaged as any
            pass
        if warn:
            self._warn(f"{path} is damaged and is compiled anew")
        return None

    def _touch(self, path: Path, modified: float) -> None:
        if time.time() - modified > TOUCH_SECONDS:
            with contextlib.suppress(OSError):  # a folder that can only be read
                os.utime(path)

    def _write(self, entry: str, code: bytes) -> bool:
        """Under the entry's lock, so that one name does for the temporary file: what a killed
        process left there is overwritten. False: it could not be written.
        """
        path = self.path(entry)
        temporary = path.with_name(f"{entry}.tmp")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(temporary, flags, 0o600), "wb") as file:
                file.write(code + _digest(entry, code))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(self.folder)
        except OSError as error:
            self._cannot_write(error)
            with contextlib.suppress(OSError):
                temporary.unlink()
            return False
        self._trim(path)
        return True

    @contextlib.contextmanager
    def _locked(self, entry: str, seconds: float | None = None) -> Iterator[bool]:
        """Whether the entry is this caller's alone. It saves work only: an entry written without it
        would be whole or found damaged. seconds: how long to wait, None: LOCK_SECONDS.
        """
        if self.why or (why := _refusal(self.folder)):  # somebody may have removed it meanwhile
            if not self.why:
                self._warn(f"{why}; kernels stay in memory only")
            yield False
            return
        seconds = LOCK_SECONDS if seconds is None else seconds
        import filelock

        lock = filelock.FileLock(self.folder / f"{entry}.lock", mode=0o600)
        try:
            lock.acquire(timeout=seconds, poll_interval=0.02)
        except filelock.Timeout:
            if seconds:
                self._warn(f"{lock.lock_file} was held for {seconds:.0f} s; compiled without it")
            yield False
            return
        except OSError as error:
            self._cannot_write(error)
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _trim(self, newest: Path) -> None:
        """Removes the entries unused for longest until the folder holds max_bytes."""
        files = []
        with os.scandir(self.folder) as found:
            for file in found:
                if file.name.endswith((".cubin", ".tmp")) and file.name != newest.name:
                    with contextlib.suppress(FileNotFoundError):  # another process trims too
                        status = file.stat(follow_symlinks=False)
                        files.append((status.st_mtime, status.st_size, Path(file.path)))
        total = newest.stat().st_size + sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.max_bytes:
                return
            with self._locked(path.stem, seconds=0) as locked:
                if locked:  # else somebody is at it right now
                    for suffix in (path.suffix, ".lock"):
                        path.with_name(path.stem + suffix).unlink(missing_ok=True)
                    total -= size

    def _cannot_write(self, error: OSError) -> None:
        why = error.strerror or error
        self._warn(f"{self.folder} cannot be written ({why}); kernels stay in memory only")

    def _warn(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(f"cubins: {what}", RuntimeWarning, stacklevel=2)


def _digest(entry: str, code: bytes) -> bytes:
    return hashlib.sha256(entry.encode() + b"\0" + code).digest()


def _sync_folder(folder: Path) -> None:
    """Makes a rename in it last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refusal(folder: Path) -> str:
    """Makes the folder where it is missing; says why it cannot be trusted or made, or ""."""
    advice = "set EVIT_FAST_CACHE to a folder of your own"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
    except OSError as error:
        return f"{folder} cannot be made ({error.strerror}); {advice}"
    if stat.S_ISLNK(status.st_mode):
        return f"{folder} is a symbolic link; {advice}"
    if not stat.S_ISDIR(status.st_mode):
        return f"{folder} is not a folder; {advice}"
    if status.st_uid != os.geteuid():
        return f"{folder} belongs to user {status.st_uid}, not to {os.geteuid()}; {advice}"
    if status.st_mode & 0o022:
        return f"{folder} can be written by others; chmod go-w it, or {advice}"
    return ""
