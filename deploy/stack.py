"""All processes of one machine, as first started: folders, Redis, workers, scheduler.

Light on purpose: nothing slow is imported before the workers, which take longest, are on their way.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from deploy import redis_server
from deploy.child import Child, ChildLog, Command
from deploy.errors import DeployError
from deploy.settings import UpSettings, check, scheduler_command, worker_commands

END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_MAX_SOCKET_PATH_BYTES = 100  # the kernel's limit is 107


@dataclass(slots=True)
class Stack:
    """The running children by name, and what has to be put away when they are gone."""

    folder: Path
    address: str
    """Where the scheduler listens, for workers and for us: unix:PATH."""
    log: ChildLog = field(default_factory=ChildLog)
    children: dict[str, Child] = field(default_factory=dict)
    data_lock: IO[bytes] | None = None

    def spawn(self, command: Command) -> Child:
        """Starts a child, or starts it again."""
        child = self.children[command.name] = Child(command, self.log)
        return child

    def clear(self) -> None:
        """Removes the folder with the sockets and, where none was named, the data."""
        if self.data_lock is not None:
            self.data_lock.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def start(settings: UpSettings) -> Stack:
    """Starts every process, without waiting for any but Redis. Raises DeployError, and leaves nothing behind.

    Signals that end us are blocked from here on, until a supervisor handles them: a stack that is half started
    is ended in order too.
    """
    check(settings)
    signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    os.environ.setdefault("PAGODA_LOG_LEVEL", "WARNING")  # for the children
    folder = _socket_folder()
    socket_path = folder / "pagoda.sock"
    stack = Stack(folder, f"unix:{socket_path}")
    try:
        redis_url = settings.redis_url or _spawn_redis(stack, settings.data or folder / "data")
        for command in worker_commands(settings, socket_path):
            stack.spawn(command)
        if settings.redis_url is None:
            redis_server.wait_until_ready(stack.children["redis"], folder / "redis.sock")
        stack.spawn(scheduler_command(settings, socket_path, redis_url))
    except BaseException:
        kill(list(stack.children.values()))
        stack.clear()
        raise
    return stack


def kill(children: Sequence[Child]) -> None:
    """Ends children at once."""
    for child in children:
        child.signal(signal.SIGKILL)
    for child in children:
        child.wait()


def _spawn_redis(stack: Stack, data_dir: Path) -> str:
    stack.data_lock = redis_server.lock_data_dir(data_dir)
    socket_path = stack.folder / "redis.sock"
    stack.spawn(redis_server.redis_command(redis_server.find_server(), socket_path, data_dir.resolve()))
    return f"unix://{socket_path}"


def _socket_folder() -> Path:
    """A folder of our own whose path is short enough for a unix socket."""
    for parent in (None, "/tmp"):
        with suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="pagoda-", dir=parent))
            if len(bytes(folder / "pagoda.sock")) <= _MAX_SOCKET_PATH_BYTES:
                return folder
            folder.rmdir()
    raise DeployError("no folder for sockets: set TMPDIR to one that can be written and has a short path")
