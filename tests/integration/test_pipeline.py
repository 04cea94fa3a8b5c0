"""pipeline("text-generation")."""

import pytest
import torch
from integration_models import EOS, PAD, RowNoise, endless, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, pipeline

from hf_variational import VariationalGPTForCausalLM, posterior_noise

PROMPT = "w5 w9 w11"


@pytest.fixture
def checkpoint(tmp_path):
    words = {"<pad>": PAD, "<s>": 1, "</s>": EOS, **{f"w{i}": i for i in range(3, 61)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<pad>",
        padding_side="left",
    )
    model = endless(tiny_model())
    model.generation_config.num_posterior_samples = 3
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return model, tokenizer, str(tmp_path)


def test_pipeline_of_a_directory(checkpoint):
    model, tokenizer, directory = checkpoint
    generator = pipeline("text-generation", model=directory, device="cpu")
    assert isinstance(generator.model, VariationalGPTForCausalLM)
    source = RowNoise()
    with posterior_noise(source):
        answer = generator(PROMPT, max_new_tokens=6, do_sample=False, return_full_text=False)
    assert {request.num_samples for request in source.requests} == {3}, "the checkpoint's generation config says 3"
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with posterior_noise(RowNoise()):
        expected = model.generate(ids, max_new_tokens=6, num_posterior_samples=3)
    assert answer[0]["generated_text"].split() == tokenizer.decode(expected[0, 3:], skip_special_tokens=True).split()


@pytest.mark.parametrize("samples", [0, 2])
def test_argument_overrides_the_checkpoint(checkpoint, samples):
    model, tokenizer, _ = checkpoint
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    source = RowNoise()
    with posterior_noise(source):
        generator(PROMPT, max_new_tokens=2, do_sample=False, num_posterior_samples=samples)
    assert {request.num_samples for request in source.requests} == ({samples} if samples else set())


def test_batches_of_different_length_and_several_answers(checkpoint):
    model, tokenizer, _ = checkpoint
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu", batch_size=2)
    torch.manual_seed(0)
    texts = [PROMPT, "w7 w8 w9 w10 w20"]
    answers = generator(texts, max_new_tokens=3, do_sample=True, num_return_sequences=2, return_full_text=False)
    assert [len(answer) for answer in answers] == [2, 2]
    assert all(isinstance(item["generated_text"], str) for answer in answers for item in answer)
