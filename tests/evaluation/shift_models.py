"""A tokenizer of ten letters, rows of them, and a tiny model that reads them."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hf_variational import EVEConfig, VariationalGPTConfig, VariationalGPTForCausalLM

LETTERS = "abcdefghij"
ID = {token: index for index, token in enumerate(("<s>", "</s>", "<unk>", *LETTERS))}


def tokenizer_of_letters(front: bool = False) -> PreTrainedTokenizerFast:
    """`front`: whether it puts the beginning-of-sequence token in front of a text."""
    backend = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if front:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ID["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def letters(count: int = 12, length: int = 10, seed: int = 0) -> list[list[int]]:
    """Rows of random letters."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(ID["a"], len(ID), (count, length), generator=generator).tolist()


def spelled(count: int = 12, length: int = 9) -> list[list[int]]:
    """Rows of the letters in their order, so that each is known from the one before."""
    return [list(range(ID["a"], ID["a"] + length)) for _ in range(count)]


def variational(eve: EVEConfig, sharp: float = 1.0) -> VariationalGPTForCausalLM:
    """A model whose scale depends on the token, if it may, and whose predictions are not all alike."""
    torch.manual_seed(0)
    config = VariationalGPTConfig(
        vocab_size=len(ID),
        hidden_size=12,
        intermediate_size=10,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.4,
        eve=eve,
    )
    model = VariationalGPTForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale_up"):
                parameter.normal_(0, 2.0)
        model.lm_head.weight.mul_(sharp)
    return model
