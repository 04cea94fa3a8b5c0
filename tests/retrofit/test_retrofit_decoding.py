"""Caches, `generate` and pipelines of language models whose attention was made variational."""

import copy

import pytest
import torch
import transformers as hf
from families import (
    DEPENDENT,
    FAMILIES,
    LANGUAGE_MODELS,
    LENGTH,
    VOCAB,
    WeightsNoise,
    inputs,
    retrofitted,
    stock,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from hf_variational import UncertaintyStoppingCriteria, posterior_noise

SAMPLES = 3
NEW = 6


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def full_pass(model, given, sequences: list[int] | None = None, **options):
    positions = positions_of(given["attention_mask"])
    with posterior_noise(WeightsNoise(sequences)):
        return model(**given, position_ids=positions, use_cache=False, num_posterior_samples=SAMPLES, **options)


class TestCache:
    @torch.no_grad()
    @pytest.mark.parametrize("name", LANGUAGE_MODELS)
    @pytest.mark.parametrize("dependent", DEPENDENT)
    @pytest.mark.parametrize("layers", ["all", [1]], ids=["all", "middle"])
    def test_cached_decoding_is_the_full_pass(self, name, dependent, layers):
        """In chunks of 3, 1, 1, 2 and 1 tokens, behind padding, past the sliding windows of 4."""
        model, given = retrofitted(name, data_dependent=dependent, layers=layers), inputs(name, padding=2)
        expected = full_pass(model, given).logits
        positions, cache, start, pieces = positions_of(given["attention_mask"]), None, 0, []
        for width in (3, 1, 1, 2, 1):
            end = start + width
            with posterior_noise(WeightsNoise()):
                out = model(
                    input_ids=given["input_ids"][:, start:end],
                    attention_mask=given["attention_mask"][:, :end],
                    position_ids=positions[:, start:end],
                    past_key_values=cache,
                    use_cache=True,
                    num_posterior_samples=SAMPLES,
                )
            cache, start = out.past_key_values, end
            pieces.append(out.logits)
        attended = given["attention_mask"].bool()
        torch.testing.assert_close(torch.cat(pieces, 1)[attended], expected[attended], atol=2e-5, rtol=1e-4)
        copies = [layer.keys.shape[0] // 2 for layer in cache.layers]
        assert copies == ([1, SAMPLES, SAMPLES] if layers == [1] else [SAMPLES] * 3)

    @torch.no_grad()
    @pytest.mark.parametrize("dependent", DEPENDENT)
    def test_base_decoder_too(self, dependent):
        """It has no head, and its rows stay those of the samples."""
        model, given = retrofitted("gpt2", data_dependent=dependent, layers=[1]), inputs("gpt2")
        ids = given["input_ids"]
        with posterior_noise(WeightsNoise()):
            expected = model(ids, num_posterior_samples=SAMPLES, use_cache=False).last_hidden_state
            out = model(ids[:, :5], num_posterior_samples=SAMPLES)
            for token in range(5, LENGTH):
                step = model(
                    ids[:, token : token + 1], past_key_values=out.past_key_values, num_posterior_samples=SAMPLES
                )
                torch.testing.assert_close(step.last_hidden_state[:, 0], expected[:, token], atol=1e-5, rtol=1e-4)

    @torch.no_grad()
    def test_another_number_of_samples_is_refused(self):
        model, given = retrofitted("llama"), inputs("llama")
        cache = model(**given, num_posterior_samples=2, use_cache=True).past_key_values
        longer = torch.ones(2, LENGTH + 1, dtype=torch.long)
        with pytest.raises(ValueError, match="num_posterior_samples=2, this pass has 3"):
            model(longer[:, :1], attention_mask=longer, past_key_values=cache, num_posterior_samples=3)


def generated(model, given, sequences: list[int], samples: int = SAMPLES, **options):
    options = {"do_sample": False, "max_new_tokens": NEW, "num_posterior_samples": samples, **options}
    with posterior_noise(WeightsNoise(sequences, samples=max(samples, 1))):
        return model.generate(**given, return_dict_in_generate=True, **options)


def with_new_tokens(given: dict, sequences: torch.Tensor) -> dict:
    """What a full pass over the answer takes."""
    mask = given["attention_mask"].repeat_interleave(len(sequences) // len(given["attention_mask"]), 0)
    return {"input_ids": sequences, "attention_mask": torch.nn.functional.pad(mask, (0, NEW), value=1)}


class TestGenerate:
    @torch.no_grad()
    @pytest.mark.parametrize("name", LANGUAGE_MODELS)
    @pytest.mark.parametrize("layers", ["all", [1]], ids=["all", "middle"])
    def test_greedy_is_a_loop_of_full_passes(self, name, layers):
        """Tokens from the predictive distribution of a naive pass over all tokens so far, and its measures."""
        model, given = retrofitted(name, data_dependent="query", layers=layers), inputs(name, length=6, padding=2)
        result = generated(model, given, [0, 1], output_uncertainty=True, output_logits=True)
        naive = dict(given)
        for _ in range(NEW):
            token = full_pass(model, naive).logits[:, -1].argmax(-1, keepdim=True)
            naive = {
                "input_ids": torch.cat([naive["input_ids"], token], 1),
                "attention_mask": torch.nn.functional.pad(naive["attention_mask"], (0, 1), value=1),
            }
        assert torch.equal(result.sequences, naive["input_ids"])
        out = full_pass(model, naive, output_uncertainty=True)
        steps = slice(given["input_ids"].shape[1] - 1, -1)
        torch.testing.assert_close(torch.stack(result.logits, 1), out.logits[:, steps], atol=2e-5, rtol=1e-4)
        assert len(result.uncertainty) == 6
        for key, value in result.uncertainty.items():
            torch.testing.assert_close(value, out.uncertainty[key][:, steps], atol=1e-5, rtol=1e-3, msg=key)
        assert result.uncertainty.mutual_information.min() > 1e-5

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["gpt2-next", "llama", "mistral", "gemma2"])
    def test_beams_score_as_full_passes_do(self, name):
        model, given = retrofitted(name), inputs(name, length=6, padding=2)
        options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0, "output_uncertainty": True}
        result = generated(model, given, [0, 0, 0, 1, 1, 1], output_scores=True, **options)
        out = full_pass(model, with_new_tokens(given, result.sequences), [0, 0, 1, 1], output_uncertainty=True)
        steps = slice(given["input_ids"].shape[1] - 1, -1)
        chosen = result.sequences[:, given["input_ids"].shape[1] :]
        log_p = out.logits[:, steps].gather(-1, chosen.unsqueeze(-1)).squeeze(-1).sum(1)
        torch.testing.assert_close(result.sequences_scores, log_p, atol=1e-4, rtol=1e-4)
        for key, value in result.uncertainty.items():
            torch.testing.assert_close(value, out.uncertainty[key][:, steps], atol=1e-5, rtol=1e-3, msg=key)

    @torch.no_grad()
    @pytest.mark.parametrize("name", LANGUAGE_MODELS)
    def test_mean_pass_generates_as_the_stock_model(self, name):
        plain, given = stock(name), inputs(name, length=6, padding=2)
        expected = plain.generate(**given, do_sample=False, max_new_tokens=NEW)
        model = retrofitted(plain)
        assert torch.equal(model.generate(**given, do_sample=False, max_new_tokens=NEW), expected)
        model.generation_config.num_posterior_samples = 2
        with posterior_noise(WeightsNoise(samples=2)):
            asked = model.generate(**given, do_sample=False, max_new_tokens=NEW)
        assert torch.equal(asked, generated(model, given, [0, 1], samples=2).sequences)

    @torch.no_grad()
    @pytest.mark.parametrize("dependent", DEPENDENT)
    def test_static_cache(self, dependent):
        model, given = retrofitted("llama", data_dependent=dependent), inputs("llama", length=6, padding=2)
        expected = generated(model, given, [0, 1])
        actual = generated(model, given, [0, 1], cache_implementation="static", disable_compile=True)
        assert torch.equal(actual.sequences, expected.sequences)

    @torch.no_grad()
    def test_other_ways_to_generate(self):
        model, given = retrofitted("qwen3"), inputs("qwen3", length=6)
        options = {"num_posterior_samples": 2, "max_new_tokens": 4}
        drawn = model.generate(**given, do_sample=True, num_return_sequences=3, **options)
        assert drawn.shape == (6, 10)
        stopped = model.generate(**given, stopping_criteria=[UncertaintyStoppingCriteria(0.0)], **options)
        assert stopped.shape == (2, 7)
        with pytest.raises(ValueError, match="return_dict_in_generate=True"):
            model.generate(**given, output_uncertainty=True, **options)
        with pytest.raises(ValueError, match="num_posterior_samples is 0"):
            model.generate(**given, output_uncertainty=True, return_dict_in_generate=True)

    @torch.no_grad()
    def test_number_of_samples_is_saved_with_the_model(self, tmp_path):
        from hf_variational import variational_class

        model, given = retrofitted("gpt2-next"), inputs("gpt2-next", length=6)
        model.generation_config.num_posterior_samples = 2
        model.save_pretrained(tmp_path)
        again = variational_class(hf.GPT2LMHeadModel).from_pretrained(tmp_path).eval()
        with posterior_noise(WeightsNoise(samples=2)):
            actual = again.generate(**given, do_sample=False, max_new_tokens=NEW)
        assert torch.equal(actual, generated(model, given, [0, 1], samples=2).sequences)

    @torch.no_grad()
    def test_a_copy_generates_the_same(self):
        model, given = retrofitted("gpt2-next"), inputs("gpt2-next", length=6)
        expected = generated(model, given, [0, 1]).sequences
        assert torch.equal(generated(copy.deepcopy(model), given, [0, 1]).sequences, expected)


def tokenizer() -> hf.PreTrainedTokenizerFast:
    words = {"[PAD]": 0, "[MASK]": 1, "[UNK]": 2} | {f"w{index}": index for index in range(3, VOCAB)}
    tokens = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokens.pre_tokenizer = Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]", padding_side="left"
    )


