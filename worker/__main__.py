"""python -m worker: one worker process. Exit codes: 0 asked to end, 1 error within, 2 bad flag or
model, 3 mismatch, 4 name taken."""

import gc
import logging
import os
import signal
import sys
import threading

from pagoda.logs import configure

from worker.config import WorkerConfig, parse_config
from worker.errors import WorkerError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main() -> int:
    """Run until an error ends it; the exit code. A signal ends the process from within."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    threading.Thread(target=_exit_on_signal, name="signals", daemon=True).start()
    try:
        config = parse_config(sys.argv[1:])
        configure(config.name, config.log_level, config.log_format)
        _serve(config)
    except WorkerError as error:
        sys.stderr.write(f"worker: {error}\n")
        return error.exit_code
    except Exception:
        logging.getLogger("pagoda.worker").exception("ended by an error of its own or of its device")
        return 1
    return 0


def _serve(config: WorkerConfig) -> None:
    from worker.assemble import assemble
    from worker.batch import Batch
    from worker.executor import Executor
    from worker.link import Link
    from worker.metrics import WorkerMetrics

    metrics = WorkerMetrics()
    if config.metrics_listen:
        metrics.listen(config.metrics_listen)
    parts = assemble(config)
    # What is there now stays: a collection that walks through all of torch takes longer than a step.
    gc.freeze()
    link = Link(config.schedulers, parts.description, metrics)
    link.start()
    try:
        Executor(link, Batch(parts.limits), parts.runner, parts.swaps(link)).run()
    finally:
        link.close()


def _exit_on_signal() -> None:
    """A thread of its own: an exception raised into whatever the main thread does could leave a lock held, and a signal
    that comes just before it blocks would be seen by nobody. The stream ends with the process; nothing is to be saved.
    """
    signal.sigwait(_SIGNALS)
    os._exit(0)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Not sys.exit: taking torch and gRPC apart costs half a second.
    os._exit(code)
