"""Encoders of `transformers`: from the hub or a folder, or an EfficientNet with random weights.

`transformers` is imported only here and only when such an encoder is opened: it takes seconds, and
encoders of ours do without it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from features.encoders.network import IMAGENET_MEAN, IMAGENET_STD, NetworkEncoder, he_init
from utils.log import get_log
from warehouse.errors import ConfigError

__all__ = ["EFFICIENTNETS", "network_from_config", "pretrained_encoder", "random_encoder"]

log = get_log(__name__)
EFFICIENTNETS = {
    "efficientnet_b0": (1.0, 1.0, 1280, 224),
    "efficientnet_b1": (1.0, 1.1, 1280, 240),
    "efficientnet_b2": (1.1, 1.2, 1408, 260),
    "efficientnet_b3": (1.2, 1.4, 1536, 300),
    "efficientnet_b4": (1.4, 1.8, 1792, 380),
}
"""name -> width and depth coefficients, pooled channels, picture side.

Table 1 of arXiv:1905.11946 and its reference code.
"""
PREPROCESSING = "preprocessor_config.json"
REMEDY = "save the model into a folder and name that, or random:efficientnet_b0 for random features"


class VisionModel(nn.Module):
    """A `transformers` vision model that returns (map, pooled).

    Tokens [B, N, D] become a map [B, D, N, 1].
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        output = self.model(pixel_values=pixels)
        spatial, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        if spatial.ndim == 3:
            # Vision transformers return a sequence without the shape of the grid.
            spatial = spatial.transpose(1, 2).unsqueeze(-1)
        return spatial, None if pooled is None else pooled.flatten(1)


def network_from_config(config: dict[str, Any]) -> nn.Module:
    """The network of a saved configuration, with fresh weights."""
    transformers = _transformers()
    # The caller overwrites these weights: drawing them must not move the global generator.
    with torch.random.fork_rng(devices=[]):
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**config))
    return VisionModel(model)


def random_encoder(name: str, size: int | None, seed: int) -> NetworkEncoder:
    """An EfficientNet with He-normal weights drawn from `seed`.

    Raises ConfigError for a name that is not in EFFICIENTNETS.
    """
    transformers = _transformers()
    if name not in EFFICIENTNETS:
        raise ConfigError(
            "unknown random encoder",
            where="features.encoder",
            expected=f"random: and one of {', '.join(EFFICIENTNETS)}",
            found=f"random:{name}",
        )
    width, depth, channels, side = EFFICIENTNETS[name]
    config = transformers.EfficientNetConfig(
        width_coefficient=width, depth_coefficient=depth, hidden_dim=channels, image_size=side
    )
    with torch.random.fork_rng(devices=[]):
        model = transformers.EfficientNetModel(config)
    # The library's own initialisation gives all-zero features in eval mode.
    he_init(model, seed)

    side = size or side
    return NetworkEncoder(
        f"random:{name}",
        VisionModel(model),
        model.encoder.blocks,
        size=(side, side),
        random=True,
        recipe=_recipe(model),
    )


def pretrained_encoder(source: Path | str, size: int | None, offline: bool) -> NetworkEncoder:
    """A saved model's folder, or a model of the hub.

    Raises ConfigError for weights that are missing or incomplete, and for a configuration that
    contradicts itself or does not accept the size.
    """
    name = str(source)
    if name in EFFICIENTNETS:
        # The short names are of this project; the hub knows these models by their owner.
        source = f"google/{name.replace('_', '-')}"
    model = _load(source, name, offline)
    side = size or _side(model.config)
    mean, std = _normalisation(source, offline)

    # Blocks of any architecture: its longest list of modules.
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    blocks = max(lists, key=len, default=list(model.children()))
    try:
        return NetworkEncoder(
            name,
            VisionModel(model),
            list(blocks),
            size=(side, side),
            mean=mean,
            std=std,
            recipe=_recipe(model),
        )
    except (RuntimeError, ValueError) as error:
        # A contradiction between settings shows only when the first image goes through.
        found = " ".join(str(error).split())[:160]
        if size is not None:
            raise ConfigError(
                "the encoder does not accept images of this size",
                where=name,
                expected="null, which is the encoder's own size",
                found=f"{size}: {found}",
            ) from None
        raise ConfigError(
            "the encoder's configuration contradicts itself",
            where=name,
            found=found,
            remedy=REMEDY,
        ) from None


def _load(source: Path | str, name: str, offline: bool) -> Any:
    transformers = _transformers()
    try:
        model, loading = transformers.AutoModel.from_pretrained(
            str(source),
            local_files_only=offline or isinstance(source, Path),
            # Pickles and code that comes with a model could run anything.
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=torch.float32,
        )
    except Exception as error:  # the hub's client raises its own, HTTP's and the parsers' errors
        found = " ".join(str(error).split())[:160]
        raise ConfigError(
            "the encoder's weights are not there", where=name, found=found, remedy=REMEDY
        ) from None
    # transformers would fill missing weights with random ones and only log it.
    if loading["missing_keys"]:
        raise ConfigError(
            "the encoder's weights are incomplete",
            where=name,
            found=f"without {sorted(loading['missing_keys'])[0]}",
            remedy=REMEDY,
        )
    return model


def _recipe(model: Any) -> dict[str, Any]:
    return {
        "kind": "transformers",
        "config": json.loads(model.config.to_json_string(use_diff=False)),
    }


def _side(config: Any) -> int:
    side = getattr(config, "image_size", 224)
    return int(side[0] if isinstance(side, list | tuple) else side)


def _normalisation(source: Path | str, offline: bool) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the model's preprocessor_config.json, else ImageNet's."""
    if isinstance(source, Path):
        path: Path | None = source / PREPROCESSING
    else:
        path = _cached(source, PREPROCESSING, offline)
    if path is None:
        log.warning(
            "%s: no %s was found; images are normalised by ImageNet's mean and deviation",
            source,
            PREPROCESSING,
        )
    if path is None or not path.is_file():
        return IMAGENET_MEAN, IMAGENET_STD
    try:
        declared = json.loads(path.read_bytes())
        mean = [float(value) for value in declared["image_mean"]]
        std = [float(value) for value in declared["image_std"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "the encoder's preprocessing does not parse", where=path, found=f"{error}"[:120]
        ) from None
    return mean, std


def _cached(name: str, file: str, offline: bool) -> Path | None:
    """A file of a hub model, in the hub's cache.

    None where the hub has no such file, or cannot be asked and the file was never fetched.
    """
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(name, file, local_files_only=offline)
    except Exception:  # the hub's client raises its own and HTTP's errors
        return None
    return None if found is None else Path(found)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "encoders need the package transformers",
            remedy="pip install 'tensor-warehouse[encoders]'",
        ) from None
    library: Any = transformers
    # Its warnings and bars would appear between those of the command.
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    return library
