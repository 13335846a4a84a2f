"""A step fed with what the step before it samples, on the device: see `StepInputs.input_ids`.

`last` is what `sampler.choose` returned for the step before. A choice of logits that were not finite means nothing:
id 0 is run in its place, so that no embedding is read out of range, and what it leads to counts as not finite either.
"""

import torch


def feed(input_ids: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The ids to run, all of them known on the device. input_ids: [num_tokens]; last: [2, num_choices]."""
    return _resolve(input_ids, last[0] * last[1])


def taint(choices: torch.Tensor, sampled_ids: torch.Tensor, last: torch.Tensor) -> None:
    """Mark in `choices` [2, num_samples] which of them follow from one that meant nothing.

    sampled_ids: [num_samples], the input ids, fed or not, whose logits were sampled.
    """
    choices[1].mul_(torch.where(sampled_ids < 0, _resolve(sampled_ids, last[1]), 1))


def _resolve(ids: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`ids`, but entry i of `values` for ~i."""
    return torch.where(ids < 0, values[(~ids).clamp(min=0)], ids)
