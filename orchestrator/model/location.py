"""Where a model's files are on this machine."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from orchestrator.errors import Fault, ModelError
from orchestrator.spec import Model

FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve(model: Model) -> Path:
    """The folder of `model.path`: itself if it is one, else the hub's snapshot, downloaded once into its cache.

    Raises:
        ModelError: neither a folder nor a hub id that can be reached.
    """
    assert model.path is not None, "random weights have no location"
    folder = Path(model.path).expanduser()
    return folder if folder.is_dir() else _snapshot(model.path)


@lru_cache(maxsize=4)
def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # the hub client raises a dozen unrelated types; all mean the same to the person
        raise ModelError(
            Fault("model.path", f"{name} is not a folder here and could not be fetched: {str(error).splitlines()[0]}",
                  "give the path of a local Hugging Face folder, or check the id, the network and the access token")
        ) from error  # fmt: skip
