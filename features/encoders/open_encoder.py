"""The encoder that a name stands for.

    random:efficientnet_b0   He-normal weights drawn from `seed`; marked random wherever it is named
    efficientnet_b0          google/efficientnet-b0 of the hub or its cache
    owner/model              any other model of the hub
    a folder                 with config.json: a `transformers` model
                             with checkpoint.json: a model of ours, or a fine-tuned encoder

Missing or incomplete weights are an error and are never replaced by random ones. Given up: pickled
weights, and code that comes with a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from features.encoders.network import FINETUNED, NetworkEncoder
from features.encoders.pretrained import network_from_config, pretrained_encoder, random_encoder
from utils.training.backbone import Backbones
from utils.training.checkpoint import Checkpoint, known_model, load_checkpoint, load_module
from warehouse.errors import ConfigError, StateError

__all__ = ["open_encoder"]

AVERAGED_NETWORK = "network."
"""Prefix of the encoder's tensors among the averaged weights of a fine-tuning run."""
MAX_SIDE = 4096
"""Pixels. The same bound as the settings have: a checkpoint must not ask for more memory."""


def open_encoder(
    name: str,
    *,
    size: int | None = None,
    seed: int = 0,
    offline: bool = False,
    backbones: Backbones | None = None,
) -> NetworkEncoder:
    """Open the encoder that `name` stands for (see the module's docstring).

    Parameters
    ----------
    size
        Side in pixels that images are resized to; None uses the encoder's own size.
    seed
        Of random weights.
    offline
        Use the hub's cache only.
    backbones
        How checkpoints of our own models are opened, by their kind.

    Raises
    ------
    ConfigError
        An unknown name, or weights that are missing, incomplete or cannot be fetched.
    StateError
        A checkpoint of another kind.
    """
    kind, _, rest = name.partition(":")
    if kind == "random":
        return random_encoder(rest, size, seed)

    path = Path(name).expanduser()
    if path.name == "checkpoint.json" or (path / "checkpoint.json").is_file():
        return _from_checkpoint(load_checkpoint(path), size, backbones or {})

    # A path must not be looked up on the hub, where it could name somebody's repository.
    if name.startswith((".", "/", "~")) and not (path / "config.json").is_file():
        raise ConfigError(
            "the folder holds no encoder",
            where=path,
            expected="config.json and model.safetensors, or checkpoint.json",
            remedy="name a saved model's folder, or random:efficientnet_b0 for random features",
        )
    return pretrained_encoder(path if path.is_dir() else name, size, offline)


def _from_checkpoint(saved: Checkpoint, size: int | None, backbones: Backbones) -> NetworkEncoder:
    remedy = "name one of train_detector, train_vqvae or finetune"
    model = known_model(saved, [FINETUNED, *backbones], "an encoder", remedy)
    if model["kind"] == FINETUNED:
        return _finetuned(saved, model, size, backbones)
    backbone = backbones[model["kind"]](saved)
    return NetworkEncoder(
        backbone.name,
        backbone.network,
        backbone.blocks,
        size=None if size is None else (size, size),
        mean=backbone.mean,
        std=backbone.std,
        recipe=backbone.recipe,
    )


def _finetuned(
    saved: Checkpoint, model: dict[str, Any], size: int | None, backbones: Backbones
) -> NetworkEncoder:
    """The encoder in a fine-tuned checkpoint: architecture by its recipe, averaged weights."""
    try:
        encoder = dict(model["encoder"])
        # A copy: building takes entries out of the recipe, which goes on with the encoder.
        network = _network_from_recipe(dict(encoder["recipe"]), backbones)
        blocks = [network.get_submodule(str(name)) for name in encoder["blocks"]]
        sides, mean, std = _preprocessing(encoder["preprocessing"])
        name = str(model["name"])
        # Drawn weights count as trained only if all of them were.
        random = bool(encoder["random"] and model["frozen"])
    # The JSON may be anything: whatever does not fit is one error of one line.
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise StateError(
            "the checkpoint is not of a fine-tuned encoder",
            where=saved.path,
            found=f"{error}"[:160],
            remedy="make one with python -m scripts.finetune",
        ) from None

    weights = {
        # The head that was trained with it is not part of the encoder.
        key.removeprefix(AVERAGED_NETWORK): value
        for key, value in saved.part("average").items()
        if key.startswith(AVERAGED_NETWORK)
    }
    load_module(network, weights, saved.path)
    return NetworkEncoder(
        name,
        network,
        blocks,
        size=sides if size is None else (size, size),
        random=random,
        mean=mean,
        std=std,
        recipe=encoder["recipe"],
    )


def _preprocessing(
    declared: dict[str, Any],
) -> tuple[tuple[int, int] | None, list[float], list[float]]:
    """Size, mean and std; raises ValueError for values that no image can be prepared with."""
    side, mean, std = (declared[key] for key in ("size", "mean", "std"))
    sides = None if side is None else (int(side[0]), int(side[1]))
    fits = sides is None or all(1 <= length <= MAX_SIDE for length in sides)
    if not fits or len(mean) != 3 or len(std) != 3 or not all(std):
        raise ValueError(f"preprocessing {declared}")
    return sides, mean, std


def _network_from_recipe(recipe: dict[str, Any], backbones: Backbones) -> nn.Module:
    """The network of a recipe, with fresh weights.

    Raises KeyError, TypeError and ValueError for a recipe that does not describe a network.
    """
    kind = recipe.pop("kind")
    if kind == "transformers":
        return network_from_config(dict(recipe["config"]))
    if kind not in backbones:
        raise ValueError(f"a model of kind {kind!r:.40} cannot be opened here")
    return backbones[kind]({"kind": kind, **recipe}).network