class TestPipelines:
    @pytest.mark.parametrize("name", ["gpt2-next", "llama"])
    def test_text_generation(self, name, caplog):
        options = {"max_new_tokens": 5, "do_sample": False}
        plain = stock(name)
        expected = hf.pipeline("text-generation", model=plain, tokenizer=tokenizer())("w5 w9", **options)
        generator = hf.pipeline("text-generation", model=retrofitted(plain), tokenizer=tokenizer())
        assert generator("w5 w9", **options) == expected
        (sampled,) = generator("w5 w9", num_posterior_samples=2, **options)
        assert sampled["generated_text"].count("w") == 7
        assert "not supported" not in caplog.text

    @pytest.mark.parametrize("name", ["bert-masked", "roberta-masked"])
    def test_fill_mask(self, name):
        plain = stock(name)
        text = "w5 [MASK] w9"
        expected = hf.pipeline("fill-mask", model=plain, tokenizer=tokenizer())(text)
        actual = hf.pipeline("fill-mask", model=retrofitted(plain), tokenizer=tokenizer())(text)
        assert [one["token_str"] for one in actual] == [one["token_str"] for one in expected]
        assert [one["score"] for one in actual] == pytest.approx([one["score"] for one in expected])

    @pytest.mark.parametrize("name", ["bert-single", "bert-tokens", "vit-single"])
    def test_classification(self, name):
        plain = stock(name)
        if FAMILIES[name].is_image:
            from PIL import Image

            processor = hf.ViTImageProcessor(size={"height": 16, "width": 16})
            task, extra, given = (
                "image-classification",
                {"image_processor": processor},
                Image.new("RGB", (16, 16), "red"),
            )
        else:
            task = "text-classification" if name == "bert-single" else "token-classification"
            extra, given = {"tokenizer": tokenizer()}, "w5 w7 w9"
        expected = hf.pipeline(task, model=plain, **extra)(given)
        actual = hf.pipeline(task, model=retrofitted(plain), **extra)(given)
        assert [one.get("label", one.get("entity")) for one in actual] == [
            one.get("label", one.get("entity")) for one in expected
        ]
        assert [one["score"] for one in actual] == pytest.approx([one["score"] for one in expected])
