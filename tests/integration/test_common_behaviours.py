"""What every transformers model does, this one does too, with posterior samples and without."""

import copy
import pickle

import pytest
import torch
from integration_models import PAD, VOCABULARY, RowNoise, eve_config, prompt, tiny_model

from hf_variational import PredictiveMeasures, posterior_noise


def run(model, *args, noise=None, **options):
    with posterior_noise(noise or RowNoise()):
        return model(*args, **options)


def gradients(model, **options):
    model.zero_grad()
    labels = prompt()
    run(model, labels, labels=labels, num_posterior_samples=2, kl_weight=1.0, **options).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_default_samples_of_each_mode():
    model = tiny_model(num_posterior_samples=3)
    for mode, expected in ((False, []), (True, [3])):
        source = RowNoise()
        run(model.train(mode), prompt(), noise=source)
        assert [request.num_samples for request in source.requests[:1]] == expected
    source = RowNoise()
    run(model.train(), prompt(), noise=source, num_posterior_samples=0)
    assert source.requests == []


def test_eval_mode_with_labels_is_the_mean_pass_plus_the_kl():
    model, labels = tiny_model(), prompt()
    out = model(labels, labels=labels)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.nll, expected)
    assert out.kl > 0
    torch.testing.assert_close(out.loss, out.nll + model.config.kl_weight * out.kl)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", [VOCABULARY + 9, VOCABULARY - 11])
def test_resize_token_embeddings(tied, size):
    model = tiny_model(tie_word_embeddings=tied)
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == size
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    labels = prompt() % size
    out = run(model, labels, labels=labels, num_posterior_samples=3, output_uncertainty=True)
    assert out.logits.shape == (2, 6, size)
    assert torch.isfinite(out.loss)
    out.loss.backward()
    assert model.get_input_embeddings().weight.grad.shape == (size, 32)
    out = model.generate(
        labels, max_new_tokens=3, num_posterior_samples=2, return_dict_in_generate=True, output_uncertainty=True
    )
    assert out.uncertainty.mutual_information.isfinite().all()


def test_tied_weights_share_memory_and_gradient():
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
    grads = gradients(model)
    assert grads["model.embed_tokens.weight"].abs().sum() > 0


@pytest.mark.parametrize("samples", [0, 3])
def test_inputs_embeds(samples):
    model, ids = tiny_model(), prompt()
    embeddings = model.get_input_embeddings()(ids)
    expected = run(model, ids, labels=ids, num_posterior_samples=samples)
    out = run(model, inputs_embeds=embeddings, labels=ids, num_posterior_samples=samples)
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.loss, expected.loss)


def test_token_variance_without_tokens_is_nan():
    model, ids = tiny_model(), prompt()
    embeddings = model.get_input_embeddings()(ids)
    out = run(model, inputs_embeds=embeddings, num_posterior_samples=3, output_uncertainty=True).uncertainty
    assert out.token_variance.isnan().all()
    assert out.mutual_information.isfinite().all()
    seen = run(model, ids, num_posterior_samples=3, output_uncertainty=True).uncertainty.token_variance
    assert seen[:, :-1].isfinite().all()
    assert seen[:, -1].isnan().all()


@pytest.mark.parametrize("layers", [None, [1, 2], [2]], ids=str)
def test_hidden_states_and_attentions(layers):
    model = tiny_model(attn_implementation="eager", variational_layers=layers)
    split = (layers or [0])[0]
    out = run(model, prompt(), num_posterior_samples=3, output_hidden_states=True, output_attentions=True)
    assert [len(state) for state in out.hidden_states] == [2 if i <= split else 6 for i in range(4)]
    assert [len(weights) for weights in out.attentions] == [2 if i <= split else 6 for i in range(3)]
    for weights in out.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights), 4, 6))
    # the last hidden state is what the head reads
    logits = torch.log_softmax(model.lm_head(out.hidden_states[-1]), -1).unflatten(0, (2, 3))
    torch.testing.assert_close(out.logits, logits.logsumexp(1) - torch.tensor(3.0).log())


@pytest.mark.parametrize("samples", [0, 2])
def test_tuples_begin_with_loss_and_logits(samples):
    model, ids = tiny_model(), prompt()
    options = {"num_posterior_samples": samples, "output_posteriors": True, "output_hidden_states": True}
    if samples:
        options.update(output_uncertainty=True, output_sample_logits=True)
    out = run(model, ids, labels=ids, **options)
    assert list(out)[:4] == ["loss", "logits", "past_key_values", "hidden_states"]
    values = run(model, ids, labels=ids, return_dict=False, **options)
    assert isinstance(values, tuple)
    assert len(values) == len(out)
    assert torch.equal(values[0], out.loss)
    assert torch.equal(values[1], out.logits)
    assert torch.equal(out[0], out.loss)
    assert torch.equal(run(model, ids, return_dict=False, **options)[0], out.logits)


def test_new_output_fields_are_ignored_by_a_plain_trainer():
    model, ids = tiny_model(), prompt()
    options = {"output_posteriors": True, "output_uncertainty": True, "output_sample_logits": True}
    out = run(model, ids, labels=ids, num_posterior_samples=2, **options)
    assert set(out) - set(model.config.keys_to_ignore_at_inference) == {"loss", "logits"}
    assert isinstance(out.uncertainty, PredictiveMeasures)


