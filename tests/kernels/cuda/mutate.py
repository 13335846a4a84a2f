"""Seeds bugs into the kernels one by one and reports how many the emulated tests catch.

Each bug is tried in a process of its own, on a copy of the source, with a cache of its own: a wrong kernel may well
end its process. What survives has no name in any test; at least MIN_CAUGHT of all must be caught.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kernels.cuda import variant

ROOT = Path(__file__).parents[3]
TESTS = Path(__file__).parent
ATTENTION_TESTS = "test_attention.py"
OTHER_TESTS = {
    "copy.cuh": "test_copy.py",
    "rotate.cuh": "test_rotate.py",
    "eight_bit.cuh": "test_eight_bit.py",
    **dict.fromkeys(("rows.cuh", "norm.cuh", "gate.cuh", "greedy.cuh"), "test_linear.py"),
}
MIN_CAUGHT = 0.9
TIMEOUT_S = 600.0
NUM_PROCESSES = 2
# The variants that tests of attention are run for: all kinds of products, both block sizes, window, cap and scales.
VARIANTS = (
    "not ptx and (bfloat16_d80_b16_window or float32_d128_b32_window or bfloat16_d96_b32 or float16_d64"
    " or bfloat16_float8 or bfloat16_int8 or float16_int8 or float32_int8)"
)
# Those whose PTX is tried with bugs that the emulated source does not show: assembly, and what fences are for.
PTX_VARIANTS = "ptx and (d128_b16-ptx or bfloat16_int8 or float16_int8 or float32_d64)"
INVALID = 70
CAUGHT, HUNG = "caught  ", "hung    "


@dataclass(frozen=True, slots=True)
class Mutation:
    """`before`, which stands once in `file`, becomes `after`. in_ptx: nothing else shows it."""

    name: str
    file: str
    in_ptx: bool
    before: str
    after: str

    @property
    def tests(self) -> tuple[str, str]:
        """Those that should notice: their file, and which of it, as pytest's -k has it."""
        file = OTHER_TESTS.get(self.file, ATTENTION_TESTS)
        if self.in_ptx:
            return file, PTX_VARIANTS
        return file, VARIANTS if file == ATTENTION_TESTS else "not ptx"


def read_mutations() -> list[Mutation]:
    """Those of mutations.txt."""
    found = []
    for entry in (TESTS / "mutations.txt").read_text("utf-8").split("\n\n")[1:]:
        title, *changes = entry.rstrip("\n").split("\n")
        place, name = title.split(": ", 1)
        file, _, tag = place.partition(" ")
        before, after = ("\n".join(line[2:] for line in changes if line[0] == sign) for sign in "-+")
        found.append(Mutation(name, file, tag == "(PTX)", before, after))
    return found


def mutate(mutation: Mutation, folder: Path) -> None:
    """Copy the kernels into `folder`, with the bug."""
    shutil.copytree(variant.FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    path = folder / mutation.file
    source = path.read_text("utf-8")
    assert source.count(mutation.before) == 1, (
        f"{mutation.name}: {mutation.before!r} stands {source.count(mutation.before)} times"
    )
    path.write_text(source.replace(mutation.before, mutation.after), "utf-8")


def verdict(mutation: Mutation) -> str:
    """CAUGHT where its tests fail, HUNG where they never end; a bug that does not compile is none."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "kernels"
        mutate(mutation, folder)
        command = [sys.executable, "-m", "tests.kernels.cuda.mutate", str(folder), *mutation.tests]
        environment = os.environ | {"PAGODA_KERNEL_CACHE": str(Path(scratch) / "cache")}
        try:
            ended = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            return HUNG
    if ended.returncode == INVALID or "BuildError" in ended.stdout:
        return "no bug  "
    return CAUGHT if ended.returncode else "SURVIVED"


def run_tests(folder: Path, tests: str, chosen: str) -> int:
    """In the process of its own: the `chosen` tests of the file `tests` on the kernels in `folder`."""
    import hypothesis
    import pytest

    # Found examples are neither kept for later runs nor made small.
    quick = hypothesis.settings(database=None, phases=[hypothesis.Phase.generate])
    hypothesis.settings.register_profile("mutate", quick)
    hypothesis.settings.load_profile("mutate")
    variant.SOURCE = folder / variant.SOURCE.name
    variant.HEADERS = tuple(sorted(folder.glob("*.cuh")))
    flags = ["-x", "-q", "--hypothesis-seed=1", "-p", "no:cacheprovider", "-k", chosen]
    code = pytest.main([str(TESTS / tests), *flags])
    known = {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}
    return int(code) if code in known else INVALID


def main() -> None:
    """Print a line for each bug; fail if too many survive."""
    mutations, caught = read_mutations(), 0
    with ThreadPoolExecutor(NUM_PROCESSES) as pool:
        for mutation, found in zip(mutations, pool.map(verdict, mutations), strict=True):
            caught += found in (CAUGHT, HUNG)
            print(f"{found} {mutation.file}: {mutation.name}", flush=True)
    share = caught / len(mutations)
    print(f"{caught} of {len(mutations)} caught, {share:.0%}")
    sys.exit(share < MIN_CAUGHT)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(run_tests(Path(sys.argv[1]), *sys.argv[2:]))
    main()
