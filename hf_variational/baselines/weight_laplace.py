"""Laplace approximation of all weights with a diagonal Hessian, after training, by laplace-torch.

Daxberger et al. 2021 (*Laplace Redux*, arXiv 2106.14806), section 3; Kunstner, Balles and Hennig 2019 (*Limitations of
the empirical Fisher approximation*, arXiv 1905.12558), equation 3: θ ~ N(θ*, (diag F + δ I)^-1) with θ* the trained
weights, δ the prior's precision and F the Fisher matrix, of a softmax the same as the generalised Gauss-Newton matrix.
With targets y_t drawn from the model itself, the scores of a sequence's positions have mean 0 and are independent, so

    diag F = Σ over sequences of E_{y ~ p} [(Σ_t ∇ log p(y_t | x_<t))²],

and one backward pass a sequence and draw is an unbiased estimate. laplace-torch's own backends take a Jacobian or a
backward pass for each logit of each position, so this stands in their place; the posterior, its samples and its
marginal likelihood are laplace-torch's. A sample is a whole network: S of them are the members of an ensemble.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import vector_to_parameters
from transformers import PreTrainedModel

from ..evaluation.batches import data_batches
from ..evaluation.streaming import IGNORED_LABEL
from .ensemble import EnsembleForCausalLM
from .laplace import CurvatureInterface, DiagLaplace, check_precision, chosen_precision, take_targets, validation_nll


class SequenceFisher(CurvatureInterface):
    """The diagonal of the Fisher matrix of a language model, for laplace-torch, from one draw of its targets."""

    @torch.enable_grad()
    def diag(self, x: Tensor, y: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
        """The loss, 0-dim, and an estimate of the diagonal, [parameters], of tokens and targets [batch, length]."""
        total, loss = torch.zeros(sum(p.numel() for p in self.params), device=x.device), 0.0
        for tokens, targets in zip(x, y, strict=True):
            logits = self.model(tokens[None])[0].float()
            scored = targets != IGNORED_LABEL
            loss = loss + F.cross_entropy(logits[scored], targets[scored], reduction="sum").detach()
            drawn = torch.distributions.Categorical(logits=logits[scored].detach()).sample()
            log_p = -F.cross_entropy(logits[scored], drawn, reduction="sum")
            scores = torch.autograd.grad(log_p, self.params)
            total += torch.cat([score.flatten() for score in scores]).float().square()
        return loss, total


def diagonal_laplace(
    model: PreTrainedModel,
    data,
    num_posterior_samples: int = 8,
    prior_precision: float | str = "validation",
    validation=None,
    *,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> EnsembleForCausalLM:
    """Draws networks from a diagonal Laplace approximation of all weights of a trained language model.

    Args:
        model: a decoder-only language model; it is not changed, and its parameters with `requires_grad` are
            approximated.
        data: what it was trained on, or some of it: sequences of one length without padding in front, as
            [`evaluate_language_model`] takes them.
        num_posterior_samples: S, the networks that are drawn.
        prior_precision: δ, or how it is found, as in [`last_layer_laplace`].
        validation: for `"validation"`; held out.
        batch_size: sequences of a batch of validation.
        seed: of the estimate and of the draws; the global generator stays as it is.
        progress: whether to show progress bars.

    Returns:
        An ensemble of the S networks; `prior_precision` is its δ.

    Raises:
        ImportError: without laplace-torch.
        ValueError: for data without a target, or a precision that is not above 0.

    Example:

    ```python
    >>> ensemble = diagonal_laplace(model, train_windows, validation=windows)
    >>> out = ensemble(**inputs, output_uncertainty=True)
    ```
    """
    check_precision(prior_precision, validation)
    logits = _Logits(copy.deepcopy(model).eval())
    laplace = DiagLaplace(logits, "classification", backend=SequenceFisher)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        laplace.fit(_Sequences(model, data), progress_bar=progress)

    def drawn(precision: float) -> EnsembleForCausalLM:
        laplace.prior_precision = precision
        return _members(laplace, num_posterior_samples, seed)

    def nll(precision: float) -> float:
        return validation_nll(drawn(precision), validation, batch_size, num_posterior_samples)

    precision = chosen_precision(laplace, prior_precision, nll, progress)
    ensemble = drawn(precision)
    ensemble.prior_precision = precision
    return ensemble


class _Logits(nn.Module):
    """A language model as laplace-torch calls a network."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


class _Sequences:
    """Sequences and their targets; a data loader to laplace-torch.

    Attributes:
        dataset: as long as there are sequences.
    """

    def __init__(self, model: PreTrainedModel, data):
        pad_token_id = getattr(model.config, "pad_token_id", None) or 0
        self.pairs = []
        for batch in data_batches(data, 1, pad_token_id, None):
            batch = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
            mask = batch.get("attention_mask")
            if mask is not None and bool((mask[:, 0] == 0).any()):
                raise ValueError("The data has padding in front, which this fit reads as tokens: pad behind.")
            targets = take_targets(batch)
            if bool((targets != IGNORED_LABEL).any()):
                self.pairs.append((batch["input_ids"], targets))
        if not self.pairs:
            raise ValueError("There is nothing to fit to: no sequence of the data has a token to predict.")
        self.dataset = range(sum(len(ids) for ids, _ in self.pairs))

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.pairs


def _members(laplace: DiagLaplace, count: int, seed: int) -> EnsembleForCausalLM:
    generator = torch.Generator(laplace.mean.device).manual_seed(seed)
    members = []
    for _ in range(count):
        member = copy.deepcopy(laplace.model.model)
        trained = [parameter for parameter in member.parameters() if parameter.requires_grad]
        vector_to_parameters(laplace.sample(1, generator)[0], trained)
        members.append(member)
    return EnsembleForCausalLM.from_members(members)
