"""A training run from a recipe: what `hf-variational train` and `training/train.py` do."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, default_data_collator, set_seed
from transformers.utils import logging

from ..files import write_whole
from ..modeling import VariationalGPTConfig, VariationalGPTForCausalLM
from ..modeling.saving import write_card
from .arguments import VariationalTrainingArguments
from .checkpoints import last_complete_checkpoint
from .data import cut, load_text, pack, train_tokenizer
from .naming import is_variational
from .recipe import MODEL_KEYS, Recipe, load_recipe, recipe_from_dict
from .retrofitting import base_facts, calibrate, card_recipe, load_pretrained, make_variational, send_posteriors
from .settings import settings_of
from .trainer import VariationalTrainer

logger = logging.get_logger(__name__)

RECIPE_FILE = "recipe.json"
METRICS_FILE = "metrics.json"
# Which blocks are held out does not depend on the training's seed, so that runs of several seeds share them.
_SPLIT_SEED = 0


def run(
    recipe: Recipe | str | os.PathLike,
    resume: bool | str = False,
    *,
    prepare: Callable[[PreTrainedModel], PreTrainedModel] | None = None,
) -> VariationalTrainer:
    """
    Trains as the recipe says and returns the trainer.

    The output folder gets the recipe and the tokenizer at once, checkpoints on the way, and in the end the model (load
    it with `AutoModelForCausalLM`), the trainer's state and `metrics.json`.

    Args:
        recipe: A [`Recipe`], or the path of one.
        resume (`bool` or `str`, defaults to `False`):
            Goes on from the newest complete checkpoint of the output folder (an empty folder starts a new run), or
            from the checkpoint named.
        prepare (*optional*): What becomes of the model between its making and its training.

    Raises:
        FileExistsError: if the output folder is not empty and the run is not to resume.
        ValueError: if it is to resume and there is no checkpoint, or the recipe is another.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    if recipe.retrofit is not None and recipe.retrofit.train == "none":
        raise ValueError("This recipe trains nothing (`retrofit.train: none`): give it to `hf-variational retrofit`.")
    args = VariationalTrainingArguments(**recipe.arguments)
    checkpoint = _on_main_process_first(args, lambda: _check_output_folder(Path(args.output_dir), recipe, resume))
    data = read_data(recipe, args)
    model = make_model(recipe, args, data, calibrated=checkpoint is not None)
    if prepare is not None:
        model = prepare(model)
    trainer = make_trainer(model, args, data)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    evaluation = trainer.evaluate() if data.validation is not None else {}
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        if not hasattr(model, "peft_config"):
            write_card(model, args.output_dir)  # once more, for the tokenizer is there by now
        _write_json(Path(args.output_dir) / METRICS_FILE, _metrics(trainer, result.metrics, evaluation))
    # A process that leaves right after its last collective can hang in gloo's destructor.
    trainer.accelerator.wait_for_everyone()
    return trainer


@dataclass(frozen=True)
class RunData:
    """
    What a recipe's sections `data` and `tokenizer` name, read.

    Attributes:
        tokenizer: Of the text, and saved beside the model.
        train, validation: Blocks of tokens; `validation` is `None` where the recipe names none.
        calibration: Blocks that a retrofit is calibrated on, held out of `train`.
    """

    tokenizer: object
    train: object
    validation: object | None
    calibration: list[dict] | None


def read_data(recipe: Recipe, args: VariationalTrainingArguments) -> RunData:
    """The tokenizer (one that is trained is saved to `args.output_dir`, or taken from there) and the blocks."""
    tokenizer = _tokenizer(recipe, args)
    train, validation = _blocks(recipe, args, tokenizer)
    calibration, train = _calibration_blocks(recipe, train)
    return RunData(tokenizer, train, validation, calibration)


def make_model(recipe: Recipe, args: VariationalTrainingArguments, data: RunData, calibrated: bool = False):
    """
    The model that a run trains, seeded with `args.seed`; a retrofit is calibrated, unless a checkpoint that it goes on
    from has that done (`calibrated`).
    """
    set_seed(args.seed)
    model = build_model(recipe, data.tokenizer)
    if recipe.retrofit is not None:
        if not calibrated:
            _calibrate(model, recipe, args, data.calibration)
        _prepare_saving(model, recipe, args)
    return model


def make_trainer(model, args: VariationalTrainingArguments, data: RunData) -> VariationalTrainer:
    """The trainer of a run."""
    return VariationalTrainer(
        model,
        args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.tokenizer,
        data_collator=default_data_collator,
    )


