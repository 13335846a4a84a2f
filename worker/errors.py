"""What can go wrong with a worker, each with the exit code of the process."""


class WorkerError(Exception):
    """Ends the process with one line on stderr."""

    exit_code = 1


class ConfigError(WorkerError):
    """A flag has a value that cannot be used; the message names it."""

    exit_code = 2


class ModelError(WorkerError):
    """A checkpoint cannot be served; the message names the file, tensor or setting and says what to do."""

    exit_code = 2


class MismatchError(WorkerError):
    """The scheduler serves another model, contract or length."""

    exit_code = 3


class NameTakenError(WorkerError):
    """A live worker has this name."""

    exit_code = 4


class ProtocolError(Exception):
    """A plan breaks the contract: ends the stream, not the process."""
