"""Laplace approximation of the last layer, after training, by laplace-torch.

Daxberger et al. 2021 (*Laplace Redux*, arXiv 2106.14806), sections 2 and 3: with θ* the trained weights of the head,
θ ~ N(θ*, (H + δ I)^-1), where δ is the prior's precision and H the generalised Gauss-Newton matrix of the
log-likelihood. Of a linear head with hidden states h_n and probabilities p_n both its factored forms are products of
matrices:

    diagonal   H_vj = Σ_n p_nv (1 - p_nv) h_nj²
    Kronecker  H = Σ_n (diag p_n - p_n p_nᵀ) ⊗ (1/N) Σ_n h_n h_nᵀ

laplace-torch's own backends take a Jacobian or a backward pass for each of the vocabulary's logits, so these stand in
their place; the posterior, its samples and its marginal likelihood are laplace-torch's.

A posterior sample is one draw of the head, kept until the prior's precision changes. The rows split at the head: the
body runs once.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..evaluation.batches import data_batches, take_labels
from ..evaluation.language_model import evaluate_language_model
from ..evaluation.streaming import IGNORED_LABEL
from ..modeling.objective import shift_targets
from ..modeling.sample_axis import repeat_rows
from .samples import TARGETS, RowSamplesMixin, abandon, adopt, batch_of, join_samples

try:
    from laplace import DiagLaplace, KronLaplace
    from laplace.curvature import CurvatureInterface
    from laplace.utils import Kron
except (ImportError, RuntimeError) as error:  # a torchvision of another build than torch's raises the second
    raise ImportError(
        f"The Laplace baselines need laplace-torch, an optional dependency, which cannot be imported ({error}): pip "
        "install 'hf-variational[laplace]', with a torchvision, which it needs, from where your torch is from."
    ) from error

# Of a Kronecker factor all eigenvectors are computed: beyond this vocabulary that takes hours and gigabytes.
LARGEST_KRONECKER_VOCABULARY = 2**14
# Precisions among which validation chooses: from a wide prior to one that leaves the trained weights alone.
PRECISIONS = tuple(10.0 ** (exponent / 2) for exponent in range(-4, 15))


class HeadCurvature(CurvatureInterface):
    """The generalised Gauss-Newton matrix of a linear map before a softmax, for laplace-torch."""

    def diag(self, x: Tensor, y: Tensor, **kwargs) -> tuple[Tensor, Tensor]:
        """The loss, 0-dim, and the diagonal, [weights and biases], of inputs [n, hidden] and targets [n]."""
        loss, p = self._loss(x, y)
        variance = p * (1 - p)
        parts = [(variance.T @ x.square()).flatten()]
        if self.model.bias is not None:
            parts.append(variance.sum(0))
        return loss, torch.cat(parts)

    def kron(self, x: Tensor, y: Tensor, N: int, **kwargs) -> tuple[Tensor, Kron]:
        """The loss, 0-dim, and the Kronecker factors of `n` of `N` data."""
        loss, p = self._loss(x, y)
        outputs = torch.diag(p.sum(0)) - p.T @ p
        factors = [[outputs, x.T @ x / N]]
        if self.model.bias is not None:
            factors.append([outputs.clone()])
        return loss, Kron(factors)

    @torch.no_grad()
    def _loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(x)
        return self.lossfunc(logits, y), logits.softmax(-1)


_STRUCTURES = {"diag": DiagLaplace, "kron": KronLaplace}


class LastLayerLaplaceMixin(RowSamplesMixin):
    """A language model whose posterior samples are draws of its head; see [`last_layer_laplace`]."""

    @property
    def variational_layers(self) -> list[int]:
        """The head alone, which counts as the layer behind the last."""
        return [self.config.get_text_config().num_hidden_layers]

    @property
    def prior_precision(self) -> float:
        """δ, the precision of the prior of the head's weights. Setting it draws new samples."""
        return float(self._laplace.prior_precision)

    @prior_precision.setter
    def prior_precision(self, value: float) -> None:
        self._laplace.prior_precision = float(value)
        self._drawn.clear()

    def _sampled(self, inputs: dict, num_samples: int, ours: dict):
        batch_of(inputs)
        head = self.get_output_embeddings()
        with _entering(head) as seen:
            outputs = self._stock_pass({name: value for name, value in inputs.items() if name not in TARGETS})
        heads = _SampledHeads.of(self._draws(num_samples), head)
        states = repeat_rows(seen[0], num_samples)
        return type(outputs)(**{**outputs, **join_samples(states, heads, num_samples, inputs, ours)})

    def _draws(self, num_samples: int) -> list[Tensor]:
        while len(self._drawn) < num_samples:
            device = self._laplace.mean.device
            generator = torch.Generator(device).manual_seed(self._seed + len(self._drawn))
            self._drawn.append(self._laplace.sample(1, generator)[0])
        return self._drawn[:num_samples]


