"""Generation of encoder-decoders, whose encoder may sample too."""

from torch import Tensor

from ..modeling.sample_axis import SampleAxis
from .passes import active_axes


class EncoderSamplesMixin:
    """Has `generate` run a variational encoder with posterior samples: its states have batch * S rows."""

    def _prepare_text_encoder_decoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs, *args, **kwargs
    ):
        with self._encoder_samples(inputs_tensor, model_kwargs):
            return super()._prepare_text_encoder_decoder_kwargs_for_generation(
                inputs_tensor, model_kwargs, *args, **kwargs
            )

    # Its name before transformers 5.20.
    def _prepare_encoder_decoder_kwargs_for_generation(self, inputs_tensor, model_kwargs, *args, **kwargs):
        with self._encoder_samples(inputs_tensor, model_kwargs):
            return super()._prepare_encoder_decoder_kwargs_for_generation(inputs_tensor, model_kwargs, *args, **kwargs)

    def _encoder_samples(self, inputs_tensor: Tensor, model_kwargs: dict):
        samples = model_kwargs.get("num_posterior_samples") or 0
        axis = SampleAxis(samples, inputs_tensor.shape[0], None)
        return active_axes((axis, axis) if samples and self.posterior_sites else None)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        samples = model_kwargs.get("num_posterior_samples") or 0
        encoded = model_kwargs.get("encoder_outputs")
        states = None if encoded is None else encoded["last_hidden_state"]
        is_sampled = samples > 1 and input_ids is not None and states is not None
        is_sampled = is_sampled and states.shape[0] == samples * input_ids.shape[0]
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if is_sampled and expand_size > 1:
            # Copies of a sequence are neighbours, and so are the samples of each.
            copies = states.unflatten(0, (-1, samples)).repeat_interleave(expand_size, dim=0).flatten(0, 1)
            model_kwargs["encoder_outputs"]["last_hidden_state"] = copies
        return input_ids, model_kwargs
