"""Beam search: the measures are those of the beams that win, whatever rows their tokens came from."""

import pytest
import torch
from integration_models import (
    EOS,
    PAD,
    RowNoise,
    assert_same_measures,
    endless,
    eve_config,
    measures_of_sequences,
    prompt,
    tiny_model,
)
from transformers import StoppingCriteria

from hf_variational import UncertaintyStoppingCriteria, VariationalGenerateBeamOutput, posterior_noise

NEW, BEAMS, SAMPLES, BATCH = 8, 3, 3, 2


@pytest.fixture(scope="module")
def model():
    return endless(tiny_model(eve=eve_config(noise="sequence")))


def search(model, noise=None, **options):
    """Beams of a batch, whose rows have noise of their own."""
    ids = prompt(BATCH)
    torch.manual_seed(0)
    options = {
        "num_beams": BEAMS,
        "num_posterior_samples": SAMPLES,
        "max_new_tokens": NEW,
        "attention_mask": torch.ones_like(ids),
        "return_dict_in_generate": True,
        "output_uncertainty": True,
        **options,
    }
    with posterior_noise(noise or RowNoise()):
        return model.generate(ids, **options)


def rows(returned: int = 1, beams: int = BEAMS) -> list[int]:
    """The noise row of each returned sequence: all beams of a group descend from its first row."""
    return [group * beams for group in range(BATCH) for _ in range(returned)]


MODES = {
    "beam search": {},
    "all beams": {"num_return_sequences": BEAMS},
    "beam sample": {"do_sample": True, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static", "num_return_sequences": 2},
    "many beams": {"num_beams": 6, "num_return_sequences": 5, "length_penalty": 0.3},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layers", [None, [1, 2]], ids=["all layers", "split above"])
def test_measures_of_the_winning_beams(mode, layers):
    # Each row has noise of its own, so a cache that reorders samples, keys or noise wrongly shows at once.
    model = endless(tiny_model(eve=eve_config(noise="sequence"), variational_layers=layers))
    options = MODES[mode]
    out = search(model, **options)
    assert isinstance(out, VariationalGenerateBeamOutput)
    assert out.beam_indices.unique().numel() > BATCH, "no beam ever changed its row: the test would show nothing"
    noise = RowNoise(rows(options.get("num_return_sequences", 1), options.get("num_beams", BEAMS)))
    expected = measures_of_sequences(model, out.sequences, NEW, noise, num_posterior_samples=SAMPLES)
    assert_same_measures(out.uncertainty, expected)


def test_without_a_cache(model):
    # Without a cache nothing keeps a row's noise, so the beams of a sequence share theirs.
    shared = [row for row in range(BATCH) for _ in range(BEAMS)]
    out = search(model, noise=RowNoise(shared), use_cache=False)
    expected = measures_of_sequences(model, out.sequences, NEW, RowNoise(range(BATCH)), num_posterior_samples=SAMPLES)
    assert_same_measures(out.uncertainty, expected)


def test_noise_of_each_token():
    model = endless(tiny_model(eve=eve_config(noise="token")))
    shared = [row for row in range(BATCH) for _ in range(BEAMS)]
    out = search(model, noise=RowNoise(shared))
    expected = measures_of_sequences(model, out.sequences, NEW, RowNoise(range(BATCH)), num_posterior_samples=SAMPLES)
    assert_same_measures(out.uncertainty, expected)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_beams_that_ended(model, early_stopping):
    ended_tokens = 0
    for end in (1, 11, 52):
        out = search(
            model, eos_token_id=end, pad_token_id=PAD, num_return_sequences=BEAMS, early_stopping=early_stopping
        )
        new = out.sequences[:, 6:]
        is_end = new == end
        ended = (is_end.cumsum(1) - is_end.long()) > 0
        ended_tokens += int(ended.sum())
        noise = RowNoise(rows(BEAMS))
        expected = measures_of_sequences(model, out.sequences, new.shape[1], noise, num_posterior_samples=SAMPLES)
        assert_same_measures(out.uncertainty, expected, where=~ended)
        for name, measure in out.uncertainty.items():
            assert (measure[ended] == 0).all(), name
    assert ended_tokens > 0


def test_several_end_tokens(model):
    ends = [11, 52, EOS]
    out = search(model, eos_token_id=ends, pad_token_id=PAD, num_return_sequences=BEAMS)
    new = out.sequences[:, 6:]
    is_end = torch.isin(new, torch.tensor(ends))
    ended = (is_end.cumsum(1) - is_end.long()) > 0
    noise = RowNoise(rows(BEAMS))
    expected = measures_of_sequences(model, out.sequences, new.shape[1], noise, num_posterior_samples=SAMPLES)
    assert_same_measures(out.uncertainty, expected, where=~ended)


class InformationByFullForward(StoppingCriteria):
    """What `UncertaintyStoppingCriteria` promises, from a full forward pass over every sequence it is shown."""

    def __init__(self, model, threshold, patience, prompt_length):
        self.model, self.threshold, self.patience, self.prompt_length = model, threshold, patience, prompt_length

    def __call__(self, input_ids, scores, **kwargs):
        new = input_ids.shape[1] - self.prompt_length
        candidates = input_ids.shape[0] // BATCH
        noise = RowNoise([group * BEAMS for group in range(BATCH) for _ in range(candidates)])
        measures = measures_of_sequences(self.model, input_ids, new, noise, num_posterior_samples=SAMPLES)
        recent = measures.mutual_information[:, -self.patience :]
        return (recent > self.threshold).all(1) & (recent.shape[1] == self.patience)


@pytest.mark.parametrize(("threshold", "patience"), [(0.15, 1), (0.25, 1), (0.1, 2), (0.15, 2), (0.07, 3)])
def test_uncertainty_ends_beams(model, threshold, patience):
    reference = InformationByFullForward(model, threshold, patience, prompt_length=6)
    options = {"num_return_sequences": BEAMS, "eos_token_id": EOS, "pad_token_id": PAD}
    expected = search(model, stopping_criteria=[reference], **options)
    criterion = UncertaintyStoppingCriteria(max_mutual_information=threshold, patience=patience)
    out = search(model, stopping_criteria=[criterion], **options)
    assert not torch.equal(expected.sequences, search(model, **options).sequences)
    assert torch.equal(out.sequences, expected.sequences)
    assert_same_measures(out.uncertainty, expected.uncertainty)


def test_token_ids_alone(model):
    assert torch.equal(search(model, return_dict_in_generate=False, output_uncertainty=False), search(model).sequences)
