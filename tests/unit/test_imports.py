"""Who may import whom, read from the sources themselves, imports inside functions included; and fresh contract code."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"scheduler", "worker", "kernels", "deploy", "pagoda", "tests"}
PURE = (
    "planner",
    "admitter",
    "step_rows",
    "beam_search",
    "best_of",
    "float_bits",
    "forks",
    "sequence",
    "block_hash",
    "block_states",
    "block_manager",
    "eviction",
    "history",
    "pins",
    "retry_delay",
    "host_pool",
    "swapper",
    "swap_ahead",
    "promises",
    "waiting_queue",
    "worker_choice",
    "admission",
    "changes",
)


def sources(package: str) -> list[Path]:
    """All of a package's own files, generated code left out."""
    found = [p for p in (ROOT / package).rglob("*.py") if "_pb2" not in p.name]
    assert found, package
    return found


def imported(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever it stands; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            literal = node.args[0] if node.args else None
            if name in {"import_module", "__import__"} and isinstance(literal, ast.Constant):
                yield str(literal.value)


def violations(path: Path, allowed: set[str]) -> list[str]:
    """Imports of our own packages beyond those allowed: a package by its name, or single modules of it."""
    found = []
    for name in imported(path):
        if name.split(".")[0] not in OURS:
            continue
        prefixes = {".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 2)}
        if not prefixes & allowed:
            found.append(f"{path.relative_to(ROOT)} imports {name}")
    return found


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("kernels", {"kernels"}),
        ("protos/pagoda", {"pagoda"}),
        ("scheduler", {"scheduler", "pagoda"}),
        ("worker", {"worker", "pagoda", "kernels"}),
        ("deploy", {"deploy", "pagoda", "scheduler.config", "scheduler.client", "worker.config"}),
        ("tests/load/harness", {"tests.load.harness", "pagoda", "scheduler.client"}),
    ],
)
def test_packages_know_only_what_they_stand_on(package: str, allowed: set[str]) -> None:
    assert [v for path in sources(package) for v in violations(path, allowed)] == []


def test_the_client_stands_on_the_contract_alone() -> None:
    assert violations(ROOT / "scheduler/client.py", {"pagoda"}) == []


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("scheduler", {"torch", "numpy", "transformers", "safetensors"}),
        ("worker", {"redis", "valkey", "transformers"}),
        ("kernels", {"redis", "valkey", "grpc", "transformers"}),
        ("protos/pagoda", {"torch", "numpy", "redis"}),
    ],
)
def test_what_a_package_s_image_does_not_carry_is_never_imported(package: str, forbidden: set[str]) -> None:
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imported(path)
        if name.split(".")[0] in forbidden
    ]
    assert found == []


@pytest.mark.parametrize("module", PURE)
def test_the_core_uses_the_standard_library_and_itself(module: str) -> None:
    allowed = {f"scheduler.{name}" for name in PURE}
    path = ROOT / "scheduler" / f"{module}.py"
    assert violations(path, allowed) == []
    foreign = {name.split(".")[0] for name in imported(path)} - OURS
    assert foreign <= sys.stdlib_module_names
    assert not foreign & {"asyncio", "socket", "threading", "time", "random", "os", "io", "logging"}, "pure"


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("scheduler.__main__", ("torch", "numpy", "transformers", "worker", "deploy", "kernels")),
        ("scheduler.client", ("torch", "numpy", "redis", "scheduler.engine")),
        ("worker.__main__", ("redis", "scheduler", "transformers")),
        ("deploy.cli", ("torch", "numpy", "transformers", "tests")),
        ("tests.load.harness.cli", ("torch", "numpy", "grpc", "aiohttp")),
        ("tests.load.harness.pagoda_backend", ("torch", "redis", "worker", "deploy", "scheduler.engine")),
    ],
)
def test_nothing_forbidden_comes_in_by_way_of_others(module: str, forbidden: tuple[str, ...]) -> None:
    program = f"import sys, {module}; print(*[name for name in {forbidden} if name in sys.modules])"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'protos'}"}
    run = subprocess.run([sys.executable, "-c", program], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


def test_the_contract_s_code_is_what_its_protos_generate(tmp_path: Path) -> None:
    """`make proto` was run after the last change of a .proto file."""
    protos = sorted((ROOT / "protos").rglob("*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}", *outputs, *map(str, protos)]
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    generated = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.py*"))
    assert len(generated) == 4 * len(protos)
    for path in generated:
        assert (ROOT / "protos" / path).read_text("utf-8") == (tmp_path / path).read_text("utf-8"), (
            f"make proto: {path}"
        )


def test_the_cpu_kernels_include_only_what_is_below_them() -> None:
    """Folders of kernels/cpu, and those that each may include from."""
    below = {"base": set(), "attention": {"base"}, "products": {"base"}, "steps": {"base", "attention", "products"}}
    folder = ROOT / "kernels" / "cpu"
    assert {path.parent.name for path in folder.glob("*/*.h")} == set(below)
    for path in (*folder.glob("*/*.h"), *folder.glob("*/*.cpp")):
        for name in re.findall(r'^#include "([^"]+)"', path.read_text("utf-8"), re.MULTILINE):
            included = (path.parent / name).resolve()
            assert included.is_file(), f"{path.name}: {name}"
            assert included.parent.name in {path.parent.name, *below[path.parent.name]}, f"{path.name}: {name}"
