"""How much noise a model can use, found on validation data without any training."""

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..modeling.attention import AttentionPosterior
from ..modeling.configuration_variational_gpt import check_num_posterior_samples
from ..modeling.eve import EVE
from ..modeling.objective import IGNORE_INDEX
from .axes import targets_of
from .calibrate import variational_model
from .ffn import eve_modules
from .sequences import batches_of

# Factors by which all scales are first multiplied; the search goes on around the best, and over the edge if it is one.
_GRID = (0.5, 1.0, 2.0)
_FURTHEST = 64.0
# Multipliers that are nearer to each other than this share are not told apart.
_RESOLUTION = 0.03
# Changes of the NLL below this share are not followed further.
_FLAT = 1e-5
Site = tuple[int, str]


@dataclass
class FittedScale:
    """What `fit_scale` found.

    Attributes:
        base_nll: negative log-likelihood (NLL) of the mean pass, the base model's, nats per target.
        nll: NLL of the predictive distribution with the fitted scales, on the same targets.
        shared: the multiplier of all scales that was best before the layers parted.
        multipliers: (layer, site) to what its scale was multiplied by in all.
        evaluations: (shared multiplier, NLL), in the order tried.
        num_targets: targets that the NLLs are means over.
        num_posterior_samples: S.
        seconds: that it took.
    """

    base_nll: float
    nll: float
    shared: float
    multipliers: dict[Site, float]
    evaluations: list[tuple[float, float]] = field(default_factory=list)
    num_targets: int = 0
    num_posterior_samples: int = 8
    seconds: float = 0.0


def fit_scale(
    model: PreTrainedModel,
    dataset,
    tokenizer=None,
    *,
    tolerance: float | None = None,
    per_layer: bool = True,
    num_posterior_samples: int = 8,
    max_sequences: int = 64,
    max_length: int | None = None,
    batch_size: int = 8,
    epochs: int = 1,
    learning_rate: float = 0.2,
    seed: int = 0,
    progress: bool = True,
) -> FittedScale:
    """Multiplies the (calibrated) scales of a retrofit so that its predictive distribution is best, in place. Nothing
    else changes: no pretrained weight, and not the mean pass.

    One multiplier of all scales is found by successive parabolic interpolation of the predictive NLL, with common
    random numbers. Then each posterior's own follows that NLL's gradient (Adam on the logarithm), and they are kept if
    the NLL became lower. A multiplier of a Dirichlet attention's scale divides its concentration by its square.

    Args:
        model: what `variationalize` made, best after `calibrate_prior`, or a PEFT model with an EVE adapter.
        dataset: validation sequences, as in `calibrate_prior`; rows of token ids without `labels` are their own
            targets in a causal language model, other heads need `labels`.
        tolerance: `None` minimises the NLL. A number: then all scales are raised together as far as the NLL stays
            within this share above the base model's (0.01: 1 %), for as much dispersion as it costs.
        per_layer: whether layers get multipliers of their own.
        num_posterior_samples: S.
        max_sequences, max_length, batch_size, progress: as in `calibrate_prior`.
        epochs: passes over the data in which the layers part; each costs about three evaluations.
        learning_rate: of the multipliers' logarithms, falling linearly to 0.
        seed: of the noise, which is the same in every evaluation.

    Returns:
        What was found. The prior of `prior="centered"` follows the scales, so the fitted model has a KL of 0.

    Raises:
        ValueError: for an empty data set or one without targets, no posterior, no samples, or a negative tolerance.
    """
    start = time.perf_counter()
    model = variational_model(model)
    if check_num_posterior_samples(num_posterior_samples) == 0:
        raise ValueError("fit_scale looks at the predictive distribution: num_posterior_samples must be at least 1.")
    if tolerance is not None and not tolerance >= 0:
        raise ValueError(f"tolerance must be a share of 0 or more, got {tolerance!r}.")
    scales = _Scales(model)
    batches = list(
        batches_of(dataset, tokenizer, model, max_sequences, max_length, batch_size, "reading", progress=False)
    )
    search = _Search(model, scales, batches, num_posterior_samples, seed, progress)
    was_training = model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        base = search.nll(0)
        shared, nll = search.best_shared()
        scales.multiply(shared)
        factors = dict.fromkeys(scales.sites, 1.0)
        if per_layer and len(scales.sites) > 1 and epochs:
            factors, nll = search.parted(epochs, learning_rate, nll)
        raised = 1.0
        if tolerance is not None:
            raised, nll = search.largest(base * (1.0 + tolerance), nll)
            scales.multiply(raised)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train(was_training)
        search.bar.close()
    scales.move_priors()
    return FittedScale(
        base_nll=base,
        nll=nll,
        shared=shared,
        multipliers={site: shared * factor * raised for site, factor in factors.items()},
        evaluations=search.tried,
        num_targets=search.count,
        num_posterior_samples=num_posterior_samples,
        seconds=time.perf_counter() - start,
    )


