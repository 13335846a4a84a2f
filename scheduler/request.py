"""What a validated request is: plain frozen values, and their form in Redis."""

from dataclasses import dataclass

from pagoda.v1 import generation_pb2 as pb

from scheduler.beam_search import EarlyStopping

_EARLY_STOPPING = {
    EarlyStopping.HEURISTIC: pb.EARLY_STOPPING_UNSPECIFIED,
    EarlyStopping.FULL: pb.EARLY_STOPPING_FULL,
    EarlyStopping.NEVER: pb.EARLY_STOPPING_NEVER,
}


def early_stopping(sampling: pb.SamplingParams) -> EarlyStopping:
    """The contract's value. Raises KeyError for one that it does not name."""
    return {number: value for value, number in _EARLY_STOPPING.items()}[sampling.early_stopping]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample and when to stop, every default resolved (see generation.proto for units and ranges)."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    max_tokens: int
    min_tokens: int
    ignore_eos: bool
    stop_token_ids: tuple[int, ...]
    stop: tuple[str, ...]
    beam_width: int = 0
    """Beams to search with; 0: it samples."""
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = EarlyStopping.HEURISTIC
    best_of: int = 0
    """Choices to sample, of which the best are delivered; 0: all are."""


@dataclass(frozen=True, slots=True)
class RequestBody:
    """A request as it is kept: prompt tokenized, defaults filled in, seed drawn.

    `digest` is taken over what the client sent, so that the same request sent again is recognised.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    n: int
    resumable: bool
    resume_wait_s: float
    tenant: str
    cache_salt: str
    priority: int
    digest: bytes
    pin_prompt_s: float = 0.0

    @property
    def num_sequences(self) -> int:
        """Sequences that the request runs: choices, delivered or not, or beams."""
        return max(self.n, self.sampling.best_of, self.sampling.beam_width)

    def to_bytes(self) -> bytes:
        """The body as a resolved GenerateRequest; `digest` is stored beside it."""
        s = self.sampling
        message = pb.GenerateRequest(
            request_id=self.request_id,
            token_ids=pb.TokenIds(ids=self.prompt_token_ids),
            sampling=pb.SamplingParams(
                temperature=s.temperature,
                top_k=s.top_k,
                top_p=s.top_p,
                min_p=s.min_p,
                seed=s.seed,
                max_tokens=s.max_tokens,
                min_tokens=s.min_tokens,
                ignore_eos=s.ignore_eos,
                stop_token_ids=s.stop_token_ids,
                stop=s.stop,
                beam_width=s.beam_width or None,
                length_penalty=s.length_penalty,
                early_stopping=_EARLY_STOPPING[s.early_stopping],
                best_of=s.best_of or None,
            ),
            n=self.n,
            resumable=self.resumable,
            resume_wait_s=self.resume_wait_s,
            tenant=self.tenant,
            cache_salt=self.cache_salt,
            priority=self.priority,
            pin_prompt_s=self.pin_prompt_s,
        )
        return message.SerializeToString()

    @classmethod
    def from_bytes(cls, data: bytes, digest: bytes) -> "RequestBody":
        """The inverse of to_bytes."""
        message = pb.GenerateRequest.FromString(data)
        s = message.sampling
        sampling = SamplingParams(
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
            seed=s.seed,
            max_tokens=s.max_tokens,
            min_tokens=s.min_tokens,
            ignore_eos=s.ignore_eos,
            stop_token_ids=tuple(s.stop_token_ids),
            stop=tuple(s.stop),
            beam_width=s.beam_width,
            length_penalty=s.length_penalty,
            early_stopping=early_stopping(s),
            best_of=s.best_of,
        )
        return cls(
            request_id=message.request_id,
            prompt_token_ids=tuple(message.token_ids.ids),
            sampling=sampling,
            n=message.n,
            resumable=message.resumable,
            resume_wait_s=message.resume_wait_s,
            tenant=message.tenant,
            cache_salt=message.cache_salt,
            priority=message.priority,
            digest=digest,
            pin_prompt_s=message.pin_prompt_s,
        )