def build_model(recipe: Recipe, tokenizer):
    """
    The model of a recipe, in train mode: a `VariationalGPTForCausalLM` whose vocabulary and special tokens are the
    tokenizer's, or a retrofit.
    """
    model = _new_model(recipe, tokenizer)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and recipe.data.block_size > longest:
        raise ValueError(
            f"block_size={recipe.data.block_size} is longer than the model's max_position_embeddings={longest}: lower "
            "one, or raise the other."
        )
    return model.train()


def _new_model(recipe: Recipe, tokenizer):
    if recipe.retrofit is not None:
        return make_variational(load_pretrained(recipe.retrofit), recipe.retrofit)
    fields = {name: value for name, value in recipe.model.items() if name not in MODEL_KEYS}
    options = {name: recipe.model[name] for name in ("attn_implementation",) if name in recipe.model}
    pretrained = recipe.model.get("pretrained")
    if pretrained is not None:
        config = _pretrained_config(pretrained, {**fields, **options})
        # half-precision weights would round the updates away; mixed precision is an argument of the training
        model = VariationalGPTForCausalLM.from_pretrained(
            pretrained, config=config, dtype=fields.get("dtype", "float32")
        )
    else:
        special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        special["pad_token_id"] = tokenizer.pad_token_id
        defaults = {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": max(recipe.data.block_size, VariationalGPTConfig.max_position_embeddings),
        }
        model = VariationalGPTForCausalLM(VariationalGPTConfig(**{**defaults, **special, **fields, **options}))
    if model.config.vocab_size < len(tokenizer):
        raise ValueError(
            f"vocab_size={model.config.vocab_size} is too small for the tokenizer's {len(tokenizer)} tokens: leave it "
            "out of the recipe's section `model`, or name the model's own tokenizer."
        )
    return model


def _pretrained_config(pretrained: str, fields: dict) -> VariationalGPTConfig:
    stored, _ = VariationalGPTConfig.get_config_dict(pretrained)
    kind = stored.pop("model_type", None)
    if kind not in ("llama", VariationalGPTConfig.model_type):
        raise ValueError(
            f"pretrained={pretrained!r} is a model of type {kind!r}: a recipe starts from the Llama architecture or "
            "from a VariationalGPT."
        )
    for name in ("architectures", "transformers_version", "auto_map"):
        stored.pop(name, None)
    return VariationalGPTConfig(**{**stored, **fields})


# ---- A retrofit ----


def _calibration_blocks(recipe: Recipe, blocks):
    """The blocks a retrofit is calibrated on, and those that are left to train on."""
    if recipe.retrofit is None:
        return None, blocks
    count = recipe.retrofit.calibration.sequences
    if not hasattr(blocks, "train_test_split"):
        return list(blocks.take(count)), blocks.skip(count)
    if count >= len(blocks):
        raise ValueError(
            f"The training text makes {len(blocks)} sequences: too few to calibrate on {count} and to train. Lower "
            "`retrofit.calibration.sequences`, or give more text."
        )
    parts = blocks.train_test_split(test_size=count, seed=_SPLIT_SEED)
    return list(parts["test"]), parts["train"]


def _calibrate(model, recipe: Recipe, args, rows: list[dict]) -> None:
    # also the other processes' models go where they are trained: a broadcast may know that device alone
    model.to(args.device)
    _on_main_process_first(
        args,
        lambda: calibrate(
            model,
            recipe.retrofit,
            rows,
            num_posterior_samples=args.eval_posterior_samples or 8,
            batch_size=args.per_device_eval_batch_size,
            seed=args.seed,
            progress=not args.disable_tqdm,
        ),
    )
    send_posteriors(model)


def _prepare_saving(model, recipe: Recipe, args) -> None:
    """What a checkpoint says of itself: that `generate` draws samples, and in its card where it comes from."""
    if args.eval_posterior_samples and hasattr(model, "generation_config"):
        model.generation_config.num_posterior_samples = args.eval_posterior_samples
    model.card_facts = {**base_facts(recipe.retrofit.model), "seeds": [args.seed], "recipe": card_recipe(recipe)}


# ---- The output folder ----


def _on_main_process_first(args, check):
    """What `check` returns or raises on the main process, on every process: the others would see what it wrote."""
    from accelerate.utils import broadcast_object_list

    outcome = [None, None]
    if args.process_index == 0:
        try:
            outcome[0] = check()
        except (OSError, ValueError) as error:
            outcome[1] = error
    if args.world_size > 1:
        broadcast_object_list(outcome, from_process=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _check_output_folder(folder: Path, recipe: Recipe, resume: bool | str) -> str | None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"The output folder {folder} is a file: name another `output_dir`.")
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied and not resume:
        raise FileExistsError(
            f"The output folder {folder} is not empty: resume its run (`--resume`), or name another `output_dir`. "
            "Nothing was written."
        )
    checkpoint = None
    if isinstance(resume, (str, os.PathLike)):
        checkpoint = os.fspath(resume)
        if not os.path.isfile(os.path.join(checkpoint, "trainer_state.json")):
            raise ValueError(f"{checkpoint} is not a complete checkpoint: it has no trainer_state.json.")
    elif occupied:
        checkpoint = last_complete_checkpoint(folder)
        finished = (folder / METRICS_FILE).is_file()
        if checkpoint is None and (finished or not _only_ours(folder)):
            raise ValueError(
                f"There is no complete checkpoint in {folder} to resume from: name another `output_dir`, or empty "
                "this one."
            )
    _check_same_recipe(folder / RECIPE_FILE, recipe)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / RECIPE_FILE, recipe.to_dict())
    return checkpoint


