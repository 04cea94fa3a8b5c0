"""Controlled generation: what it equals where nothing is to be decided, what each decision does, and what it costs."""

import copy
import math

import pytest
import torch
from acting_models import END, KeyedNoise, llama, made
from transformers import GenerationConfig, StoppingCriteria

from hf_variational import EVEConfig, UncertaintyStoppingCriteria, posterior_noise, variationalize
from hf_variational.acting import (
    Action,
    ActionThresholds,
    AdaptiveSampling,
    InternalScore,
    UncertaintyController,
    corrected_measures,
)

INF = math.inf
SCHEDULE = (2, 4, 8)
SCORE = InternalScore({"kl": 0.01, "scale": 0.5, "mutual_information": 3.0}, -0.2)
GREEDY = {"max_new_tokens": 7, "do_sample": False}
PROMPTS = torch.tensor([[0, 0, 5, 7, 9], [3, 12, 4, 8, 6], [0, 14, 3, 20, 11]])
MASK = PROMPTS.ne(0).long()


@pytest.fixture(scope="module", params=["variational", "retrofit"])
def model(request):
    if request.param == "variational":
        return made()
    return variationalize(llama(), eve=EVEConfig(initial_scale=0.5), layers=[1, 2]).eval()


def controller(answer=-INF, final=INF, abstain=INF, tolerance=0.0, schedule=SCHEDULE, unit="step", **options):
    thresholds = ActionThresholds(answer, final, abstain)
    return UncertaintyController(SCORE, thresholds, AdaptiveSampling(tolerance, schedule), unit, **options)


def run(of, model, prompts=PROMPTS, mask=MASK, noise=True, **options):
    with posterior_noise(KeyedNoise()):
        return of.generate(model, prompts, mask, **{**GREEDY, **options})


def plain(model, samples, **options):
    with posterior_noise(KeyedNoise()):
        return model.generate(
            PROMPTS,
            attention_mask=MASK,
            num_posterior_samples=samples,
            output_uncertainty=True,
            return_dict_in_generate=True,
            **{**GREEDY, **options},
        )


def assert_same_text(found, expected):
    assert torch.equal(found.sequences, expected.sequences)
    for name, values in expected.uncertainty.items():
        torch.testing.assert_close(found.uncertainty[name], values, rtol=1e-3, atol=1e-5, msg=name)


# ---- Where nothing is to be decided ----


@pytest.mark.parametrize("unit", ["step", "sequence"])
def test_answering_everything_is_generate(model, unit):
    found, expected = run(controller(INF, INF, INF, unit=unit), model), plain(model, 2)
    assert_same_text(found, expected)
    steps = (found.actions != Action.NONE).sum(1)
    assert (found.actions[found.actions != Action.NONE] == Action.ANSWER).all()
    assert torch.equal(found.samples, torch.where(found.actions == Action.NONE, 0, 2))
    assert not found.abstained.any() and (found.abstained_at == -1).all()
    assert torch.equal(found.sample_tokens, 2 * (MASK.sum(1) + steps - 1))
    assert (found.recomputed_tokens == 0).all()


@pytest.mark.parametrize("unit", ["step", "sequence"])
def test_an_unlimited_budget_is_the_fixed_run(model, unit):
    assert_same_text(run(controller(unit=unit), model), plain(model, 8))


def test_a_tolerance_of_any_error_is_generate(model):
    assert_same_text(run(controller(tolerance=INF), model), plain(model, 2))


@pytest.mark.parametrize("unit", ["step", "sequence"])
def test_abstaining_from_everything(model, unit):
    found = run(controller(-INF, -INF, -INF, unit=unit), model)
    assert found.abstained.all() and (found.abstained_at == 0).all()
    assert (found.sequences[:, 5:] == 0).all()
    assert (found.actions[:, 0] == Action.ABSTAIN).all()
    if unit == "step":
        assert found.sequences.shape == (3, 6)
        assert torch.equal(found.sample_tokens, 2 * MASK.sum(1))


def test_sampling_tokens(model):
    options = {"do_sample": True, "temperature": 0.9, "top_k": 5}
    torch.manual_seed(0)
    expected = plain(model, 2, **options)
    torch.manual_seed(0)
    assert_same_text(run(controller(INF, INF, INF), model, **options), expected)


# ---- Decisions ----


