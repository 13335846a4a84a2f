"""The committed traces are what their script draws, and what the data sets' means say."""

import pytest

from tests.load.memory.traces import MAX_MODEL_LEN, SPECS, draw_trace, read_trace


@pytest.mark.parametrize("name", SPECS)
def test_a_file_is_what_the_script_draws(name: str) -> None:
    assert read_trace(name) == draw_trace(SPECS[name])


@pytest.mark.parametrize("name", SPECS)
def test_lengths_have_the_data_set_s_means_but_for_the_cut(name: str) -> None:
    trace, spec = read_trace(name), SPECS[name]
    prompts, outputs = [x.num_prompt_tokens for x in trace], [x.num_output_tokens for x in trace]
    assert sum(prompts) / len(trace) == pytest.approx(spec.mean_prompt_tokens, rel=0.03)
    assert sum(outputs) / len(trace) == pytest.approx(spec.mean_output_tokens, rel=0.05)
    assert max(p + o for p, o in zip(prompts, outputs, strict=True)) <= MAX_MODEL_LEN
    assert min(prompts + outputs) >= 1
