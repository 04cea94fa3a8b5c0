"""`generate` of models whose feed-forward units are variational, against loops of stock models without a cache."""

import copy

import pytest
import torch
from eve_families import GENERATING, TINY, centered, given, positions_of, retrofitted, stock
from eve_reference import UnitNoise, grid, predictive, sampled_by_hand
from torch import Tensor
from torch.nn import functional as F

from hf_variational import posterior_noise

SAMPLES, NEW, PROMPT = 3, 5, 6


def prompt_of(name: str, batch: int = 2, padding: int = 2) -> dict[str, Tensor]:
    inputs = given(name, batch=batch, length=PROMPT, padding=padding, positions=False)
    inputs.pop("decoder_input_ids", None)
    return inputs


def generated(model, prompt, sequences=None, samples=SAMPLES, offsets=None, **options):
    options = {"do_sample": False, "max_new_tokens": NEW, "num_posterior_samples": samples, **options}
    sequences = list(range(len(prompt["input_ids"]))) if sequences is None else sequences
    with posterior_noise(UnitNoise(grid(sequences, max(samples, 1)), offsets=offsets and _each(offsets, sequences))):
        return model.generate(**prompt, return_dict_in_generate=True, **options)


def _each(offsets: list[int], sequences: list[int]) -> list[int]:
    return [offsets[sequence] for sequence in sequences]


def whole(name: str, prompt: dict[str, Tensor], answers: Tensor) -> dict[str, Tensor]:
    """What a pass over all of `answers` takes; [rows, tokens] as `generate` answers, prompt included where it does."""
    copies = len(answers) // len(prompt["input_ids"])
    prompt = {key: value.repeat_interleave(copies, 0) for key, value in prompt.items()}
    if TINY[name].task == "translation":
        return {**prompt, "decoder_input_ids": answers}
    mask = F.pad(prompt["attention_mask"], (0, answers.shape[1] - PROMPT), value=1)
    inputs = {"input_ids": answers, "attention_mask": mask}
    return {**inputs, "position_ids": positions_of(mask)} if TINY[name].takes_positions else inputs


def start_of(name: str, prompt: dict[str, Tensor]) -> Tensor:
    ids = prompt["input_ids"]
    return torch.ones_like(ids[:, :1]) if TINY[name].task == "translation" else ids


def by_hand(name, plain, model, prompt, steps: int = NEW):
    """Greedy tokens, the log-probabilities that they were chosen from, and the samples' own; no cache."""
    answers, log_p, singles = start_of(name, prompt), [], []
    for _ in range(steps):
        passes = sampled_by_hand(name, plain, model, whole(name, prompt, answers), SAMPLES)
        log_p.append(predictive(passes)[:, -1])
        singles.append(torch.stack([torch.log_softmax(one.outputs.logits[:, -1].double(), -1) for one in passes], 1))
        answers = torch.cat([answers, log_p[-1].argmax(-1, keepdim=True)], 1)
    return answers, torch.stack(log_p, 1), torch.stack(singles, 1)


def entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


