"""Libraries made on demand: once, by one of many, whole or not at all."""

import ctypes
import dataclasses
import logging
import multiprocessing
import shutil
import stat
from pathlib import Path

import pytest

from kernels.build import BuildError, Library, NoCompilerError, best_library, cache_folder, load, shared_library

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@pytest.fixture
def answer(tmp_path: Path) -> Library:
    """A library whose answer() is 42, by way of a header."""
    source, header = tmp_path / "answer.cpp", tmp_path / "answer.h"
    source.write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    header.write_text("#define ANSWER 42\n")
    return Library("answer", ("g++",), ("-shared", "-fPIC"), (source,), (header,))


def ask(library: Library, folder: Path) -> int:
    return int(ctypes.CDLL(str(shared_library(library, folder))).answer())


def counting_compiler(folder: Path, delay_s: float) -> Path:
    """A g++ that takes its time and notes every compile."""
    script = folder / "g++-counted"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] || {{ echo run >> {folder}/runs; sleep {delay_s}; }}\nexec g++ "$@"\n'
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def runs(folder: Path) -> int:
    return len((folder / "runs").read_text().splitlines())


@needs_compiler
def test_compiles_once_and_says_so(answer: Library, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    counted = dataclasses.replace(answer, compilers=(str(counting_compiler(tmp_path, 0)),))
    with caplog.at_level(logging.INFO, "pagoda.kernels"):
        assert ask(counted, tmp_path / "cache") == 42
        lines = len(caplog.records)
        assert ask(counted, tmp_path / "cache") == 42
    assert runs(tmp_path) == 1
    assert len(caplog.records) == lines == 2
    assert "compiling answer" in caplog.text


@needs_compiler
@pytest.mark.parametrize("change", ["source", "header", "flags"])
def test_anything_that_goes_in_makes_another_library(answer: Library, tmp_path: Path, change: str) -> None:
    before = shared_library(answer, tmp_path)
    match change:
        case "source":
            answer.sources[0].write_text('extern "C" int answer() { return 7; }\n')
        case "header":
            answer.headers[0].write_text("#define ANSWER 7\n")
        case "flags":
            answer = dataclasses.replace(answer, flags=(*answer.flags, "-O1"))
    assert shared_library(answer, tmp_path) != before
    assert ask(answer, tmp_path) == (42 if change == "flags" else 7)


@needs_compiler
def test_of_many_processes_one_compiles(answer: Library, tmp_path: Path) -> None:
    counted = dataclasses.replace(answer, compilers=(str(counting_compiler(tmp_path, 0.3)),))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.starmap(ask, [(counted, tmp_path / "cache")] * 4) == [42] * 4
    assert runs(tmp_path) == 1


@needs_compiler
def test_a_failed_compile_says_why_and_leaves_no_library(answer: Library, tmp_path: Path) -> None:
    answer.sources[0].write_text("no such thing;\n")
    with pytest.raises(BuildError, match=r"no such thing|does not name a type"):
        shared_library(answer, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*.so")) == []


@needs_compiler
def test_what_a_killed_compile_left_is_no_library(answer: Library, tmp_path: Path) -> None:
    path = shared_library(answer, tmp_path)
    path.unlink()
    path.with_suffix(".partial").write_text("half")
    path.with_suffix(".lock").write_text("")
    assert ask(answer, tmp_path) == 42


@needs_compiler
def test_without_a_compiler_one_made_ahead_serves(answer: Library, tmp_path: Path) -> None:
    made = shared_library(answer, tmp_path)
    assert shared_library(dataclasses.replace(answer, compilers=("no-such-compiler",)), tmp_path) == made


@needs_compiler
def test_what_the_compiler_does_not_know_leaves_the_next_best(
    answer: Library, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    too_new = dataclasses.replace(answer, name="better", flags=(*answer.flags, "-march=not-yet"))
    assert best_library([too_new, answer], tmp_path) == shared_library(answer, tmp_path)
    assert "answer serves: g++ ended with 1" in caplog.text.replace(shutil.which("g++") or "", "g++")
    with pytest.raises(BuildError, match="not-yet"):
        best_library([too_new, too_new], tmp_path)


@needs_compiler
def test_without_a_compiler_the_best_that_was_made_ahead_serves(answer: Library, tmp_path: Path) -> None:
    made = shared_library(answer, tmp_path)
    lost = dataclasses.replace(answer, compilers=("no-such-compiler",))
    assert best_library([dataclasses.replace(lost, name="better"), lost], tmp_path) == made


def test_without_a_compiler_and_a_library_it_names_both(answer: Library, tmp_path: Path) -> None:
    with pytest.raises(NoCompilerError, match="answer: no no-such-compiler or nor-this here"):
        shared_library(dataclasses.replace(answer, compilers=("no-such-compiler", "nor-this")), tmp_path)


@needs_compiler
def test_a_folder_that_cannot_be_written_is_a_build_error(answer: Library, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BuildError, match="answer"):
        shared_library(answer, tmp_path / "file" / "cache")


def test_a_library_of_another_system_is_a_build_error(tmp_path: Path) -> None:
    path = tmp_path / "foreign.so"
    path.write_bytes(b"\x7fELF" + bytes(60))
    with pytest.raises(BuildError, match=r"foreign\.so: "):
        load(path)


def test_where_libraries_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PAGODA_KERNEL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/pagoda/kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert cache_folder() == Path("/var/cache/pagoda/kernels")
    monkeypatch.setenv("PAGODA_KERNEL_CACHE", "/opt/kernels")
    assert cache_folder() == Path("/opt/kernels")
