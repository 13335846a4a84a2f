"""Starts scheduler and worker processes in milliseconds: a parent that has imported everything forks them.

`python -m tests.zygote ENTRY [MODULE ...]` imports the modules and ENTRY, then reads one JSON object per line (argv,
log) and answers each with the pid of a child that runs ENTRY's main() as `python -m` would. What is tested stays what
it is: a process of its own that can be killed, stopped and restarted. Torch's import alone takes seconds without this.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
_PR_SET_PDEATHSIG = 1


class ForkedProcess:
    """A child of a zygote, held by a pidfd: its end is seen, its exit code is not."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    def send_signal(self, number: int) -> None:
        """Raises ProcessLookupError where it has ended."""
        signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """Raises ProcessLookupError where it has ended."""
        self.send_signal(signal.SIGKILL)

    def poll(self) -> int | None:
        """None while it runs, else -1."""
        return -1 if select.select([self._pidfd], [], [], 0)[0] else None

    def wait(self, timeout: float | None = None) -> int:
        """Blocks until it has ended."""
        if not select.select([self._pidfd], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"pid {self.pid}", timeout or 0.0)
        return -1

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._pidfd)


class Zygote:
    """The parent's handle in the test process."""

    def __init__(self, entry: str, preload: Sequence[str]) -> None:
        env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.zygote", entry, *preload]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=ROOT)
        atexit.register(self._process.kill)

    def spawn(self, argv: Sequence[str], log: Path) -> ForkedProcess:
        """Runs the entry with these arguments; its output is appended to `log`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"argv": list(argv), "log": str(log)}).encode() + b"\n")
        self._process.stdin.flush()
        return ForkedProcess(int(self._process.stdout.readline()))


@cache
def scheduler_zygote() -> Zygote:
    """For schedulers; like them without torch."""
    return Zygote("scheduler.__main__", ())


@cache
def timed_worker_zygote() -> Zygote:
    """For workers that run no model; without torch."""
    return Zygote("worker.__main__", ("worker.assemble", "worker.executor"))


@cache
def worker_zygote() -> Zygote:
    """For workers with a model."""
    return Zygote("worker.__main__", ("worker.assemble", "worker.executor", "worker.loading"))


def _serve(entry: str, preload: Sequence[str]) -> None:
    for name in preload:
        importlib.import_module(name)
    run = importlib.import_module(entry).main
    prctl = ctypes.CDLL(None).prctl
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are reaped by the kernel
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
                os.dup2(source, target)
            sys.argv = [entry, *order["argv"]]
            code: object = 1
            try:
                code = run()
            except SystemExit as ended:
                code = ended.code
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 0)
        print(pid, flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2:])
