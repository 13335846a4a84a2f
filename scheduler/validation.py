"""A request as it came -> the request as it is kept, or the error that names the field at fault.

Pure but for the request id and the seed that are drawn where the client left them out.
"""

import math
import re
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from pagoda.v1 import generation_pb2 as pb

from scheduler.chat_template import ChatTemplateError
from scheduler.errors import InvalidArgumentError, UnsupportedError
from scheduler.request import RequestBody, SamplingParams, early_stopping
from scheduler.tokenizer import SamplingDefaults, Tokenizer

DIGEST_BYTES = 16
MAX_TEMPERATURE = 100.0
MAX_LENGTH_PENALTY = 10.0
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_NOT_SERVED = frozenset(
    (
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logprobs",
        "json_schema",
    )
)
_SAMPLES = ("temperature", "top_k", "top_p", "min_p", "min_tokens", "stop", "best_of")
"""What does not go with beam search."""
_GREEDY = SamplingDefaults(temperature=0.0)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for. `max_pool_tokens`: tokens that the smallest worker's pool holds."""

    max_model_len: int
    max_pool_tokens: int
    max_resume_wait_s: float = 3600.0
    default_resume_wait_s: float = 60.0
    max_num_stops: int = 16
    max_stop_chars: int = 256
    max_num_stop_token_ids: int = 256
    max_name_chars: int = 256  # of tenant and cache_salt
    max_num_choices: int = 64
    max_pin_prompt_s: float = 86_400.0
    block_size: int = 16


def validate(request: pb.GenerateRequest, tokenizer: Tokenizer, limits: Limits) -> RequestBody:
    """The request with its prompt tokenized and every default filled in.

    Raises InvalidArgumentError, whose text begins with the field's name in the contract, or UnsupportedError.
    """
    _refuse_unserved(request)
    _check_names(request, limits)
    resume_wait_s = _resume_wait_s(request, limits)
    prompt = encode_prompt(request, tokenizer)
    room = min(limits.max_model_len, limits.max_pool_tokens) - len(prompt)
    if room < 1:
        raise InvalidArgumentError("prompt", _too_long(len(prompt), limits))
    beam_width = _beam_width(request.sampling, tokenizer, limits)
    if beam_width:
        room = min(room, _room_for_beams(len(prompt), beam_width, limits))
    n = _num_choices(request, beam_width, limits)
    sampling = _sampling(request.sampling, tokenizer, limits, room)
    return RequestBody(
        request_id=request.request_id or uuid.uuid4().hex,
        prompt_token_ids=tuple(prompt),
        sampling=replace(sampling, best_of=_best_of(request.sampling, n, limits)),
        n=n,
        resumable=request.resumable,
        resume_wait_s=resume_wait_s,
        tenant=request.tenant,
        cache_salt=request.cache_salt,
        priority=request.priority,
        digest=digest(request),
        pin_prompt_s=_pin_prompt_s(request, limits),
    )


def digest(request: pb.GenerateRequest) -> bytes:
    """Tells whether two requests of the same id are the same request: taken over what the client sent."""
    return blake2b(request.SerializeToString(deterministic=True), digest_size=DIGEST_BYTES).digest()


def encode_prompt(request: pb.GenerateRequest | pb.TokenizeRequest, tokenizer: Tokenizer) -> Sequence[int]:
    """The prompt's ids, whichever form it has; raises InvalidArgumentError where there is none."""
    if request.HasField("text"):
        field, token_ids = "text", _encode_text(request.text, tokenizer)
    elif request.HasField("chat"):
        field, token_ids = "chat", _encode_chat(request.chat, tokenizer)
    elif isinstance(request, pb.TokenizeRequest):
        raise InvalidArgumentError("input", "set one of text, chat")
    elif request.HasField("token_ids"):
        field, token_ids = "token_ids.ids", request.token_ids.ids
    else:
        raise InvalidArgumentError("prompt", "set one of text, token_ids, chat")
    if not token_ids:
        raise InvalidArgumentError(field, "is empty")
    check_token_ids(field, token_ids, tokenizer)
    return token_ids


def check_token_ids(field: str, token_ids: Sequence[int], tokenizer: Tokenizer) -> None:
    """Raises InvalidArgumentError for an id that the model does not have."""
    if token_ids and max(token_ids) >= tokenizer.vocab_size:
        index, token_id = next((i, t) for i, t in enumerate(token_ids) if t >= tokenizer.vocab_size)
        raise InvalidArgumentError(
            f"{field}[{index}]", f"{token_id} is out of range, the model's ids end at {tokenizer.vocab_size - 1}"
        )