@torch.no_grad()
@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("layers", ["all", [1]], ids=str)
def test_greedy_is_a_loop_of_stock_models_with_noise(name, layers):
    plain, prompt = stock(name), prompt_of(name)
    model = retrofitted(plain, layers)
    expected, log_p, singles = by_hand(name, plain, model, prompt)
    result = generated(model, prompt, output_logits=True, output_uncertainty=True)
    torch.testing.assert_close(torch.stack(result.logits, 1), log_p, atol=5e-5, rtol=1e-4)
    assert torch.equal(result.sequences, expected)
    measures = result.uncertainty
    assert len(measures) == 6 and all(value.shape == (2, NEW) for value in measures.values())
    total, within = entropy(log_p.double()), entropy(singles).mean(2)
    torch.testing.assert_close(measures.predictive_entropy.double(), total, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(measures.mutual_information.double(), total - within, atol=1e-4, rtol=1e-3)
    chosen = result.sequences[:, -NEW:]
    p = singles.exp().gather(-1, chosen[:, :, None, None].expand(-1, -1, SAMPLES, 1)).squeeze(-1)
    variance = p.var(2, correction=0)
    torch.testing.assert_close(measures.token_variance.double(), variance, atol=1e-5, rtol=1e-3)
    assert measures.mutual_information.max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", GENERATING)
def test_padding_in_front_changes_nothing(name):
    """The padded sequence of a batch answers as it does alone; of an encoder the padding is behind."""
    model, prompt = retrofitted(name, [1, 2]), prompt_of(name)
    kept = slice(0, -2) if TINY[name].task == "translation" else slice(2, None)
    alone = {key: value[:1, kept] for key, value in prompt.items()}
    # What counts padding as positions shifts them: the noise too.
    offsets = None if TINY[name].takes_positions or TINY[name].task == "translation" else [2, 0]
    batch = generated(model, prompt, offsets=offsets, output_logits=True)
    single = generated(model, alone, output_logits=True)
    torch.testing.assert_close(torch.stack(batch.logits, 1)[:1], torch.stack(single.logits, 1), atol=5e-5, rtol=1e-4)
    assert torch.equal(batch.sequences[:1, -NEW:], single.sequences[:, -NEW:])


@torch.no_grad()
@pytest.mark.parametrize("name", GENERATING)
def test_beams_score_as_passes_without_a_cache_do(name):
    plain, prompt = stock(name), prompt_of(name)
    model = retrofitted(plain, [1, 2])
    options = {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.0, "output_uncertainty": True}
    result = generated(model, prompt, [0, 0, 1, 1], output_scores=True, **options)
    inputs = whole(name, prompt, result.sequences)
    passes = sampled_by_hand(name, plain, model, inputs, SAMPLES, sequences=[0, 0, 1, 1])
    first = result.sequences.shape[1] - NEW
    log_p = predictive(passes)[:, first - 1 : -1]
    chosen = result.sequences[:, first:]
    score = log_p.gather(-1, chosen.unsqueeze(-1)).squeeze(-1).sum(1)
    torch.testing.assert_close(result.sequences_scores, score, atol=2e-4, rtol=1e-4)
    assert all(value.shape == (4, NEW) for value in result.uncertainty.values())
    torch.testing.assert_close(
        result.uncertainty.predictive_entropy.double(), entropy(log_p.double()), atol=1e-4, rtol=1e-3
    )
    without = generated(model, prompt, [0, 0, 1, 1], use_cache=False, output_scores=True, **options)
    assert torch.equal(without.sequences, result.sequences)
    torch.testing.assert_close(without.sequences_scores, result.sequences_scores, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", GENERATING)
def test_mean_pass_generates_as_the_stock_model(name):
    plain, prompt = stock(name), prompt_of(name)
    options = {"do_sample": False, "max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True}
    expected = plain.generate(**prompt, **options)
    model = retrofitted(plain)
    actual = model.generate(**prompt, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    assert all(torch.equal(one, other) for one, other in zip(actual.logits, expected.logits, strict=True))
    beams = plain.generate(**prompt, num_beams=2, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(model.generate(**prompt, num_beams=2, max_new_tokens=NEW, do_sample=False), beams)


@torch.no_grad()
@pytest.mark.parametrize("name", GENERATING)
def test_sampling_with_a_seed(name):
    model, prompt = retrofitted(name, [2]), prompt_of(name)
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        options = {"do_sample": True, "num_return_sequences": 3, "num_posterior_samples": 2, "top_k": 0}
        answers.append(model.generate(**prompt, max_new_tokens=NEW, **options))
    assert answers[0].shape[0] == 6 and answers[0].shape[1] == start_of(name, prompt).shape[1] + NEW
    assert torch.equal(answers[0], answers[1]) and not torch.equal(answers[0], answers[2])


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "t5"])
def test_sequences_returned_together_have_noise_of_their_own(name):
    """Each of several returned sequences is scored as its own pass would; an encoder runs once for all of them."""
    plain, prompt = stock(name), prompt_of(name)
    model = retrofitted(plain, [4, 5] if name == "t5" else [1, 2])
    options = {"do_sample": True, "num_return_sequences": 2, "top_k": 0, "output_logits": True}
    sequences = [0, 1, 2, 3]
    result = generated(model, prompt, sequences, **options)
    inputs = whole(name, prompt, result.sequences)
    log_p = predictive(sampled_by_hand(name, plain, model, inputs, SAMPLES, sequences=sequences))
    torch.testing.assert_close(torch.stack(result.logits, 1), log_p[:, -NEW - 1 : -1], atol=5e-5, rtol=1e-4)


class TestCache:
    @torch.no_grad()
    @pytest.mark.parametrize("name", [name for name in GENERATING if TINY[name].task == "next"])
    @pytest.mark.parametrize(("layers", "copies"), [("all", [1, 3, 3]), ([1], [1, 1, 3]), ([2], [1, 1, 1])])
    def test_in_pieces_is_the_full_pass(self, name, layers, copies):
        """In chunks of 3, 1, 2 and 2 tokens, behind padding; below and at the split one row a sequence is kept."""
        model, inputs = retrofitted(name, layers), given(name, padding=2)
        with posterior_noise(UnitNoise()):
            expected = model(**inputs, use_cache=False, num_posterior_samples=SAMPLES).logits
            cache, start, pieces = None, 0, []
            for width in (3, 1, 2, 2):
                end = start + width
                part = {key: value[:, start:end] for key, value in inputs.items()}
                part["attention_mask"] = inputs["attention_mask"][:, :end]
                options = {"past_key_values": cache, "use_cache": True, "num_posterior_samples": SAMPLES}
                out = model(**part, **options)
                cache, start = out.past_key_values, end
                pieces.append(out.logits)
        kept = inputs["attention_mask"].bool()
        torch.testing.assert_close(torch.cat(pieces, 1)[kept], expected[kept], atol=5e-5, rtol=1e-4)
        assert [layer.keys.shape[0] // 2 for layer in cache.layers] == copies

    @torch.no_grad()
    @pytest.mark.parametrize("layers", [[4], [1], [3, 5]], ids=str)
    def test_of_a_decoder_behind_an_encoder(self, layers):
        model, inputs = retrofitted("t5", layers), given("t5", padding=2)
        decoder = inputs.pop("decoder_input_ids")
        options = {"num_posterior_samples": SAMPLES}
        with posterior_noise(UnitNoise()):
            expected = model(**inputs, decoder_input_ids=decoder, use_cache=False, **options).logits
            cache, encoded, start, pieces = None, None, 0, []
            for width in (2, 1, 3):
                part = {"decoder_input_ids": decoder[:, start : start + width], "past_key_values": cache}
                if encoded is not None:
                    part["encoder_outputs"] = encoded
                out = model(**inputs, **part, use_cache=True, **options)
                cache, start = out.past_key_values, start + width
                encoded = (out.encoder_last_hidden_state,)
                pieces.append(out.logits)
        torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=5e-5, rtol=1e-4)

    @torch.no_grad()
    def test_another_number_of_samples_is_refused(self):
        for name in ("llama", "bloom", "opt"):
            model, inputs = retrofitted(name, [0, 1]), given(name, positions=False)
            cache = model(**inputs, num_posterior_samples=2, use_cache=True).past_key_values
            longer = torch.ones(2, 9, dtype=torch.long)
            with pytest.raises(ValueError, match="num_posterior_samples=2, this pass has 3"):
                model(longer[:, :1], attention_mask=longer, past_key_values=cache, num_posterior_samples=3)

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "t5"])
    def test_noise_of_a_sequence_is_kept(self, name):
        """Fresh noise at every step would differ from what the full pass draws under the same seed of the source."""
        model, prompt = retrofitted(name, eve=centered(noise="sequence")), prompt_of(name)
        result = generated(model, prompt, output_logits=True)
        torch.manual_seed(0)
        with posterior_noise(UnitNoise()):
            inputs = whole(name, prompt, result.sequences)
            out = model(**inputs, use_cache=False, num_posterior_samples=SAMPLES)
        torch.testing.assert_close(torch.stack(result.logits, 1), out.logits[:, -NEW - 1 : -1], atol=5e-5, rtol=1e-4)
        source = UnitNoise()
        with posterior_noise(source):
            model.generate(**prompt, max_new_tokens=NEW, do_sample=False, num_posterior_samples=SAMPLES)
        assert len(source.asked) == TINY[name].depth

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "t5"])
    def test_static(self, name):
        model, prompt = retrofitted(name, [1, 2]), prompt_of(name)
        expected = generated(model, prompt)
        actual = generated(model, prompt, cache_implementation="static", disable_compile=True)
        assert torch.equal(actual.sequences, expected.sequences)


