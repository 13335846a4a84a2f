"""python -m worker: one worker process. Exit codes: 0 asked to end, 2 bad flag or model, 3 mismatch, 4 name taken."""

import logging
import os
import signal
import sys
from types import FrameType

from worker.config import WorkerConfig, parse_config
from worker.errors import WorkerError


def main() -> int:
    """Run until a signal or an error ends it; the exit code."""
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGINT, _exit)
    try:
        config = parse_config(sys.argv[1:])
        logging.basicConfig(
            level=config.log_level, format=f"%(asctime)s {config.name} %(levelname)s %(message)s", stream=sys.stderr
        )
        _serve(config)
    except SystemExit as ended:  # a signal, or --help
        return int(ended.code or 0)
    except WorkerError as error:
        sys.stderr.write(f"worker: {error}\n")
        return error.exit_code
    return 0


def _serve(config: WorkerConfig) -> None:
    from worker.assemble import assemble
    from worker.batch import Batch
    from worker.executor import Executor
    from worker.link import Link

    parts = assemble(config)
    link = Link(config.schedulers, parts.description)
    link.start()
    try:
        Executor(link, Batch(parts.limits), parts.runner).run()
    finally:
        link.close()


def _exit(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: taking torch and gRPC apart costs half a second, and nothing is left to be saved.
    os._exit(code)
