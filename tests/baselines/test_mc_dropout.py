"""MC dropout against the stock model with the same masks, and the variance of a linear map of a dropped input."""

import copy

import pytest
import torch
import transformers as hf
from baseline_models import LAYERS, SAMPLES, VOCAB, given, greedy_by_hand, mean_probability, stock, with_positions
from torch import nn
from torch.nn import functional as F

from hf_variational import EVEConfig, variationalize
from hf_variational.baselines import mc_dropout, remove_mc_dropout
from hf_variational.modeling import VariationalGPTConfig, VariationalGPTForCausalLM

# Every place that drops: embeddings, residuals, attention weights.
_DROPS = {"gpt2": {"embd_pdrop": 0.3, "resid_pdrop": 0.3, "attn_pdrop": 0.3}, "llama": {"attention_dropout": 0.3}}


class RowMasks:
    """Stands in for `F.dropout`: a mask for each call, row and unit, the same at every position.

    Args:
        rows: of the table, which the rows of a pass take in order.
    """

    def __init__(self, rows: list[int], table_rows: int):
        self.rows, self.table_rows, self.calls = rows, table_rows, 0

    def __call__(self, hidden, p=0.5, training=True, inplace=False):
        if not training or p == 0:
            return hidden
        generator = torch.Generator().manual_seed(self.calls)
        self.calls += 1
        kept = torch.rand(self.table_rows, 1, hidden.shape[-1], generator=generator) >= p
        return hidden * kept[self.rows] / (1 - p)


def masked(monkeypatch, rows: list[int], table_rows: int, run):
    """`run()` with the masks of `rows`, each forward pass from the first mask on."""
    masks = RowMasks(rows, table_rows)
    monkeypatch.setattr(F, "dropout", masks)
    try:
        return run(masks)
    finally:
        monkeypatch.undo()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rate", [0, 0.0])
def test_at_rate_0_a_sample_is_the_deterministic_model_bit_for_bit(family, rate):
    plain = stock(family, **_DROPS[family])
    model = mc_dropout(copy.deepcopy(plain), rate=rate)
    inputs = with_positions(given())
    out = model(**inputs, num_posterior_samples=SAMPLES, output_sample_logits=True, output_uncertainty=True)
    repeated = {name: value.repeat_interleave(SAMPLES, 0) for name, value in inputs.items()}
    assert torch.equal(out.sample_logits.flatten(0, 1), plain(**repeated).logits.log_softmax(-1))
    assert out.uncertainty.mutual_information.max() < 1e-6
    single = model(**inputs, num_posterior_samples=1).logits
    assert torch.equal(single, plain(**inputs).logits.log_softmax(-1))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_sample_is_a_pass_of_the_stock_model_in_train_mode(family):
    plain = stock(family, **_DROPS[family])
    model = mc_dropout(copy.deepcopy(plain))
    torch.manual_seed(5)
    sampled = model(**given(), num_posterior_samples=1, use_cache=False).logits
    torch.manual_seed(5)
    expected = plain.train()(**given(), use_cache=False).logits.log_softmax(-1)
    assert torch.equal(sampled, expected)
    assert not any(module.training for module in model.modules())


def test_rows_are_the_naive_loop_with_the_same_masks(monkeypatch):
    batch, total = 2, 2 * SAMPLES
    model = mc_dropout(stock("llama"), rate=0.3)
    inputs = with_positions(given(batch))

    def whole(masks):
        return model(**inputs, num_posterior_samples=SAMPLES, output_sample_logits=True)

    out = masked(monkeypatch, list(range(total)), total, whole)
    naive = mc_dropout(stock("llama"), rate=0.3).train()
    for sample in range(SAMPLES):
        rows = [sequence * SAMPLES + sample for sequence in range(batch)]
        logits = masked(monkeypatch, rows, total, lambda masks: naive(**inputs, use_cache=False).logits)
        torch.testing.assert_close(out.sample_logits[:, sample], logits.log_softmax(-1), rtol=1e-5, atol=1e-5)


