"""Shared libraries, compiled on demand and kept.

Owns the cache folder and the lock around a compile. Knows nothing of what it compiles, nor for which device: the
command is g++ or nvcc alike. A library's file name holds two hashes: of what it is made from (sources, headers, flags,
machine), and of the compiler. A machine without a compiler takes a library that some compiler made ahead.
"""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

log = logging.getLogger("pagoda.kernels")

COMPILE_TIMEOUT_S = 900.0
# Lines of a failed compile that are worth an error message.
MESSAGE_LINES = 20


class BuildError(Exception):
    """A library could not be made, or what was made not be loaded; the message says why."""


class NoCompilerError(BuildError):
    """None of the commands exists here."""


@dataclass(frozen=True, slots=True)
class Library:
    """What a shared library is made from.

    compilers: commands or paths, the first that exists is taken. flags: all of them, `-shared` included. sources are
    compiled; headers only count for the cache's key.
    """

    name: str
    compilers: tuple[str, ...]
    flags: tuple[str, ...]
    sources: tuple[Path, ...]
    headers: tuple[Path, ...] = ()


def shared_library(library: Library, folder: Path | None = None) -> Path:
    """The file of `library` in `folder` (by default `cache_folder()`), compiled now if it is not there.

    Safe with many processes at once: one compiles, the others wait. Raises BuildError.
    """
    folder = folder or cache_folder()
    source_key = _source_key(library)
    compiler = find_compiler(library.compilers)
    if compiler is None:
        return _made_ahead(library, folder, source_key)
    path = folder / f"{library.name}-{source_key}-{_compiler_key(compiler)}.so"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(path.with_suffix(".lock")):
                if not path.exists():
                    _compile(library, compiler, path)
    except OSError as error:
        raise BuildError(f"{library.name}: {error}") from error
    return path


def best_library(libraries: Sequence[Library], folder: Path | None = None) -> Path:
    """The file of the first of `libraries` that is there or can be made. Raises BuildError: the first one's."""
    errors = []
    for library in libraries:
        try:
            path = shared_library(library, folder)
        except BuildError as error:
            errors.append(error)
            continue
        if errors:
            log.warning("%s serves: %s", library.name, str(errors[0]).partition("\n")[0])
        return path
    raise errors[0]


def load(path: Path) -> ctypes.CDLL:
    """A made library, in this process. Raises BuildError, as for one that was made on another system."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path.name}: {error}") from error


def cache_folder() -> Path:
    """PAGODA_KERNEL_CACHE, else pagoda/kernels in XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("PAGODA_KERNEL_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pagoda" / "kernels"


def find_compiler(commands: Sequence[str]) -> str | None:
    """The path of the first of `commands` that exists."""
    return next((path for command in commands if (path := shutil.which(command))), None)


def _source_key(library: Library) -> str:
    digest = hashlib.sha256()
    parts = [platform.system(), platform.machine(), *library.flags]
    for path in (*library.sources, *library.headers):
        parts += [path.name, path.read_text("utf-8")]
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()[:16]


def _compiler_key(compiler: str) -> str:
    version = _run([compiler, "--version"])
    return hashlib.sha256(f"{Path(compiler).name}\n{version}".encode()).hexdigest()[:8]


def _made_ahead(library: Library, folder: Path, source_key: str) -> Path:
    found = sorted(folder.glob(f"{library.name}-{source_key}-*.so"))
    if not found:
        raise NoCompilerError(f"{library.name}: no {' or '.join(library.compilers)} here, none made ahead in {folder}")
    return found[0]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold `path` for this process; the system lets go of it if the process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(library: Library, compiler: str, path: Path) -> None:
    """Only under the lock: what a killed compile left is overwritten, and a whole file appears at once."""
    partial = path.with_suffix(".partial")
    # A warning, since whoever waits for the start should see why.
    log.warning("compiling %s with %s, once; kept in %s", library.name, compiler, path.parent)
    start = time.monotonic()
    if len(library.sources) == 1:
        _run([compiler, *library.flags, "-o", str(partial), str(library.sources[0])])
    else:
        _compile_side_by_side(library, compiler, partial)
    partial.replace(path)
    log.info("compiled %s in %.1f s", library.name, time.monotonic() - start)


def _compile_side_by_side(library: Library, compiler: str, to: Path) -> None:
    """Each source by itself, as many at once as there are cores."""
    flags = [flag for flag in library.flags if flag != "-shared"]
    with TemporaryDirectory() as objects, ThreadPoolExecutor(os.cpu_count()) as threads:
        paths = [str(Path(objects) / f"{source.name}.o") for source in library.sources]
        commands = [
            [compiler, *flags, "-c", "-o", path, str(source)]
            for path, source in zip(paths, library.sources, strict=True)
        ]
        list(threads.map(_run, commands))
        _run([compiler, *library.flags, "-o", str(to), *paths])


def _run(command: Sequence[str]) -> str:
    """What the command prints. Raises BuildError with the end of it where it fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from error
    if run.returncode != 0:
        message = "\n".join((run.stderr or run.stdout).splitlines()[-MESSAGE_LINES:])
        raise BuildError(f"{command[0]} ended with {run.returncode}:\n{message}")
    return run.stdout
