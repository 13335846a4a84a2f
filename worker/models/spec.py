"""A model's shape, read from config.json. Imports no torch: a worker without a model reads it too.

What cannot be honoured exactly is refused by name, never approximated.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker.errors import ModelError

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding, with the names of config.json. What a rope_type does not use stays at its default."""

    rope_type: str
    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What the decoder and the pool need to know of a model. sliding_windows: tokens per layer, 0 is full attention."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeSpec
    sliding_windows: tuple[int, ...]
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str


def read_spec(model_dir: Path) -> ModelSpec:
    """The model in `model_dir`; raises ModelError."""
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist: give --model a Hugging Face checkpoint") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}): download it again") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object: download it again")
    try:
        return parse_spec(config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def parse_spec(config: dict[str, Any]) -> ModelSpec:
    """The model that `config`, the content of a config.json, describes; raises ModelError."""
    family = _family(config)
    _refuse_unsupported(config)
    num_heads = _count(config, "num_attention_heads")
    hidden_size = _count(config, "hidden_size")
    num_kv_heads = _count(config, "num_key_value_heads", num_heads)
    head_dim = _count(config, "head_dim", hidden_size // num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(f"num_attention_heads={num_heads} is no multiple of num_key_value_heads={num_kv_heads}")
    if head_dim % 2:
        raise ModelError(f"head_dim={head_dim} is odd: rotary embedding needs pairs")
    attention_bias = bool(config.get("attention_bias", False)) and family in ("llama", "qwen3")
    return ModelSpec(
        family=family,
        vocab_size=_count(config, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_count(config, "intermediate_size"),
        num_layers=_count(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        max_position_embeddings=_count(config, "max_position_embeddings"),
        rope=_rope(config),
        sliding_windows=_sliding_windows(config, family),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or family == "qwen2",
        o_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        dtype=_dtype(config),
    )


def _family(config: dict[str, Any]) -> str:
    architectures = config.get("architectures") or []
    for architecture in architectures:
        if architecture in FAMILIES:
            return FAMILIES[architecture]
    if not architectures and config.get("model_type") in FAMILIES.values():
        return str(config["model_type"])
    name = ", ".join(architectures) or config.get("model_type")
    raise ModelError(f"architecture {name} is not supported: {', '.join(FAMILIES)} are")


def _refuse_unsupported(config: dict[str, Any]) -> None:
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "?")
        raise ModelError(f"quantization_config ({method}) is not supported: give the unquantized checkpoint")
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"hidden_act={config['hidden_act']} is not supported: silu is")
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"partial_rotary_factor={config['partial_rotary_factor']} is not supported: 1.0 is")


def _count(config: dict[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{name}={value!r}: must be a whole number of 1 or more")
    return value


def _dtype(config: dict[str, Any]) -> str:
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ModelError(f"dtype={dtype} is not supported: {', '.join(_DTYPES)} are")
    return dtype


def _rope(config: dict[str, Any]) -> RopeSpec:
    """rope_parameters (transformers 5), or rope_theta with rope_scaling (before)."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = scaling.get("rope_theta", config.get("rope_theta", 10000.0))
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ModelError(f"rope type {rope_type} is not supported: {', '.join(ROPE_TYPES)} are")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"partial_rotary_factor={scaling['partial_rotary_factor']} is not supported: 1.0 is")
    if rope_type == "default":
        return RopeSpec("default", float(theta))
    original = scaling.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    names = {
        "linear": (),
        "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    }[rope_type]
    if scaling.get("factor") is None or any(n not in scaling for n in names if rope_type == "llama3"):
        raise ModelError(f"rope type {rope_type} lacks {', '.join(('factor', *names))}")
    given = {name: scaling[name] for name in names if scaling.get(name) is not None}
    return RopeSpec(
        rope_type,
        float(theta),
        factor=float(scaling["factor"]),
        original_max_position_embeddings=int(original or config["max_position_embeddings"]),
        **given,
    )


def _sliding_windows(config: dict[str, Any], family: str) -> tuple[int, ...]:
    """Per layer. Qwen uses its window only where use_sliding_window is set, and from max_window_layers on."""
    num_layers = _count(config, "num_hidden_layers")
    window = config.get("sliding_window")
    if family == "llama" or window is None or (family != "mistral" and not config.get("use_sliding_window", False)):
        return (0,) * num_layers
    if not isinstance(window, int) or window < 1:
        raise ModelError(f"sliding_window={window!r}: must be a whole number of 1 or more")
    if family == "mistral":
        return (window,) * num_layers
    types = config.get("layer_types") or [
        "sliding_attention" if layer >= config.get("max_window_layers", 28) else "full_attention"
        for layer in range(num_layers)
    ]
    if len(types) != num_layers:
        raise ModelError(f"layer_types has {len(types)} entries for num_hidden_layers={num_layers}")
    for name in types:
        if name not in ("full_attention", "sliding_attention"):
            raise ModelError(f"layer type {name} is not supported: full_attention and sliding_attention are")
    return tuple(window if name == "sliding_attention" else 0 for name in types)
