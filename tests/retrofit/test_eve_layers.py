"""Which layers are meant, and how an architecture that is not in the table is resolved by looking."""

import pytest
import torch
import transformers as hf
from eve_families import GENERATING, TINY, added, answer, centered, given, retrofitted, stock
from eve_reference import UnitNoise
from families import FAMILIES, HEADS, LAYERS, VOCAB
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutput

from hf_variational import posterior_noise, to_deterministic, variational_class, variationalize

TEXT = {name: value for name, value in FAMILIES["llama"].options.items() if name != "num_key_value_heads"}


class TestLayers:
    @pytest.mark.parametrize(
        ("layers", "expected"),
        [
            ("all", [0, 1, 2, 3, 4, 5, 6, 7, 8]),
            ("last", [8]),
            ("last_quarter", [6, 7, 8]),
            ([4], [4]),
            ([7, 0, 7], [0, 7]),
            ((2, 1), [1, 2]),
            (r"model\.layers\.(3|5)", [3, 5]),
            (r".*[02468]", [0, 2, 4, 6, 8]),
            ("model.layers.8", [8]),
        ],
        ids=str,
    )
    def test_of_nine(self, layers, expected):
        model = variationalize(stock("llama", num_hidden_layers=9), eve=centered(), layers=layers)
        assert model.settings.eve_layers == model.variational_layers == expected
        places = {key.partition(".mlp.")[0] for key in added(model)}
        assert places == {f"model.layers.{layer}" for layer in expected}

    @pytest.mark.parametrize(("count", "quarter"), [(1, 1), (4, 1), (5, 2), (8, 2), (12, 3)])
    def test_a_quarter_is_rounded_up(self, count, quarter):
        model = variationalize(stock("llama", num_hidden_layers=count), layers="last_quarter")
        assert model.settings.eve_layers == list(range(count - quarter, count))

    @pytest.mark.parametrize(
        ("layers", "expected"),
        [
            ("all", [0, 1, 2, 3, 4, 5]),
            ("last", [5]),
            ("last_quarter", [5]),
            (r"encoder\..*", [0, 1, 2]),
            (r"decoder\.block\.[12]", [4, 5]),
            ([2, 3], [2, 3]),
        ],
        ids=str,
    )
    def test_of_two_towers(self, layers, expected):
        model = variationalize(stock("t5"), eve=centered(), layers=layers)
        assert model.settings.eve_layers == expected
        assert {key.rpartition(".eve.")[0] + ".eve" for key in added(model)} == {TINY["t5"].eve(i) for i in expected}

    @pytest.mark.parametrize("layers", [[3], [-1], [0, 5], [True], ["1"], [[1]], [1.0], [], 1, {}, range(0), None])
    @pytest.mark.parametrize("name", ["llama", "bert-masked"])
    def test_others_are_refused_and_named(self, name, layers):
        plain = stock(name)
        with pytest.raises(ValueError, match="layers"):
            variationalize(plain, eve=centered(), layers=layers)
        assert type(plain) is TINY[name].model and not added(plain)
        if layers in ([3], [0, 5]):
            with pytest.raises(ValueError, match=rf"{layers[-1]}.*\[0, 1, 2\]"):
                variationalize(plain, eve=centered(), layers=layers)

    def test_a_regular_expression_that_matches_nothing(self):
        for layers in (r"model\.layers\.9", "layers", r"model\.layers\.\d\.mlp", "first"):
            with pytest.raises(ValueError, match=r"matches no layer.*model\.layers\.0"):
                variationalize(stock("llama"), layers=layers)
        with pytest.raises(ValueError, match="no regular expression"):
            variationalize(stock("llama"), layers="(")


class TinyConfig(hf.PreTrainedConfig):
    model_type = "tiny_of_the_tests"

    def __init__(self, hidden_size=32, intermediate_size=48, form="one", **kwargs):
        super().__init__(**kwargs)
        self.hidden_size, self.intermediate_size, self.form = hidden_size, intermediate_size, form
        self.num_hidden_layers, self.num_attention_heads, self.vocab_size = LAYERS, HEADS, VOCAB


