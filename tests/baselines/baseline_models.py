"""Two tiny random language models, every baseline on them, and what they are compared with."""

import copy

import pytest
import torch
import transformers as hf
from torch import Tensor

from hf_variational.baselines import EnsembleForCausalLM, mc_dropout, tempered

VOCAB, LENGTH, LAYERS, SAMPLES = 48, 7, 2, 3
# Wide, so that samples can be told apart; no dropout but where a test asks for it.
_LLAMA = {
    **{"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"intermediate_size": 40, "vocab_size": VOCAB, "max_position_embeddings": 64, "initializer_range": 0.25},
    **{"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None},
}
_GPT2 = {
    **{"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB, "n_inner": 40},
    **{"initializer_range": 0.25, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None},
    **{"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0},
}
FAMILIES = {"llama": (hf.LlamaForCausalLM, hf.LlamaConfig, _LLAMA), "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, _GPT2)}
_QUERIES = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}


def stock(family: str, seed: int = 7, implementation: str = "sdpa", **options) -> hf.PreTrainedModel:
    """A stock model in eval mode."""
    model_class, config_class, settings = FAMILIES[family]
    torch.manual_seed(seed)
    return model_class._from_config(config_class(**{**settings, **options}), attn_implementation=implementation).eval()


def dropped(family: str) -> hf.PreTrainedModel:
    return mc_dropout(stock(family), rate=0.3)


def ensemble(family: str, members: int = SAMPLES) -> EnsembleForCausalLM:
    return EnsembleForCausalLM.from_members([stock(family, seed) for seed in range(members)])


def adapted(family: str, names: tuple[str, ...] = ("first", "second", "third"), **options):
    """A PEFT model with LoRA adapters that differ, in eval mode."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, "fan_in_fan_out": family == "gpt2"}
    settings |= {"target_modules": _QUERIES[family], "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(stock(family), LoraConfig(**settings), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**settings))
    return model.eval()


def lora(family: str):
    from hf_variational.baselines import lora_ensemble

    return lora_ensemble(adapted(family))


def probabilistic(family: str, **options):
    """A PEFT model with a PVeRA adapter that has moved away from its start, in eval mode."""
    from peft import PveraConfig, get_peft_model

    settings = {"r": 8, "target_modules": _QUERIES[family], "fan_in_fan_out": family == "gpt2", **options}
    model = get_peft_model(stock(family), PveraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "pvera_lambda" in name:
                parameter.normal_()
    return model.eval()


def pvera(family: str):
    from hf_variational.baselines import pvera_samples

    return pvera_samples(probabilistic(family))


def cooled(family: str) -> hf.PreTrainedModel:
    return tempered(stock(family), 1.7)


def last_layer(family: str, structure: str = "kron", prior_precision: float | str = 5.0, **options):
    """Skips the test where laplace-torch is not installed."""
    pytest.importorskip("laplace")
    from hf_variational.baselines import last_layer_laplace

    return last_layer_laplace(stock(family), sequences(), structure, prior_precision, progress=False, **options)


def weights(family: str, prior_precision: float | str = 30.0, **options) -> EnsembleForCausalLM:
    """Skips the test where laplace-torch is not installed."""
    pytest.importorskip("laplace")
    from hf_variational.baselines import diagonal_laplace

    return diagonal_laplace(stock(family), sequences(), SAMPLES, prior_precision, progress=False, **options)


def sequences(count: int = 6, seed: int = 5) -> list[Tensor]:
    return list(given(batch=count, padding=0, seed=seed)["input_ids"])


# What makes a model of a baseline. The samples of all but a temperature's differ.
METHODS = {
    **{"mc_dropout": dropped, "ensemble": ensemble, "lora_ensemble": lora, "pvera": pvera, "temperature": cooled},
    **{"last_layer_laplace": last_layer, "diagonal_laplace": weights},
}
ENSEMBLES = ("ensemble", "diagonal_laplace")
PEFT_METHODS = ("lora_ensemble", "pvera")


def given(batch: int = 2, length: int = LENGTH, padding: int = 2, seed: int = 3) -> dict[str, Tensor]:
    """What `forward` takes; the first sequence has padding in front."""
    ids = torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def with_positions(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**inputs, "position_ids": (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def mean_probability(logits: list[Tensor]) -> Tensor:
    """log p̄ in float64 of logits that stand in a list."""
    return torch.stack([one.double().softmax(-1) for one in logits]).mean(0).log()


@torch.no_grad()
def greedy_by_hand(log_p, inputs: dict[str, Tensor], steps: int) -> tuple[Tensor, Tensor]:
    """Greedy tokens of `log_p(inputs)` [batch, length, vocab], without a cache, and what they were chosen from."""
    inputs, chosen_from = copy.copy(inputs), []
    for _ in range(steps):
        chosen_from.append(log_p(with_positions(inputs))[:, -1])
        token = chosen_from[-1].argmax(-1, keepdim=True)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
    return inputs["input_ids"], torch.stack(chosen_from, 1)
