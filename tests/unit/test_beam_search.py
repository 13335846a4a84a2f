"""Beam search against transformers' own, on small models in float32, over widths, penalties and ways to stop."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from scheduler.beam_search import BeamParams, BeamSearch, EarlyStopping
from tests.checkpoints import make_checkpoint

EARLY = {EarlyStopping.HEURISTIC: False, EarlyStopping.FULL: True, EarlyStopping.NEVER: "never"}
PROMPT = [7, 30, 99, 4, 250]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    folder: Path = make_checkpoint("llama3", tmp_path_factory.mktemp("beams"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def candidates(model, token_ids: list[int], count: int) -> list[tuple[int, float]]:
    logits = model(torch.tensor([[*PROMPT, *token_ids]])).logits[0, -1].float()
    top = torch.log_softmax(logits, dim=-1).topk(count)
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def searched(model, params: BeamParams) -> BeamSearch:
    """To its end; after every step the state is made from the log again, and must be the same."""
    search, words = BeamSearch(params), []
    while not search.is_done:
        found = {s: candidates(model, search.beams[s].token_ids, params.num_candidates) for s in search.open_slots}
        step = search.choose(found)
        words += step.words()
        search.apply(step)
        assert search.num_words == len(words)
        again = BeamSearch.replay(params, words)
        assert again == search
        search = again
    return search


# Likely tokens of this model as ends: searches end in the middle, with hypotheses of several lengths.
ENDS = {"none": (), "one": (118,), "many": tuple(range(0, 300, 7))}


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -0.5])
@pytest.mark.parametrize("early_stopping", EARLY)
@pytest.mark.parametrize("width", [2, 3, 6])
def test_the_hypotheses_are_transformers_own(model, width, early_stopping, length_penalty, ends) -> None:
    end_token_ids = ENDS[ends]
    params = BeamParams(width, length_penalty, early_stopping, 12, frozenset(end_token_ids))
    theirs = model.generate(
        torch.tensor([PROMPT]),
        num_beams=width,
        num_return_sequences=width,
        do_sample=False,
        max_new_tokens=12,
        length_penalty=length_penalty,
        early_stopping=EARLY[early_stopping],
        eos_token_id=list(end_token_ids) or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    ours = searched(model, params).hypotheses
    assert len(ours) == width
    for hypothesis, sequence, score in zip(ours, theirs.sequences, theirs.sequences_scores, strict=True):
        output = sequence[len(PROMPT) :].tolist()
        assert hypothesis.token_ids == output[: len(hypothesis.token_ids)]
        assert not any(output[len(hypothesis.token_ids) :]), "theirs goes on"
        assert hypothesis.score == pytest.approx(score.item(), rel=1e-5)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.sampled_from(EarlyStopping), st.floats(-1, 2), st.integers(0, 3), st.integers(0, 2**32))
def test_slots_keep_what_they_can(width: int, early: EarlyStopping, penalty: float, num_ends: int, seed: int) -> None:
    """Random candidates: a beam with a child stays where it is, every slot is filled, and the search ends."""
    rng = random.Random(seed)
    params = BeamParams(width, penalty, early, rng.randint(1, 10), frozenset(range(num_ends)))
    search = BeamSearch(params)
    while not search.is_done:
        found = {
            slot: [(token, -rng.expovariate(1)) for token in rng.sample(range(60), params.num_candidates)]
            for slot in search.open_slots
        }
        step = search.choose(found)
        parents = {entry.parent for entry in step.running}
        assert len(step.running) in (0, width)
        assert all(step.running[parent].parent == parent for parent in parents)
        search.apply(step)
        assert search.num_steps <= params.max_output_tokens
    assert len(search.hypotheses) == width
    assert search.hypotheses == sorted(search.hypotheses, key=lambda h: -h.score)
