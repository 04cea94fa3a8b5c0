"""Variational attention: rows of attention weights as random variables (Cinquin et al. 2021, arXiv 2110.04020)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .attention_weights import WeightsPosterior, sample_weights_with_kl
from .configuration_variational_gpt import VariationalAttentionConfig
from .dirichlet import masked_softmax
from .posterior import AttentionStatistics, PosteriorRecord, PosteriorTap
from .sample_axis import SampleAxis


class AttentionPosterior(nn.Module):
    """The posterior over the attention weights of one layer, with the parameters that stand beside its projections.

    Args:
        config: the posterior's configuration.
        num_heads: query heads.
        head_dim: width of a head's query.
        layer_idx: number of the layer, which names its record on the tape and its noise.
        max_keys: the longest row that `data_dependent=True` can read, `max_position_embeddings`.
    """

    def __init__(
        self,
        config: VariationalAttentionConfig,
        num_heads: int,
        head_dim: int,
        layer_idx: int,
        max_keys: int | None = None,
    ):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = num_heads
        self.max_keys = max_keys
        if config.data_dependent is True and max_keys is None:
            raise ValueError(
                "data_dependent=True reads a row of up to max_position_embeddings logits, and this model's config has "
                "no max_position_embeddings: use data_dependent='query', which has no maximum length."
            )
        self.weights_posterior = WeightsPosterior(config.kind, config.prior, math.log(config.prior_value))
        self.raw = nn.Parameter(torch.empty(num_heads))
        if config.data_dependent:
            width = head_dim if config.data_dependent == "query" else max_keys
            self.network_in = nn.Parameter(torch.empty(num_heads, config.hidden_size, width))
            self.network_bias = nn.Parameter(torch.empty(num_heads, config.hidden_size))
            self.network_out = nn.Parameter(torch.empty(num_heads, config.hidden_size))
        self.tap = PosteriorTap()

    def init_weights(self) -> None:
        """Starts with the initial scale or concentration in every head, for every input."""
        if self.config.initial_raw is None:
            init.zeros_(self.raw)
        else:
            init.normal_(self.raw, mean=self.config.initial_raw, std=0.01)
        if self.config.data_dependent:
            init.normal_(self.network_in, mean=0.0, std=1.0 / math.sqrt(self.network_in.shape[-1]))
            init.zeros_(self.network_bias)
            init.zeros_(self.network_out)

    @property
    def _log_unit(self) -> float:
        """log of what the softplus of the raw parameter is multiplied by.

        In the unit of the initial value a step of an optimiser changes a concentration of 100 by the same share as a
        scale of 0.1; the paper's start is in units of 1.
        """
        if self.config.initial_raw is not None:
            return 0.0
        return math.log(self.config.initial_value / math.log(2.0))

    def log_value(self, query: Tensor, rows: Tensor | None) -> Tensor:
        """log of the scale sigma or the concentration a, [batch or 1, heads, queries or 1, 1], float32 or wider.

        Args:
            query: [batch, heads, queries, head_dim].
            rows: the rows of logits that `data_dependent=True` reads, [batch, heads, queries, keys].
        """
        dtype = torch.promote_types(query.dtype, torch.float32)
        raw = self.raw.to(dtype).view(1, -1, 1)
        if self.config.data_dependent:
            features = query.to(dtype) if rows is None else rows
            weight = self.network_in.to(dtype)[..., : features.shape[-1]]
            # The answer is a logarithm and must not be rounded to bf16.
            with torch.autocast(query.device.type, enabled=False):
                hidden = F.relu(torch.matmul(features, weight.mT) + self.network_bias.to(dtype).unsqueeze(1))
                raw = raw + torch.matmul(hidden, self.network_out.to(dtype).unsqueeze(-1)).squeeze(-1)
        # softplus(x) is exp(x) for very negative x, and would underflow there.
        log_softplus = torch.where(raw < -20.0, raw, F.softplus(raw.clamp(min=-20.0)).log())
        return (log_softplus + self._log_unit).unsqueeze(-1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        axis: SampleAxis,
        *,
        scaling: float,
        dropout: float = 0.0,
        is_causal: bool = True,
        softcap: float | None = None,
        position_bias: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Attention with sampled weights; in the mean pass only what is recorded of the posterior.

        Args:
            query: [rows, heads, queries, head_dim]; key, value: [rows, key heads, keys, head_dim].
            attention_mask: as SDPA takes it: bool, additive, or `None`.
            axis: with S samples the answer has batch * S rows: where the query still has one row a sequence, the rows
                split here, and keys and values are shared.
            scaling, softcap, position_bias: of the logits.
            dropout: rate on the weights.
            is_causal: what a mask of `None` means.

        Returns:
            output [batch * S, queries, heads, head_dim] and weights [batch * S, heads, queries, keys] before dropout;
            `None` twice with S = 0.
        """
        logits, visible = masked_logits(query, key, attention_mask, scaling, is_causal, softcap, position_bias)
        rows = None
        if self.config.data_dependent is True:
            rows = self._rows(logits, visible, axis, is_causal)
        log_value = self.log_value(query, rows)
        samples = axis.rows // query.shape[0] if axis.num_samples else 0
        noise = axis.attention_noise(self.layer_idx, (*logits.shape[1:], self.weights_posterior.draws), query.device)
        weights, kl = sample_weights_with_kl(
            self.weights_posterior, logits, log_value, visible, noise, samples, with_kl=axis.record
        )
        if axis.record:
            seen = weights if samples else None
            self._record(kl, seen, logits, visible, log_value, axis)
        if not samples:
            return None, None
        weights = weights.to(value.dtype)
        dropped = F.dropout(weights, dropout) if dropout else weights
        return mix(dropped, value), weights

    def _rows(self, logits: Tensor, visible: Tensor | None, axis: SampleAxis, is_causal: bool) -> Tensor:
        """The rows of logits, 0 where masked; the causal ones by distance from the query, so that neither padding in
        front nor a cache changes what the network reads.
        """
        queries, keys = logits.shape[-2:]
        if keys > self.max_keys:
            raise ValueError(
                f"A row of {keys} keys is longer than max_position_embeddings={self.max_keys}, which the network of "
                "data_dependent=True was built for: shorten the input, use a config with a larger "
                "max_position_embeddings, or data_dependent='query', which has no maximum length."
            )
        rows = logits if visible is None else logits.masked_fill(~visible, 0.0)
        if not is_causal:
            return rows
        device = logits.device
        own_key = torch.arange(queries, device=device) + min(int(axis.seen), keys - queries)
        index = own_key.unsqueeze(-1) - torch.arange(keys, device=device)
        return rows.gather(-1, index.clamp(min=0).expand_as(rows)).masked_fill(index < 0, 0.0)

    def _record(self, kl, weights, logits, visible, log_value, axis) -> None:
        per_head = {}
        if axis.statistics:
            per_head = self._head_statistics(kl, weights, logits, visible, log_value, axis)
        statistics = AttentionStatistics(kl.sum(1), **per_head)
        self.tap(PosteriorRecord(self.layer_idx, statistics, self.num_heads, site="attention"), axis.tape)

    @torch.no_grad()
    def _head_statistics(self, kl, weights, logits, visible, log_value, axis) -> dict[str, Tensor]:
        if weights is None:
            weights = _softmax_of(logits, visible)
        entropy = -(weights * weights.clamp(min=torch.finfo(weights.dtype).tiny).log()).sum(-1)
        name = "scale" if self.config.kind == "gaussian" else "concentration"

        def average(values: Tensor) -> Tensor:
            """Over the tokens that carry KL, [rows, heads, queries] to [heads]."""
            token_weights = axis.weights(values.shape[0], values.shape[2], values.device)
            token_weights = token_weights.unsqueeze(1).to(values.dtype)
            return (values * token_weights).sum((0, 2)) / token_weights.sum().clamp(min=1)

        return {
            "kl_per_head": average(kl),
            name: average(log_value.exp().squeeze(-1).expand_as(kl)),
            "entropy": average(entropy),
            "effective_keys": average(entropy.exp()),
        }

    def extra_repr(self) -> str:
        config = self.config
        return f"heads={self.num_heads}, kind={config.kind!r}, data_dependent={config.data_dependent!r}"


