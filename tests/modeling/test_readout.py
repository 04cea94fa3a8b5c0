"""The readout of the samples, block by block, against an implementation that holds everything."""

import pytest
import torch
from noise import NoiseTable
from test_predictive import assert_measures, brute_force
from tiny import VOCAB, assert_same_gradients, gradients, tiny_model, token_ids
from torch import nn

from hf_variational import posterior_noise
from hf_variational.modeling import predictive, readout
from hf_variational.modeling.readout import read_out

BATCH, LENGTH, HIDDEN = 2, 5, 6


def naive(hidden, head, num_samples, objective, targets):
    """log p̄, the NLL and the samples' log-probabilities from their definitions."""
    log_p = torch.log_softmax(head(hidden), -1).unflatten(0, (-1, num_samples))
    log_mean = log_p.exp().mean(1).log()
    nll = torch.zeros((), dtype=log_p.dtype)
    for row in range(targets.shape[0]):
        for t in range(targets.shape[1]):
            if targets[row, t] >= 0:
                each = log_p[row, :, t, targets[row, t]]
                nll = nll - (each.mean() if objective == "elbo" else each.exp().mean().log())
    return log_mean, nll, log_p


@pytest.fixture(params=[1, 30, 10**9], ids=["position by position", "two blocks or three", "whole"])
def block_elements(request, monkeypatch):
    for module in (predictive, readout):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", request.param * (VOCAB if request.param == 30 else 1))
    return request.param


def inputs(num_samples: int):
    torch.manual_seed(0)
    hidden = torch.randn(BATCH * num_samples, LENGTH, HIDDEN, dtype=torch.float64).requires_grad_()
    head = nn.Linear(HIDDEN, VOCAB, bias=False, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (BATCH, LENGTH))
    targets[0, 2] = targets[:, -1] = -100
    return hidden, head, targets


@pytest.mark.parametrize("num_samples", [1, 4])
@pytest.mark.parametrize("objective", ["elbo", "mc_nll"])
@pytest.mark.parametrize("output_uncertainty", [False, True])
class TestAgainstNaive:
    def test_values(self, num_samples, objective, output_uncertainty, block_elements):
        hidden, head, targets = inputs(num_samples)
        log_mean, nll, log_p = naive(hidden, head, num_samples, objective, targets)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                answer = read_out(
                    hidden,
                    head,
                    num_samples,
                    VOCAB,
                    objective,
                    targets=targets,
                    observed=targets,
                    output_uncertainty=output_uncertainty,
                    output_sample_logits=True,
                )
            torch.testing.assert_close(answer.logits, log_mean)
            torch.testing.assert_close(answer.nll_sum, nll)
            torch.testing.assert_close(answer.sample_logits, log_p)
            if output_uncertainty:
                assert_measures(answer.uncertainty, brute_force(head(hidden).detach(), num_samples, targets))
            else:
                assert answer.uncertainty is None

    def test_gradients(self, num_samples, objective, output_uncertainty, block_elements):
        hidden, head, targets = inputs(num_samples)
        leaves = (hidden, head.weight)
        log_mean, nll, log_p = naive(hidden, head, num_samples, objective, targets)
        projections = torch.randn_like(log_mean), torch.randn_like(log_p)

        def total(log_mean, nll, log_p):
            return nll + (projections[0] * log_mean).sum() + (projections[1] * log_p).sum()

        expected = torch.autograd.grad(total(log_mean, nll, log_p), leaves)
        options = {"output_uncertainty": output_uncertainty, "output_sample_logits": True}
        answer = read_out(hidden, head, num_samples, VOCAB, objective, targets, targets, **options)
        actual = torch.autograd.grad(total(answer.logits, answer.nll_sum, answer.sample_logits), leaves)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("objective", ["elbo", "mc_nll"])
def test_gradcheck(objective, block_elements):
    hidden, head, targets = inputs(2)

    def nll(hidden, weight):
        return read_out(hidden, lambda x: x @ weight.T, 2, VOCAB, objective, targets).nll_sum

    small = hidden.detach()[:, :3].contiguous().requires_grad_()
    targets = targets[:, :3]
    assert torch.autograd.gradcheck(nll, (small, head.weight), fast_mode=True)


