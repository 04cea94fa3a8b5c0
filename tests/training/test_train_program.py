import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from training_models import assert_same_bits, weights
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from hf_variational.training import program
from hf_variational.training.recipe import recipe_from_dict

TEXT = "the cat sat on the mat. the dog sat on the log. " * 40


def recipe(folder, text, **changes):
    content = {
        "model": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "eve": {"scale": "unit"},
        },
        "data": {"train": str(text), "validation_fraction": 0.2, "block_size": 16},
        "tokenizer": {"vocab_size": 270},
        "arguments": {
            "output_dir": str(folder),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 2,
            "save_steps": 2,
            "eval_posterior_samples": 2,
            "disable_tqdm": True,
            "use_cpu": True,
        },
    }
    for path, value in changes.items():
        *sections, key = path.split("__")
        section = content
        for name in sections:
            section = section[name]
        section[key] = value
    return recipe_from_dict(content)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def train_script():
    spec = importlib.util.spec_from_file_location("train_script", Path(__file__).parents[2] / "training" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_recipe(folder, text, **changes):
    # JSON is YAML
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe(folder / "run", text, **changes).to_dict()))
    return str(file)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(signal.SIGINT)


def stop_at(monkeypatch, step):
    inner = program.VariationalTrainer

    class Stopping(inner):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, callbacks=[StopAt(step)], **kwargs)

    monkeypatch.setattr(program, "VariationalTrainer", Stopping)
    return lambda: monkeypatch.setattr(program, "VariationalTrainer", inner)


def test_a_run_leaves_model_tokenizer_state_and_metrics(tmp_path, text):
    folder = tmp_path / "run"
    trainer = program.run(recipe(folder, text))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert_same_bits(weights(trainer.model), weights(model))
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert model.config.vocab_size == len(tokenizer) <= 270
    assert model.config.eos_token_id == tokenizer.eos_token_id and model.config.pad_token_id == tokenizer.pad_token_id
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 4

    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["evaluation"]["eval_mutual_information"] > 0
    assert metrics["evaluation"]["eval_mean_pass_nll"] > 0 and metrics["train"]["train_loss"] > 0
    facts = metrics["facts"]
    assert facts["steps"] == 4 and facts["processes"] == 1 and facts["eval_posterior_samples"] == 2
    assert facts["variational_parameters"] == sum(p.numel() for n, p in model.named_parameters() if ".eve." in n) > 0
    assert facts["validation_blocks"] == round(0.2 * (facts["train_blocks"] + facts["validation_blocks"]))
    assert not list(folder.glob("*.part"))


def test_twin_and_eve_see_the_same_blocks(tmp_path, text):
    eve = program.run(recipe(tmp_path / "eve", text, arguments__max_steps=1))
    twin = program.run(recipe(tmp_path / "twin", text, arguments__max_steps=1, model__eve=None, arguments__seed=7))
    for name in ("train_dataset", "eval_dataset"):
        assert getattr(eve, name)["input_ids"] == getattr(twin, name)["input_ids"]
    assert not twin.model.variational_layers


def test_a_validation_text_of_its_own(tmp_path, text):
    other = tmp_path / "other.txt"
    other.write_text("a cat and a dog. " * 30)
    changes = {"data__validation": str(other), "data__validation_fraction": 0.0, "data__separate_documents": True}
    trainer = program.run(recipe(tmp_path / "run", text, arguments__max_steps=1, **changes))
    assert len(trainer.eval_dataset) > 0 and "position_ids" in trainer.eval_dataset.column_names
    without = program.run(recipe(tmp_path / "none", text, arguments__max_steps=1, data__validation_fraction=0.0))
    assert without.eval_dataset is None


def test_a_run_starts_from_a_pretrained_llama(tmp_path, text):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    )
    llama.half().save_pretrained(tmp_path / "llama")
    changes = {"model": {"pretrained": str(tmp_path / "llama"), "eve": {"scale": "unit", "initial_scale": 0.02}}}
    trainer = program.run(
        recipe(tmp_path / "run", text, arguments__max_steps=1, arguments__learning_rate=0.0, **changes)
    )
    weight = trainer.model.model.layers[1].mlp.up_proj.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, llama.model.layers[1].mlp.up_proj.weight.float())
    assert trainer.model.config.eve.initial_scale == 0.02
    assert trainer.model.model.layers[0].mlp.eve.log_scale.exp().mean().item() == pytest.approx(0.02)


def test_another_architecture_is_no_start(tmp_path, text):
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="is a model of type 'gpt2'"):
        program.run(recipe(tmp_path / "run", text, model={"pretrained": str(tmp_path / "gpt2")}))