def masked_logits(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    is_causal: bool,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention logits before masking, and which keys each query sees.

    Returns:
        logits [rows, heads, queries, keys] in float32 (or wider); visible, bool and broadcastable to them, or `None`
        where every query sees every key.

    Raises:
        ValueError: for a mask of a kind that only a special kernel reads.
    """
    queries, keys = query.shape[-2], key.shape[-2]
    if attention_mask is not None and not (torch.is_tensor(attention_mask) and attention_mask.ndim == 4):
        raise ValueError(
            f"Posterior samples of attention weights cannot read an attention mask of type "
            f"{type(attention_mask).__name__}: use attn_implementation='sdpa' or 'eager', or num_posterior_samples=0."
        )
    # Grouped-query attention without copies of the keys: the queries of a group are rows of one product.
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])
    logits = torch.matmul(grouped, key.mT).view(*query.shape[:-1], keys)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scaling
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if position_bias is not None:
        logits = logits + position_bias
    if attention_mask is None:
        # As SDPA reads it: the first query sees the first key.
        causal = is_causal and queries > 1
        return logits, query.new_ones(1, 1, queries, keys, dtype=torch.bool).tril() if causal else None
    attention_mask = attention_mask[..., :keys]
    if attention_mask.dtype == torch.bool:
        return logits, attention_mask
    visible = attention_mask > torch.finfo(attention_mask.dtype).min / 2
    return logits + attention_mask.masked_fill(~visible, 0.0), visible


def mean_weights(query: Tensor, key: Tensor, attention_mask: Tensor | None, *, scaling: float, **options) -> Tensor:
    """The weights of the mean pass, [rows, heads, queries, keys], in the dtype of the query; arguments as above."""
    options.setdefault("is_causal", True)
    return _softmax_of(*masked_logits(query, key, attention_mask, scaling, **options)).to(query.dtype)


def _softmax_of(logits: Tensor, visible: Tensor | None) -> Tensor:
    return masked_softmax(logits if visible is None else logits.masked_fill(~visible, -torch.inf))


def mix(weights: Tensor, value: Tensor) -> Tensor:
    """Sums of values, [rows, queries, heads, head_dim]; fewer rows of values than of weights are shared by samples.

    Args:
        weights: [rows, heads, queries, keys].
        value: [rows / copies, key heads, keys, head_dim].
    """
    batch, groups = value.shape[:2]
    queries = weights.shape[-2]
    grouped = weights.view(batch, -1, groups, weights.shape[1] // groups * queries, weights.shape[-1])
    mixed = torch.matmul(grouped, value.unsqueeze(1)).flatten(0, 1)
    return mixed.unflatten(2, (-1, queries)).flatten(1, 2).transpose(1, 2).contiguous()
