"""What can be wrong at the start: flags, config.json, weights, memory. Each is one line that names it."""

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.kv_format import KVFormat
from tests.checkpoints import make_checkpoint
from worker.config import parse_bytes, parse_config
from worker.errors import ConfigError, ModelError
from worker.kv_pool import FreeMemory, KVPool, PoolRequest, block_bytes, count_blocks, free_cpu_memory
from worker.loading import select_device, select_dtype
from worker.models.spec import ModelSpec, parse_spec, read_spec
from worker.weights import load_weights

GOOD = ["--scheduler", "127.0.0.1:1", "--model", "somewhere"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama3", tmp_path_factory.mktemp("checkpoints") / "llama3")


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint to be spoilt."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--block-size", "0"], "block-size=0"),
        (["--block-size", "sixteen"], "--block-size: invalid int value: 'sixteen'"),
        (["--num-blocks", "0"], "num-blocks=0"),
        (["--kv-memory", "-1"], "--kv-memory"),
        (["--kv-memory", "lots"], "'lots' is no size"),
        (["--kv-memory", "0"], "kv-memory=0"),
        (["--kv-memory", "1GiB", "--num-blocks", "5"], "give one of them"),
        (["--max-num-seqs", "0"], "max-num-seqs=0"),
        (["--max-num-batched-tokens", "-3"], "max-num-batched-tokens=-3"),
        (["--max-model-len", "0"], "max-model-len=0"),
        (["--num-threads", "0"], "num-threads=0"),
        (["--device", "tpu"], "device=tpu"),
        (["--dtype", "int8"], "--dtype"),
        (["--name", "a b"], "name='a b'"),
        (["--name", "{w}"], "name='{w}'"),
        (["--scheduler", "nowhere"], "scheduler='nowhere'"),
        (["--timed-step-s", "-1"], "timed-step-s=-1"),
        (["--timed-step-s", "nan"], "timed-step-s=nan"),
        (["--unheard-of"], "--unheard-of"),
    ],
)
def test_a_bad_flag_is_named(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(GOOD + flags)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flags", [["--model", "x"], ["--scheduler", "127.0.0.1:1"]])
def test_what_is_missing_is_named(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--scheduler|--model"):
        parse_config(flags)


def test_bad_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGODA_LOG_LEVEL", "loud")
    with pytest.raises(ConfigError, match="PAGODA_LOG_LEVEL=LOUD"):
        parse_config(GOOD)


def test_flags_arrive() -> None:
    config = parse_config([*GOOD, "--scheduler", "unix:/run/s.sock", "--kv-memory", "1.5GiB", "--device", "cuda:1"])
    assert config.schedulers == ("127.0.0.1:1", "unix:/run/s.sock")
    assert config.kv_memory_bytes == 3 * 2**29
    assert (config.block_size, config.dtype, config.device) == (16, "auto", "cuda:1")


@pytest.mark.parametrize(("text", "num_bytes"), [("5", 5), ("2KiB", 2048), ("3 MiB", 3 * 2**20), ("1gb", 10**9)])
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


def llama(**changes: Any) -> ModelSpec:
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
        "intermediate_size": 96, "vocab_size": 100, "max_position_embeddings": 256,
    }  # fmt: skip
    return parse_spec({name: value for name, value in (config | changes).items() if value is not None})


QWEN = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
        ({"architectures": None, "model_type": "mamba"}, "architecture mamba is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type dynamic is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope type longrope is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope type llama3 lacks"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope type linear lacks factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config (gptq)"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        ({"head_dim": 15}, "head_dim=15 is odd"),
        ({"vocab_size": None}, "vocab_size=None"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype=float8_e4m3fn"),
        (QWEN | {"sliding_window": -4}, "sliding_window=-4"),
        (QWEN | {"layer_types": ["full_attention", "chunked_attention"]}, "layer type chunked_attention"),
        (QWEN | {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as error:
        llama(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"sliding_window": 32}, (0, 0)),  # Llama has none
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 32}, (32, 32)),
        ({"architectures": ["MistralForCausalLM"]}, (0, 0)),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 32}, (0, 0)),
        (QWEN | {"max_window_layers": 1}, (0, 32)),
        (QWEN | {"layer_types": ["sliding_attention", "full_attention"]}, (32, 0)),
    ],
)
def test_sliding_windows(changes: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert llama(**changes).sliding_windows == windows


def test_both_spellings_of_rope() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    before = llama(rope_theta=5e5, rope_scaling=scaling | {"rope_type": "llama3"})
    since = llama(rope_parameters=scaling | {"rope_type": "llama3", "rope_theta": 5e5})
    assert before.rope == since.rope
    assert before.rope.theta == 5e5


def test_defaults_of_older_exports() -> None:
    spec = llama(torch_dtype="bfloat16")
    assert (spec.num_kv_heads, spec.head_dim, spec.rope.theta, spec.dtype) == (4, 16, 10000.0, "bfloat16")


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"'])
def test_config_json_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_spec(tmp_path)


def edit_shard(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    path = sorted(directory.glob("*.safetensors"))[1]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path.name


def load(directory: Path) -> None:
    load_weights(read_spec(directory), directory, torch.float32, CPU)


def test_missing_tensor_is_named(copy: Path) -> None:
    gone: list[str] = []
    edit_shard(copy, lambda tensors: gone.append(tensors.popitem()[0]))
    with pytest.raises(ModelError, match=f"tensor {gone[0]} is missing"):
        load(copy)


def test_unknown_tensor_is_named(copy: Path) -> None:
    edit_shard(copy, lambda tensors: tensors.update(stray=torch.zeros(1)))
    with pytest.raises(ModelError, match="tensor stray is unknown"):
        load(copy)


def test_double_tensor_is_named(copy: Path) -> None:
    edit_shard(copy, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(48)}))
    with pytest.raises(ModelError, match=r"tensor model\.norm\.weight is unknown or double"):
        load(copy)


