"""Naming the file where loading fails because it was cut off: safetensors says what is wrong, not where."""

import json
import os


def what_is_missing(file) -> str | None:
    """
    Says in words why a file cannot be a whole safetensors file; `None` if it is whole.

    The format is 8 bytes of header length, the header (JSON, with the byte range of each tensor), and the tensors.
    """
    size = os.path.getsize(file)
    with open(file, "rb") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        if size < 8 or start > size:
            return f"it has {size:,} bytes, and its header does not end there"
        try:
            header = json.loads(opened.read(start - 8))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return "its header is not readable"
    announced = start + max(ends, default=0)
    return None if announced == size else f"it has {size:,} bytes, and its header announces {announced:,}"


class WholeFilesMixin:
    """Has `from_pretrained` name the weights file that is not whole. Stands before `PreTrainedModel` in the bases."""

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, *args, **kwargs):
        try:
            return super()._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)
        except Exception as error:
            for file in checkpoint_files or ():
                if str(file).endswith(".safetensors") and (reason := what_is_missing(file)):
                    raise OSError(
                        f"{file} is not a whole safetensors file: {reason}. It was cut off while it was written, "
                        "copied or downloaded: fetch it again, or load another checkpoint."
                    ) from error
            raise
