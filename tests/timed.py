"""Stacks without a model: workers that wait instead of computing, and tokens that are known beforehand.

A timed worker samples draw(seed, output index) modulo the vocabulary: whatever happens on the way, a request's output
is known. The model folder lends tokenizer and lengths; its weights are never read.
"""

import json
import random
from pathlib import Path

import numpy as np
from pagoda.v1 import generation_pb2 as pb

from scheduler.tokenizer import Tokenizer
from tests.unit.model_folders import byte_level
from worker.rng import draw, uniforms

MAX_MODEL_LEN = 16384
EOS_TOKEN_ID = 380
VOCAB_SIZE = 430
"""More than the tokenizer has: the ids at the end have no text, as in real checkpoints."""


def make_timed_model(directory: Path, max_model_len: int = MAX_MODEL_LEN) -> Path:
    """A folder that scheduler and timed workers take for a checkpoint."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": max_model_len,
        "eos_token_id": EOS_TOKEN_ID,
    }
    byte_level(directory, config=config)
    header = json.dumps({}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return directory


def timed_tokens(seed: int, num_tokens: int) -> list[int]:
    """The output of a request with this seed."""
    drawn = draw(np.full(num_tokens, seed, np.uint64), np.arange(num_tokens, dtype=np.int64))
    return [int(token_id) for token_id in drawn % np.uint64(VOCAB_SIZE)]


def timed_logprobs(seed: int, num_tokens: int) -> list[float]:
    """The log probabilities that a timed worker reports for it."""
    shares = uniforms(np.full(num_tokens, seed, np.uint64), np.arange(num_tokens, dtype=np.int64))
    return [float(logprob) for logprob in np.log1p(-shares).astype(np.float32)]


def timed_text(model: Path, token_ids: list[int]) -> str:
    """Their text as a stream of them ends up."""
    return Tokenizer.load(model).decode(token_ids)


def timed_request(seed: int, num_tokens: int, prompt_tokens: int = 20, **fields: object) -> pb.GenerateRequest:
    """A prompt of its own, and `num_tokens` tokens that `timed_tokens` foretells."""
    rng = random.Random(seed)
    prompt = [rng.randrange(256) for _ in range(prompt_tokens)]
    sampling = pb.SamplingParams(temperature=1, seed=seed, max_tokens=num_tokens, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling, **fields)  # type: ignore[arg-type]
