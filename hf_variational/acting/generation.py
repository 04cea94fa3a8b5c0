"""Generation that is stopped where it wants more samples or abstains, and goes on with more samples from there.

Every number of samples of the schedule is one call of the model's own `generate`, for the rows that asked for it. A
stopping criterion looks at each step before its token counts. Rows only ever go on with more samples, so there are at
most as many calls as looks.
"""

import copy
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, StoppingCriteria

from ..evaluation.predictions import internal_statistics
from ..modeling.outputs import VariationalGenerateOutput
from ..modeling.predictive import PredictiveMeasures, measures_of_log_probabilities
from .corrections import corrected_measures
from .noise import numbered_noise
from .policy import Action

# Settings that count from where a call starts, answer with several rows for one, or run other passes in between.
_REFUSED = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "exponential_decay_length_penalty": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "guidance_scale": 1,
    "max_time": None,
    "stop_strings": None,
    "prompt_lookup_num_tokens": None,
    "penalty_alpha": None,
}
_REFUSED_INPUTS = ("num_posterior_samples", "streamer", "assistant_model", "past_key_values", "inputs_embeds")
_DEFAULT_NEW_TOKENS = 20


@dataclass
class ControlledGenerateOutput(VariationalGenerateOutput):
    """`VariationalGenerateOutput` with what was decided. A step that abstained is the last one of its row and holds
    padding; with `unit="sequence"` all steps of such a row do.

    Attributes:
        sequences: [rows, prompt + steps].
        uncertainty: [`PredictiveMeasures`] of the samples that a step had, as `generate` gives them, each
            [rows, steps].
        actions: [`Action`] about each step, `NONE` after a row's end, [rows, steps], int8.
        samples: posterior samples behind each step, 0 after a row's end, [rows, steps].
        scores: internal score, log-odds, [rows, steps]; errors: Monte Carlo error of the controller's measure, nats,
            likewise. 0 after a row's end.
        abstained: [rows], bool.
        abstained_at: the step that abstained (of a sequence the first one), -1 where none did, [rows].
        sample_tokens: tokens times posterior samples that were computed for each row, prompts and recomputed prefixes
            included, [rows]. S samples from the start take S · (prompt + steps − 1).
        recomputed_tokens: of them those of prefixes that an earlier call had computed, [rows].
    """

    actions: Tensor | None = None
    samples: Tensor | None = None
    scores: Tensor | None = None
    errors: Tensor | None = None
    abstained: Tensor | None = None
    abstained_at: Tensor | None = None
    sample_tokens: Tensor | None = None
    recomputed_tokens: Tensor | None = None


@dataclass
class _Row:
    """One row: its prompt, its steps (token, action, samples, score, error, measures), and what it cost."""

    prompt: Tensor
    steps: list[tuple] = field(default_factory=list)
    abstained_at: int = -1
    sample_tokens: int = 0
    recomputed_tokens: int = 0

    @property
    def tokens(self) -> Tensor:
        chosen = [step[0] for step in self.steps]
        return torch.cat([self.prompt, torch.tensor(chosen, dtype=self.prompt.dtype, device=self.prompt.device)])


def controlled_generate(controller, model, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs):
    """See [`UncertaintyController.generate`]."""
    settings = _Settings.of(model, kwargs)
    config, criteria = settings.config, settings.criteria
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids are [rows, length], got {tuple(input_ids.shape)}.")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape == input_ids.shape and bool((mask[:, -1] == 0).any()):
        raise ValueError("A prompt ends in padding: pad on the left (tokenizer(..., padding_side='left')).")
    limit = config.max_new_tokens
    if limit is None:
        limit = _DEFAULT_NEW_TOKENS if config.max_length is None else config.max_length - input_ids.shape[1]
    if limit < 1:
        raise ValueError(f"There is no room for a new token: max_length={config.max_length} with this prompt.")
    rows = [_Row(ids[attended.bool()]) for ids, attended in zip(input_ids, mask, strict=True)]
    pending = list(range(len(rows)))
    schedule = controller.sampling.schedule
    for look, size in enumerate(schedule):
        if not pending:
            break
        last = look == len(schedule) - 1
        here = [rows[index] for index in pending]
        room = limit - torch.tensor([len(row.steps) for row in here])
        watch = _Watch(controller, size, last, room, config, criteria)
        ids, attended = _left_padded([row.tokens for row in here], input_ids)
        with numbered_noise(torch.tensor(pending), torch.arange(size)), _watching(model, watch):
            model.generate(
                ids,
                attention_mask=attended,
                num_posterior_samples=size,
                output_sample_logits=True,
                output_posteriors=True,
                stopping_criteria=[watch, *criteria],
                **settings.of_call(int(room.max())),
            )
        asking = watch.hand_out(here, again=look > 0)
        pending = [index for index, asks in zip(pending, asking, strict=True) if asks]
    return _output(rows, input_ids, _pad_token(config), controller.unit)