def last_layer_laplace(
    model: PreTrainedModel,
    data,
    structure: str = "kron",
    prior_precision: float | str = "validation",
    validation=None,
    batch_size: int = 8,
    *,
    seed: int = 0,
    progress: bool = True,
) -> PreTrainedModel:
    """Puts a Laplace approximation around the head of a trained language model, in place.

    Afterwards `forward` and `generate` take `num_posterior_samples`; 0 is the trained model itself. Embeddings that
    share the head's weights stay as they are, and so does the checkpoint.

    Args:
        model: a decoder-only language model whose logits are its head's, without a softcap or a scale behind it.
        data: what it was trained on, or some of it, as [`evaluate_language_model`] takes it.
        structure: of H: `"kron"`, for vocabularies of up to 16,384, or `"diag"`.
        prior_precision: δ, or how it is found: `"validation"`, of `PRECISIONS` the one with the lowest negative
            log-likelihood on `validation` with 8 samples; `"marglik"`, the one with the largest marginal likelihood on
            `data`, whose curvature is that of so much data and no more.
        validation: for `"validation"`; held out.
        batch_size: sequences of a forward pass.
        seed: of the draws: sample s is the same in every pass.
        progress: whether to show progress bars.

    Returns:
        The same model, of a subclass of its class, with `prior_precision`; `remove_last_layer_laplace` takes it away.

    Raises:
        ImportError: without laplace-torch.
        ValueError: for another structure, a vocabulary too large for it, logits that are not the head's, data without
            a target, or a precision that is not above 0.

    Example:

    ```python
    >>> model = last_layer_laplace(model, train_windows, validation=windows)
    >>> out = model(**inputs, num_posterior_samples=8, output_uncertainty=True)
    ```
    """
    check_precision(prior_precision, validation)
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    adopt(model, LastLayerLaplaceMixin)
    try:
        _check_structure(structure, head)
        tokens = _HeadInputs(model, data, batch_size)
        # A copy, because laplace-torch sets what it approximates to its samples.
        layer = nn.Linear(*reversed(head.weight.shape), bias=head.bias is not None, device=head.weight.device)
        layer.load_state_dict({name: value.float() for name, value in head.state_dict().items()})
        laplace = _STRUCTURES[structure](layer, "classification", backend=HeadCurvature)
        laplace.fit(tokens, progress_bar=progress)
    except ValueError:
        abandon(model, LastLayerLaplaceMixin, "last_layer_laplace")
        raise
    model._laplace, model._drawn, model._seed = laplace, [], seed

    def nll(precision: float) -> float:
        model.prior_precision = precision
        return validation_nll(model, validation, batch_size)

    model.prior_precision = chosen_precision(laplace, prior_precision, nll, progress)
    return model


def remove_last_layer_laplace(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `last_layer_laplace`, in place.

    Raises:
        ValueError: for a model that `last_layer_laplace` did not make.
    """
    abandon(model, LastLayerLaplaceMixin, "last_layer_laplace")
    del model._laplace, model._drawn, model._seed
    return model


def chosen_precision(laplace, asked: float | str, nll: Callable[[float], float], progress: bool) -> float:
    """The prior's precision of a fitted approximation; `nll`: on validation data, at a precision."""
    if asked == "marglik":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "By default `link_approx`")  # of a predictive that is not used here
            laplace.optimize_prior_precision(pred_type="nn", method="marglik", prior_structure="scalar")
        return float(laplace.prior_precision)
    if asked == "validation":
        return min(tqdm(PRECISIONS, desc="Choosing the prior precision", disable=not progress), key=nll)
    return float(asked)


def validation_nll(model: PreTrainedModel, validation, batch_size: int, num_posterior_samples: int = 8) -> float:
    """Negative log-likelihood per token of the predictive distribution on held-out data, nats."""
    result = evaluate_language_model(model, validation, num_posterior_samples, batch_size, progress=False)
    return result["samples"]["nll"]


