"""What variational models share: how their heads ask for samples, run the decoder, and charge for the posteriors."""

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .objective import ScoredTokens, posterior_penalties
from .outputs import VariationalModelOutput
from .posterior import PosteriorRecord, check_complete


def check_samples_for(num_samples: int, **asked: bool) -> None:
    """Raises `ValueError` if an output that only samples have is asked of a mean pass."""
    for name, is_asked in asked.items():
        if is_asked and num_samples == 0:
            raise ValueError(
                f"{name}=True needs posterior samples, but num_posterior_samples is 0 (the mean pass, the default in "
                f"eval mode): pass num_posterior_samples=8, or leave {name} out."
            )


class NonReentrantMixin:
    """Keeps gradient checkpointing from losing the KL. Of a model that has `variational_layers`."""

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        # Under reentrant checkpointing, which is torch's default, the KL would lose its gradient without a word.
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and self.variational_layers:
            if options.get("use_reentrant"):
                raise ValueError(
                    "gradient_checkpointing_kwargs={'use_reentrant': True} gives the KL a gradient of zero without a "
                    "word: use {'use_reentrant': False}."
                )
            gradient_checkpointing_func = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)


class VariationalHeadMixin:
    """Of a `VariationalGPTPreTrainedModel` with a `VariationalGPTModel` in `model`."""

    def _resolve_num_samples(self, num_posterior_samples: int | None, **asked: bool) -> int:
        """The number of samples of this pass; `asked`: the outputs that need one, by the names of their arguments."""
        num_samples = self.model.resolve_num_samples(num_posterior_samples)
        check_samples_for(num_samples, **asked)
        return num_samples

    def _run_decoder(
        self, num_samples: int, scored: ScoredTokens | None, output_posteriors: bool | None, **inputs
    ) -> tuple[VariationalModelOutput, dict]:
        """Runs the decoder.

        Args:
            num_samples: S; 0 is the mean pass.
            scored: the targets, if there is a loss, for which the tape is then recorded.
            output_posteriors: as in `forward`; `None`: the config's.
            inputs: of `VariationalGPTModel`; what belongs to the loss alone is left out.

        Returns:
            the decoder's output, with a complete tape if it was recorded, and the fields of the head's output that
            are known by now.
        """
        if output_posteriors is None:
            output_posteriors = getattr(self.config, "output_posteriors", False)
        is_recorded = bool(output_posteriors or scored is not None)
        outputs = self.model(
            num_posterior_samples=num_samples,
            output_posteriors=is_recorded,
            output_statistics=bool(output_posteriors),
            token_weights=None if scored is None else scored.weights,
            **{name: value for name, value in inputs.items() if name not in ("shift_labels", "num_items_in_batch")},
        )
        if is_recorded:
            check_complete(outputs.posteriors, self.posterior_sites)
        fields = {
            "past_key_values": outputs.past_key_values,
            "hidden_states": outputs.hidden_states,
            "attentions": outputs.attentions,
        }
        if output_posteriors:
            batch = outputs.last_hidden_state.shape[0] // max(num_samples, 1)
            for name, site in (("posteriors", "ffn"), ("attention_posteriors", "attention")):
                fields[name] = {
                    record.layer: record.statistics.over_samples(batch)
                    for record in outputs.posteriors
                    if record.site == site
                }
        return outputs, fields

    def _loss(
        self,
        nll: Tensor,
        records: tuple[PosteriorRecord, ...],
        scored: ScoredTokens,
        kl_weight: Tensor | float | None,
        free_bits: float,
    ) -> dict:
        """The fields of the loss: the NLL per target, 0-dim, plus what the posteriors cost."""
        if not self.variational_layers:
            return {"loss": nll, "kl": torch.zeros_like(nll)}
        penalties = posterior_penalties(records, scored, free_bits)
        weight = self.config.kl_weight if kl_weight is None else kl_weight
        return {
            "loss": penalties.added_to(nll, weight, self.config.eve),
            "kl": penalties.kl,
            "kl_per_layer": penalties.kl_per_layer,
            "reconstruction": penalties.reconstruction,
        }
