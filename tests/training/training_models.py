"""A model of a few thousand parameters and generated data: every test here takes seconds."""

import torch
from datasets import Dataset

from hf_variational import EVEConfig, VariationalGPTConfig, VariationalGPTForCausalLM, VariationalTrainingArguments

VOCABULARY = 40
LENGTH = 10


def make_model(seed=0, eve="default", **fields):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "kl_weight": 1e-3,
    }
    eve = EVEConfig(scale="input", scale_rank=2) if eve == "default" else eve
    return VariationalGPTForCausalLM(VariationalGPTConfig(**{**sizes, **fields}, eve=eve))


def make_blocks(rows=16, seed=1, masked=True):
    """Rows of counting tokens; with `masked` each row has another number of targets."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, VOCABULARY, (rows, 1), generator=generator)
    steps = torch.randint(1, 4, (rows, 1), generator=generator)
    tokens = (starts + steps * torch.arange(LENGTH)) % VOCABULARY
    labels = tokens.clone()
    if masked:
        for row in range(rows):
            labels[row, LENGTH - row % (LENGTH - 2) :] = -100
    return Dataset.from_dict({"input_ids": tokens.tolist(), "labels": labels.tolist()})


def make_arguments(folder, **fields):
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "eval_posterior_samples": 3,
    }
    return VariationalTrainingArguments(output_dir=str(folder), **{**defaults, **fields})


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