def take_targets(batch: dict[str, Tensor]) -> Tensor:
    """Takes the labels out of a batch, or makes them: the target of each position, [batch, length]; -100 for none."""
    return shift_targets(take_labels(batch))


def check_precision(prior_precision: float | str, validation) -> None:
    if isinstance(prior_precision, str):
        if prior_precision not in ("marglik", "validation"):
            raise ValueError(
                f"prior_precision={prior_precision!r} is unknown: give a number, 'marglik' or 'validation'."
            )
        if (prior_precision == "validation") != (validation is not None):
            raise ValueError("prior_precision='validation' and held-out data in validation=... belong together.")
    elif isinstance(prior_precision, bool) or not 0 < prior_precision < float("inf"):
        raise ValueError(f"prior_precision must be a finite number above 0, got {prior_precision!r}.")


def _check_structure(structure: str, head: nn.Linear) -> None:
    vocab, hidden = head.weight.shape
    if structure == "full":
        raise ValueError(
            f"The full Hessian of a head of {vocab} x {hidden} weights has {(vocab * hidden) ** 2:.1e} entries: use "
            "structure='kron' or 'diag'."
        )
    if structure not in _STRUCTURES:
        raise ValueError(f"structure={structure!r} is unknown: choose 'kron' or 'diag'.")
    if structure == "kron" and vocab > LARGEST_KRONECKER_VOCABULARY:
        raise ValueError(
            f"structure='kron' needs all eigenvectors of a matrix of {vocab} x {vocab}, one row a token of the "
            f"vocabulary, and at most {LARGEST_KRONECKER_VOCABULARY} can be had: use structure='diag'."
        )


class _HeadInputs:
    """What enters the head where there is a target, and the targets; a data loader to laplace-torch.

    Attributes:
        dataset: as long as there are targets.
    """

    def __init__(self, model: PreTrainedModel, data, batch_size: int):
        self.model = model.eval()
        pad_token_id = getattr(model.config, "pad_token_id", None) or 0
        self.batches = [
            {name: value for name, value in batch.items() if isinstance(value, Tensor)}
            for batch in data_batches(data, batch_size, pad_token_id, None)
        ]
        self.dataset = range(sum(int((take_targets(dict(batch)) != IGNORED_LABEL).sum()) for batch in self.batches))
        if not self.dataset:
            raise ValueError("There is nothing to fit to: no sequence of the data has a token to predict.")

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        head = self.model.get_output_embeddings()
        for number, batch in enumerate(self.batches):
            batch = {name: value.to(self.model.device) for name, value in batch.items()}
            targets = take_targets(batch)
            with torch.no_grad(), _entering(head) as seen:
                logits = self.model(**batch, use_cache=False).logits
                if number == 0 and not torch.allclose(logits, head(seen[0]), rtol=1e-3, atol=1e-3):
                    raise ValueError(
                        f"The logits of {type(self.model).__name__} are not those of its head, which this "
                        "approximation is of: a softcap, a scale or a temperature stands behind it."
                    )
            rows = targets != IGNORED_LABEL
            yield seen[0][rows].float(), targets[rows]


@dataclass
class _SampledHeads:
    """The head of each sample, as [`join_samples`] calls it.

    Attributes:
        weight: [S, vocab, hidden].
        bias: [S, 1, vocab], or `None`.
    """

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, draws: list[Tensor], head: nn.Linear) -> "_SampledHeads":
        count = head.weight.numel()
        drawn = torch.stack(draws).to(head.weight)
        bias = None if head.bias is None else drawn[:, None, count:]
        return cls(drawn[:, :count].unflatten(1, head.weight.shape), bias)

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[1]

    def __call__(self, states: Tensor) -> Tensor:
        samples = len(self.weight)
        # A product for each sample, over the positions of all sequences at once.
        rows = states.unflatten(0, (-1, samples)).transpose(0, 1)
        logits = rows.flatten(1, 2) @ self.weight.transpose(1, 2)
        if self.bias is not None:
            logits = logits + self.bias
        return logits.unflatten(1, rows.shape[1:3]).transpose(0, 1).flatten(0, 1)


@contextmanager
def _entering(module: nn.Module) -> Iterator[list[Tensor]]:
    """What enters a module inside, in a list."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()
