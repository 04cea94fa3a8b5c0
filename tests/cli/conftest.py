"""A byte-level tokenizer learned in a moment, and tiny checkpoints of both kinds saved beside it."""

import pytest
import torch
from retrofit_runs import retrofitted, save_llama, sentences, texts_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_variational import (
    EVEConfig,
    VariationalAttentionConfig,
    VariationalGPTConfig,
    VariationalGPTForCausalLM,
    save_for_hub,
)

TEXT = (
    "The with statement is used to wrap the execution of a block with methods defined by a context manager. "
    "A compound statement consists of one or more clauses. The for statement is used to iterate over a sequence.\n"
) * 4


@pytest.fixture(scope="session")
def tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def _checkpoint(folder, tokenizer, **variational):
    torch.manual_seed(0)
    config = VariationalGPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
        **variational,
    )
    save_for_hub(VariationalGPTForCausalLM(config), folder, tokenizer)
    return str(folder)


@pytest.fixture(scope="session")
def eve_checkpoint(tmp_path_factory, tokenizer):
    return _checkpoint(tmp_path_factory.mktemp("checkpoints") / "eve", tokenizer, eve=EVEConfig(initial_scale=0.5))


@pytest.fixture(scope="session")
def twin_checkpoint(tmp_path_factory, tokenizer):
    return _checkpoint(tmp_path_factory.mktemp("checkpoints") / "twin", tokenizer, eve=None)


@pytest.fixture(scope="session")
def attention_checkpoint(tmp_path_factory, tokenizer):
    attention = VariationalAttentionConfig("dirichlet", initial_concentration=5.0)
    return _checkpoint(tmp_path_factory.mktemp("checkpoints") / "attention", tokenizer, eve=None, attention=attention)


# ---- What `hf-variational retrofit` leaves ----


@pytest.fixture(scope="session")
def place(tmp_path_factory, tokenizer):
    """A folder with a base model and texts."""
    folder = tmp_path_factory.mktemp("retrofit")
    save_llama(folder / "base", tokenizer)
    (folder / "text.txt").write_text(sentences(0))
    (folder / "other.txt").write_text("x = [0, 1, 2]\nfor y in x: print(y * 7, '%d' % y)\n" * 40)
    (folder / "short.txt").write_text("The with statement.")
    (folder / "empty.txt").write_text("")
    return folder


@pytest.fixture(scope="session")
def scaled(place):
    """The command without a word about training, which trains nothing."""
    return retrofitted(place, "scaled", "--other", f"code={place / 'other.txt'}")


@pytest.fixture(scope="session")
def trained(place):
    steps = ("arguments.max_steps=3", "arguments.warmup_steps=0", "arguments.logging_steps=1")
    return retrofitted(place, "trained", "--train", "posterior", "--layers", "last", *steps)


@pytest.fixture(scope="session")
def base(place):
    return AutoModelForCausalLM.from_pretrained(place / "base").eval()


@pytest.fixture(scope="session")
def texts(place, tokenizer):
    return texts_of(place, tokenizer)
