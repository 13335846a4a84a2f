"""Loads a checkpoint's tensors into the decoder's, stacked and cast. Checks that each is there once, in its shape."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from worker.errors import ModelError
from worker.models.decoder import LayerWeights, LinearWeights, ModelWeights
from worker.models.spec import ModelSpec

INDEX = "model.safetensors.index.json"


def load_weights(spec: ModelSpec, model_dir: Path, dtype: torch.dtype, device: torch.device) -> ModelWeights:
    """The weights in `model_dir`, of `dtype`, on `device`.

    Raises ModelError that names the file or tensor: missing, unknown, of a wrong shape, unreadable.
    """
    layout = _Layout(dtype, device)
    weights = _lay_out(spec, layout)
    missing = dict(layout.places)
    for path in _files(model_dir):
        for name, tensor in _tensors(path):
            if _is_ignored(name, spec):
                continue
            place = missing.pop(name, None)
            if place is None:
                raise ModelError(f"{path}: tensor {name} is unknown or double for {spec.family}")
            if place.shape != tensor.shape:
                raise ModelError(
                    f"{path}: tensor {name} has shape {list(tensor.shape)}, config.json says {list(place.shape)}"
                )
            place.copy_(tensor)
    if missing:
        name = next(iter(missing))
        raise ModelError(f"{model_dir}: tensor {name} is missing ({len(missing)} in all): download the weights again")
    return weights


class _Layout:
    """Allocates the decoder's tensors and notes which part of them each checkpoint tensor fills."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype = dtype
        self._device = device
        self.places: dict[str, torch.Tensor] = {}

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """One tensor of its own."""
        self.places[name] = torch.empty(shape, dtype=self._dtype, device=self._device)
        return self.places[name]

    def stacked(self, names_and_rows: list[tuple[str, int]], *rest: int) -> torch.Tensor:
        """Checkpoint tensors [rows, *rest], one below the other in one tensor."""
        rows = [count for _, count in names_and_rows]
        whole = torch.empty((sum(rows), *rest), dtype=self._dtype, device=self._device)
        for (name, _), part in zip(names_and_rows, torch.split(whole, rows), strict=True):
            self.places[name] = part
        return whole

    def linear(self, parts: list[tuple[str, int]], num_in: int, bias: bool) -> LinearWeights:
        """Checkpoint projections with these names and output sizes, stacked."""
        weight = self.stacked([(f"{name}.weight", rows) for name, rows in parts], num_in)
        return LinearWeights(weight, self.stacked([(f"{name}.bias", rows) for name, rows in parts]) if bias else None)


def _lay_out(spec: ModelSpec, layout: _Layout) -> ModelWeights:
    embedding = layout.tensor("model.embed_tokens.weight", spec.vocab_size, spec.hidden_size)
    layers = [_lay_out_layer(spec, layout, f"model.layers.{i}") for i in range(spec.num_layers)]
    norm = layout.tensor("model.norm.weight", spec.hidden_size)
    tied = spec.tie_word_embeddings
    lm_head = embedding if tied else layout.tensor("lm_head.weight", spec.vocab_size, spec.hidden_size)
    return ModelWeights(embedding, layers, norm, lm_head)


def _lay_out_layer(spec: ModelSpec, layout: _Layout, name: str) -> LayerWeights:
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    attention, mlp = f"{name}.self_attn", f"{name}.mlp"
    qkv = [(f"{attention}.q_proj", q_size), (f"{attention}.k_proj", kv_size), (f"{attention}.v_proj", kv_size)]
    gate_up = [(f"{mlp}.gate_proj", inner), (f"{mlp}.up_proj", inner)]
    return LayerWeights(
        input_norm=layout.tensor(f"{name}.input_layernorm.weight", hidden),
        qkv=layout.linear(qkv, hidden, spec.qkv_bias),
        q_norm=layout.tensor(f"{attention}.q_norm.weight", spec.head_dim) if spec.qk_norm else None,
        k_norm=layout.tensor(f"{attention}.k_norm.weight", spec.head_dim) if spec.qk_norm else None,
        o=layout.linear([(f"{attention}.o_proj", hidden)], q_size, spec.o_bias),
        post_norm=layout.tensor(f"{name}.post_attention_layernorm.weight", hidden),
        gate_up=layout.linear(gate_up, hidden, spec.mlp_bias),
        down=layout.linear([(f"{mlp}.down_proj", hidden)], inner, spec.mlp_bias),
    )


def _is_ignored(name: str, spec: ModelSpec) -> bool:
    """Tensors that older exports carry and that follow from others."""
    return name.endswith("rotary_emb.inv_freq") or (spec.tie_word_embeddings and name == "lm_head.weight")


def _files(model_dir: Path) -> list[Path]:
    index = model_dir / INDEX
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{index} is no index of safetensors: download it again") from None
        files = [model_dir / name for name in names]
    else:
        files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{model_dir} has no *.safetensors file: download the weights into it")
    for path in files:
        if not path.is_file():
            raise ModelError(f"{path} does not exist, {INDEX} names it: download the weights again")
    return files


def _tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({error}): download it again") from None
