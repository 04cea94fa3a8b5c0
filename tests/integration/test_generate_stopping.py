"""Rows that end, stopping criteria and streamers."""

from threading import Thread

import pytest
import torch
from integration_models import EOS, PAD, RowNoise, assert_same_measures, eve_config, prompt, stock_llama, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

from hf_variational import UncertaintyStoppingCriteria, posterior_noise

NEW, SAMPLES = 10, 3


@pytest.fixture(scope="module")
def model():
    return tiny_model(eve=eve_config(noise="sequence"))


def generate(model, inputs=None, **options):
    inputs = prompt(4) if inputs is None else inputs
    torch.manual_seed(0)
    options = {
        "max_new_tokens": NEW,
        "num_posterior_samples": SAMPLES,
        "attention_mask": torch.ones_like(inputs),
        "return_dict_in_generate": True,
        "output_uncertainty": True,
        "eos_token_id": None,
        "pad_token_id": PAD,
        **options,
    }
    with posterior_noise(RowNoise()):
        return model.generate(inputs, **options)


@pytest.fixture(scope="module")
def endless_output(model):
    """What the rows generate when nothing ends them; no row depends on another."""
    return generate(model)


def end_of_rows(ends: torch.Tensor) -> torch.Tensor:
    """Where a row is over already, given where it ends."""
    return (ends.cumsum(1) - ends.long()) > 0


@pytest.mark.parametrize("mode", [{}, {"do_sample": True}, {"cache_implementation": "static"}], ids=str)
def test_measures_are_zero_after_the_end_token(model, mode):
    free = generate(model, **mode)
    end = free.sequences[1, 6 + 3].item()
    out = generate(model, eos_token_id=end, **mode)
    new = out.sequences[:, 6:]
    over = end_of_rows(new == end)
    assert over[1, 4:].all()
    assert not over[1, :4].any()
    assert (new[over] == PAD).all()
    for name, measure in out.uncertainty.items():
        assert (measure[over] == 0).all(), name
    # the end token itself is a token like any other, and has its measures
    if not mode.get("do_sample"):
        length = new.shape[1]
        assert_same_measures(out.uncertainty, free.uncertainty.map(lambda v: v[:, :length]), where=~over)


class EndsRow(StoppingCriteria):
    def __init__(self, row, length):
        self.row, self.length = row, length

    def __call__(self, input_ids, scores, **kwargs):
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool)
        done[self.row] = input_ids.shape[1] == self.length  # once: a row that ended stays ended
        return done


def test_custom_criterion_without_an_end_token(model, endless_output):
    out = generate(model, stopping_criteria=StoppingCriteriaList([EndsRow(1, 9)]))
    # transformers goes on writing tokens where there is no end token, and so their measures must not be believed
    assert torch.equal(out.sequences, endless_output.sequences)
    over = torch.zeros(4, NEW, dtype=torch.bool)
    over[1, 3:] = True
    for name, measure in out.uncertainty.items():
        assert (measure[over] == 0).all(), name
    assert_same_measures(out.uncertainty, endless_output.uncertainty, where=~over)


def test_criterion_that_ends_the_batch(model, endless_output):
    class Ends(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 10)

    out = generate(model, stopping_criteria=[Ends()])
    assert out.sequences.shape == (4, 10)
    assert_same_measures(out.uncertainty, endless_output.uncertainty.map(lambda v: v[:, :4]))


def expected_ends(information: torch.Tensor, threshold: float, patience: int) -> torch.Tensor:
    """Where each row ends by the rule: the last of `patience` tokens in a row above the threshold."""
    above = information > threshold
    ends = torch.zeros_like(above)
    for row in range(above.shape[0]):
        for step in range(patience - 1, above.shape[1]):
            if above[row, step - patience + 1 : step + 1].all():
                ends[row, step] = True
                break
    return ends


@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("mode", [{}, {"cache_implementation": "static"}], ids=str)
def test_uncertainty_ends_rows(model, endless_output, mode, patience):
    information = endless_output.uncertainty.mutual_information
    threshold = information.flatten().quantile(0.5).item()
    ends = expected_ends(information, threshold, patience)
    assert ends.any()
    assert ends.sum() == ends.any(1).sum()
    criterion = UncertaintyStoppingCriteria(max_mutual_information=threshold, patience=patience)
    # an end token nobody writes: only then does transformers pad rows that ended
    unused = next(t for t in range(60) if not (endless_output.sequences == t).any() and t != PAD)
    out = generate(model, eos_token_id=unused, stopping_criteria=[criterion], **mode)
    over = end_of_rows(ends)[:, : out.sequences.shape[1] - 6]
    last = NEW if not ends.any(1).all() else int(ends.long().argmax(1).max()) + 1
    assert out.sequences.shape[1] == 6 + last
    new, free = out.sequences[:, 6:], endless_output.sequences[:, 6 : 6 + last]
    assert torch.equal(new, torch.where(over, PAD, free))
    kept = endless_output.uncertainty.map(lambda v: torch.where(over, 0.0, v[:, :last]))
    assert_same_measures(out.uncertainty, kept)


def test_uncertainty_ends_rows_without_being_returned(model):
    criterion = UncertaintyStoppingCriteria(max_mutual_information=0.0, patience=2)
    out = generate(model, stopping_criteria=[criterion], return_dict_in_generate=False, output_uncertainty=None)
    assert out.shape == (4, 8)
    out = generate(model, stopping_criteria=[criterion], output_uncertainty=False)
    assert "uncertainty" not in out


def test_uncertainty_of_a_certain_model_never_ends_a_row(model):
    criterion = UncertaintyStoppingCriteria(max_mutual_information=0.0)
    assert generate(model, stopping_criteria=[criterion], num_posterior_samples=1).sequences.shape == (4, 6 + NEW)


def test_uncertainty_criterion_without_samples_is_refused(model):
    criterion = UncertaintyStoppingCriteria(max_mutual_information=0.1)
    with pytest.raises(ValueError, match="num_posterior_samples is 0.*num_posterior_samples=8"):
        generate(model, stopping_criteria=[criterion], num_posterior_samples=0, output_uncertainty=None)
    with pytest.raises(ValueError, match="num_posterior_samples >= 1"):
        stock_llama().generate(prompt(), stopping_criteria=[criterion], max_new_tokens=2)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ({"max_mutual_information": -0.1}, "-0.1"),
        ({"max_mutual_information": float("nan")}, "nan"),
        ({"max_mutual_information": 0.1, "patience": 0}, "0"),
        ({"max_mutual_information": 0.1, "patience": 1.5}, "1.5"),
    ],
)
def test_criterion_refuses(arguments, value):
    with pytest.raises(ValueError, match=f"(max_mutual_information|patience) must be .*{value}"):
        UncertaintyStoppingCriteria(**arguments)


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": PAD, "<s>": 1, "</s>": EOS, **{f"w{i}": i for i in range(3, 61)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def test_text_streamer(model, tokenizer, capsys):
    out = generate(model, prompt(1), streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.split() == tokenizer.decode(out.sequences[0, 6:]).split()
    assert out.uncertainty.mutual_information.shape == (1, NEW)


def test_text_iterator_streamer_in_a_thread(model, tokenizer):
    expected = generate(model, prompt(1))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    kept = []
    thread = Thread(target=lambda: kept.append(generate(model, prompt(1), streamer=streamer)))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == tokenizer.decode(expected.sequences[0, 6:]).split()
    assert_same_measures(kept[0].uncertainty, expected.uncertainty)