def test_an_occupied_folder_is_refused_and_left_as_it_was(tmp_path, text):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    for resume, error in ((False, FileExistsError), (True, ValueError)):
        with pytest.raises(error, match="run"):
            program.run(recipe(folder, text), resume=resume)
    assert [file.name for file in folder.iterdir()] == ["thesis.tex"]
    with pytest.raises(FileExistsError, match="is a file"):
        program.run(recipe(text, text))


def test_an_interrupted_run_resumes_to_the_same_bits(tmp_path, text, monkeypatch):
    whole = program.run(recipe(tmp_path / "whole", text))
    undo = stop_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        program.run(recipe(tmp_path / "stopped", text))
    undo()
    assert not (tmp_path / "stopped" / "metrics.json").exists()
    with pytest.raises(FileExistsError, match="--resume"):
        program.run(recipe(tmp_path / "stopped", text))
    resumed = program.run(recipe(tmp_path / "stopped", text), resume=True)
    assert_same_bits(weights(whole.model), weights(resumed.model))
    timing = ("runtime", "per_second", "model_preparation_time")
    left, right = (
        {
            name: value
            for name, value in json.loads((tmp_path / run / "metrics.json").read_text())["evaluation"].items()
            if not name.endswith(timing)
        }
        for run in ("whole", "stopped")
    )
    assert left == right


def test_a_run_stopped_before_its_first_checkpoint_starts_again(tmp_path, text, monkeypatch):
    def at_once(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(program.VariationalTrainer, "_will_log", at_once)
    with pytest.raises(KeyboardInterrupt):
        program.run(recipe(tmp_path / "run", text))
    monkeypatch.undo()
    assert program.run(recipe(tmp_path / "run", text), resume=True).state.global_step == 4


def test_a_longer_run_goes_on_from_a_named_checkpoint(tmp_path, text):
    program.run(recipe(tmp_path / "run", text))
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    longer = program.run(recipe(tmp_path / "longer", text, arguments__max_steps=6), resume=checkpoint)
    assert longer.state.global_step == 6
    with pytest.raises(ValueError, match="checkpoint-3 is not a complete checkpoint"):
        program.run(recipe(tmp_path / "more", text), resume=str(tmp_path / "run" / "checkpoint-3"))


def test_another_recipe_does_not_go_on_with_a_run(tmp_path, text):
    program.run(recipe(tmp_path / "run", text))
    for changes, name in (
        ({"model__hidden_size": 32}, "model.hidden_size=16, the recipe 32"),
        ({"data__block_size": 8}, "data.block_size=16, the recipe 8"),
        ({"tokenizer__vocab_size": 280}, "tokenizer.vocab_size=270, the recipe 280"),
    ):
        with pytest.raises(ValueError, match=name):
            program.run(recipe(tmp_path / "run", text, **changes), resume=True)


def test_sizes_that_do_not_fit_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match="vocab_size=100 is too small for the tokenizer's"):
        program.run(recipe(tmp_path / "a", text, model__vocab_size=100))
    with pytest.raises(ValueError, match="block_size=16 is longer than the model's max_position_embeddings=8"):
        program.run(recipe(tmp_path / "b", text, model__max_position_embeddings=8))
    with pytest.raises(ValueError, match="too few to hold"):
        program.run(recipe(tmp_path / "c", text, data__block_size=10_000))


# ---- the script ----


def test_the_script_trains_refuses_and_resumes(tmp_path, text, capsys):
    main = train_script().main
    file = write_recipe(tmp_path, text)
    assert main([file, "arguments.max_steps=2"]) == 0
    assert main([file]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert main([file, "--resume"]) == 0
    assert json.loads((tmp_path / "run" / "trainer_state.json").read_text())["global_step"] == 4
    assert main([file, "arguments.max_step=2", "--resume"]) == 1
    assert "did you mean 'max_steps'" in capsys.readouterr().err


def test_the_script_says_how_to_go_on_after_ctrl_c(tmp_path, text, capsys, monkeypatch):
    stop_at(monkeypatch, 1)
    assert train_script().main([write_recipe(tmp_path, text)]) == 130
    assert "checkpoint-2 is saved" in (message := capsys.readouterr().err) and "--resume" in message
    assert os.path.isfile(tmp_path / "run" / "checkpoint-2" / "trainer_state.json")


def test_the_script_names_an_empty_text(tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert train_script().main([write_recipe(tmp_path, empty)]) == 1
    assert f"{empty} is empty" in capsys.readouterr().err


def test_processes_that_were_asked_for_and_not_started_are_missed():
    refuse = train_script().refuse_lost_processes
    asked = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}
    with pytest.raises(SystemExit, match="two_cpu_processes.yaml"):
        refuse(asked)
    refuse({**asked, "WORLD_SIZE": "2"})
    refuse({"ACCELERATE_USE_CPU": "True"})
    refuse({"MASTER_ADDR": "127.0.0.1"})
