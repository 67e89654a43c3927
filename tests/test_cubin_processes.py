"""The cache of cubins under many processes: cold starts at once, kills, readers, forks."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evit_fast.cubins import Cache
from tests.cubin_cache import Compiler, names, no_warning
from tests.native_build import run


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder that does not exist yet."""
    return tmp_path / "cubins"


COLD_START = """
import os, sys, time
from pathlib import Path
from evit_fast.cubins import Cache
folder, log, go, keys, number = sys.argv[1:]
def build(key):
    log_file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log_file, f"{key}\\n".encode())
    time.sleep(0.01)
    return f"code of {key} ".encode() * 5000
while not os.path.exists(go):
    time.sleep(0.005)
cache = Cache(Path(folder))
for i in range(int(keys)):
    key = f"key{(i + int(number)) % int(keys)}"
    assert cache.get(key, lambda: build(key)) == f"code of {key} ".encode() * 5000
"""


@pytest.mark.parametrize(
    ("processes", "starts"), [(6, 2), pytest.param(32, 20, marks=pytest.mark.full)]
)
def test_cold_starts_compile_once(tmp_path, processes, starts):
    keys = 4
    for start in range(starts):
        folder, log, go = (tmp_path / f"{name}{start}" for name in ("cubins", "log", "go"))
        command = [sys.executable, "-W", "error", "-c", COLD_START, folder, log, go, f"{keys}"]
        workers = [
            subprocess.Popen([*command, f"{i}"], stderr=subprocess.PIPE, text=True)
            for i in range(processes)
        ]
        go.touch()
        assert [worker.communicate()[1] for worker in workers] == [""] * processes
        assert not any(worker.returncode for worker in workers)
        assert sorted(log.read_text().split()) == [f"key{i}" for i in range(keys)]
        ends = ("cubin", "lock")
        assert names(folder) == {f"key{i}.{end}" for i in range(keys) for end in ends}


# Kills a child before each line of the cache's code in turn, from the folder's making to the end
# of the write; after each kill another start must find or make the entry without a word.
KILL_AT_EACH_LINE = """
import itertools, os, shutil, signal, sys, warnings
from pathlib import Path
import filelock
from evit_fast import cubins
folder = Path(sys.argv[1])
warnings.simplefilter("error")

def child(last):
    lines = itertools.count()
    def trace(frame, event, argument):
        if frame.f_code.co_filename != cubins.__file__:
            return None
        if event == "line" and next(lines) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    cubins.Cache(folder).get("a", lambda: b"code" * 1000)
    os._exit(0)

temporaries = 0
for line in itertools.count():
    shutil.rmtree(folder, ignore_errors=True)
    pid = os.fork()
    if pid == 0:
        child(line)
    status = os.waitpid(pid, 0)[1]
    if status == 0:
        break
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    temporaries += (folder / "a.tmp").exists()
    assert cubins.Cache(folder).get("a", lambda: b"code" * 1000) == b"code" * 1000
    assert {path.name for path in folder.iterdir()} <= {"a.cubin", "a.lock"}, line
print(line, temporaries)
"""


def test_killed_at_each_line(folder):
    kills, temporaries = map(int, run(sys.executable, "-c", KILL_AT_EACH_LINE, folder).split())
    assert kills >= 60 and temporaries >= 3


# Builds some entries of 1 MB again and again.
BUILD = """
import itertools, sys
from pathlib import Path
from evit_fast.cubins import Cache
cache = Cache(Path(sys.argv[1]))
print("ready", flush=True)
for i in itertools.cycle(range(int(sys.argv[2]))):
    cache.path(f"entry{i}").unlink(missing_ok=True)
    cache.get(f"entry{i}", lambda: bytes([i]) * 2**20)
"""


@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.full)])
def test_killed_while_building(folder, kills):
    rng = random.Random(kills)
    for _ in range(kills):
        command = [sys.executable, "-W", "error", "-c", BUILD, folder, "8"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as worker:
            assert worker.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0, 0.1))
            worker.kill()
        with no_warning():  # the later start: an entry is whole or absent
            for entry in range(8):
                code = bytes([entry]) * 2**20
                assert Cache(folder).get(f"entry{entry}", Compiler(code)) == code
    ends = ("cubin", "lock")
    assert names(folder) == {f"entry{entry}.{end}" for entry in range(8) for end in ends}


def test_a_reader_sees_an_entry_whole_or_not_at_all(folder):
    cache, seen = Cache(folder), 0
    command = [sys.executable, "-c", BUILD, folder, "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as worker, no_warning():
        assert worker.stdout.readline() == b"ready\n"
        try:
            while seen < 60:
                code = cache._read("entry0", warn=True)
                assert code in (None, bytes(2**20))
                seen += code is not None
        finally:
            worker.kill()


FORK = """
import os, sys, threading, time
from evit_fast import cubins
compiling, done = threading.Event(), threading.Event()
def build():
    compiling.set()
    done.wait()
    return b"code"
thread = threading.Thread(target=lambda: cubins.default().get("a", build))
thread.start()
compiling.wait()
pid = os.fork()  # while the other thread holds the entry
if pid == 0:
    os._exit(0 if cubins.default().get("a", lambda: b"compiled twice") == b"code" else 1)
time.sleep(0.2)
done.set()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_fork_while_compiling(folder):
    run("env", f"EVIT_FAST_CACHE={folder}", sys.executable, "-W", "ignore", "-c", FORK, timeout=60)