def test_a_step_abstains_above_its_threshold(model):
    everything = run(controller(INF, INF, INF), model)
    threshold = float(everything.scores[everything.actions == Action.ANSWER].median())
    found = run(controller(threshold, threshold, threshold), model)
    for row in range(3):
        steps = everything.actions[row] == Action.ANSWER
        above = ((everything.scores[row] > threshold) & steps).nonzero()
        at = int(above[0]) if len(above) else -1
        assert found.abstained_at[row] == at and bool(found.abstained[row]) == (at >= 0)
        kept = at if at >= 0 else int(steps.sum())
        assert torch.equal(found.sequences[row, 5 : 5 + kept], everything.sequences[row, 5 : 5 + kept])
        assert (found.sequences[row, 5 + kept :] == 0).all()
        if at >= 0:
            assert found.actions[row].tolist()[: at + 1] == [Action.ANSWER] * at + [Action.ABSTAIN]
            assert (found.actions[row, at + 1 :] == Action.NONE).all()
            assert found.scores[row, at] == pytest.approx(float(everything.scores[row, at]), rel=1e-3)
    assert found.abstained.any()


def by_hand(model, prompt, of, limit, row):
    """The step policy without caches or generate: every step from its whole prefix, with what noise says."""
    tokens, samples, cost, recomputed, look, start = list(prompt), [], 0, 0, 0, len(prompt)
    schedule = of.sampling.schedule
    while len(tokens) - start < limit:
        size = schedule[look]
        noise = KeyedNoise()
        noise.table = noise.table[:, row : row + 1]
        with posterior_noise(noise), torch.no_grad():
            out = model(
                torch.tensor([tokens]), num_posterior_samples=size, output_sample_logits=True, output_posteriors=True
            )
        measures = corrected_measures(out.sample_logits[0, :, -1].float())
        kl = sum(layer.kl[0, -1] for layer in out.posteriors.values())
        scale = torch.stack([layer.scale_per_token[0, -1] for layer in out.posteriors.values()]).mean()
        score = 0.01 * kl + 0.5 * scale + 3.0 * measures.mutual_information - 0.2
        thresholds = of.thresholds
        last = look == len(schedule) - 1
        small = last or float(measures.predictive_entropy_error) < of.sampling.tolerance
        if thresholds.answer < score <= thresholds.abstain and not small:
            cost += size * len(tokens)
            look += 1
            recomputed += schedule[look] * len(tokens)
            continue
        if score > thresholds.abstain or (score > thresholds.answer and score > thresholds.final):
            samples.append(size)
            return tokens[start:], samples, cost + size * len(tokens), recomputed, len(samples) - 1
        token = int(out.logits[0, -1].argmax())
        tokens.append(token)
        samples.append(size)
        if token == END:
            break
    return tokens[start:], samples, cost + schedule[look] * (len(tokens) - 1), recomputed, -1


@pytest.mark.parametrize("low, high, tolerance", [(0.3, 0.7, 0.0), (0.2, 0.95, 0.1), (0.5, 1.0, 0.0)])
def test_steps_by_hand(model, low, high, tolerance):
    everything = run(controller(INF, INF, INF), model)
    scores = everything.scores[everything.actions == Action.ANSWER].double()
    answer, final, abstain = (float(scores.quantile(q)) for q in (low, (low + high) / 2, high))
    of = controller(answer, final, abstain + (0.1 if high == 1 else 0), tolerance)
    found = run(of, model)
    for row in range(3):
        prompt = PROMPTS[row][MASK[row].bool()].tolist()
        tokens, samples, cost, recomputed, at = by_hand(model, prompt, of, 7, row)
        assert found.sequences[row, 5 : 5 + len(tokens)].tolist() == tokens
        assert (found.sequences[row, 5 + len(tokens) :] == 0).all()
        assert found.samples[row][found.actions[row] != Action.NONE].tolist() == samples
        assert int(found.abstained_at[row]) == at
        assert int(found.sample_tokens[row]) == cost
        assert int(found.recomputed_tokens[row]) == recomputed


def test_the_steps_by_hand_draw_more_and_abstain(model):
    everything = run(controller(INF, INF, INF), model)
    scores = everything.scores[everything.actions == Action.ANSWER].double()
    of = controller(float(scores.quantile(0.3)), float(scores.quantile(0.5)), float(scores.quantile(0.7)))
    found = run(of, model)
    assert len(found.samples[found.samples > 0].unique()) > 1 or found.abstained.any()


