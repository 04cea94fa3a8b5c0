"""Generation with per-token uncertainty: the stock `generate`, and a recorder that listens to its steps."""

from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import (
    GenerateBeamDecoderOnlyOutput,
    GenerateBeamEncoderDecoderOutput,
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
    GenerationMixin,
    GenerationMode,
    StoppingCriteria,
    StoppingCriteriaList,
)

from .configuration_variational_gpt import check_num_posterior_samples
from .outputs import (
    VariationalGenerateBeamEncoderDecoderOutput,
    VariationalGenerateBeamOutput,
    VariationalGenerateEncoderDecoderOutput,
    VariationalGenerateOutput,
)
from .predictive import PredictiveMeasures, token_variance


@dataclass
class UncertaintyRecorder:
    """Keeps the measures of each decoding step of one call of `generate`.

    Beams are followed by the rows that their tokens came from, so what is kept is right for the beams that win.

    Attributes:
        steps: measures of each step, each [rows].
        pending: log p_s of the last step, [rows, S, vocab], until its token is chosen.
        variances: variance of the chosen token's probability, a step each, [rows].
        candidates: with beams, (rows they continue, tokens, variances) of each step's candidates, each [batch, k].
        paths: with beams, the rows that the candidates of this step came from, [batch * k, steps].
        alive: whether a row goes on after each step, each [rows].
        prompt_length: tokens of the prompt.
        active: whether this call records at all.
        returned: whether it returns what it recorded.
    """

    active: bool = False
    returned: bool = False
    prompt_length: int = 0
    steps: list[PredictiveMeasures] = field(default_factory=list)
    pending: Tensor | None = None
    variances: list[Tensor] = field(default_factory=list)
    candidates: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    paths: Tensor | None = None
    alive: list[Tensor] = field(default_factory=list)

    def step(self, outputs) -> None:
        """Takes the measures of a forward pass whose last position is about to choose a token."""
        # Copies: under CUDA graphs the next step overwrites what this one returned.
        self.steps.append(outputs.uncertainty.map(lambda measure: measure[:, -1].clone()))
        self.pending = outputs.sample_logits[:, :, -1]

    def chosen(self, input_ids: Tensor) -> None:
        """Takes the sequences [rows, length] that end in the tokens the rows chose."""
        if not self.variances:
            self.prompt_length = input_ids.shape[1] - 1
        tokens = input_ids[:, -1].to(self.pending.device)
        log_p = self.pending.gather(-1, tokens[:, None, None].expand(-1, self.pending.shape[1], 1))
        self.variances.append(token_variance(log_p.squeeze(-1)))
        self.pending = None

    def considered(self, rows: Tensor, tokens: Tensor, paths: Tensor) -> None:
        """Takes the candidates of a beam search step: the row each continues and its token, [batch, k]; and the rows
        that all their tokens came from, [batch, k, steps]."""
        log_p = self.pending[rows.to(self.pending.device), :, tokens.to(self.pending.device)]
        self.candidates.append((rows, tokens, token_variance(log_p.flatten(0, 1)).unflatten(0, rows.shape)))
        self.paths = paths.flatten(0, 1)
        self.pending = None

    def ended(self, done: Tensor) -> None:
        """Takes which rows have ended with this step's token."""
        self.alive.append(~done & (self.alive[-1] if self.alive else torch.ones_like(done)))

    def recent(self, name: str, count: int) -> Tensor:
        """The last `count` values of a measure for each row that a stopping criterion sees, [rows, <= count]."""
        if self.paths is None:
            return torch.stack([step[name] for step in self.steps[-count:]], dim=1)
        first = max(0, len(self.steps) - count)
        return torch.stack([self.steps[t][name][self.paths[:, t]] for t in range(first, len(self.steps))], dim=1)

    def measures(self, sequences: Tensor, beam_indices: Tensor | None = None) -> PredictiveMeasures:
        """The measures of the new tokens of `sequences`, each [rows, new tokens]; 0 after a row's end."""
        length = sequences.shape[1] - self.prompt_length
        if beam_indices is None:
            columns = {name: torch.stack([step[name] for step in self.steps[:length]], 1) for name in self.steps[0]}
            columns["token_variance"] = torch.stack(self.variances[:length], dim=1)
            # A row is alive at a step if the step before did not end it.
            first = torch.ones_like(self.alive[0])
            alive = torch.stack([first, *self.alive[: length - 1]], dim=1)
        else:
            rows = beam_indices[:, :length]
            alive = rows >= 0
            rows = rows.clamp(min=0)
            columns = {
                name: torch.stack([self.steps[t][name][rows[:, t]] for t in range(length)], dim=1)
                for name in self.steps[0]
            }
            new_tokens = sequences[:, self.prompt_length :]
            columns["token_variance"] = torch.stack(
                [self._candidate_variance(t, rows[:, t], new_tokens[:, t]) for t in range(length)], dim=1
            )
        return PredictiveMeasures(
            **{name: torch.where(alive.to(value.device), value, 0.0) for name, value in columns.items()}
        )

    def _candidate_variance(self, step: int, rows: Tensor, tokens: Tensor) -> Tensor:
        parents, candidates, variances = (part.flatten() for part in self.candidates[step])
        match = (rows[:, None] == parents) & (tokens[:, None] == candidates)
        return torch.where(match, variances.to(match.device), 0.0).amax(-1)


