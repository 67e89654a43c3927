"""The cache of cubins in one process: what is kept, trusted, replaced, removed; units and fill."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import stat
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import pytest

from evit_fast import cubins, nvrtc
from evit_fast.cubins import Cache, Unit
from tests.cubin_cache import CODE, Compiler, names, no_warning, one_warning

WHOLE = len(CODE) + cubins.DIGEST_BYTES
DAY = 86400.0
SOURCE = '#include "h"\nextern "C" __global__ void k(float* x) { x[0] = N; }'


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder that does not exist yet."""
    return tmp_path / "cubins"


# --- one process


def test_compiled_once_and_kept(folder):
    compiler = Compiler()
    with no_warning():
        for _ in range(2):
            cache = Cache(folder)
            assert cache.get("a", compiler) == CODE and cache.get("a", compiler) == CODE
    assert compiler.calls == 1
    assert names(folder) == {"a.cubin", "a.lock"}
    assert (folder / "a.cubin").read_bytes()[: len(CODE)] == CODE


def test_only_the_owner_can_reach_it(folder):
    old = os.umask(0)
    try:
        Cache(folder).get("a", Compiler())
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_an_entry_under_another_name_is_refused(folder):
    cache, other = Cache(folder), Compiler(b"other")
    cache.get("a", Compiler())
    shutil.copy(folder / "a.cubin", folder / "b.cubin")
    with one_warning("b.cubin is damaged"):
        assert cache.get("b", other) == b"other"


def test_a_failed_compile_keeps_nothing(folder):
    cache, compiler = Cache(folder), Compiler()

    def fail() -> bytes:
        raise nvrtc.CompileError("wrong", "")

    for _ in range(2):
        with pytest.raises(nvrtc.CompileError, match="wrong"):
            cache.get("a", fail)
    assert names(folder) == {"a.lock"}
    assert cache.get("a", compiler) == CODE and compiler.calls == 1


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_threads_compile_once(folder, where):
    if where == "memory":
        folder.write_text("in the way")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = Cache(folder)
    calls = []

    def compile_slowly() -> bytes:
        calls.append(1)
        time.sleep(0.05)
        return CODE

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: cache.get("a", compile_slowly), range(8))) == {CODE}
    assert len(calls) == 1


def test_the_unused_for_longest_is_removed(folder):
    cache = Cache(folder, max_bytes=3 * WHOLE)
    now = time.time()
    for days, entry in ((9, "read"), (5, "old"), (3, "young")):
        cache.get(entry, Compiler())
        os.utime(folder / f"{entry}.cubin", (now - days * DAY,) * 2)
    cache.get("read", Compiler())  # the oldest, and now the youngest
    (folder / "killed.tmp").write_bytes(b"x" * WHOLE)
    os.utime(folder / "killed.tmp", (now - 7 * DAY,) * 2)
    cache.get("new", Compiler())
    kept = ("read", "young", "new")
    assert names(folder) == {f"{entry}.{end}" for entry in kept for end in ("cubin", "lock")}


def test_an_entry_at_work_is_not_removed(folder):
    cache = Cache(folder, max_bytes=WHOLE)
    cache.get("a", Compiler())
    with filelock.FileLock(folder / "a.lock"), no_warning():
        cache.get("b", Compiler())
        assert {"a.cubin", "a.lock", "b.cubin"} <= names(folder)


def test_a_lock_held_too_long_is_passed_by(folder, monkeypatch):
    monkeypatch.setattr(cubins, "LOCK_SECONDS", 0.05)
    cache, compiler = Cache(folder), Compiler()
    with filelock.FileLock(folder / "a.lock"), one_warning("a.lock was held for"):
        assert cache.get("a", compiler) == CODE and cache.get("a", compiler) == CODE
    assert compiler.calls == 1 and "a.cubin" not in names(folder)


# --- folders that are not used


def test_a_symbolic_link(folder, tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "real")
    assert_in_memory(folder, "is a symbolic link")
    assert names(tmp_path / "real") == set()


def test_another_users_folder(folder, monkeypatch):
    folder.mkdir(mode=0o700)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert_in_memory(folder, f"belongs to user {owner}, not to {owner + 1}")
    assert names(folder) == set()


def test_a_folder_others_can_write(folder):
    folder.mkdir()
    folder.chmod(0o770)
    assert_in_memory(folder, "can be written by others")
    assert names(folder) == set()


def test_a_file_in_the_way(folder):
    folder.write_text("in the way")
    assert_in_memory(folder, "is not a folder")
    assert_in_memory(folder / "below", "cannot be made (File exists)")


