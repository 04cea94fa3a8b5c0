"""A model whose logits are a table, with noise that grows with the token: fast, and not all tokens alike."""

import math
from types import SimpleNamespace

import torch
from torch import nn

from hf_variational.modeling.predictive import predictive_measures

VOCAB = 11


class Bigram(nn.Module):
    """Logits from the current token, and noise on them for each posterior sample."""

    def __init__(self, variational=True, scale=2.0, noise=1.5, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(scale * torch.randn(VOCAB, VOCAB, generator=generator))
        self.noise = noise
        self.variational_layers = [0] if variational else []
        self.config = SimpleNamespace(pad_token_id=None)
        self.calls: list[tuple[int, int]] = []

    def forward(self, input_ids, attention_mask=None, num_posterior_samples=0, output_uncertainty=False, **options):
        self.calls.append((input_ids.shape[0], num_posterior_samples))
        if not num_posterior_samples:
            return SimpleNamespace(logits=self.table[input_ids])
        logits = self.table[input_ids]
        noise = torch.randn(logits.shape[0], num_posterior_samples, *logits.shape[1:])
        drawn = (logits[:, None] + self.noise * noise * input_ids[:, None, :, None] / VOCAB).flatten(0, 1)
        targets = nn.functional.pad(input_ids[:, 1:], (0, 1), value=-100)
        log_p = drawn.log_softmax(-1).unflatten(0, (-1, num_posterior_samples))
        measures = predictive_measures(drawn, num_posterior_samples, targets) if output_uncertainty else None
        return SimpleNamespace(logits=log_p.logsumexp(1) - math.log(num_posterior_samples), uncertainty=measures)


def sampled_rows(model, count=60, length=12, seed=1):
    """Sequences drawn of the model's own mean pass, so that it is right as often as it says."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (count, 1), generator=generator)
    for _ in range(length - 1):
        p = model.table.detach()[tokens[:, -1]].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=generator)], dim=1)
    return tokens.tolist()


def other_rows(count=60, length=12, seed=2):
    """Sequences of large tokens alone, which the noise is larger for."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB // 2, VOCAB, (count, length), generator=generator).tolist()