def _encode_text(text: str, tokenizer: Tokenizer) -> Sequence[int]:
    # An empty text is none, even where the tokenizer would put a special token before it.
    return tokenizer.encode(text) if text else ()


def _encode_chat(chat: pb.ChatMessages, tokenizer: Tokenizer) -> Sequence[int]:
    if not chat.messages:
        return ()
    try:
        return tokenizer.encode_chat([(message.role, message.content) for message in chat.messages])
    except ChatTemplateError as error:
        raise InvalidArgumentError("chat", " ".join(str(error).split())) from None


def _too_long(num_prompt_tokens: int, limits: Limits) -> str:
    if num_prompt_tokens >= limits.max_model_len:
        most, what = limits.max_model_len - 1, f"max_model_len {limits.max_model_len}"
    else:
        most, what = limits.max_pool_tokens - 1, f"a worker's KV pool of {limits.max_pool_tokens} tokens"
    return f"is {num_prompt_tokens} tokens long, {what} allows {most}"


def _refuse_unserved(request: pb.GenerateRequest) -> None:
    if request.adapter:
        raise UnsupportedError("adapter")
    for field, _ in request.sampling.ListFields():
        if field.name in _NOT_SERVED:
            raise UnsupportedError(f"sampling.{field.name}")


def _check_names(request: pb.GenerateRequest, limits: Limits) -> None:
    if request.request_id and not _REQUEST_ID.fullmatch(request.request_id):
        raise InvalidArgumentError("request_id", "must be 1 to 128 of [A-Za-z0-9._:-]")
    for field, value in (("tenant", request.tenant), ("cache_salt", request.cache_salt)):
        if len(value) > limits.max_name_chars:
            raise InvalidArgumentError(field, f"has {len(value)} characters, at most {limits.max_name_chars}")


def _num_choices(request: pb.GenerateRequest, beam_width: int, limits: Limits) -> int:
    most, what = (beam_width, " beams") if beam_width else (limits.max_num_choices, "")
    if request.n > most:
        raise InvalidArgumentError("n", f"is {request.n}, at most {most}{what}")
    return max(1, request.n)


def _best_of(s: pb.SamplingParams, n: int, limits: Limits) -> int:
    """0 where every choice is delivered."""
    if not s.HasField("best_of"):
        return 0
    if not n <= s.best_of <= limits.max_num_choices:
        reason = f"must be {n}, which is n, to {limits.max_num_choices}, is {s.best_of}"
        raise InvalidArgumentError("sampling.best_of", reason)
    return s.best_of if s.best_of > n else 0


def _beam_width(s: pb.SamplingParams, tokenizer: Tokenizer, limits: Limits) -> int:
    """0 where there is no beam search."""
    if not s.HasField("beam_width"):
        for name in ("length_penalty", "early_stopping"):
            if any(field.name == name for field, _ in s.ListFields()):
                raise InvalidArgumentError(f"sampling.{name}", "is set, but beam_width is not")
        return 0
    if not 2 <= s.beam_width <= limits.max_num_choices:
        raise InvalidArgumentError("sampling.beam_width", f"must be 2 to {limits.max_num_choices}, is {s.beam_width}")
    for field, _ in s.ListFields():
        if field.name in _SAMPLES:
            raise InvalidArgumentError(f"sampling.{field.name}", "does not go with beam_width")
    if not math.isfinite(s.length_penalty) or abs(s.length_penalty) > MAX_LENGTH_PENALTY:
        raise InvalidArgumentError(
            "sampling.length_penalty", f"must be -{MAX_LENGTH_PENALTY:g} to {MAX_LENGTH_PENALTY:g}"
        )
    if s.early_stopping not in pb.EarlyStopping.values():
        raise InvalidArgumentError("sampling.early_stopping", f"{s.early_stopping} is not one of the contract's")
    num_ends = len({*(() if s.ignore_eos else tokenizer.eos_token_ids), *s.stop_token_ids})
    if max(2, 1 + num_ends) * s.beam_width > tokenizer.vocab_size:
        raise InvalidArgumentError("sampling.beam_width", f"is too much for {tokenizer.vocab_size} token ids")
    return s.beam_width