def _only_ours(folder: Path) -> bool:
    """Whether a run was stopped here before its first checkpoint: there is nothing to lose."""
    return (folder / RECIPE_FILE).is_file() and not (folder / "config.json").exists()


def _check_same_recipe(file: Path, recipe: Recipe) -> None:
    """A checkpoint goes on with its model and its data; the arguments may change."""
    if not file.is_file():
        return
    before = recipe_from_dict(json.loads(file.read_text(encoding="utf-8")), where=str(file)).to_dict()
    now = json.loads(json.dumps(recipe.to_dict()))
    for section in ("model", "data", "tokenizer", "retrofit"):
        here, there = now[section] or {}, before[section] or {}
        for key in sorted({*there, *here} - {"num_proc"}):
            old, new = there.get(key), here.get(key)
            if old != new:
                raise ValueError(
                    f"The run in {file.parent} has {section}.{key}={old!r}, the recipe {new!r}: resume with the run's "
                    "recipe, or name another `output_dir`."
                )


def _write_json(file: Path, content: dict) -> None:
    write_whole(file, json.dumps(content, indent=2) + "\n")


# ---- Tokenizer and data ----


def _tokenizer(recipe: Recipe, args):
    name = recipe.tokenizer.name or (recipe.retrofit and recipe.retrofit.model)
    if name is not None:
        return AutoTokenizer.from_pretrained(name)
    folder = Path(args.output_dir)
    with args.main_process_first(desc="training the tokenizer"):
        if not (folder / "tokenizer.json").is_file():
            text = load_text(recipe.data.train)
            trained = train_tokenizer(text, recipe.tokenizer.vocab_size, recipe.tokenizer.min_frequency)
            trained.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


def _blocks(recipe: Recipe, args, tokenizer):
    data = recipe.data
    make, options = cut, {"num_proc": data.num_proc}
    if recipe.retrofit is None:
        make, options = pack, {**options, "separate_documents": data.separate_documents}
    with args.main_process_first(desc="packing the text"):
        blocks = make(load_text(data.train), tokenizer, data.block_size, **options)
        if data.validation is not None:
            return blocks, make(load_text(data.validation), tokenizer, data.block_size, **options)
    if not data.validation_fraction:
        return blocks, None
    if not hasattr(blocks, "train_test_split"):
        raise ValueError("A streamed text has no number of blocks to hold a share of out: name a `validation` text.")
    if len(blocks) < 2:
        raise ValueError(
            f"The training text makes {len(blocks)} block of {data.block_size} tokens: too few to hold "
            f"validation_fraction={data.validation_fraction} of them out. Lower `block_size`, or give more text."
        )
    held_out = min(max(1, round(data.validation_fraction * len(blocks))), len(blocks) - 1)
    parts = blocks.train_test_split(test_size=held_out, seed=_SPLIT_SEED)
    return parts["train"], parts["test"]


def _metrics(trainer: VariationalTrainer, train: dict, evaluation: dict) -> dict:
    model, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    variational = sum(p.numel() for name, p in model.named_parameters() if is_variational(name))
    total = sum(p.numel() for p in model.parameters())
    samples = args.train_posterior_samples
    samples = settings_of(model).num_posterior_samples if samples is None else samples
    facts = {
        "parameters": total,
        "variational_parameters": variational,
        "steps": trainer.state.global_step,
        "seed": args.seed,
        "processes": args.world_size,
        "device": args.device.type,
        "precision": str(model.dtype).removeprefix("torch.") if args.mixed_precision == "no" else args.mixed_precision,
        "train_posterior_samples": samples if model.variational_layers else 0,
        "eval_posterior_samples": args.eval_posterior_samples if model.variational_layers else 0,
    }
    for name, dataset in (("train_blocks", trainer.train_dataset), ("validation_blocks", trainer.eval_dataset)):
        if dataset is not None and hasattr(dataset, "__len__"):
            facts[name] = len(dataset)
    return {"facts": facts, "train": train, "evaluation": evaluation}