class _Watch(StoppingCriteria):
    """Looks at every step of one call of `generate`, and ends rows that ask for more samples or abstain.

    Args:
        room: new tokens that each row may still have, [rows].
    """

    def __init__(self, controller, size: int, last: bool, room: Tensor, config: GenerationConfig, criteria: list):
        self.controller, self.size, self.last, self.room = controller, size, last, room
        self.criteria = criteria
        ends = config.eos_token_id
        self.ends = torch.as_tensor([] if ends is None else ends, dtype=torch.long).reshape(-1)
        self.log_p: Tensor | None = None
        self.internal: dict[str, Tensor] = {}
        self.lengths = torch.zeros_like(room)  # steps that each row computed
        self.alive = torch.ones_like(room, dtype=torch.bool)
        self.columns: list[tuple[Tensor, ...]] = []
        self.measures: list[PredictiveMeasures] = []

    def see(self, module: nn.Module, args, kwargs, outputs) -> None:
        """The forward hook: keeps what the last position says."""
        self.log_p = outputs.sample_logits[:, :, -1].float()
        self.internal = {name: values[:, -1] for name, values in internal_statistics(outputs).items()}

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        tokens = input_ids[:, -1]
        measures, _ = measures_of_log_probabilities(self.log_p.unsqueeze(2), tokens[:, None].to(self.log_p.device))
        corrected = vars(corrected_measures(self.log_p))
        score = self.controller.score({**corrected, **self.internal})
        error = corrected[f"{self.controller.sampling.measure}_error"].cpu().double()
        if self.controller.unit == "step":
            actions = self._act(score, error)
        else:  # about the whole sequence, once it is there
            actions = torch.full(score.shape, Action.ANSWER, dtype=torch.int8)
        self.columns.append((tokens.cpu(), actions, score, error))
        self.measures.append(measures.map(lambda measure: measure[:, 0].cpu()))
        self.lengths += self.alive
        done = (actions != Action.ANSWER) | torch.isin(tokens.cpu(), self.ends) | (self.lengths >= self.room)
        for criterion in self.criteria:
            done |= criterion(input_ids, scores, **kwargs).cpu()
        self.alive &= ~done
        return ~self.alive.to(input_ids.device)

    def _act(self, score: Tensor, error: Tensor) -> Tensor:
        return self.controller.thresholds.act(score, error, self.controller.sampling.tolerance, self.last)

    def hand_out(self, rows: list[_Row], again: bool) -> list[bool]:
        """Gives each row its steps and their cost; answers which rows ask for more samples."""
        names = list(self.measures[0])
        tokens, actions, scores, errors = (torch.stack(column, 1) for column in zip(*self.columns, strict=True))
        measures = {name: torch.stack([step[name] for step in self.measures], 1) for name in names}
        if self.controller.unit == "sequence":
            actions = actions.clone()
            for index, length in enumerate(self.lengths.tolist()):
                score, error = scores[index, :length].mean(), errors[index, :length].square().mean().sqrt()
                actions[index] = self._act(score[None], error[None])
        asking = []
        for index, row in enumerate(rows):
            length = int(self.lengths[index])
            prefix = len(row.tokens)
            row.sample_tokens += self.size * (prefix + length - 1)
            row.recomputed_tokens += self.size * prefix if again else 0
            decision = int(actions[index, length - 1])
            asks = decision == Action.DRAW_MORE
            if decision == Action.ABSTAIN:
                row.abstained_at = 0 if self.controller.unit == "sequence" else len(row.steps) + length - 1
            kept = length - 1 if asks else length
            if asks and self.controller.unit == "sequence":
                kept = 0  # from the prompt again
            for step in range(kept):
                row.steps.append(
                    (
                        int(tokens[index, step]),
                        int(actions[index, step]),
                        self.size,
                        float(scores[index, step]),
                        float(errors[index, step]),
                        tuple(float(measures[name][index, step]) for name in names),
                    )
                )
            asking.append(asks)
        return asking