def test_greedy_generation_with_a_cache_is_the_naive_loop_without(monkeypatch):
    total = 2 * SAMPLES
    model = mc_dropout(stock("llama"), rate=0.3)
    rows = list(range(total))

    def log_p(inputs):
        return masked(
            monkeypatch,
            rows,
            total,
            lambda masks: model(**inputs, num_posterior_samples=SAMPLES, use_cache=False).logits,
        )

    tokens, chosen_from = greedy_by_hand(log_p, given(), 4)

    def decode(masks):
        # A mask lasts the whole sequence, so what the cache holds is what a pass without one computes.
        handle = model.register_forward_pre_hook(lambda *_: setattr(masks, "calls", 0))
        options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        try:
            return model.generate(**given(), num_posterior_samples=SAMPLES, **options)
        finally:
            handle.remove()

    result = masked(monkeypatch, rows, total, decode)
    assert torch.equal(result.sequences, tokens)
    torch.testing.assert_close(torch.stack(result.logits, 1), chosen_from, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_variance_of_w_out_is_that_of_a_linear_map_of_a_dropped_input():
    # Var[Σ_j w_ij h_j m_j] = p / (1 - p) Σ_j w_ij² h_j², with m_j in {0, 1 / (1 - p)}
    rate, samples = 0.25, 6000
    model = stock("llama", num_hidden_layers=1)
    seen = {}
    projection = model.model.layers[0].mlp.down_proj
    projection.register_forward_hook(lambda module, args, output: seen.update(h=args[0], out=output))
    one = {"input_ids": torch.tensor([[5]])}
    model(**one)
    h, weight = seen["h"].flatten(), projection.weight
    mc_dropout(model, rate)(**one, num_posterior_samples=samples)
    variance = rate / (1 - rate) * (weight**2 @ h**2)
    ratio = seen["out"].flatten(0, 1).var(0) / variance
    assert (ratio - 1).abs().max() < 0.12 and (ratio.mean() - 1).abs() < 0.03


def test_in_train_mode_the_same_dropout_trains():
    model = mc_dropout(stock("llama"), rate=0.3).train()
    labels = given()["input_ids"]
    torch.manual_seed(0)
    loss = model(**given(), labels=labels).loss
    torch.manual_seed(0)
    logits = model.eval()(**given(), num_posterior_samples=1).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_deterministic_twin_of_a_variational_gpt(tmp_path):
    settings = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 40}
    config = VariationalGPTConfig(**settings, num_key_value_heads=2, vocab_size=VOCAB, eve=None, initializer_range=0.3)
    torch.manual_seed(0)
    plain = VariationalGPTForCausalLM(config).eval()
    model = mc_dropout(copy.deepcopy(plain), rate=0.2)
    labels = given()["input_ids"]
    assert torch.equal(model(**given(), labels=labels).loss, plain(**given(), labels=labels).loss)
    assert model(**given(), num_posterior_samples=4, output_uncertainty=True).uncertainty.mutual_information.max() > 0
    model.train()(**given(), labels=labels).loss.backward()
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is VariationalGPTForCausalLM
    assert torch.equal(again(**given()).logits, plain(**given()).logits)


def test_layers_below_the_first_dropout_have_no_samples():
    model = mc_dropout(stock("llama"), rate=0.3, modules=r"model\.layers\.1\.self_attn\.o_proj")
    assert model.variational_layers == [1]
    torch.manual_seed(0)
    out = model(**given(), num_posterior_samples=4, output_hidden_states=True)
    below = out.hidden_states[1].unflatten(0, (2, 4))
    assert (below - below[:, :1]).abs().max() < 1e-6
    above = out.hidden_states[2].unflatten(0, (2, 4))
    assert (above - above[:, :1]).abs().max() > 1e-2
    assert mc_dropout(stock("gpt2", **_DROPS["gpt2"])).variational_layers == [0, 1]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_removed_it_is_the_stock_model_again(family):
    plain = stock(family, **_DROPS[family])
    for rate, modules in ((0.5, None), (None, None), (0.5, ["lm_head"])):
        model = mc_dropout(copy.deepcopy(plain), rate, modules)
        for again in (copy.deepcopy(model), model):
            again = remove_mc_dropout(again)
            assert type(again) is type(plain)
            assert vars(again).keys() == vars(plain).keys()
            assert str(again) == str(plain)
            torch.manual_seed(0)
            trained = again.train()(**given()).logits
            torch.manual_seed(0)
            assert torch.equal(trained, plain.train()(**given()).logits)
            plain.eval()