def assert_in_memory(folder: Path, why: str) -> None:
    compilers = [Compiler(bytes([i])) for i in range(3)]
    with one_warning(why):
        cache = Cache(folder)
        for _ in range(2):
            for i, compiler in enumerate(compilers):
                assert cache.get(f"entry{i}", compiler) == compiler.code
    assert why in cache.why and [c.calls for c in compilers] == [1, 1, 1]
    with pytest.raises(RuntimeError, match=r"cubins: .* set EVIT_FAST_CACHE to a folder"):
        cubins.fill([Unit("", "k", 70)], cache)


@contextlib.contextmanager
def plain_user():
    """Gives up root, whom no mode keeps from writing, and yields a folder of that user's own."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    root = os.geteuid() == 0
    if root:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        for path in (folder, *folder.glob("*")):
            path.chmod(0o700)
        shutil.rmtree(folder)


def test_a_folder_that_can_only_be_read():
    compiler, new = Compiler(), Compiler(b"new")
    with plain_user() as home:
        folder = home / "cubins"
        Cache(folder).get("a", compiler)
        folder.chmod(0o500)
        os.utime(folder / "a.cubin", (time.time() - 2 * DAY,) * 2)
        with one_warning("cannot be written (Permission denied)"):
            cache = Cache(folder)
            for _ in range(2):
                assert cache.get("a", compiler) == CODE
                assert cache.get("b", new) == cache.get("c", new) == b"new"
        assert (compiler.calls, new.calls) == (1, 2)


def test_a_home_that_can_only_be_read():
    with plain_user() as home:
        home.chmod(0o500)
        assert_in_memory(home / ".cache" / "evit_fast" / "cubins", "cannot be made (Permission")


def test_a_disk_that_can_only_be_read(folder, monkeypatch):
    def refuse(path: object) -> None:
        raise OSError(30, "Read-only file system")

    cache, compiler = Cache(folder), Compiler()
    cache.get("a", compiler)
    os.utime(folder / "a.cubin", (time.time() - 2 * DAY,) * 2)
    monkeypatch.setattr(os, "utime", refuse)
    with no_warning():
        assert cache.get("a", compiler) == CODE and compiler.calls == 1


def test_a_full_disk(folder, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    compiler, cache = Compiler(), Cache(folder)
    monkeypatch.setattr(os, "fsync", full)
    with one_warning("cannot be written (No space left on device)"):
        assert cache.get("a", compiler) == CODE and cache.get("a", compiler) == CODE
        assert cache.get("b", compiler) == CODE
    assert compiler.calls == 2 and names(folder) == {"a.lock", "b.lock"}


def test_a_folder_removed_meanwhile(folder):
    cache, compiler = Cache(folder), Compiler()
    cache.get("a", compiler)
    shutil.rmtree(folder)
    with no_warning():
        assert cache.get("a", compiler) == CODE and compiler.calls == 2
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and names(folder) == {"a.cubin", "a.lock"}


# --- damage


@pytest.mark.parametrize("damages", [100, pytest.param(1000, marks=pytest.mark.full)])
def test_damaged_files_are_replaced(folder, damages):
    """Half are cut at every length there is in turn, half have one bit flipped."""
    rng = random.Random(damages)
    cache, compiler = Cache(folder), Compiler()
    cache.get("a", compiler)
    path = folder / "a.cubin"
    whole = path.read_bytes()
    assert len(whole) == WHOLE
    for i in range(damages):
        if i % 2:
            data = bytearray(whole)
            bit = rng.randrange(8 * WHOLE)
            data[bit // 8] ^= 1 << bit % 8
        else:
            data = whole[: i * WHOLE // damages]
        path.write_bytes(data)
        with one_warning("a.cubin is damaged and is compiled anew"):
            cache._said.clear()
            assert cache.get("a", compiler) == CODE
        assert compiler.calls == 2 + i and path.read_bytes() == whole


@pytest.mark.parametrize("what", ["link", "folder", "foreign"])
def test_what_is_no_plain_file_of_this_user(folder, what, tmp_path, monkeypatch):
    """A link to a right file, a folder, a right file of another user."""
    cache, compiler = Cache(folder), Compiler()
    path = folder / "a.cubin"
    cache.get("a", compiler)
    path.rename(tmp_path / "right")
    if what == "folder":
        path.mkdir()
    elif what == "link":
        path.symlink_to(tmp_path / "right")
    else:
        (tmp_path / "right").rename(path)
        owner = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cache.get("a", compiler) == CODE
    assert compiler.calls == 2


# --- units


def unit(number: int = 0, arch: int | str = 70, **fields) -> Unit:
    fields = {"source": SOURCE, "headers": {"h": ""}} | fields
    return Unit(name="cga.cu", arch=arch, options=(f"-DN={number}",), **fields)


def test_every_part_counts():
    base = Unit("s", "n", 70, ("a", "b"), {"h": "t"})
    others = [
        Unit("S", "n", 70, ("a", "b"), {"h": "t"}),
        Unit("s", "N", 70, ("a", "b"), {"h": "t"}),
        Unit("s", "N/n.cu", 70, ("a", "b"), {"h": "t"}),
        Unit("s", "n", 75, ("a", "b"), {"h": "t"}),
        Unit("s", "n", 70, ("b", "a"), {"h": "t"}),
        Unit("s", "n", 70, ("ab",), {"h": "t"}),
        Unit("s", "n", 70, ("a", "b", "h"), {"t": ""}),
        Unit("s", "n", 70, ("a", "b"), {"h": "T"}),
        Unit("s", "n", 70, ("a", "b"), {"ht": ""}),
    ]
    assert len({base.entry(), *(other.entry() for other in others)}) == 10
    assert base.entry() == Unit("s", "n", "sm_70", ["a", "b"], {"h": "t"}).entry()
    two = {"x": "1", "y": "2"}
    assert (
        Unit("s", "n", 70, (), two).entry() == Unit("s", "n", 70, (), {"y": "2", "x": "1"}).entry()
    )
    name = Unit("s", "../../etc/c g.cu", 70).entry()
    assert name.startswith("c_g-sm_70-") and "/" not in name


def test_a_unit_is_compiled_once(folder, monkeypatch):
    code = cubins.get(unit(), Cache(folder))
    assert code == nvrtc.compile(SOURCE, "cga.cu", 70, ["-DN=0"], {"h": ""}).code
    version = nvrtc.version(70)
    assert f"{unit().entry()}-nvrtc{version}.cubin" in names(folder)
    monkeypatch.setattr(nvrtc.Nvrtc, "compile", lambda *_: pytest.fail("compiled again"))
    assert cubins.get(unit(), Cache(folder)) == code


def test_without_nvrtc_any_version_serves(folder, monkeypatch):
    cache = Cache(folder)
    for version in ("12.8", "12.10", "12.9"):
        cache.get(f"{unit().entry()}-nvrtc{version}", Compiler(version.encode()))

    def nothing(arch: object) -> None:
        raise RuntimeError("nvrtc: nothing here")

    monkeypatch.setattr(nvrtc, "find", nothing)
    assert cubins.get(unit(), cache) == b"12.10"
    (folder / f"{unit().entry()}-nvrtc12.10.cubin").write_bytes(b"")
    with one_warning("is damaged"):
        assert cubins.get(unit(), cache) == b"12.9"
    with pytest.raises(RuntimeError, match="nothing here"):
        cubins.get(unit(1), cache)


def test_fill(folder):
    units = [unit(number, arch) for arch in (70, 80) for number in range(3)]
    broken = [unit(source="?"), unit(arch=42)]
    seen = []
    outcomes = cubins.fill([*units, *broken], Cache(folder), threads=2, report=seen.append)
    assert sorted(map(id, seen)) == sorted(map(id, outcomes))
    assert [outcome.unit for outcome in outcomes] == [*units, *broken]
    assert all(outcome.compiled and not outcome.error for outcome in outcomes[:6])
    assert isinstance(outcomes[6].error, nvrtc.CompileError)
    assert "cannot compile for sm_42" in str(outcomes[7].error)
    assert {o.path.name for o in outcomes[:6]} == {n for n in names(folder) if n.endswith(".cubin")}
    again = cubins.fill(units, Cache(folder), threads=2)
    assert not any(outcome.compiled or outcome.error for outcome in again)


def test_fill_says_what_it_could_not_write(folder, monkeypatch):
    cache = Cache(folder)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "I/O error")))
    with one_warning("I/O error"):
        (outcome,) = cubins.fill([unit()], cache)
    assert outcome.compiled and "could not be written" in str(outcome.error)


def test_the_default_folder(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("EVIT_FAST_CACHE", str(folder))
    assert cubins.default().folder == folder and cubins.default() is cubins.default()
    monkeypatch.setenv("EVIT_FAST_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    cubins._cache.cache_clear()
    assert cubins.default().folder == tmp_path / "xdg" / "evit_fast" / "cubins"
    cubins._cache.cache_clear()
