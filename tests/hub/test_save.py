"""What `save_pretrained` and `save_for_hub` leave in a folder."""

import ast
import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_variational import VariationalGPTConfig, VariationalGPTForCausalLM, modeling, save_for_hub
from hf_variational.hub.cards import is_untouched
from hf_variational.modeling import saving

MODELING = Path(modeling.__file__).parent


def siblings(file: Path, seen: set[str]) -> set[str]:
    """The names of the modules that a module needs from its own folder, found by parsing it."""
    if file.stem not in seen:
        seen.add(file.stem)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, ast.unparse(node)
                siblings(MODELING / f"{node.module}.py", seen)
    return seen


def tokenizer():
    vocabulary = {"<unk>": 0, "a": 1, "b": 2}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")))


def test_a_plain_save_writes_weights_and_a_card(model, tmp_path):
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    card = (tmp_path / "README.md").read_text()
    assert is_untouched(card) and "Not measured." in card and "needs the package" in card
    assert f'from_pretrained("{tmp_path.name}")' in card


@pytest.mark.usefixtures("registered")
def test_a_registered_class_brings_all_of_its_code(model, tmp_path):
    model.save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_variational_gpt.VariationalGPTConfig",
        "AutoModelForCausalLM": "modeling_variational_gpt.VariationalGPTForCausalLM",
    }
    needed = siblings(MODELING / "modeling_variational_gpt.py", set())
    assert {"generation", "outputs", "saving"} <= needed
    assert {path.stem for path in tmp_path.glob("*.py")} == needed
    for name in needed:
        assert (tmp_path / f"{name}.py").read_bytes() == (MODELING / f"{name}.py").read_bytes()
    assert "trust_remote_code=True" in (tmp_path / "README.md").read_text()
    assert load_file(tmp_path / "model.safetensors")


def test_the_modelling_code_needs_only_torch_and_transformers():
    for file in MODELING.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                allowed = {"torch", "transformers", "safetensors", *sys.stdlib_module_names}
                assert name.split(".")[0] in allowed, f"{file.name} imports {name}"


def test_save_for_hub_needs_no_registration_and_leaves_no_trace(model, tmp_path):
    metrics = {"mean_pass": {"nll": 1.5}}
    save_for_hub(model, tmp_path / "full", tokenizer(), facts={"data": "A book"}, metrics=metrics)
    names = {path.name for path in (tmp_path / "full").iterdir()}
    assert {"tokenizer.json", "modeling_variational_gpt.py", "model.safetensors", "README.md"} <= names
    card = (tmp_path / "full" / "README.md").read_text()
    assert "A book" in card and "| NLL | 1.5 |" in card
    assert "trust_remote_code=True" in card and "AutoTokenizer" in card
    assert VariationalGPTForCausalLM._auto_class is None and VariationalGPTConfig._auto_class is None
    model.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    with pytest.raises(ValueError, match="is a file"):
        save_for_hub(model, tmp_path / "plain" / "config.json")


def test_what_training_recorded_stays_with_the_model(model, tmp_path):
    model.card_facts, model.card_metrics = {"data": "A book"}, {"eval_nll": 1.5}
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "A book" in card and "| NLL | 1.5 |" in card
    assert not any("card" in name for name in json.loads((tmp_path / "config.json").read_text()))


def test_a_card_that_cannot_be_written_does_not_lose_the_save(model, tmp_path, caplog):
    logger = logging.getLogger("hf_variational.hub.save")
    logger.addHandler(caplog.handler)
    model.card_metrics = {"speed": 3}
    model.save_pretrained(tmp_path)
    logger.removeHandler(caplog.handler)
    assert "No model card was written" in caplog.text and "speed" in caplog.text
    assert AutoModelForCausalLM.from_pretrained(tmp_path) is not None
    with pytest.raises(ValueError, match="speed"):
        save_for_hub(model, tmp_path)


@pytest.mark.parametrize("written", [b"# Mine\n", b"---\nlicense: mit\n---\nMine", b"\xff\xfe no text", b"<!-- -->"])
def test_a_person_s_readme_is_kept(model, tmp_path, written):
    (tmp_path / "README.md").write_bytes(written)
    model.save_pretrained(tmp_path)
    save_for_hub(model, tmp_path, facts={"data": "A book"})
    assert (tmp_path / "README.md").read_bytes() == written


def test_our_own_card_is_renewed_until_somebody_edits_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    save_for_hub(model, tmp_path, facts={"data": "A book"})
    card = tmp_path / "README.md"
    assert "A book" in card.read_text()
    edited = card.read_text().replace("A book", "A good book")
    card.write_text(edited)
    save_for_hub(model, tmp_path, facts={"data": "Another"})
    assert card.read_text() == edited
    assert [path.name for path in tmp_path.glob(".README*")] == []


def test_without_the_package_saving_is_transformers_own(model, tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "_card_writer", None)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_another_rank_writes_no_card(model, tmp_path):
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()
    assert saving._readme_before == {}


def test_the_number_of_samples_survives_in_the_generation_config(model, tmp_path):
    model.generation_config.num_posterior_samples = 5
    model.generation_config._from_model_config = False
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.generation_config.num_posterior_samples == 5
    assert "draws 5 posterior samples" in (tmp_path / "README.md").read_text()
    again.save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again").generation_config.num_posterior_samples == 5


def test_shards_and_settings_come_back(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).eve == model.config.eve
    ids = torch.arange(6)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0, atol=0)
    # what the card says of a stock Llama
    llama = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(llama(ids).logits, model(ids).logits)


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
@pytest.mark.parametrize("left", [0, 4, 100, -10])
def test_a_file_that_was_cut_off_is_named(model, tmp_path, left, shards):
    model.save_pretrained(tmp_path, max_shard_size=shards)
    cut = max(tmp_path.glob("*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:left])
    with pytest.raises(OSError, match=rf"{cut.name} is not a whole safetensors file"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