def _room_for_beams(num_prompt_tokens: int, beam_width: int, limits: Limits) -> int:
    """Output tokens with which all beams fit the smallest pool even where they share nothing but the prompt.

    Each may hold one block more: a copy that runs.
    """
    num_shared, num_rest = divmod(num_prompt_tokens, limits.block_size)
    num_each = (limits.max_pool_tokens // limits.block_size - num_shared) // beam_width - 1
    room = num_each * limits.block_size - num_rest
    if room < 1:
        raise InvalidArgumentError(
            "sampling.beam_width",
            f"{beam_width} beams of this prompt need more than a pool of {limits.max_pool_tokens} tokens",
        )
    return room


def _resume_wait_s(request: pb.GenerateRequest, limits: Limits) -> float:
    wait_s = request.resume_wait_s
    if not 0 <= wait_s <= limits.max_resume_wait_s:  # NaN is not
        raise InvalidArgumentError("resume_wait_s", f"must be 0 to {limits.max_resume_wait_s:g}, is {wait_s:g}")
    if wait_s and not request.resumable:
        raise InvalidArgumentError("resume_wait_s", "is set, but resumable is not")
    return (wait_s or limits.default_resume_wait_s) if request.resumable else 0.0


def _pin_prompt_s(request: pb.GenerateRequest, limits: Limits) -> float:
    if not 0 <= request.pin_prompt_s <= limits.max_pin_prompt_s:  # NaN is not
        raise InvalidArgumentError(
            "pin_prompt_s", f"must be 0 to {limits.max_pin_prompt_s:g}, is {request.pin_prompt_s:g}"
        )
    return request.pin_prompt_s


def _sampling(s: pb.SamplingParams, tokenizer: Tokenizer, limits: Limits, room: int) -> SamplingParams:
    defaults = _GREEDY if s.HasField("beam_width") else tokenizer.defaults
    temperature = s.temperature if s.HasField("temperature") else defaults.temperature
    if not (math.isfinite(temperature) and 0 <= temperature <= MAX_TEMPERATURE):
        raise InvalidArgumentError("sampling.temperature", f"must be 0 to {MAX_TEMPERATURE:g}, is {temperature:g}")
    top_p = s.top_p if s.HasField("top_p") else defaults.top_p
    if not 0 < top_p <= 1:
        raise InvalidArgumentError("sampling.top_p", f"must be over 0 and up to 1, is {top_p:g}")
    if not 0 <= s.min_p < 1:
        raise InvalidArgumentError("sampling.min_p", f"must be 0 up to below 1, is {s.min_p:g}")
    max_tokens, min_tokens = _lengths(s, room)
    return SamplingParams(
        temperature=temperature,
        top_k=s.top_k if s.HasField("top_k") else defaults.top_k,
        top_p=top_p,
        min_p=s.min_p,
        seed=s.seed if s.HasField("seed") else secrets.randbits(64),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        ignore_eos=s.ignore_eos,
        stop_token_ids=_stop_token_ids(s, tokenizer, limits),
        stop=_stops(s, limits),
        beam_width=s.beam_width,
        length_penalty=s.length_penalty if s.HasField("length_penalty") else 1.0,
        early_stopping=early_stopping(s),
    )


def _lengths(s: pb.SamplingParams, room: int) -> tuple[int, int]:
    """(max_tokens, min_tokens); `room`: output tokens that fit after the prompt."""
    max_tokens = s.max_tokens if s.HasField("max_tokens") else room
    if max_tokens < 1:
        raise InvalidArgumentError("sampling.max_tokens", f"must be at least 1, is {max_tokens}")
    if max_tokens > room:
        raise InvalidArgumentError(
            "sampling.max_tokens", f"is {max_tokens}, but after this prompt there is room for {room} tokens"
        )
    if s.min_tokens < 0:
        raise InvalidArgumentError("sampling.min_tokens", f"must be at least 0, is {s.min_tokens}")
    if s.min_tokens > max_tokens:
        raise InvalidArgumentError(
            "sampling.min_tokens", f"is {s.min_tokens}, more than max_tokens, which is {max_tokens}"
        )
    return max_tokens, s.min_tokens


def _stops(s: pb.SamplingParams, limits: Limits) -> tuple[str, ...]:
    if len(s.stop) > limits.max_num_stops:
        raise InvalidArgumentError("sampling.stop", f"has {len(s.stop)} texts, at most {limits.max_num_stops}")
    for index, text in enumerate(s.stop):
        if not text:
            raise InvalidArgumentError(f"sampling.stop[{index}]", "is empty")
        if len(text) > limits.max_stop_chars:
            reason = f"has {len(text)} characters, at most {limits.max_stop_chars}"
            raise InvalidArgumentError(f"sampling.stop[{index}]", reason)
    return tuple(dict.fromkeys(s.stop))


def _stop_token_ids(s: pb.SamplingParams, tokenizer: Tokenizer, limits: Limits) -> tuple[int, ...]:
    token_ids, most = s.stop_token_ids, limits.max_num_stop_token_ids
    if len(token_ids) > most:
        raise InvalidArgumentError("sampling.stop_token_ids", f"has {len(token_ids)} ids, at most {most}")
    check_token_ids("sampling.stop_token_ids", token_ids, tokenizer)
    return tuple(dict.fromkeys(token_ids))
