"""One child process: started so that it can't outlive us, its stderr read line by line.

Knows nothing of restarts or of what the child does.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

_PR_SET_PDEATHSIG = 1
_KEPT_LINES = 500


@dataclass(frozen=True, slots=True)
class Command:
    """What to run. `name` is what people call it: "redis", "scheduler", "worker-0"."""

    name: str
    argv: tuple[str, ...]
    quiet_start: bool = False
    """What it says before everything is ready is chatter."""
    progress: str = ""
    """Lines with this in them tell why the start takes long: they are passed on at once."""
    environment: tuple[tuple[str, str], ...] = ()
    """What others of this machine must not read off the command line."""


class ChildLog:
    """What the children say: kept back while they start, passed on to stderr, dropped while they end.

    A start that fails then tells its one line, not everybody's.
    """

    def __init__(self) -> None:
        self._held: deque[str] = deque(maxlen=_KEPT_LINES)
        self._holding = True
        self._muted = False
        self._lock = threading.Lock()

    def write(self, line: str, is_chatter: bool = False, is_progress: bool = False) -> None:
        """One line of a child; `is_chatter`: not worth keeping back; `is_progress`: not to be kept back."""
        with self._lock:
            if self._muted:
                return
            if is_progress or not self._holding:
                sys.stderr.write(line)
                sys.stderr.flush()
            elif not is_chatter:
                self._held.append(line)

    def release(self) -> None:
        """Passes on what was held, and from now on every line."""
        with self._lock:
            sys.stderr.writelines(self._held)
            sys.stderr.flush()
            self._held.clear()
            self._holding = False

    def mute(self) -> None:
        """From now on nothing is passed on."""
        with self._lock:
            self._muted = True


class Child:
    """A running process in a session of its own (Ctrl-C reaches us, and we end it in order)."""

    def __init__(self, command: Command, log: ChildLog) -> None:
        self.command = command
        self._last_line = ""
        self._process = subprocess.Popen(
            command.argv,
            env={**os.environ, **dict(command.environment)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_bind_to(os.getpid()),
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._read, args=(log,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; -N where signal N killed it."""
        return self._process.poll()

    @property
    def last_line(self) -> str:
        """The last that it said; all of it once it has ended."""
        if self.exit_code is not None:
            self._reader.join(timeout=1)
        return self._last_line

    def wait(self) -> int:
        """Blocks until it ends; its exit code."""
        return self._process.wait()

    def call_at_end(self, callback: Callable[[int], object]) -> None:
        """Calls back with the exit code, from a thread of its own."""
        threading.Thread(target=lambda: callback(self.wait()), daemon=True).start()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to it and to what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _read(self, log: ChildLog) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._last_line = line.strip() or self._last_line
                is_progress = bool(self.command.progress) and self.command.progress in line
                log.write(line, self.command.quiet_start, is_progress)


def _bind_to(parent_pid: int) -> Callable[[], None]:
    """To be run in the child before exec: the kernel kills it when its parent dies, however that happens."""
    prctl = ctypes.CDLL(None).prctl

    def bind() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent_pid:  # it died before the call
            os._exit(1)

    return bind
