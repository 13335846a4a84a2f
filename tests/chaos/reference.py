"""transformers' own greedy generate, and what counts as equal to it."""

from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

NEAR_TIE = 1e-4
"""Where the reference's two best logits are closer, a first difference is reported and not failed."""


class Reference:
    """One checkpoint in float32, one prompt at a time; remembers what it has generated."""

    def __init__(self, directory: Path) -> None:
        torch.set_num_threads(1)  # the processes under test want the other cores
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self._outputs: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, prompt: list[int], num_tokens: int) -> list[int]:
        known = self._outputs.get(tuple(prompt), [])
        if len(known) < num_tokens:
            known = self._outputs[tuple(prompt)] = self._generate(prompt, num_tokens)
        return known[:num_tokens]

    def check(self, prompt: list[int], ours: list[int], num_tokens: int) -> None:
        """Asserts that `ours` is the greedy output, or differs from it first at a near tie, which is printed."""
        theirs = self(prompt, num_tokens)
        if ours == theirs:
            return
        assert len(ours) == len(theirs), f"{len(ours)} tokens, not {len(theirs)}"
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        with torch.no_grad():
            best = self._model(torch.tensor([prompt + theirs[:at]])).logits[0, -1].topk(2).values
        gap = float(best[0] - best[1])
        assert gap < NEAR_TIE, (
            f"first difference at {at}: {ours[at]} for {theirs[at]}, and the best two are {gap:.2e} apart"
        )
        print(f"near tie at {at}: {gap:.2e}")

    def _generate(self, prompt: list[int], num_tokens: int) -> list[int]:
        with torch.no_grad():
            input_ids = torch.tensor([prompt])
            output = self._model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),  # else ids equal to the padding would be left out
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return output[0, len(prompt) :].tolist()


@cache
def reference_of(directory: Path) -> Reference:
    """The reference of a checkpoint, loaded once."""
    return Reference(directory)
