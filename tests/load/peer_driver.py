"""Runs another engine for `bench_engines`, in that engine's own Python: nothing here but it and the standard library.

`python peer_driver.py NAME MODEL_DIR`: says {"ready": seconds} when the model is loaded, then answers each line
{"prompts": [[id ...] ...], "max_tokens": [n ...]} with {"seconds", "first_s", "num_tokens"}: until all were done, until
the first token of any, and the tokens of all. Decoding is greedy, and never ends before max_tokens.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path


class Vllm:
    """vLLM in this process, step by step."""

    def __init__(self, model: str) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        from vllm import LLM

        self.engine = LLM(
            model=model,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=2048,
            max_num_seqs=64,
            enable_prefix_caching=True,
        ).llm_engine
        self.count = 0

    def run(self, prompts: list[list[int]], max_tokens: list[int]) -> Iterator[int]:
        """Tokens of each step."""
        from vllm import SamplingParams

        for prompt, limit in zip(prompts, max_tokens, strict=True):
            parameters = SamplingParams(temperature=0, max_tokens=limit, ignore_eos=True, detokenize=False)
            self.count += 1
            self.engine.add_request(str(self.count), {"prompt_token_ids": prompt}, parameters)
        seen: dict[str, int] = {}
        while self.engine.has_unfinished_requests():
            before = sum(seen.values())
            for output in self.engine.step():
                seen[output.request_id] = len(output.outputs[0].token_ids)
            yield sum(seen.values()) - before


class OpenVino:
    """openvino-genai's continuous batching, step by step, over a copy of the model in its own format (made once)."""

    def __init__(self, model: str) -> None:
        import openvino_genai

        self.genai = openvino_genai
        exported = Path(model) / "openvino"
        if not exported.exists():
            self._export(model, exported)
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 2
        scheduler.max_num_seqs = 64
        scheduler.max_num_batched_tokens = 2048
        scheduler.enable_prefix_caching = True
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(exported, scheduler, "CPU")
        self.count = 0

    @staticmethod
    def _export(model: str, to: Path) -> None:
        from optimum.intel import OVModelForCausalLM

        OVModelForCausalLM.from_pretrained(
            model, export=True, compile=False, load_in_8bit=False
        ).half().save_pretrained(to)

    def run(self, prompts: list[list[int]], max_tokens: list[int]) -> Iterator[int]:
        """Tokens of each step."""
        import numpy as np
        import openvino

        handles = []
        for prompt, limit in zip(prompts, max_tokens, strict=True):
            config = self.genai.GenerationConfig(max_new_tokens=limit, ignore_eos=True, do_sample=False)
            self.count += 1
            handles.append(self.pipeline.add_request(self.count, openvino.Tensor(np.array([prompt])), config))
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            new = 0
            for handle in handles:
                while handle.can_read():
                    new += sum(len(output.generated_ids) for output in handle.read().values())
            yield new


def main() -> None:
    """See the module."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the engine prints is no answer
    began = time.perf_counter()
    engine = {"vllm": Vllm, "openvino": OpenVino}[sys.argv[1]](sys.argv[2])
    out.write(json.dumps({"ready": time.perf_counter() - began}) + "\n")
    for line in sys.stdin:
        began, first_s, num_tokens = time.perf_counter(), 0.0, 0
        for new in engine.run(**json.loads(line)):
            num_tokens += new
            if num_tokens and not first_s:
                first_s = time.perf_counter() - began
        seconds = time.perf_counter() - began
        out.write(json.dumps({"seconds": seconds, "first_s": first_s, "num_tokens": num_tokens}) + "\n")


if __name__ == "__main__":
    main()