def test_one_sample_is_the_ordinary_nll():
    hidden, head, targets = inputs(1)
    expected = nn.functional.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
    for objective in ("elbo", "mc_nll"):
        torch.testing.assert_close(read_out(hidden, head, 1, VOCAB, objective, targets).nll_sum, expected)


def test_mc_nll_is_at_most_the_elbo():
    """Jensen: the predictive distribution is never worse than its samples on average."""
    hidden, head, targets = inputs(4)
    mc_nll, elbo = (read_out(hidden, head, 4, VOCAB, objective, targets).nll_sum for objective in ("mc_nll", "elbo"))
    assert mc_nll < elbo


def test_blocks_forget_no_memory_unwritten(monkeypatch, poisoned_scratch):
    for module in (predictive, readout):
        monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1)
    hidden, head, targets = inputs(3)
    with torch.no_grad():
        answer = read_out(hidden, head, 3, VOCAB, "elbo", targets, targets, output_uncertainty=True)
    assert torch.isfinite(answer.logits).all() and torch.isfinite(answer.nll_sum)


def test_nothing_larger_than_the_answer_survives_a_block(monkeypatch):
    """With gradients and several samples the logits of a block are computed again rather than kept."""
    hidden, head, targets = inputs(4)
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        read_out(hidden, head, 4, VOCAB, "elbo", targets)
    assert max(kept, default=0) < BATCH * 4 * LENGTH * VOCAB


class TestInTheModel:
    @pytest.mark.parametrize("objective", ["elbo", "mc_nll"])
    @pytest.mark.parametrize("samples", [1, 3])
    def test_blocks_change_neither_loss_nor_gradient(self, objective, samples, monkeypatch):
        model, ids = tiny_model(objective=objective), token_ids()
        options = {"labels": ids, "num_posterior_samples": samples, "output_uncertainty": True}
        noise, found = NoiseTable.of(model, 2, samples), []
        for elements in (10**9, 1):
            for module in (predictive, readout):
                monkeypatch.setattr(module, "BLOCK_ELEMENTS", elements)
            with posterior_noise(noise):
                out = model(ids, **options)
            found.append((out, gradients(model, out.loss)))
        torch.testing.assert_close(found[0][0].loss, found[1][0].loss)
        torch.testing.assert_close(found[0][0].logits, found[1][0].logits)
        assert_same_gradients(found[1][1], found[0][1])
        for name, value in found[0][0].uncertainty.items():
            torch.testing.assert_close(value, found[1][0].uncertainty[name], equal_nan=True)

    def test_answer_follows_logits_to_keep(self):
        model, ids = tiny_model(), token_ids()
        noise = NoiseTable.of(model, 2, 3)
        options = {"num_posterior_samples": 3, "output_uncertainty": True, "output_sample_logits": True}
        with torch.no_grad(), posterior_noise(noise):
            whole = model(ids, **options)
            for keep, index in ((2, slice(-2, None)), (torch.tensor([0, 4]), [0, 4])):
                part = model(ids, logits_to_keep=keep, **options)
                torch.testing.assert_close(part.logits, whole.logits[:, index])
                torch.testing.assert_close(part.sample_logits, whole.sample_logits[:, :, index])
                for name, value in part.uncertainty.items():
                    torch.testing.assert_close(value, whole.uncertainty[name][:, index], equal_nan=True)

    def test_uncertainty_is_that_of_the_sample_logits_and_observes_the_next_token(self):
        model, ids = tiny_model(), token_ids()
        with torch.no_grad():
            out = model(ids, num_posterior_samples=4, output_uncertainty=True, output_sample_logits=True)
        targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
        assert_measures(out.uncertainty, brute_force(out.sample_logits.flatten(0, 1), 4, targets))
        assert out.uncertainty.token_variance[:, -1].isnan().all()
        torch.testing.assert_close(out.logits, out.sample_logits.exp().mean(1).log())
        assert out.logits.dtype == torch.float32