@pytest.mark.parametrize("samples", [0, 3])
@pytest.mark.parametrize("layers", [None, [1]], ids=str)
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_sdpa_and_eager_agree(samples, layers, side):
    ids = prompt(2, 8)
    mask = torch.ones_like(ids)
    if side != "none":
        mask[0, slice(0, 3) if side == "left" else slice(5, 8)] = 0
    labels = torch.where(mask.bool(), ids, -100)
    labels[0, 3] = -100  # its predecessor is padding
    outputs = []
    for attention in ("sdpa", "eager"):
        model = tiny_model(attn_implementation=attention, variational_layers=layers)
        options = {"attention_mask": mask, "labels": labels, "num_posterior_samples": samples}
        outputs.append(run(model, torch.where(mask.bool(), ids, PAD), **options))
    attended = mask.bool()
    torch.testing.assert_close(outputs[0].logits[attended], outputs[1].logits[attended], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(outputs[0].loss, outputs[1].loss)
    torch.testing.assert_close(outputs[0].kl, outputs[1].kl)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_grouped_query_attention(heads):
    model = tiny_model(num_key_value_heads=heads)
    out = run(model, prompt(), num_posterior_samples=3, use_cache=True)
    keys = [layer.keys.shape[:2] for layer in out.past_key_values.layers]
    assert keys == [(2, heads), (6, heads), (6, heads)]


@pytest.mark.parametrize("prior", ["empirical", "autoregressive"])
def test_packed_documents(prior):
    model = tiny_model(eve=eve_config(prior=prior))
    documents = prompt(2, 6)
    labels = documents.clone()
    labels[:, 0] = -100  # the first token of a document is predicted by no other
    packed = documents.reshape(1, 12)
    positions = torch.arange(6).repeat(2).unsqueeze(0)

    def noise_of_packed(request):
        tables = RowNoise()
        blocks = [tables._table(request.layer, row, request.num_samples, request.shape[2:]) for row in range(2)]
        return torch.cat([block[:, :6] for block in blocks], dim=1)

    expected = run(model, documents, labels=labels, num_posterior_samples=3, output_posteriors=True)
    out = run(
        model,
        packed,
        labels=labels.reshape(1, 12),
        position_ids=positions,
        num_posterior_samples=3,
        output_posteriors=True,
        use_cache=False,
        noise=noise_of_packed,
    )
    torch.testing.assert_close(out.logits.reshape(2, 6, -1), expected.logits, atol=2e-5, rtol=1e-4)
    for layer, statistics in expected.posteriors.items():
        torch.testing.assert_close(out.posteriors[layer].kl.reshape(2, 6), statistics.kl, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.nll, expected.nll)


@pytest.mark.parametrize("logits_to_keep", [1, 3, torch.tensor([0, 4])], ids=str)
@pytest.mark.parametrize("samples", [0, 2])
def test_logits_to_keep(logits_to_keep, samples):
    model, ids = tiny_model(), prompt()
    options = {"num_posterior_samples": samples, "output_uncertainty": samples > 0}
    full = run(model, ids, **options)
    out = run(model, ids, logits_to_keep=logits_to_keep, **options)
    kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    torch.testing.assert_close(out.logits, full.logits[:, kept])
    if samples:
        for name, measure in full.uncertainty.items():
            torch.testing.assert_close(out.uncertainty[name], measure[:, kept], equal_nan=True)


def test_mask_of_four_dimensions():
    model, ids = tiny_model(), prompt()
    mask = torch.ones(6, 6).tril().bool().expand(2, 1, 6, 6)
    expected = run(model, ids, num_posterior_samples=3)
    out = run(model, ids, attention_mask=mask, num_posterior_samples=3)
    torch.testing.assert_close(out.logits, expected.logits)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_work_alone(duplicate):
    model = tiny_model()
    double = duplicate(model)
    expected = gradients(model)
    assert_trains_alone(double, model, expected)


def test_copy_after_a_pass_works_alone():
    model = tiny_model()
    expected = gradients(model)  # the tape's hooks are installed in the first pass that needs them
    assert_trains_alone(copy.deepcopy(model), model, expected)


def assert_trains_alone(double, model, expected):
    for name, gradient in gradients(double).items():
        assert torch.equal(gradient, expected[name])
    with torch.no_grad():
        double.lm_head.weight.zero_()
    out = run(double, prompt(), labels=prompt(), num_posterior_samples=2, output_posteriors=True)
    assert sorted(out.posteriors) == [0, 1, 2]
    assert torch.equal(gradients(model)["lm_head.weight"], expected["lm_head.weight"])


def test_copy_of_a_cache_goes_on_alone():
    model, ids = tiny_model(eve=eve_config(noise="sequence")), prompt(2, 8)
    with torch.no_grad():
        cache = run(model, ids[:, :5], num_posterior_samples=2, use_cache=True).past_key_values
        double = copy.deepcopy(cache)
        first = run(model, ids[:, 5:], num_posterior_samples=2, past_key_values=cache)
        second = run(model, ids[:, 5:], num_posterior_samples=2, past_key_values=double, noise=RowNoise(seed=99))
    assert torch.equal(first.logits, second.logits)


CHECKPOINTING = [None, {}, {"use_reentrant": False}, {"preserve_rng_state": True}]


@pytest.mark.parametrize("options", CHECKPOINTING, ids=str)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient(options):
    model = tiny_model().train()
    torch.manual_seed(5)
    labels = prompt()
    expected = {}
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(*([] if options is None else [options]))
        model.zero_grad()
        torch.manual_seed(5)  # fresh noise from the global generator
        model(labels, labels=labels, num_posterior_samples=2, kl_weight=1.0, use_cache=False).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, expected.setdefault(name, parameter.grad.clone()))
    model.gradient_checkpointing_disable()


def test_frozen_base_trains_only_the_neurons():
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".eve." in name)
    labels = prompt()
    run(model, labels, labels=labels, num_posterior_samples=2).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (".eve." in name)