class _Scales:
    """The scales of a model's posteriors, which can be multiplied."""

    def __init__(self, model: PreTrainedModel):
        self.parts: dict[Site, list] = {}
        for layer, eve in eve_modules(model).items():
            self.parts[layer, "ffn"] = [one for one in eve.modules() if isinstance(one, EVE)]
        for module in model.modules():
            if isinstance(module, AttentionPosterior):
                self.parts[module.layer_idx, "attention"] = [module]
        if not self.parts:
            raise ValueError(f"{type(model).__name__} has no posterior whose scale could be fitted.")
        self.sites = sorted(self.parts)
        self.posteriors = [part for parts in self.parts.values() for part in parts]
        self.parameters = [_raw(part) for part in self.posteriors]
        self.start = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def multiply(self, factor: float | dict[Site, float]) -> None:
        """Multiplies all scales, or each site's."""
        for site, parts in self.parts.items():
            log_factor = math.log(factor[site] if isinstance(factor, dict) else factor)
            for part in parts:
                if isinstance(part, EVE):
                    part.log_scale.add_(log_factor)
                else:
                    part.raw.copy_(_raw_of(_softplus_log(part.raw) + _exponent(part) * log_factor))

    def gradient(self) -> dict[Site, float]:
        """Of a loss in the logarithm of each site's multiplier, from the gradients of the parameters."""
        answer = {}
        for site, parts in self.parts.items():
            total = 0.0
            for part in parts:
                if isinstance(part, EVE):
                    total += part.log_scale.grad.sum().item()
                else:
                    # raw = softplus^-1(exp(u)), so d raw / d u = softplus(raw) / sigmoid(raw).
                    slope = _softplus_log(part.raw).exp() / torch.sigmoid(part.raw)
                    total += (_exponent(part) * slope * part.raw.grad).sum().item()
            answer[site] = total
        return answer

    @torch.no_grad()
    def restore(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def snapshot(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def move_priors(self) -> None:
        """Has centered priors ask for the dispersion that was fitted."""
        for part, start in zip(self.posteriors, self.start, strict=True):
            if isinstance(part, EVE) and part.config.prior == "centered":
                moved = (part.log_scale - start).mean()  # the same for every unit
                part.prior_log_scale.add_(moved.to(part.prior_log_scale))


def _raw(part) -> Tensor:
    return part.log_scale if isinstance(part, EVE) else part.raw


def _exponent(part: AttentionPosterior) -> int:
    """The power of a multiplier of the dispersion that multiplies sigma, or the concentration a."""
    return 1 if part.config.kind == "gaussian" else -2


def _softplus_log(raw: Tensor) -> Tensor:
    return torch.where(raw < -20.0, raw, F.softplus(raw.clamp(min=-20.0)).log())


def _raw_of(log_softplus: Tensor) -> Tensor:
    """The inverse of `_softplus_log`: log(exp(exp(u)) - 1), without overflow at either end."""
    value = log_softplus.exp()
    return torch.where(log_softplus < -16.0, log_softplus, value + (-torch.expm1(-value)).log())


class _Search:
    """Evaluations of the predictive NLL on the same targets with the same noise."""

    def __init__(self, model, scales: _Scales, batches: list[dict], num_samples: int, seed: int, progress: bool):
        self.model, self.scales, self.num_samples, self.seed = model, scales, num_samples, seed
        device = next(model.parameters()).device
        self.batches = []
        for batch in batches:
            batch = {name: value.to(device) for name, value in batch.items()}
            if "labels" not in batch:
                if not model.can_generate() or "input_ids" not in batch:
                    raise ValueError(
                        f"The data set has no labels, and {type(model).__name__} is no causal language model whose "
                        "texts are their own targets: give rows with labels."
                    )
                mask = batch.get("attention_mask")
                labels = batch["input_ids"].clone()
                batch["labels"] = labels if mask is None else labels.masked_fill(mask == 0, IGNORE_INDEX)
            self.batches.append(batch)
        self.count = sum(int((targets_of(model, batch)[0] != IGNORE_INDEX).sum()) for batch in self.batches)
        if not self.count:
            raise ValueError("The data set has no target: every label is -100, or every text has one token.")
        self.tried: list[tuple[float, float]] = []
        self.bar = tqdm(desc="fitting scales", unit="pass", disable=not progress)

    def _nll_of(self, index: int, num_samples: int) -> Tensor:
        """Sum of the NLL of the predictive distribution over a batch."""
        batch = self.batches[index]
        targets, _ = targets_of(self.model, batch)
        inputs = dict(batch)
        if not self.model.config.is_encoder_decoder:  # whose decoder reads them
            inputs.pop("labels")
        # The same noise for every multiplier: their differences are not those of the draws.
        torch.manual_seed(self.seed + 1000 * index)
        logits = self.model(**inputs, num_posterior_samples=num_samples).logits
        flat = targets.reshape(-1).to(logits.device)
        logits = logits.reshape(len(flat), -1).float()
        # Of samples it is log p̄ already.
        loss = F.nll_loss if num_samples else F.cross_entropy
        return loss(logits, flat, ignore_index=IGNORE_INDEX, reduction="sum")

    @torch.no_grad()
    def nll(self, num_samples: int) -> float:
        """NLL per target with the scales as they are; 0 samples: of the mean pass."""
        with torch.random.fork_rng():
            total = sum(self._nll_of(index, num_samples).item() for index in range(len(self.batches)))
        self.bar.update()
        return total / self.count

    def _at(self, factor: float) -> float:
        before = self.scales.snapshot()
        self.scales.multiply(factor)
        value = self.nll(self.num_samples)
        self.scales.restore(before)
        self.tried.append((factor, value))
        self.bar.set_postfix(multiplier=f"{factor:.3g}", nll=f"{value:.4f}")
        return value

    def best_shared(self, refinements: int = 2) -> tuple[float, float]:
        """The multiplier of all scales whose NLL is lowest, and that NLL: a grid, moved over its edge as far as the
        best is there, and then the vertex of the parabola through the best three, which the NLL is near its minimum.
        """
        known = {math.log(factor): self._at(factor) for factor in _GRID}
        while True:
            points = sorted(known)
            best = min(points, key=known.get)
            step = math.log(2.0) if best == points[-1] else -math.log(2.0) if best == points[0] else 0.0
            if not step or abs(best + step) > math.log(_FURTHEST):
                break
            known[best + step] = self._at(math.exp(best + step))
            if abs(known[best + step] - known[best]) < _FLAT * known[best]:
                break  # as where ever less noise is ever so little better
        for _ in range(refinements):
            points = sorted(known)
            place = points.index(min(points, key=known.get))
            if place in (0, len(points) - 1):
                break
            vertex = _vertex(*((point, known[point]) for point in points[place - 1 : place + 2]))
            if min(abs(vertex - point) for point in points) < _RESOLUTION:
                break
            known[vertex] = self._at(math.exp(vertex))
        best = min(known, key=known.get)
        return math.exp(best), known[best]

    def parted(self, epochs: int, learning_rate: float, nll: float) -> tuple[dict[Site, float], float]:
        """A multiplier for each site by Adam on its logarithm, if that made the NLL lower; and the NLL."""
        before = self.scales.snapshot()
        logs = torch.zeros(len(self.scales.sites), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([logs], lr=learning_rate)
        steps, step = epochs * len(self.batches), 0
        for parameter in self.scales.parameters:
            parameter.requires_grad_(True)
        with torch.random.fork_rng():
            for _ in range(epochs):
                for index in range(len(self.batches)):
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate * (1.0 - step / steps)
                    with torch.enable_grad():
                        (self._nll_of(index, self.num_samples) / self.count).backward()
                    gradient = self.scales.gradient()
                    logs.grad = torch.tensor([gradient[site] for site in self.scales.sites], dtype=torch.float64)
                    old = logs.detach().clone()
                    optimizer.step()
                    change = (logs.detach() - old).exp().tolist()
                    self.scales.multiply(dict(zip(self.scales.sites, change, strict=True)))
                    for parameter in self.scales.parameters:
                        parameter.grad = None
                    step += 1
        for parameter in self.scales.parameters:
            parameter.requires_grad_(False)
        found = self.nll(self.num_samples)
        if found < nll:
            return dict(zip(self.scales.sites, logs.detach().exp().tolist(), strict=True)), found
        self.scales.restore(before)
        return dict.fromkeys(self.scales.sites, 1.0), nll

    def largest(self, limit: float, nll: float, steps: int = 5) -> tuple[float, float]:
        """The largest multiplier of all scales whose NLL stays below a limit, and that NLL."""
        known = {1.0: nll}

        def fits(factor: float) -> bool:
            known[factor] = self._at(factor)
            return known[factor] <= limit

        low, high = (1.0, 2.0) if nll <= limit else (0.5, 1.0)
        if nll <= limit:
            while high < _FURTHEST and fits(high):
                low, high = high, 2 * high
        else:  # the best itself is above
            while low > 1 / _FURTHEST and not fits(low):
                low, high = low / 2, low
        for _ in range(steps):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low, known.get(low, nll)


def _vertex(*points: tuple[float, float]) -> float:
    """Where the parabola through three points, the middle one the lowest, has its minimum."""
    (a, fa), (b, fb), (c, fc) = points
    numerator = (b - a) ** 2 * (fb - fc) - (b - c) ** 2 * (fb - fa)
    denominator = (b - a) * (fb - fc) - (b - c) * (fb - fa)
    return b - 0.5 * numerator / denominator if denominator else b
