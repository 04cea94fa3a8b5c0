"""Whether probabilities mean what they say: of the predictions made with confidence p, a share p should be right."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_whole


class ReliabilityCurve(NamedTuple):
    """What a reliability diagram shows (DeGroot and Fienberg 1983), per bin, each [bins].

    Attributes:
        confidence: mean confidence; nan in an empty bin.
        accuracy: share of the predictions that were right; nan in an empty bin.
        count: predictions.
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor

    @property
    def expected_error(self) -> float:
        """Σ_b n_b / n · |accuracy_b − confidence_b|."""
        filled = self.count > 0
        return float((self._gaps * self.count)[filled].sum() / self.count.sum())

    @property
    def maximum_error(self) -> float:
        """max_b |accuracy_b − confidence_b| over the bins that are not empty."""
        return float(self._gaps[self.count > 0].max())

    @property
    def _gaps(self) -> Tensor:
        return (self.confidence - self.accuracy).abs()


def reliability_curve(confidence, correct, num_bins: int = 15, binning: str = "width") -> ReliabilityCurve:
    """Sorts predictions into bins of their confidence.

    Args:
        confidence: probability of each prediction, from 0 to 1, [n].
        correct: whether it was right, 0 or 1, [n].
        num_bins: number of bins.
        binning: `"width"`: equal-width bins, a bin is (low, high]; `"mass"`: bins of equally many predictions, where
            equal confidences share a bin, so the order of the data does not matter.

    Raises:
        ValueError: without predictions, or for values outside their range.
    """
    check_num_bins(num_bins)
    confidence, correct = columns(confidence=confidence, correct=correct)
    for name, values in (("confidence", confidence), ("correct", correct)):
        outside = (values < 0) | (values > 1) if name == "confidence" else (values != 0) & (values != 1)
        outside &= ~values.isnan()
        if outside.any():
            allowed = "a probability from 0 to 1" if name == "confidence" else "0 or 1"
            raise ValueError(f"`{name}` is {allowed} for each prediction, got {float(values[outside][0])}.")
    if binning not in _BINNINGS:
        raise ValueError(f"`binning` is one of {', '.join(map(repr, _BINNINGS))}, got {binning!r}.")
    bins = _BINNINGS[binning](confidence, num_bins)
    return binned(bins, num_bins, confidence, correct)


def expected_calibration_error(confidence, correct, num_bins: int = 15, binning: str = "width") -> float:
    """ECE = Σ_b n_b / n · |accuracy_b − confidence_b| (Naeini et al. 2015; Guo et al. 2017, eq. 3; with `"mass"` the
    adaptive bins of Nixon et al. 2019).

    It is 0 for calibrated predictions only in the limit: with n predictions its expectation is about
    Σ_b √(2 n_b v_b / π) / n, v_b the mean of p(1 − p) in the bin.

    Args:
        confidence, correct, num_bins, binning: as in [`reliability_curve`].
    """
    return reliability_curve(confidence, correct, num_bins, binning).expected_error


def maximum_calibration_error(confidence, correct, num_bins: int = 15, binning: str = "width") -> float:
    """MCE = max_b |accuracy_b − confidence_b| over the bins that are not empty (Naeini et al. 2015; Guo et al. 2017,
    eq. 5).

    Args:
        confidence, correct, num_bins, binning: as in [`reliability_curve`].
    """
    return reliability_curve(confidence, correct, num_bins, binning).maximum_error