_OUTPUTS = {
    GenerateDecoderOnlyOutput: VariationalGenerateOutput,
    GenerateBeamDecoderOnlyOutput: VariationalGenerateBeamOutput,
    GenerateEncoderDecoderOutput: VariationalGenerateEncoderDecoderOutput,
    GenerateBeamEncoderDecoderOutput: VariationalGenerateBeamEncoderDecoderOutput,
}
_recorder: ContextVar[UncertaintyRecorder | None] = ContextVar("uncertainty_recorder", default=None)


class _RecordedCriteria(StoppingCriteriaList):
    """The stopping criteria of a call, whose answers the recorder hears."""

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        recorder = _recorder.get()
        if recorder.pending is not None:
            recorder.chosen(input_ids)
        done = super().__call__(input_ids, scores, **kwargs)
        recorder.ended(done)
        return done


class UncertaintyStoppingCriteria(StoppingCriteria):
    """Ends a row when the model no longer knows: its mutual information stays above a threshold.

    Args:
        max_mutual_information: nats; a token above it counts as not known.
        patience: how many such tokens in a row end the row.

    Raises:
        ValueError: for a negative threshold or a patience below 1; and in `generate` without posterior samples.

    Example:

    ```python
    >>> criterion = UncertaintyStoppingCriteria(max_mutual_information=0.2, patience=3)
    >>> model.generate(**inputs, num_posterior_samples=8, stopping_criteria=[criterion], max_new_tokens=64)
    ```
    """

    def __init__(self, max_mutual_information: float, patience: int = 1):
        if not max_mutual_information >= 0:
            raise ValueError(f"max_mutual_information must be 0 or more nats, got {max_mutual_information!r}.")
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 1:
            raise ValueError(f"patience must be a whole number of at least 1, got {patience!r}.")
        self.max_mutual_information = max_mutual_information
        self.patience = patience

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        recorder = _recorder.get()
        if recorder is None or not recorder.steps:
            raise ValueError(
                "UncertaintyStoppingCriteria needs generate of a variational model with num_posterior_samples >= 1."
            )
        recent = recorder.recent("mutual_information", self.patience)
        unknown = (recent > self.max_mutual_information).all(dim=1)
        return unknown.to(input_ids.device) & (recent.shape[1] == self.patience)