class TinyBlock(nn.Module):
    """Means over the past, and a feed-forward network; of `form` "two" there are two of them, of "none" none."""

    def __init__(self, config):
        super().__init__()
        width, units = config.hidden_size, config.intermediate_size
        self.mix = nn.Linear(width, width)
        if config.form != "none":
            self.widen, self.narrow = nn.Linear(width, units), nn.Linear(units, width)
        if config.form == "two":
            self.widen_again, self.narrow_again = nn.Linear(width, units), nn.Linear(units, width)

    def forward(self, h):
        steps = torch.arange(1, h.shape[1] + 1, device=h.device).view(1, -1, 1)
        h = h + torch.tanh(self.mix(h.cumsum(1) / steps))
        if hasattr(self, "narrow"):
            h = h + self.narrow(F.gelu(self.widen(F.layer_norm(h, h.shape[-1:]))))
        if hasattr(self, "narrow_again"):
            h = h + self.narrow_again(F.gelu(self.widen_again(F.layer_norm(h, h.shape[-1:]))))
        return h


class TinyLMHeadModel(hf.PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(TinyBlock(config) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None, return_dict=None, **kwargs):
        h = self.embed(input_ids)
        for block in self.blocks:
            h = block(h)
        logits = self.head(h)
        loss = None if labels is None else F.cross_entropy(logits.transpose(1, 2), labels)
        return CausalLMOutput(loss=loss, logits=logits)


def tiny(form: str = "one") -> TinyLMHeadModel:
    torch.manual_seed(0)
    model = TinyLMHeadModel(TinyConfig(form=form))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape))
    return model.eval()


