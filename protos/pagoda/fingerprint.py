"""Tells one model from another, the same way on both ends of the worker link.

Reads config.json and, of each safetensors file, its name, size, header and evenly spaced samples of its data, so that
it takes milliseconds on any size of model.
"""

import hashlib
from pathlib import Path

NUM_SAMPLES = 16
SAMPLE_BYTES = 4096


def model_fingerprint(model_dir: Path) -> str:
    """Hex digest (32 characters) of the model in `model_dir`.

    Raises FileNotFoundError where the folder has no config.json or no *.safetensors.
    """
    digest = hashlib.blake2b(digest_size=16, person=b"pagoda-model")
    _add(digest, b"config.json", (model_dir / "config.json").read_bytes())
    weights = sorted(model_dir.glob("*.safetensors"))
    if not weights:
        raise FileNotFoundError(f"{model_dir} has no *.safetensors file")
    for path in weights:
        _add(digest, path.name.encode(), _samples(path))
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, name: bytes, content: bytes) -> None:
    for part in (name, content):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _samples(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        parts = [size.to_bytes(8, "little"), file.read(min(header_bytes, size))]
        for i in range(NUM_SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * i // (NUM_SAMPLES - 1))
            parts.append(file.read(SAMPLE_BYTES))
    return b"".join(parts)
