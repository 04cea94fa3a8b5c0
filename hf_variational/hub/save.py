"""Saving and pushing a checkpoint whole: safetensors, the modelling code, the tokenizer, and a card.

Importing this module has `save_pretrained` and `push_to_hub` of the package's models write a card as well.
"""

import contextlib
import copy
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..modeling.saving import register_card_writer
from .adapters import forget_record, is_adapter, write_record
from .cards import as_list, is_untouched, model_card
from .described import auto_class, is_retrofit

logger = logging.get_logger(__name__)


def write_model_card(
    model,
    directory: str | os.PathLike,
    readme_before: bytes | None = None,
    repo_id: str | None = None,
    facts: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> bool:
    """
    Writes the card of a saved model, `README.md`, unless a person wrote one.

    Args:
        model: The model saved in `directory`. What its attributes `card_facts` and `card_metrics` hold stands in for
            `facts` and `metrics`, so that a later `save_pretrained` or `push_to_hub` keeps what training recorded.
        directory: The folder with the weights.
        readme_before (`bytes`, *optional*):
            The README as it stood before the save, which counts before the one that now lies there.
        repo_id (`str`, *optional*): The repository it goes to, for the examples in the card.
        facts, metrics: See [`model_card`].

    Returns:
        `bool`: Whether a card was written.
    """
    if is_adapter(model):
        forget_record(directory)
        return write_record(directory, facts, metrics)
    directory = Path(directory)
    readme = directory / "README.md"
    now = readme.read_bytes() if readme.is_file() else None
    for content in (readme_before, now):
        if content is not None and not _ours(content):
            if content != now:
                _write(readme, content)
            logger.info(f"{readme} was written by a person and stays as it is.")
            return False
    has_code = bool(getattr(model.config, "auto_map", None)) and any(directory.glob("modeling_*.py"))
    has_tokenizer = any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    facts = dict(facts if facts is not None else getattr(model, "card_facts", None) or {})
    # `push_to_hub(tags=...)` and `add_model_tags` end up in the card that is replaced here
    facts["tags"] = [*as_list(facts.get("tags")), *(getattr(model, "model_tags", None) or []), *_tags(now)]
    text = model_card(
        model,
        facts,
        metrics if metrics is not None else getattr(model, "card_metrics", None),
        path=repo_id or directory.resolve().name,
        has_code=has_code,
        has_tokenizer=has_tokenizer,
    )
    _write(readme, text.encode())
    return True


def _ours(content: bytes) -> bool:
    """Whether nobody loses work when this README is replaced: our own card untouched, or transformers' empty form."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return False
    return not text.strip() or is_untouched(text) or _is_empty_form(text)


def _tags(content: bytes | None) -> list[str]:
    from huggingface_hub import ModelCard

    return list(ModelCard(content.decode()).data.tags or []) if content and content.strip() else []


def _is_empty_form(text: str) -> bool:
    from huggingface_hub import ModelCard, ModelCardData

    if "This model card has been automatically generated." not in text:
        return False
    description = (
        "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been "
        "automatically generated."
    )
    empty = ModelCard.from_template(ModelCardData(library_name="transformers"), model_description=description)
    try:
        return ModelCard(text).text.strip() == empty.text.strip()
    except Exception:  # metadata that does not parse was not written by transformers
        return False


def _write(path: Path, content: bytes) -> None:
    # beside the old one and then over it: an interrupted write leaves the old card whole
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _with_code(model) -> Iterator[None]:
    """`register_for_auto_class` for one save: it acts on the classes, and an `auto_map` stays in the config.

    The class of a retrofit was made, and has no file that could be copied.
    """
    if is_retrofit(model):
        yield
        return
    config, model_class, config_class = model.config, type(model), type(model.config)
    before = copy.deepcopy(getattr(config, "auto_map", None))
    classes = {cls: cls._auto_class for cls in (model_class, config_class)}
    own = auto_class(model)
    try:
        if model_class._auto_class is None:
            model_class.register_for_auto_class(own)
        if config_class._auto_class is None:
            config_class.register_for_auto_class("AutoConfig")
        yield
    finally:
        for cls, registered in classes.items():
            cls._auto_class = registered
        if before is None:
            with contextlib.suppress(AttributeError):
                del config.auto_map
        else:
            config.auto_map = before


def save_for_hub(
    model,
    directory: str | os.PathLike,
    tokenizer=None,
    facts: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    **kwargs,
) -> Path:
    """
    Saves all that a Hub repository needs: safetensors weights, the modelling code with its `auto_map`, the tokenizer
    and a card. It does not have to be told `register_for_auto_class`, and leaves the classes as they were. The code of
    a retrofit is the package's, and of a PEFT model the adapters are saved.

    Args:
        model: A model of this package, or a PEFT model with an EVE adapter.
        directory: Where to; made if it is not there. A `README.md` that a person wrote is kept.
        tokenizer (*optional*): Saved beside the model.
        facts, metrics (`dict`, *optional*): What the card says; see [`~hf_variational.hub.model_card`].
        kwargs: Passed on to `save_pretrained`.

    Example:

    ```python
    >>> metrics = evaluate_language_model(model, dataset)
    >>> save_for_hub(model, "my-model", tokenizer, facts={"data": "WikiText-2"}, metrics=metrics)
    ```
    """
    return _save(model, directory, tokenizer, facts, metrics, None, kwargs)


def _save(model, directory, tokenizer, facts, metrics, repo_id, kwargs) -> Path:
    directory = Path(directory)
    if directory.is_file():
        raise ValueError(f"{directory} is a file: a model is saved into a folder. Name another.")
    readme = directory / "README.md"
    before = readme.read_bytes() if readme.is_file() else None
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if is_adapter(model):
        forget_record(directory)
        model.save_pretrained(directory, **kwargs)
        write_record(directory, facts, metrics)
        return directory
    with _with_code(model):
        model.save_pretrained(directory, **kwargs)
        write_model_card(model, directory, before, repo_id, facts, metrics)
    return directory


def push_to_hub(
    model,
    repo_id: str,
    tokenizer=None,
    facts: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    *,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
    **kwargs,
):
    """
    Pushes what [`save_for_hub`] saves, in one commit. A card a person wrote or edited on the Hub is kept.

    Args:
        model, tokenizer, facts, metrics, kwargs: See [`save_for_hub`].
        repo_id (`str`): The repository, made if it is not there.
        private, token, revision, create_pr, commit_message: As for `PreTrainedModel.push_to_hub`.

    Returns:
        `huggingface_hub.CommitInfo`

    Example:

    ```python
    >>> push_to_hub(model, "me/my-model", tokenizer, facts={"data": "WikiText-2", "license": "apache-2.0"})
    ```
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        with contextlib.suppress(EntryNotFoundError, RevisionNotFoundError):
            there = api.hf_hub_download(repo_id, "README.md", revision=revision)
            (Path(directory) / "README.md").write_bytes(Path(there).read_bytes())
        _save(model, directory, tokenizer, facts, metrics, repo_id, kwargs)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


def _write_beside_a_save(model, directory, **kwargs) -> None:
    try:
        write_model_card(model, directory, **kwargs)
    except Exception as error:
        # the weights are saved by now, often in the middle of a training run: a card is not worth losing that for
        logger.warning(f"No model card was written to {directory}: {type(error).__name__}: {error}")


register_card_writer(_write_beside_a_save)