def test_a_checkpoint_is_that_of_the_stock_class(tmp_path):
    model = mc_dropout(stock("gpt2"), rate=0.2)
    model.save_pretrained(tmp_path)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is hf.GPT2LMHeadModel and again.config.architectures == ["GPT2LMHeadModel"]
    assert torch.equal(again(**given()).logits, model(**given()).logits)


def test_a_plain_trainer_trains_and_predicts_with_it(tmp_path):
    model = mc_dropout(stock("llama"), rate=0.2)
    rows = [{"input_ids": row, "labels": row} for row in given(batch=4, padding=0)["input_ids"]]
    arguments = hf.TrainingArguments(tmp_path, max_steps=2, report_to=[], save_strategy="no", use_cpu=True)
    trainer = hf.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.predict(rows).predictions.shape == (4, given()["input_ids"].shape[1], VOCAB)


def test_bad_input_is_refused():
    for rate in (-0.1, 1, 1.0, True, "0.1"):
        with pytest.raises(ValueError, match=r"rate is a probability in \[0, 1\)"):
            mc_dropout(stock("llama"), rate)
    plain = stock("llama")
    with pytest.raises(ValueError, match="no dropout of its own: say at which rate"):
        mc_dropout(plain)
    assert type(plain) is hf.LlamaForCausalLM
    with pytest.raises(ValueError, match="names no module"):
        mc_dropout(plain, 0.1, modules=["up_projection"])
    with pytest.raises(ValueError, match="posterior samples of its own"):
        mc_dropout(mc_dropout(plain, 0.1), 0.2)
    with pytest.raises(ValueError, match="posterior samples of its own"):
        mc_dropout(variationalize(stock("llama"), eve=EVEConfig()), 0.1)
    with pytest.raises(ValueError, match="was not made by mc_dropout"):
        remove_mc_dropout(stock("llama"))
    with pytest.raises(ValueError, match="must be a transformers PreTrainedModel, got Linear"):
        mc_dropout(nn.Linear(2, 2), 0.1)
    t5 = hf.T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="no decoder-only language model"):
        mc_dropout(hf.T5ForConditionalGeneration(t5), 0.1)
    mixtral = {"num_key_value_heads": 2, "num_local_experts": 2, "num_attention_heads": 4, "hidden_size": 32}
    config = hf.MixtralConfig(**mixtral, intermediate_size=16, num_hidden_layers=1, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"as in modules=\['o_proj'\]"):
        mc_dropout(hf.MixtralForCausalLM(config), 0.1)


def test_gradient_checkpointing_of_a_layer_that_drops_itself_is_refused_where_it_would_lose_the_cache():
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 16,
        "word_embed_proj_dim": 16,
    }
    model = mc_dropout(hf.OPTForCausalLM(hf.OPTConfig(**sizes, vocab_size=VOCAB, dropout=0.2)).eval())
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        model(**given(), num_posterior_samples=2)
    model.gradient_checkpointing_disable()
    model(**given(), num_posterior_samples=2)


def test_the_mean_of_many_samples_is_the_naive_average(monkeypatch):
    model = mc_dropout(stock("gpt2", implementation="eager", **_DROPS["gpt2"]))
    out = model(**given(), num_posterior_samples=5, output_sample_logits=True)
    torch.testing.assert_close(out.logits.double(), mean_probability(list(out.sample_logits.unbind(1))))