def test_wrong_shape_is_named(copy: Path) -> None:
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        tensors[next(iter(tensors))] = torch.zeros(3)

    edit_shard(copy, shorten)
    with pytest.raises(ModelError, match=r"has shape \[3\], config\.json says \["):
        load(copy)


@pytest.mark.parametrize("num_bytes", [0, 4, 200, 20_000])
def test_truncated_file_is_named(num_bytes: int, copy: Path) -> None:
    path = sorted(copy.glob("*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(ModelError, match=path.name):
        load(copy)


def test_missing_shard_is_named(copy: Path) -> None:
    path = sorted(copy.glob("*.safetensors"))[3]
    path.unlink()
    with pytest.raises(ModelError, match=path.name):
        load(copy)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_index_that_is_none(content: str, copy: Path) -> None:
    (copy / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match="is no index"):
        load(copy)


def test_one_file_without_index(checkpoint: Path, tmp_path: Path) -> None:
    """And what older exports carry besides is ignored."""
    tensors = {name: tensor for path in checkpoint.glob("*.safetensors") for name, tensor in load_file(path).items()}
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "model.safetensors")
    shutil.copy(checkpoint / "config.json", tmp_path)
    load(tmp_path)


def kv_format(dtype: torch.dtype) -> KVFormat:
    return KVFormat(dtype, num_kv_heads=2, head_dim=16, block_size=16, key_group=16)


def test_pool_size() -> None:
    spec = llama(num_key_value_heads=2)
    num_bytes = block_bytes(spec.num_layers, kv_format(torch.bfloat16))
    assert num_bytes == 2 * 2 * 2 * 16 * 16 * 2
    free = FreeMemory(4 * num_bytes, 20 * num_bytes)
    # The null block is paid for too.
    assert count_blocks(PoolRequest(None, None), num_bytes, free) == 3
    assert count_blocks(PoolRequest(None, 7), num_bytes, free) == 7
    assert count_blocks(PoolRequest(10 * num_bytes + 5, None), num_bytes, free) == 9
    with pytest.raises(ConfigError, match=f"kv-memory={num_bytes}: holds no block"):
        count_blocks(PoolRequest(num_bytes, None), num_bytes, free)
    with pytest.raises(ConfigError, match=f"kv-memory={21 * num_bytes}: takes"):
        count_blocks(PoolRequest(21 * num_bytes, None), num_bytes, free)
    with pytest.raises(ConfigError, match="num-blocks=20: takes"):
        count_blocks(PoolRequest(None, 20), num_bytes, free)
    pool = KVPool(spec.num_layers, 7, kv_format(torch.bfloat16), CPU)
    assert pool.blocks.nbytes == 8 * pool.block_bytes == 8 * num_bytes
    assert pool.layers[1].values.shape == (8, 2, 16 * 16 * 2)
    assert pool.layers[1].values.is_contiguous()
    assert 0 < free_cpu_memory().default_bytes <= min(2**30, free_cpu_memory().most_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("key_group", "value_group"), [(1, 1), (2, 2), (16, 1)])
def test_poison_fills_what_it_names(dtype: torch.dtype, key_group: int, value_group: int) -> None:
    held = dataclasses.replace(kv_format(dtype), key_group=key_group, value_group=value_group)
    pool = KVPool(2, 3, held, CPU)
    rows = torch.ones(4, 2, 16, 16)
    for layer in pool.layers:
        held.write_keys(layer.keys, (), rows)
        held.write_values(layer.values, (), rows)
    pool.poison_block(2, 5)
    for layer in pool.layers:
        for found in (held.read_keys(layer.keys), held.read_values(layer.values)):
            assert found[2, :, 5:].isnan().all()
            found[2, :, 5:] = 1
            assert torch.equal(found, rows)
    pool.poison()
    for layer in pool.layers:
        assert held.read_keys(layer.keys).isnan().all()
        assert held.read_values(layer.values).isnan().all()


def test_dtypes() -> None:
    assert select_dtype("float16", "bfloat16", CPU) == torch.float16
    assert select_dtype("auto", "float16", CPU) == torch.float32
    assert select_dtype("auto", "float32", CPU) == torch.float32
    assert select_dtype("auto", "bfloat16", CPU) == torch.bfloat16
    assert select_dtype("auto", "bfloat16", torch.device("cuda:0")) == torch.bfloat16


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device=cuda:99"):
            select_device("cuda:99")
    else:
        with pytest.raises(ConfigError, match=r"device=cuda: .* sees no CUDA device"):
            select_device("cuda")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--block-size", "7"], "block-size=7"),
        (["--model", "/nowhere"], "/nowhere/config.json does not exist"),
        (["--max-model-len", "100000"], "max-model-len=100000"),
    ],
)
def test_the_process_ends_with_one_line(flags: list[str], message: str, checkpoint: Path) -> None:
    command = [sys.executable, "-m", "worker", "--scheduler", "127.0.0.1:1", "--model", str(checkpoint), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_a_folder_without_weights(copy: Path) -> None:
    for path in copy.glob("*.safetensors*"):
        path.unlink()
    command = [sys.executable, "-m", "worker", "--scheduler", "127.0.0.1:1", "--model", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no *.safetensors" in done.stderr


def test_without_a_model_torch_is_not_imported() -> None:
    """The timer's start is the interpreter's; and torch in a scheduler's image would be a mistake."""
    code = (
        "import sys, json; from worker.config import parse_config; from worker.assemble import assemble; "
        "assemble(parse_config(['--scheduler', 'h:1', '--timed-step-s', '0.01'])); "
        "print(json.dumps([name for name in ('torch', 'transformers', 'redis') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout) == []


def test_torch_imports_in_part_and_whole_when_asked() -> None:
    code = (
        "import gc, sys; from worker.torch_start import import_torch; import_torch('cpu'); import torch; "
        "assert gc.isenabled() and 'torch._meta_registrations' not in sys.modules; "
        "assert torch.ones(2).sum().item() == 2; import torch._meta_registrations; "
        "assert (torch.empty(3, 4, device='meta') @ torch.empty(4, 5, device='meta')).shape == (3, 5)"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