@contextmanager
def _watching(model, watch: _Watch):
    """The model that `generate` calls, which an adapter's model has inside."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle = inner.register_forward_hook(watch.see, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@dataclass
class _Settings:
    """What a caller wants of `generate`.

    Attributes:
        config: what results from the caller's settings and the model's own, to be read.
        given: the caller's generation config, if there is one.
        options: the other arguments, as given.
        criteria: stopping criteria.
    """

    config: GenerationConfig
    given: GenerationConfig | None
    options: dict
    criteria: list

    @classmethod
    def of(cls, model, kwargs: dict) -> "_Settings":
        if model.config.is_encoder_decoder:
            raise ValueError(
                f"{type(model).__name__} has an encoder: controlled generation is of decoder-only models."
            )
        for name in _REFUSED_INPUTS:
            if kwargs.get(name) is not None:
                raise ValueError(f"Controlled generation does without {name}: leave it out.")
        options = dict(kwargs)
        criteria = list(options.pop("stopping_criteria", None) or [])
        given = options.pop("generation_config", None)
        config = GenerationConfig() if given is None else copy.deepcopy(given)
        config.update(**model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
        config.update(**options)
        for name, neutral in _REFUSED.items():
            if (value := getattr(config, name, None)) not in (None, neutral):
                raise ValueError(
                    f"{name}={value!r} is not for controlled generation, which stops and goes on between calls of "
                    "generate: leave it out."
                )
        return cls(config, given, options, criteria)

    def of_call(self, new_tokens: int) -> dict:
        """The arguments of a call of `generate` for at most so many new tokens."""
        # Not `config`: in a config None means the model's value, and as an argument no value.
        own = {"max_new_tokens": new_tokens, "return_dict_in_generate": False, "output_uncertainty": False}
        options = {name: value for name, value in self.options.items() if name != "max_length"}
        if self.given is None:
            return {**options, **own}
        config = copy.deepcopy(self.given)
        config.max_length = None
        config.update(**own, allow_custom_entries=True)
        return {**{name: value for name, value in options.items() if name not in own}, "generation_config": config}


def _pad_token(config: GenerationConfig) -> int:
    if config.pad_token_id is not None:
        return config.pad_token_id
    ends = config.eos_token_id
    return 0 if ends is None else ends[0] if isinstance(ends, list) else int(ends)


def _left_padded(sequences: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    length = max(len(tokens) for tokens in sequences)
    ids, mask = like.new_zeros(len(sequences), length), like.new_zeros(len(sequences), length)
    for index, tokens in enumerate(sequences):
        ids[index, length - len(tokens) :] = tokens
        mask[index, length - len(tokens) :] = 1
    return ids, mask


def _output(rows: list[_Row], input_ids: Tensor, pad: int, unit: str) -> ControlledGenerateOutput:
    device, width = input_ids.device, max(len(row.steps) for row in rows)
    new = input_ids.new_full((len(rows), width), pad)
    filled = {
        name: torch.zeros(len(rows), width, dtype=dtype)
        for name, dtype in (("actions", torch.int8), ("samples", torch.long))
    }
    filled["actions"].fill_(int(Action.NONE))
    scores, errors = torch.zeros(len(rows), width), torch.zeros(len(rows), width)
    measures = torch.zeros(len(_MEASURES), len(rows), width)
    for index, row in enumerate(rows):
        for step, (token, action, size, score, error, values) in enumerate(row.steps):
            if row.abstained_at < 0 or step < row.abstained_at:
                new[index, step] = token
            filled["actions"][index, step], filled["samples"][index, step] = action, size
            scores[index, step], errors[index, step] = score, error
            measures[:, index, step] = torch.tensor(values)
    abstained_at = torch.tensor([row.abstained_at for row in rows], device=device)
    return ControlledGenerateOutput(
        sequences=torch.cat([input_ids, new], dim=1),
        uncertainty=PredictiveMeasures(**dict(zip(_MEASURES, measures.to(device), strict=True))),
        actions=filled["actions"].to(device),
        samples=filled["samples"].to(device),
        scores=scores.to(device),
        errors=errors.to(device),
        abstained=abstained_at >= 0,
        abstained_at=abstained_at,
        sample_tokens=torch.tensor([row.sample_tokens for row in rows], device=device),
        recomputed_tokens=torch.tensor([row.recomputed_tokens for row in rows], device=device),
    )


_MEASURES = tuple(PredictiveMeasures.__dataclass_fields__)
