"""`make bench-load`: `pagoda load` on `pagoda up` with the demo model, from a trickle to beyond the knee.

Writes the result as JSON, and as a page beside it.
"""

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.load.bench_step import machine_line
from tests.load.soak import pagoda_up
from tests.stack import ROOT

LIMITS = ("--goodput", "ttft:500", "tpot:50")
RAMP = ("--ramp-up-strategy", "exponential", "--ramp-up-start-rps", "2", "--ramp-up-end-rps", "512")
STAGES = ("--find-knee", *RAMP, "--num-stages", "9", "--stage-s", "15")


async def bench(flags: Sequence[str]) -> int:
    """The exit code of `pagoda load` with these flags, on a service of its own."""
    with tempfile.TemporaryDirectory() as folder:
        async with pagoda_up(Path(folder)) as (port, _):
            command = (sys.executable, "-m", "deploy.cli", "load", "--port", str(port), *flags)
            environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}"}
            process = await asyncio.create_subprocess_exec(*command, env=environment)
            return await process.wait()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("build/load.json"))
    given = parser.parse_args()
    print(machine_line(), flush=True)
    flags = (*STAGES, "--dataset-name", "alpaca", *LIMITS, "--num-warmups", "4", "--result-filename", str(given.json))
    code = asyncio.run(bench(flags))
    print(machine_line())
    raise SystemExit(code)


if __name__ == "__main__":
    main()
