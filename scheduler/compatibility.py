"""Which workers may serve: the same contract, model, block size, KV dtype and length on both ends."""

from pagoda import PROTOCOL_VERSION
from pagoda.v1 import worker_pb2 as pb


class RefusedError(Exception):
    """A worker may not serve; `detail` names the difference, with both values."""

    def __init__(self, reason: "pb.RefusedReason.ValueType", detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class Compatibility:
    """What the scheduler expects. A kv_dtype of "auto" becomes that of the first worker."""

    def __init__(self, fingerprint: str, block_size: int, kv_dtype: str, max_model_len: int) -> None:
        self.fingerprint = fingerprint
        self.block_size = block_size
        self.kv_dtype = kv_dtype
        self.max_model_len = max_model_len

    def check(self, register: pb.Register) -> None:
        """Raises RefusedError where the worker differs."""
        if self.kv_dtype == "auto":
            self.kv_dtype = register.kv_dtype
        pairs = (
            ("protocol version", register.protocol_version, PROTOCOL_VERSION),
            ("model", register.model_fingerprint, self.fingerprint),
            ("block_size", register.block_size, self.block_size),
            ("KV dtype", register.kv_dtype, self.kv_dtype),
        )
        for name, theirs, ours in pairs:
            if theirs != ours:
                self._refuse(f"{name}: the worker has {theirs}, the scheduler {ours}")
        if register.max_model_len < self.max_model_len:
            self._refuse(
                f"max_model_len: the worker runs {register.max_model_len} tokens, the scheduler serves "
                f"{self.max_model_len}"
            )
        if not register.worker_name or len(register.worker_name) > 128 or set(register.worker_name) & set("{} \n"):
            self._refuse(f"worker name {register.worker_name!r}: 1 to 128 characters without spaces and braces")
        if register.num_blocks < 1 or register.max_num_seqs < 1 or register.max_num_batched_tokens < 1:
            self._refuse("num_blocks, max_num_seqs and max_num_batched_tokens must be at least 1")
        if len(register.kv_groups) > 1:
            self._refuse(f"KV groups: the worker has {len(register.kv_groups)}, the scheduler serves 1")

    def _refuse(self, detail: str) -> None:
        raise RefusedError(pb.REFUSED_REASON_MISMATCH, detail)
