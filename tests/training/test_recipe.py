from pathlib import Path

import pytest
import yaml

from hf_variational.training.recipe import load_recipe, recipe_from_dict

RECIPES = Path(__file__).parents[2] / "training" / "recipes"


def content(**changes):
    base = {
        "model": {"hidden_size": 16, "eve": {"scale": "unit"}},
        "data": {"train": "a.txt", "block_size": 32},
        "tokenizer": {"vocab_size": 300},
        "arguments": {"output_dir": "out", "learning_rate": 0.001},
    }
    for path, value in changes.items():
        section, _, key = path.partition("__")
        base[section] = {**base[section], key: value} if key else value
    return base


def write(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("unknown", "nearest", "section"),
    [
        ({"modell": {}}, "model", ""),
        ({"model__hidden_sice": 8}, "hidden_size", "section `model`"),
        ({"model__eve": {"inital_scale": 0.1}}, "initial_scale", "`eve`"),
        ({"data__block_sise": 8}, "block_size", "section `data`"),
        ({"tokenizer__vocabsize": 8}, "vocab_size", "section `tokenizer`"),
        ({"arguments__learningrate": 0.1}, "learning_rate", "section `arguments`"),
        ({"arguments__kl_schedul": "constant"}, "kl_schedule", "section `arguments`"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_name(unknown, nearest, section):
    given = {**content(), **unknown} if "modell" in unknown else content(**unknown)
    with pytest.raises(ValueError, match=f"unknown key .*did you mean '{nearest}'") as error:
        recipe_from_dict(given, where="my.yaml")
    assert section in str(error.value) and "my.yaml" in str(error.value)


def test_a_key_like_no_other_gets_the_list():
    with pytest.raises(ValueError, match="unknown key 'zzz': the names are train, validation"):
        recipe_from_dict(content(data__zzz=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arguments__learning_rate": "fast"}, "`learning_rate` is float, got 'fast'"),
        ({"arguments__max_steps": 1.5}, "`max_steps` is int, got 1.5"),
        ({"arguments__max_steps": True}, "`max_steps` is int, got True"),
        ({"arguments__bf16": "yes please"}, "`bf16` is bool, got 'yes please'"),
        ({"model__hidden_size": "wide"}, "`hidden_size` is int, got 'wide'"),
        ({"model__eve": "gaussian"}, "`eve` is a mapping, or null"),
        ({"data__block_size": None}, "`block_size` is int, got None"),
        ({"data__validation_fraction": 1.0}, "`validation_fraction` is a number in"),
        ({"arguments": {"seed": 1}}, "no `output_dir`"),
        ({"data": {"block_size": 8}}, "no `train`"),
        ({"data": None}, "no section `data`"),
        ({"model": [1]}, "`model` is a mapping"),
    ],
)
def test_bad_values_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        recipe_from_dict(content(**change))


def test_validation_is_given_once():
    with pytest.raises(ValueError, match="not both"):
        recipe_from_dict(content(data={"train": "a", "validation": "b", "validation_fraction": 0.1}))


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    file = write(
        tmp_path, "data: {train: a.txt}\narguments: {output_dir: out, learning_rate: 1e-3, kl_weight: 2.5E-4}"
    )
    recipe = load_recipe(file)
    assert recipe.arguments["learning_rate"] == 0.001 and recipe.arguments["kl_weight"] == 0.00025
    assert recipe.tokenizer.vocab_size == 4096 and recipe.model == {}


def test_no_is_a_word_and_true_is_not(tmp_path):
    file = write(tmp_path, "data: {train: a.txt}\narguments: {output_dir: out, eval_strategy: no, bf16: true}")
    arguments = load_recipe(file, ["arguments.save_strategy=no", "arguments.report_to=none"]).arguments
    assert arguments["eval_strategy"] == arguments["save_strategy"] == "no" and arguments["bf16"] is True
    assert arguments["report_to"] == "none"
    assert yaml.safe_load("no") is False


def test_a_tokenizer_is_named_in_short(tmp_path):
    file = write(tmp_path, "data: {train: a.txt}\narguments: {output_dir: out}\ntokenizer: some/folder")
    assert load_recipe(file).tokenizer.name == "some/folder"


def test_overrides_are_checked_like_the_rest(tmp_path):
    file = write(tmp_path, yaml.safe_dump(content()))
    recipe = load_recipe(file, ["arguments.learning_rate=3e-4", "model.eve.scale=scalar", "tokenizer.vocab_size=512"])
    assert recipe.arguments["learning_rate"] == 3e-4
    assert recipe.model["eve"] == {"scale": "scalar"} and recipe.tokenizer.vocab_size == 512
    with pytest.raises(ValueError, match="did you mean 'max_steps'"):
        load_recipe(file, ["arguments.max_step=3"])
    with pytest.raises(ValueError, match="write section.key=value"):
        load_recipe(file, ["max_steps"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {train: a, train: b}", "the key 'train' stands twice"),
        ("data: [", "is not YAML"),
        ("just text", "is not a recipe"),
        ("", "is not a recipe"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, text))


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.yaml"):
        load_recipe(tmp_path / "gone.yaml")


def test_plain_values_go_round():
    recipe = recipe_from_dict(content())
    assert recipe_from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_are_valid(file, tmp_path):
    from hf_variational import VariationalGPTConfig, VariationalTrainingArguments

    recipe = load_recipe(file, [f"arguments.output_dir={tmp_path}", "arguments.use_cpu=true"])
    VariationalTrainingArguments(**recipe.arguments)
    VariationalGPTConfig(**recipe.model)


def test_shipped_twin_differs_in_the_noise_alone():
    eve, twin = load_recipe(RECIPES / "eve.yaml"), load_recipe(RECIPES / "twin.yaml")
    assert eve.data == twin.data and eve.tokenizer == twin.tokenizer
    assert {key for key in eve.model if eve.model[key] != twin.model[key]} == {"eve"} and twin.model["eve"] is None
    different = {key for key in eve.arguments if eve.arguments[key] != twin.arguments.get(key)}
    assert different == {"output_dir", "kl_schedule", "kl_warmup_ratio", "kl_weight"}
