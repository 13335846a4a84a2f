"""Every way in which a request can fail, and the one table that maps each to a gRPC status."""

import grpc


class RequestError(Exception):
    """The base of all that a client is told; its text is the status message: one line that says what to do."""

    retry_after_s: float | None = None
    """When the same call may go through, as far as that can be told."""


class InvalidArgumentError(RequestError):
    """A field of the request breaks a rule."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field


class UnsupportedError(RequestError):
    """The request asks for something that is not served yet; the text names it."""

    def __init__(self, option: str) -> None:
        super().__init__(f"{option} is not served yet; leave it unset")


class AlreadyExistsError(RequestError):
    """The request_id is taken by a request with another body."""


class NotFoundError(RequestError):
    """No such request, or its record has expired."""


class QueueFullError(RequestError):
    """The waiting queue is at its limit; try again later."""

    def __init__(self, num_waiting: int, retry_after_s: float | None) -> None:
        when = "later" if retry_after_s is None else f"in {retry_after_s:.1f} s"
        super().__init__(f"{num_waiting} requests are waiting already; try again {when}")
        self.retry_after_s = retry_after_s


class PinBudgetError(RequestError):
    """What is to be pinned does not fit beside what is pinned; unpin, wait for an expiry, or raise the budget."""


class UnavailableError(RequestError):
    """The service can't go on now; a resuming client comes back with (request_id, next_index)."""


class CancelledError(RequestError):
    """The request was cancelled."""


class DeadlineError(RequestError):
    """The request's deadline passed."""


class InternalError(RequestError):
    """The request failed through no fault of its client."""


STATUS_OF: dict[type[RequestError], grpc.StatusCode] = {
    InvalidArgumentError: grpc.StatusCode.INVALID_ARGUMENT,
    UnsupportedError: grpc.StatusCode.UNIMPLEMENTED,
    AlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    PinBudgetError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    CancelledError: grpc.StatusCode.CANCELLED,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    InternalError: grpc.StatusCode.INTERNAL,
}