def brier(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Σ_v (p_v − 1[v = y])² of each prediction (Brier 1950), from 0 to 2.

    Args:
        probabilities: [n, classes].
        targets: [n].

    Returns:
        [n].
    """
    chosen = probabilities.gather(-1, targets[:, None]).squeeze(-1)
    return (torch.linalg.vecdot(probabilities, probabilities) - 2 * chosen + 1).clamp(min=0)


def rank_calibration_error(uncertainty, loss, num_bins: int = 20) -> float:
    """RCE = E_u |P(reg(U) ≥ reg(u)) − P(U ≤ u)|, reg(u) the mean correctness at uncertainty u (Huang et al. 2024,
    arXiv 2404.03163, section 4): 0 if more uncertainty always goes with a larger mean loss, whatever their scales.

    The binned estimate: both probabilities are over the other bins of equally many predictions, and a prediction has
    the mean uncertainty and the mean loss (their correctness, turned round) of its bin.

    Args:
        uncertainty: higher is less certain, [n].
        loss: higher is worse: 1 for an error and 0 for a correct prediction, or a real-valued loss, [n].
        num_bins: number of bins.

    Raises:
        ValueError: if the uncertainties do not fill two bins.
    """
    check_num_bins(num_bins)
    uncertainty, loss = columns(uncertainty=uncertainty, loss=loss)
    if uncertainty.isnan().any() or loss.isnan().any():
        return float("nan")
    means = binned(mass_bins(uncertainty, num_bins), num_bins, uncertainty, loss)
    filled = means.count > 0
    if (others := int(filled.sum()) - 1) < 1:
        raise ValueError(
            f"A rank needs uncertainties in at least two bins, got {uncertainty.numel()} predictions in one bin of "
            f"{num_bins}."
        )

    def rank(values: Tensor) -> Tensor:
        """P(value of another bin ≤ a bin's own)."""
        return ((values[None, :] <= values[:, None]).sum(-1).double() - 1) / others

    gaps = (rank(means.accuracy[filled]) - rank(means.confidence[filled])).abs()
    return float((gaps * means.count[filled]).sum() / means.count.sum())


class ClasswiseCalibration:
    """
    Classwise calibration error, gathered block by block: for every class k the predictions are binned by their
    probability of k, and (1 / K) Σ_k Σ_b n_kb / n · |share of k_kb − mean probability_kb| (Kull et al. 2019, eq. 3).

    A bin's term is |Σ p_k − Σ 1[y = k]| / n, so one number a class and bin is kept: classes · bins in float64,
    whatever the number of predictions. Most probabilities lie in the first bin and are added up as a whole.

    Args:
        num_bins (`int`, defaults to 15): Equal-width bins; a bin is (low, high].

    Example:

    ```python
    >>> classwise = ClasswiseCalibration()
    >>> scores = token_scores(model, data, classwise=classwise)
    >>> classwise.compute()
    ```
    """

    def __init__(self, num_bins: int = 15):
        check_num_bins(num_bins)
        self.num_bins = num_bins
        self.num_predictions = 0
        self._gaps: Tensor | None = None

    @torch.no_grad()
    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Adds predictions.

        Args:
            probabilities: [n, classes].
            targets: class of each, [n].
        """
        classes = probabilities.shape[-1]
        if self._gaps is None:
            self._gaps = torch.zeros(classes, self.num_bins, dtype=torch.float64)
        if probabilities.dim() != 2 or classes != len(self._gaps) or targets.shape != probabilities.shape[:1]:
            raise ValueError(
                f"Expected probabilities [n, {len(self._gaps)}] and targets [n], got {tuple(probabilities.shape)} and "
                f"{tuple(targets.shape)}."
            )
        targets = targets.to(probabilities.device)
        # Of what adds up to 1, few entries are this large, and all that do not lie in the first bin are among them.
        large = probabilities > 0.5 / self.num_bins
        self._gaps[:, 0] += probabilities.masked_fill(large, 0).sum(0).cpu().double()
        self._add(large.nonzero()[:, 1], probabilities[large], 1.0)
        chosen = probabilities.gather(-1, targets[:, None]).squeeze(-1)
        self._add(targets, chosen, -1.0)
        self.num_predictions += targets.numel()

    def _add(self, classes: Tensor, probabilities: Tensor, sign: float) -> None:
        probabilities = probabilities.cpu().double()
        values = probabilities if sign > 0 else torch.full_like(probabilities, sign)
        self._gaps.index_put_((classes.cpu(), width_bins(probabilities, self.num_bins)), values, accumulate=True)

    def compute(self) -> float:
        """The error of all predictions so far."""
        if not self.num_predictions:
            raise ValueError("There is nothing to evaluate: no prediction was added.")
        return float(self._gaps.abs().sum() / (self.num_predictions * len(self._gaps)))


def check_num_bins(num_bins: int) -> None:
    """Refuses what is not a whole number of at least 1."""
    check_whole("num_bins", num_bins, 1)


def columns(**values) -> list[Tensor]:
    """Tensors, arrays or lists as float64 tensors on the CPU, each [n], of equal lengths.

    Raises:
        ValueError: if they are empty, or their lengths differ.
    """
    tensors = [torch.as_tensor(value).detach().cpu().double().flatten() for value in values.values()]
    sizes = ", ".join(f"{tensor.numel()} of `{name}`" for name, tensor in zip(values, tensors, strict=True))
    if not tensors[0].numel() or any(tensor.numel() != tensors[0].numel() for tensor in tensors):
        raise ValueError(f"Expected as many values of each, and at least one, got {sizes}.")
    return tensors


def width_bins(confidence: Tensor, num_bins: int) -> Tensor:
    """Number of the equal-width bin (low, high] of each confidence; 0 is in the first."""
    return torch.bucketize(confidence, torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)[1:-1])


def mass_bins(values: Tensor, num_bins: int) -> Tensor:
    """Number of the bin of each value, where bins have as equally many values as ties allow: equal values go together,
    by the mean of their ranks.
    """
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    middle = counts.cumsum(0) - counts.double() / 2
    return (num_bins * middle / values.numel()).long()[place]


_BINNINGS = {"width": width_bins, "mass": mass_bins}


def binned(bins: Tensor, num_bins: int, confidence: Tensor, correct: Tensor) -> ReliabilityCurve:
    """Means per bin of two columns."""

    def total(values: Tensor) -> Tensor:
        return torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, values)

    return curve_of_sums(total(confidence), total(correct), total(torch.ones_like(confidence)))


def curve_of_sums(confidence: Tensor, correct: Tensor, count: Tensor) -> ReliabilityCurve:
    """The curve from the sums over each bin."""
    return ReliabilityCurve(confidence / count, correct / count, count.long())
