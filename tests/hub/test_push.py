"""Pushing to the Hub and loading from it, in processes of their own, against a double of its HTTP interface."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_double import HubDouble
from huggingface_hub import ModelCard

from hf_variational.hub.cards import is_untouched

ROOT = Path(__file__).parents[2]

MODEL = """
import sys
sys.path.insert(0, {tests!r})
import torch
from conftest import build
from huggingface_hub import HfApi
from hf_variational import VariationalGPTConfig, VariationalGPTForCausalLM, push_to_hub

model = build()
"""

LOAD = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_variational":
            raise ImportError(f"{name} is not here")

package = sys.argv[1] == "with"
if package:
    import hf_variational
else:
    sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("user/repo", **({} if package else {"trust_remote_code": True}))
ids = torch.tensor([[1, 5, 9]])
torch.manual_seed(3)
out = model(ids, num_posterior_samples=2).logits
print("RESULT", type(model).__module__.split(".")[0], float(model(ids).logits.abs().sum()), float(out.sum()))
"""


@pytest.fixture
def hub():
    with HubDouble() as hub:
        yield hub
        assert hub.unexpected == []


def run(hub, tmp_path, program: str, *arguments: str) -> list[str]:
    program = program.replace("{tests!r}", repr(str(Path(__file__).parent)))
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT")]


def test_push_then_load_with_and_without_the_package(hub, tmp_path):
    [[mean, sampled]] = run(
        hub,
        tmp_path,
        MODEL
        + """
VariationalGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
VariationalGPTConfig.register_for_auto_class()
model.push_to_hub("user/repo")
ids = torch.tensor([[1, 5, 9]])
torch.manual_seed(3)
out = model(ids, num_posterior_samples=2).logits
print("RESULT", float(model(ids).logits.abs().sum()), float(out.sum()))
""",
    )
    files = hub.repositories["user/repo"].files()
    assert {"config.json", "model.safetensors", "modeling_variational_gpt.py", "generation.py"} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    card = files["README.md"].decode()
    assert is_untouched(card) and 'from_pretrained("user/repo", trust_remote_code=True)' in card

    for how, module in (("with", "hf_variational"), ("without", "transformers_modules")):
        [[found, *values]] = run(hub, tmp_path / "", LOAD, how)
        assert found == module
        assert [float(value) for value in values] == pytest.approx([float(mean), float(sampled)], rel=1e-5)


def test_cards_on_the_hub_are_renewed_or_kept(hub, tmp_path):
    run(
        hub,
        tmp_path,
        MODEL
        + """
api = HfApi()
facts = {"data": "A book", "license": "apache-2.0"}
metrics = {"samples": {"perplexity": 3.0}, "conditions": {"num_posterior_samples": 8}}

push_to_hub(model, "user/first", facts=facts, metrics=metrics, private=True)
push_to_hub(model, "user/first", facts={**facts, "data": "Another book"}, metrics=metrics)
model.card_facts = {"data": "A third book"}
model.push_to_hub("user/first", tags=["tagged"])
model.save_pretrained("local", push_to_hub=True, repo_id="user/local")

model.card_facts = None
model.push_to_hub("user/edited")
api.upload_file(path_or_fileobj=b"# Mine", path_in_repo="README.md", repo_id="user/edited")
model.push_to_hub("user/edited")
push_to_hub(model, "user/edited", facts=facts, revision="next")
import pathlib
pathlib.Path("mine").mkdir()
pathlib.Path("mine/README.md").write_text("# Local")
model.save_pretrained("mine", push_to_hub=True, repo_id="user/mine")
""",
    )
    first = hub.repositories["user/first"]
    assert first.private
    cards = [ModelCard(files["README.md"].decode()) for _, files in first.commits.values() if "README.md" in files]
    assert [text for card in cards for text in ("A book", "Another book", "A third book") if text in card.text] == [
        "A book",
        "Another book",
        "A third book",
    ]
    assert {"tagged", "variational"} <= set(cards[-1].data.tags) and len(cards[-1].data.tags) == 4
    assert cards[0].data.license == "apache-2.0" and cards[0].data.eval_results[0].metric_value == 3.0
    assert "modeling_variational_gpt.py" in first.files()
    assert "A third book" in hub.repositories["user/local"].files()["README.md"].decode()
    edited = hub.repositories["user/edited"]
    # transformers puts an empty metadata block before a README without one
    assert edited.files()["README.md"] == edited.files("next")["README.md"] == b"---\n{}\n---\n# Mine"
    assert "modeling_variational_gpt.py" in edited.files("next")
    assert hub.repositories["user/mine"].files()["README.md"] == b"# Local"
    assert (tmp_path / "mine" / "README.md").read_text() == "# Local"


def test_a_retrofit_and_an_adapter_are_pushed_and_loaded_by_name(hub, tmp_path):
    pytest.importorskip("peft")
    [[mean, sampled, adapted]] = run(
        hub,
        tmp_path,
        """
import torch, peft, transformers as hf
from hf_variational import EVEAdapterConfig, push_to_hub, variationalize
torch.manual_seed(0)
config = hf.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)
base = hf.LlamaForCausalLM(config).eval()
base.push_to_hub("user/base")
adapter = peft.get_peft_model(
    hf.AutoModelForCausalLM.from_pretrained("user/base"), EVEAdapterConfig(layers="last", task_type="CAUSAL_LM")
).eval()
push_to_hub(adapter, "user/adapter")  # peft's own puts the Hub's empty form over the card
model = variationalize(base, layers="last")
model.push_to_hub("user/retrofit")
ids = torch.tensor([[1, 5, 9]])
values = [model(ids).logits]
for one in (model, adapter):
    torch.manual_seed(3)
    values.append(one(ids, num_posterior_samples=2).logits)
print("RESULT", *(float(value.abs().sum()) for value in values))
""",
    )
    retrofit, adapter = (set(hub.repositories[f"user/{name}"].files()) for name in ("retrofit", "adapter"))
    assert {"config.json", "model.safetensors", "README.md"} <= retrofit
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= adapter
    assert (
        "model.safetensors" not in adapter
        and "pip install" in hub.repositories["user/adapter"].files()["README.md"].decode()
    )
    [found] = run(
        hub,
        tmp_path,
        """
import torch, hf_variational, transformers as hf
from peft import AutoPeftModelForCausalLM
ids = torch.tensor([[1, 5, 9]])
model = hf.AutoModelForCausalLM.from_pretrained("user/retrofit").eval()
adapter = AutoPeftModelForCausalLM.from_pretrained("user/adapter").eval()
values = [model(ids).logits]
for one in (model, adapter):
    torch.manual_seed(3)
    values.append(one(ids, num_posterior_samples=2).logits)
stock = hf.LlamaForCausalLM.from_pretrained("user/retrofit").eval()
assert torch.equal(stock(ids).logits, values[0])
print("RESULT", type(model).__name__, *(float(value.abs().sum()) for value in values))
""",
    )
    assert found[0] == "VariationalLlamaForCausalLM"
    assert [float(value) for value in found[1:]] == pytest.approx(
        [float(mean), float(sampled), float(adapted)], rel=1e-5
    )
