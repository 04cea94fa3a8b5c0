"""The card beside a saved checkpoint.

`modeling` travels into Hub repositories and knows nothing of templates, so the package registers the function that
renders the card. Where the package is absent nobody registers one and saving is transformers' own.
"""

from pathlib import Path

_card_writer = None
# README.md as it stood before a `save_pretrained` that is under way, by path: when it pushes, transformers puts the
# Hub's card over it before anybody could look.
_readme_before = {}


def register_card_writer(writer):
    """
    Sets the function called after every save and before every upload:
    `writer(model, directory, readme_before=None, repo_id=None, facts=None, metrics=None)`.
    """
    global _card_writer
    _card_writer = writer


def write_card(model, directory, readme_before=None, repo_id=None, facts=None, metrics=None):
    """Writes `README.md` into `directory` if the package is there to render it. A README a person wrote is kept."""
    if _card_writer is not None:
        _card_writer(
            model, Path(directory), readme_before=readme_before, repo_id=repo_id, facts=facts, metrics=metrics
        )


class CardMixin:
    """Has `save_pretrained` and `push_to_hub` write a model card. Stands before `PreTrainedModel` among the bases."""

    def save_pretrained(self, save_directory, is_main_process=True, *args, **kwargs):
        readme = Path(save_directory) / "README.md"
        key = str(readme.resolve())
        _readme_before[key] = readme.read_bytes() if readme.is_file() else None
        try:
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
            # an adapter's folder is not a checkpoint of this model, and has a card of its own kind
            adapter = getattr(self, "_hf_peft_config_loaded", False)
            if is_main_process and Path(save_directory).is_dir() and not adapter:
                write_card(self, save_directory, readme_before=_readme_before[key])
        finally:
            del _readme_before[key]

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        if not getattr(self, "_hf_peft_config_loaded", False):
            before = _readme_before.get(str((Path(working_dir) / "README.md").resolve()))
            write_card(self, working_dir, readme_before=before, repo_id=repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)