class TestByLooking:
    def by_hand(self, plain, model, ids, target: str, samples: int = 3):
        logits, noise = [], UnitNoise()
        named = model.state_dict()
        for sample in range(samples):
            handles = []
            for layer in model.settings.eve_layers:
                where = f"blocks.{layer}.eve"

                def hook(module, args, layer=layer, where=where, sample=sample):
                    (h,) = args
                    low_rank = h @ named[f"{where}.scale_down"].T @ named[f"{where}.scale_up"].T
                    positions = torch.arange(h.shape[1])
                    eps = torch.stack([noise.of(layer, row, sample, positions, h.shape[-1]) for row in range(len(h))])
                    log_scale = (low_rank + named[f"{where}.log_scale"]).clamp(-12, 2)
                    return (h + log_scale.exp() * eps,)

                block = plain.blocks[layer]
                handles.append(block.get_submodule(target).register_forward_pre_hook(hook))
            logits.append(plain(ids).logits.double().softmax(-1))
            for handle in handles:
                handle.remove()
        return torch.stack(logits).mean(0).log().float()

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("form", "target"), [("one", None), ("one", "narrow"), ("two", "narrow"), ("two", "narrow_again")]
    )
    @pytest.mark.parametrize("layers", ["all", [1]], ids=str)
    def test_a_class_of_ones_own(self, form, target, layers, tmp_path):
        plain, ids = tiny(form), given("llama")["input_ids"]
        targets = None if target is None else [target]
        model = retrofitted(plain, layers, target_modules=targets)
        assert type(model).__name__ == "VariationalTinyForCausalLM" and isinstance(model, TinyLMHeadModel)
        assert torch.equal(model(ids).logits, plain(ids).logits)
        expected = self.by_hand(plain, model, ids, target or "narrow")
        with posterior_noise(UnitNoise()):
            out = model(ids, num_posterior_samples=3, labels=ids)
        torch.testing.assert_close(out.logits, expected, atol=2e-5, rtol=1e-4)
        assert out.kl > 0
        model.save_pretrained(tmp_path)
        again = variational_class(TinyLMHeadModel).from_pretrained(tmp_path)
        assert again.settings == model.settings
        with posterior_noise(UnitNoise()):
            torch.testing.assert_close(again(ids, num_posterior_samples=3).logits, out.logits)
        read = TinyLMHeadModel.from_pretrained(tmp_path)
        torch.testing.assert_close(read(ids).logits, plain(ids).logits)
        assert torch.equal(to_deterministic(model)(ids).logits, plain(ids).logits)

    def test_several_candidates_are_listed(self):
        plain = tiny("two")
        with pytest.raises(ValueError, match="target_modules=") as refusal:
            variationalize(plain, eve=centered())
        assert "narrow" in str(refusal.value) and "narrow_again" in str(refusal.value)
        assert type(plain) is TinyLMHeadModel and not added(plain)

    def test_no_network_is_found(self):
        with pytest.raises(ValueError, match=r"no FFN.*target_modules"):
            variationalize(tiny("none"))
        with pytest.raises(ValueError, match="'wide_projection'"):
            variationalize(tiny(), target_modules=["wide_projection"])
        with pytest.raises(ValueError, match="names no module in a layer"):
            variationalize(tiny(), target_modules=r"blocks\.7\.narrow")

    def test_a_regular_expression_for_one_layer(self):
        model = variationalize(tiny("two"), target_modules=r"blocks\.[02]\.narrow_again")
        assert model.settings.eve_layers == [0, 2]

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("model", "config", "options", "projection"),
        [
            (hf.StableLmForCausalLM, hf.StableLmConfig, {**TEXT, "num_key_value_heads": 2}, "mlp.down_proj"),
            (hf.GraniteForCausalLM, hf.GraniteConfig, {**TEXT, "num_key_value_heads": 2}, "mlp.down_proj"),
            (hf.GlmForCausalLM, hf.GlmConfig, {**TEXT, "num_key_value_heads": 2, "head_dim": 8}, "mlp.down_proj"),
            (
                hf.MptForCausalLM,
                hf.MptConfig,
                {"vocab_size": VOCAB, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64},
                "ffn.down_proj",
            ),
            (
                hf.ElectraForMaskedLM,
                hf.ElectraConfig,
                {**FAMILIES["bert"].options, "embedding_size": 32},
                "output.dense",
            ),
        ],
        ids=lambda value: value.__name__ if isinstance(value, type) else "",
    )
    def test_families_outside_the_table(self, model, config, options, projection):
        torch.manual_seed(0)
        plain, inputs = model(config(**options)).eval(), given("llama", padding=2, positions=False)
        ours = retrofitted(plain, [1, 2])
        assert ours.settings.eve_layers == [1, 2]
        where = projection.rpartition(".")[0] + ".eve."
        assert added(ours) and all(where in key for key in added(ours))
        assert torch.equal(answer(ours(**inputs)), answer(plain(**inputs)))
        with posterior_noise(UnitNoise()):
            out = ours(**inputs, num_posterior_samples=3, labels=inputs["input_ids"])
        singles = []
        for sample in range(3):
            with posterior_noise(UnitNoise([(0, sample), (1, sample)])):
                singles.append(ours(**inputs, num_posterior_samples=1).logits.double().exp())
        torch.testing.assert_close(out.logits, torch.stack(singles).mean(0).log().float(), atol=2e-5, rtol=1e-4)
        assert out.kl > 0

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["llama", "opt", "bert-masked", "gpt2"])
    def test_table_and_looking_agree(self, name):
        """A family of the table, had it not been in it."""
        tiny_model, inputs = TINY[name], given(name)
        target = tiny_model.projection(0).partition(".0.")[2]
        # That of the attention ends in the same words.
        target = r".*layer\.\d\.output\.dense" if name == "bert-masked" else [target]
        one = retrofitted(name)
        other = retrofitted(name, target_modules=target)
        assert added(one).keys() == added(other).keys() and name in (*GENERATING, "bert-masked")
        with posterior_noise(UnitNoise()):
            expected = answer(one(**inputs, num_posterior_samples=2))
            assert torch.equal(answer(other(**inputs, num_posterior_samples=2)), expected)