def test_sequences_are_decided_by_their_means(model):
    looks = {size: run(controller(schedule=(size,)), model) for size in SCHEDULE}

    def mean(found, row):
        return float(found.scores[row][found.actions[row] != Action.NONE].double().mean())

    first = sorted(mean(looks[2], row) for row in range(3))
    # the most certain sequence is answered, the least certain one abstained from, the third draws all samples
    answer, abstain = (first[0] + first[1]) / 2, (first[1] + first[2]) / 2
    found = run(controller(answer, abstain, abstain, unit="sequence", schedule=(2, 8)), model)
    for row in range(3):
        score = mean(looks[2], row)
        size = 2 if not answer < score <= abstain else 8
        expected = looks[size]
        steps = int((expected.actions[row] != Action.NONE).sum())
        is_abstained = mean(expected, row) > abstain
        assert bool(found.abstained[row]) == is_abstained
        assert (found.samples[row, :steps] == size).all()
        assert (found.actions[row, :steps] == (Action.ABSTAIN if is_abstained else Action.ANSWER)).all()
        text = torch.zeros_like(expected.sequences[row, 5:]) if is_abstained else expected.sequences[row, 5:]
        assert torch.equal(found.sequences[row, 5 : 5 + steps], text[:steps])
        length = int(MASK[row].sum())
        again = 0 if size == 2 else 8 * length
        assert int(found.recomputed_tokens[row]) == again
        both = int((looks[2].actions[row] != Action.NONE).sum())
        cost = 2 * (length + both - 1) + (8 * (length + steps - 1) if size == 8 else 0)
        assert int(found.sample_tokens[row]) == cost


# ---- generate's own settings ----


def test_the_end_of_a_sequence(model):
    # a token that greedy decoding comes to is made the end
    end = int(plain(model, 8).sequences[1, 7])
    for unit in ("step", "sequence"):
        found, expected = run(controller(unit=unit), model, eos_token_id=end), plain(model, 8, eos_token_id=end)
        assert_same_text(found, expected)


def test_no_end_and_a_config_of_ones_own(model):
    end = int(plain(model, 8).sequences[1, 7])
    ending = copy.deepcopy(model.generation_config)
    try:
        model.generation_config.eos_token_id = end
        found, expected = run(controller(), model, eos_token_id=None), plain(model, 8, eos_token_id=None)
        assert (found.actions == Action.ANSWER).all()
        assert_same_text(found, expected)
        assert_same_text(run(controller(), model), plain(model, 8))
    finally:
        model.generation_config = ending
    config = GenerationConfig(max_length=12, eos_token_id=end, do_sample=False, pad_token_id=0)
    with posterior_noise(KeyedNoise()):
        found = controller().generate(model, PROMPTS, MASK, generation_config=config)
    assert_same_text(found, plain(model, 8, eos_token_id=end))
    assert config.max_length == 12


def test_own_criteria_and_processors(model):
    class Third(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return (input_ids != 0).sum(1) >= 8

    options = {"repetition_penalty": 1.7, "stopping_criteria": [Third()]}
    assert_same_text(run(controller(), model, **options), plain(model, 8, **options))
    options = {"stopping_criteria": [UncertaintyStoppingCriteria(0.0, patience=2)]}
    assert_same_text(run(controller(INF, INF, INF), model, **options), plain(model, 2, **options))


def test_max_length_and_defaults(model):
    found = controller(INF, INF, INF).generate(model, PROMPTS, MASK, max_length=9, do_sample=False)
    assert found.sequences.shape[1] <= 9
    assert model.generation_config.max_length != 9  # the model's own settings are left alone


def test_without_a_noise_source(model):
    torch.manual_seed(0)
    found = controller(tolerance=0.05).generate(model, PROMPTS, MASK, **GREEDY)
    assert (found.sample_tokens > 0).all() and found.sequences.shape[1] <= 12
    assert found.errors[found.actions != Action.NONE].min() >= 0


# ---- Bad input ----


def test_bad_input(model):
    of = controller()
    for options, message in (
        ({"num_beams": 2}, "num_beams=2 is not for controlled generation"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"min_new_tokens": 3}, "min_new_tokens=3"),
        ({"max_time": 1.0}, "max_time=1.0"),
        ({"num_posterior_samples": 4}, "without num_posterior_samples"),
        ({"assistant_model": model}, "without assistant_model"),
        ({"max_length": 5, "max_new_tokens": None}, "no room for a new token"),
    ):
        with pytest.raises(ValueError, match=message):
            of.generate(model, PROMPTS, MASK, **{**GREEDY, **options})
    with pytest.raises(ValueError, match="A prompt ends in padding: pad on the left"):
        of.generate(model, PROMPTS.flip(1), MASK.flip(1), **GREEDY)
    with pytest.raises(ValueError, match=r"input_ids are \[rows, length\], got \(5,\)"):
        of.generate(model, PROMPTS[0], **GREEDY)