class VariationalGenerationMixin(GenerationMixin):
    """`generate` with `num_posterior_samples` and `output_uncertainty`."""

    def generate(self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, **kwargs):
        """`GenerationMixin.generate`, with two more arguments.

        Args:
            num_posterior_samples: S posterior samples, over which tokens are chosen from the predictive distribution;
                0 is the mean pass. `None`: what the checkpoint's generation config says, else 0.
            output_uncertainty: with `return_dict_in_generate=True`, adds `uncertainty`, a [`PredictiveMeasures`] whose
                fields are [rows, new tokens]; 0 after a row has ended.

        Raises:
            ValueError: for uncertainty without samples, without `return_dict_in_generate=True`, or in assisted
                generation.
        """
        criteria = kwargs.get("stopping_criteria") or ()
        recorder = UncertaintyRecorder(active=any(isinstance(item, UncertaintyStoppingCriteria) for item in criteria))
        token = _recorder.set(recorder)
        try:
            result = super().generate(inputs, generation_config=generation_config, **kwargs)
        finally:
            _recorder.reset(token)
        if not recorder.returned:
            return result
        # Only beams have indices.
        measures = recorder.measures(result.sequences, getattr(result, "beam_indices", None))
        return _OUTPUTS[type(result)](**result, uncertainty=measures)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in transformers; `num_posterior_samples` of the generation config is kept."""
        if hasattr(self.generation_config, "num_posterior_samples"):
            # A generation config marked as derived from the model's loses its custom entries when it is loaded.
            self.generation_config._from_model_config = False
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _prepare_generation_config(self, generation_config, **kwargs):
        samples = kwargs.pop("num_posterior_samples", None)
        uncertainty = kwargs.pop("output_uncertainty", None)
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        if samples is None:
            samples = getattr(generation_config, "num_posterior_samples", None) or 0
        if uncertainty is None:
            uncertainty = bool(getattr(generation_config, "output_uncertainty", False))
        model_kwargs["num_posterior_samples"] = check_num_posterior_samples(samples)
        if samples and generation_config.cache_implementation == "paged":
            raise ValueError(
                "cache_implementation='paged' (continuous batching) runs the mean pass only: use another cache, or "
                "num_posterior_samples=0."
            )
        recorder = _recorder.get()
        if recorder is not None and (uncertainty or recorder.active):
            recorder.active, recorder.returned = True, uncertainty
            _check_recordable(generation_config, samples, uncertainty)
            model_kwargs.update(output_uncertainty=True, output_sample_logits=True)
        return generation_config, model_kwargs

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        recorder = _recorder.get()
        modes = (
            GenerationMode.GREEDY_SEARCH,
            GenerationMode.SAMPLE,
            GenerationMode.BEAM_SEARCH,
            GenerationMode.BEAM_SAMPLE,
        )
        if recorder is not None and recorder.active and generation_mode not in modes:
            raise ValueError(
                f"Per-token uncertainty is recorded in greedy search, sampling and beam search, not in "
                f"{generation_mode.value}: leave out output_uncertainty, or the assistant model or mode."
            )
        return super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _get_candidate_generator(self, *args, model_kwargs, **kwargs):
        # The assistant samples as its own generation config says.
        model_kwargs = {name: value for name, value in model_kwargs.items() if name != "num_posterior_samples"}
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)

    def _prepare_cache_for_generation(self, *args, **kwargs):
        # transformers 5.10 keeps a static cache on the model, whose rows are those of the last call's samples.
        self.__dict__.pop("_cache", None)
        return super()._prepare_cache_for_generation(*args, **kwargs)

    def _get_stopping_criteria(self, *args, **kwargs):
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        recorder = _recorder.get()
        return _RecordedCriteria(criteria) if recorder is not None and recorder.active else criteria

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        recorder = _recorder.get()
        if recorder is not None and recorder.active:
            recorder.step(outputs)
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _get_top_k_continuations(self, *args, **kwargs):
        answer = super()._get_top_k_continuations(*args, **kwargs)
        recorder = _recorder.get()
        if recorder is not None and recorder.active:
            _, sequences, beam_indices = answer
            length, recorder.prompt_length = kwargs["cur_len"], kwargs["decoder_prompt_len"]
            paths = beam_indices[:, :, : length - recorder.prompt_length + 1]
            recorder.considered(paths[:, :, -1], sequences[:, :, length], paths)
        return answer


def _check_recordable(generation_config: GenerationConfig, samples: int, returned: bool) -> None:
    if samples == 0:
        raise ValueError(
            "Per-token uncertainty needs posterior samples, but num_posterior_samples is 0 (the mean pass): pass "
            "num_posterior_samples=8, or set it in the checkpoint's generation config."
        )
    if returned and not generation_config.return_dict_in_generate:
        raise ValueError("output_uncertainty=True needs return_dict_in_generate=True: it returns more than token ids.")


__all__ = ["UncertaintyStoppingCriteria", "VariationalGenerationMixin"]
