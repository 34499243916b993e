"""A layer saved in a folder, and loaded from a folder or from the Hugging Face Hub; needs the extra `hub`.

The folder holds `config.json` (`fff.layers.config`, and the version of this package) and `model.safetensors`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file, save_file

import fff
from fff.layers.config import from_config, shapes, to_config
from fff.layers.contract import RoutedLayer

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


def save_pretrained(layer: RoutedLayer, folder: str | os.PathLike[str]) -> None:
    """Write class, arguments and weights of a layer into a folder, which is made where it is missing.

    To share it: `huggingface_hub.upload_folder(repo_id="you/name", folder_path=folder)`.

    ValueError, before anything is written, for a layer that no configuration tells: see `fff.layers.config.to_config`.
    """
    config = json.dumps({**to_config(layer), "fff": fff.__version__}, indent=2)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in layer.state_dict().items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})  # which refuses tied parameters
    (folder / _CONFIG).write_text(config + "\n")


def from_pretrained(folder_or_repo_id: str | os.PathLike[str], *, revision: str | None = None) -> RoutedLayer:
    """The layer that `save_pretrained` wrote, in evaluation mode, on the CPU, in the types it was saved in.

    folder_or_repo_id: a folder, or else a repository of the Hub.  revision: its branch, tag or commit.

    ValueError where there is no such folder and no repository could have the name, where the configuration names no
    known class or arguments that it does not take, or the weights are not those of the layer that it tells.
    """
    config_path, weights_path = (_find(folder_or_repo_id, name, revision) for name in (_CONFIG, _WEIGHTS))
    config = json.loads(Path(config_path).read_text())
    if not isinstance(config, dict):
        raise ValueError(f"{config_path} is no JSON object")
    if missing := {"class", "arguments"} - set(config):
        raise ValueError(f"{config_path} lacks {sorted(missing)}")
    found = load_file(weights_path)
    try:
        with torch.device("meta"):  # a stranger's sizes take no memory before they are found in the file
            expected = shapes(from_config(config))
    except RuntimeError as error:  # sizes that no tensor has
        raise ValueError(f"{config_path}: {error}") from None
    given = {name: tuple(tensor.shape) for name, tensor in found.items()}
    for name in sorted(expected.keys() | given.keys()):
        if given.get(name) != expected.get(name):
            raise ValueError(
                f"{weights_path}: {name} has shape {given.get(name)}, {config['class']} needs {expected.get(name)}"
            )
        if not found[name].is_floating_point():
            raise ValueError(f"{weights_path}: {name} holds {found[name].dtype}, no floating-point numbers")
    layer = from_config(config)
    layer.load_state_dict(found, assign=True)
    return layer.eval()


def _find(folder_or_repo_id: str | os.PathLike[str], name: str, revision: str | None) -> str | Path:
    if Path(folder_or_repo_id).is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is of a repository, and {str(folder_or_repo_id)!r} is a folder")
        return Path(folder_or_repo_id, name)
    try:
        return hf_hub_download(str(folder_or_repo_id), name, revision=revision)
    except HFValidationError as error:
        raise ValueError(
            f"{str(folder_or_repo_id)!r} is neither a folder nor a repository of the Hub: {error}"
        ) from None
