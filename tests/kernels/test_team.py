"""The threads of the CPU kernels: every unit once, whoever claims it; under the thread sanitizer too."""

import subprocess
from pathlib import Path

import pytest

from kernels.build import find_compiler

pytestmark = pytest.mark.skipif(find_compiler(["g++"]) is None, reason="no g++")
ROOT = Path(__file__).parents[2]
HEADERS = ROOT / "kernels/cpu/base"
SOURCES = (ROOT / "tests/kernels/team_stress.cpp", HEADERS / "team.cpp")


@pytest.mark.parametrize(
    ("flags", "num_loops"), [((), 20_000), (("-fsanitize=thread", "-g"), 2_000)], ids=["plain", "sanitized"]
)
def test_every_unit_is_done_once(flags: tuple[str, ...], num_loops: int, tmp_path: Path) -> None:
    program = tmp_path / "stress"
    command = ["g++", "-std=c++20", "-O2", "-pthread", f"-I{HEADERS}", *flags, "-o", program, *SOURCES]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "tsan" in built.stderr:
        pytest.skip("this compiler has no thread sanitizer")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program, str(num_loops)], capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stdout + ran.stderr[:4000]