@torch.no_grad()
def test_copies_generate_the_same():
    for name in ("gpt2", "mixtral", "t5"):
        model, prompt = retrofitted(name), prompt_of(name)
        expected = generated(model, prompt).sequences
        assert torch.equal(generated(copy.deepcopy(model), prompt).sequences, expected)


@torch.no_grad()
def test_uncertainty_is_refused_without_samples_or_a_dictionary():
    model, prompt = retrofitted("opt"), prompt_of("opt")
    with pytest.raises(ValueError, match="return_dict_in_generate=True"):
        model.generate(**prompt, num_posterior_samples=2, output_uncertainty=True, max_new_tokens=2)
    with pytest.raises(ValueError, match="num_posterior_samples is 0"):
        model.generate(**prompt, output_uncertainty=True, return_dict_in_generate=True, max_new_tokens=2)


@torch.no_grad()
def test_drafted_tokens_are_those_of_greedy_search():
    """Prompt lookup checks several tokens in one pass, and crops the cache where the draft was wrong."""
    model, ids = retrofitted("llama", [1, 2]), torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    options = {"max_new_tokens": 10, "do_sample": False, "num_posterior_samples": SAMPLES}
    answers = []
    for drafted in ({}, {"prompt_lookup_num_tokens": 2}):
        with posterior_noise(UnitNoise()):
            answers.append(model.generate(ids, **options, **drafted))
    assert torch.equal(answers[0], answers[1])
