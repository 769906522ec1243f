"""Encoders: pictures in, a pooled vector and a spatial map out, and a fingerprint of all that
decides the numbers.

    random:efficientnet_b0      He-normal weights of our own from `seed`, marked random wherever it is named
    efficientnet_b0             google/efficientnet-b0 from the hub or its cache; any other hub name as it is
    a folder                    with config.json: a `transformers` model; with checkpoint.json: a model of ours, or a fine-tuned one

Weights that are absent or incomplete are an error, never random ones. Models run in eval mode, so a
picture's features do not depend on its batch. Given up: pickled weights, and code that comes with a
model.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from utils.log import get_log
from utils.training.checkpoint import Checkpoint, known_model, load_checkpoint, load_module
from warehouse.errors import ConfigError, StateError

__all__ = [
    "EFFICIENTNETS",
    "FINETUNED",
    "Backbone",
    "Encoded",
    "Encoder",
    "NetworkEncoder",
    "he_init",
    "open_encoder",
]

log = get_log(__name__)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
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
RESIZE = "bilinear, antialiased"
FINETUNED = "finetuned"
"""Kind of a checkpoint that holds a fine-tuned encoder; see `NetworkEncoder.describe`."""
Ours = Mapping[str, Callable[[Any], dict[str, Any]]]
"""Kind of our model -> what makes the fields of a Backbone from a Checkpoint of it, or from a
recipe, then with fresh weights.
"""


class Encoded(NamedTuple):
    """pooled: float32 [B, D]; spatial: float32 [B, D, h, w]."""

    pooled: Tensor
    spatial: Tensor


class Encoder(Protocol):
    """name; random: whether its weights were drawn; width: D; size.

    (H, W) that pictures are resized to, None: as they come.
    """

    name: str
    random: bool
    width: int
    size: tuple[int, int] | None

    def __call__(self, pictures: Tensor) -> Encoded:
        """pictures: [B, 3, H, W], uint8 in [0, 255] or float in [0, 1]."""

    def fingerprint(self) -> dict[str, Any]:
        """JSON: name, random, sha256 of the weights, preprocessing."""

    def last_blocks(self, count: int) -> list[nn.Module]:
        """The last `count` blocks, in the order of the forward pass: what fine-tuning unfreezes."""


@dataclass(frozen=True, slots=True)
class Backbone:
    """A model of ours as a backbone: network gives [B, D, h, w] from pictures normalised by mean
    and std (of values in [0, 1]).

    recipe: JSON that builds the same network again, without its weights.
    """

    name: str
    network: nn.Module
    blocks: Sequence[nn.Module]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    recipe: dict[str, Any] = field(default_factory=dict)


class NetworkEncoder:
    """Any network behind the protocol. network: [B, 3, H, W] to [B, D, h, w], or to (that, pooled
    [B, D]); without pooled, the mean.

    recipe: JSON that builds the network again; without one it cannot be fine-tuned into a
    checkpoint that stands for itself.
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        blocks: Sequence[nn.Module],
        *,
        size: tuple[int, int] | None,
        random: bool = False,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        recipe: dict[str, Any] | None = None,
    ) -> None:
        self.name, self.random, self.size, self.recipe = name, random, size, recipe or {}
        self.network = network.eval().requires_grad_(False)
        self.blocks = list(blocks)
        self.mean, self.std = (
            tuple(float(value) for value in mean),
            tuple(float(value) for value in std),
        )
        self.weights_sha256 = weights_digest(network)
        with torch.inference_mode():
            side = size or (64, 64)
            self.width = self(torch.zeros(1, 3, *side, dtype=torch.uint8)).pooled.shape[1]

    def __call__(self, pictures: Tensor) -> Encoded:
        said = self.network(self._normalised(pictures))
        spatial, pooled = said if isinstance(said, tuple) else (said, None)
        return Encoded(spatial.mean(dim=(2, 3)) if pooled is None else pooled, spatial)

    def resized(self, pictures: Tensor) -> Tensor:
        """float32 [B, 3, h, w] in [0, 1] at the encoder's size."""
        value = pictures.float()
        if pictures.dtype == torch.uint8:
            value = value.mul_(1 / 255)
        if self.size is not None and tuple(value.shape[2:]) != self.size:
            value = functional.interpolate(
                value, self.size, mode="bilinear", antialias=True, align_corners=False
            )
        return value

    def _normalised(self, pictures: Tensor) -> Tensor:
        value = self.resized(pictures)
        mean, std = (
            torch.tensor(values, device=value.device).view(1, 3, 1, 1)
            for values in (self.mean, self.std)
        )
        return ((value - mean) / std).contiguous(memory_format=torch.channels_last)

    def fingerprint(self) -> dict[str, Any]:
        preprocessing = {
            "size": self.size and list(self.size),
            "resize": RESIZE,
            "mean": list(self.mean),
            "std": list(self.std),
        }
        return {
            "name": self.name,
            "random": self.random,
            "weights_sha256": self.weights_sha256,
            "preprocessing": preprocessing,
        }

    def describe(self) -> dict[str, Any]:
        """JSON: the fingerprint, and all that builds the encoder again but its weights."""
        names = {id(module): name for name, module in self.network.named_modules()}
        return {
            **self.fingerprint(),
            "recipe": self.recipe,
            "blocks": [names[id(block)] for block in self.blocks],
        }

    def last_blocks(self, count: int) -> list[nn.Module]:
        if not 1 <= count <= len(self.blocks):
            raise ConfigError(
                "so many blocks cannot be unfrozen",
                where=self.name,
                expected=f"1 to {len(self.blocks)}",
                found=count,
            )
        return self.blocks[-count:]


def open_encoder(
    name: str,
    *,
    size: int | None = None,
    seed: int = 0,
    offline: bool = False,
    ours: Ours | None = None,
) -> NetworkEncoder:
    """The encoder of a name (see above). size: side in pixels, null: what suits the encoder; seed:
    of random weights.

    ours: opens checkpoints of our models; whoever knows them hands it in. Raises ConfigError: an
    unknown name, weights that are absent, incomplete or cannot be fetched; StateError for a
    checkpoint of another kind; what `load_checkpoint` and `ours` raise.
    """
    kind, _, rest = name.partition(":")
    if kind == "random":
        return _random(rest, size, seed)
    path = Path(name).expanduser()
    if path.name == "checkpoint.json" or (path / "checkpoint.json").is_file():
        saved, ours = load_checkpoint(path), ours or {}
        remedy = "name one of train_detector, train_vqvae or finetune"
        said = known_model(saved, [FINETUNED, *ours], "an encoder", remedy)
        if said["kind"] == FINETUNED:
            return _finetuned(saved, said, size, ours)
        backbone = Backbone(**ours[said["kind"]](saved))
        return NetworkEncoder(
            backbone.name,
            backbone.network,
            backbone.blocks,
            size=None if size is None else (size, size),
            mean=backbone.mean,
            std=backbone.std,
            recipe=backbone.recipe,
        )
    if name.startswith((".", "/", "~")) and not (path / "config.json").is_file():
        raise ConfigError(
            "no encoder in this folder",
            where=path,
            expected="config.json and model.safetensors, or checkpoint.json",
            remedy="name a saved model's folder, or random:efficientnet_b0 for random features",
        )
    return _pretrained(path if path.is_dir() else name, size, offline)


def _finetuned(
    saved: Checkpoint, said: dict[str, Any], size: int | None, ours: Ours
) -> NetworkEncoder:
    """The encoder inside a fine-tuned checkpoint.

    Its architecture from the recipe, its averaged weights.
    """
    try:
        about = dict(said["encoder"])
        network = _built(dict(about["recipe"]), ours)
        blocks = [network.get_submodule(str(name)) for name in about["blocks"]]
        side, mean, std = (about["preprocessing"][key] for key in ("size", "mean", "std"))
        sides = None if side is None else (int(side[0]), int(side[1]))
        if (
            (sides is not None and not all(1 <= length <= 4096 for length in sides))
            or len(mean) != 3
            or len(std) != 3
            or not all(std)
        ):
            raise ValueError(f"preprocessing {about['preprocessing']}")
        name, random = str(said["name"]), bool(about["random"] and said["frozen"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise StateError(
            "the checkpoint is not of a fine-tuned encoder",
            where=saved.path,
            found=f"{error}"[:160],
            remedy="make one with python -m scripts.finetune",
        ) from None
    weights = saved.part("average")
    load_module(
        network,
        {key[8:]: value for key, value in weights.items() if key.startswith("network.")},
        saved.path,
    )
    return NetworkEncoder(
        name,
        network,
        blocks,
        size=sides if size is None else (size, size),
        random=random,
        mean=mean,
        std=std,
        recipe=about["recipe"],
    )


def _built(recipe: dict[str, Any], ours: Ours) -> nn.Module:
    """The network of a recipe, with fresh weights.

    Raises KeyError, TypeError, ValueError for a recipe that is none.
    """
    kind = recipe.pop("kind")
    if kind != "transformers":
        if kind not in ours:
            raise ValueError(f"a model of kind {kind!r:.40} cannot be opened here")
        network: nn.Module = ours[kind]({"kind": kind, **recipe})["network"]
        return network
    transformers = _transformers()
    config = dict(recipe["config"])
    with torch.random.fork_rng(devices=[]):
        return _Transformer(
            transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**config))
        )


def he_init(module: nn.Module, seed: int) -> None:
    """He-normal convolutions and linear layers (fan-in, arXiv:1502.01852), norm weight 1, bias 0.

    A function of names, shapes, seed.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                fan_in = part.weight[0].numel()
                part.weight.copy_(
                    torch.randn(part.weight.shape, generator=generator) * math.sqrt(2 / fan_in)
                )
            elif isinstance(part, nn.BatchNorm2d | nn.LayerNorm):
                part.weight.fill_(1)
            if isinstance(part, nn.BatchNorm2d):
                part.reset_running_stats()
            if isinstance(getattr(part, "bias", None), Tensor):
                part.bias.zero_()


def weights_digest(module: nn.Module) -> str:
    """sha256 of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}\0{value.dtype}\0{list(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Transformer(nn.Module):
    """A `transformers` vision model as (map, pooled).

    Tokens [B, N, D] become a map [B, D, N, 1].
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        said = self.model(pixel_values=pixels)
        spatial, pooled = said.last_hidden_state, getattr(said, "pooler_output", None)
        if spatial.ndim == 3:
            spatial = spatial.transpose(1, 2).unsqueeze(-1)
        return spatial, None if pooled is None else pooled.flatten(1)


def _random(name: str, size: int | None, seed: int) -> NetworkEncoder:
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
    he_init(model, seed)
    side = size or side
    return NetworkEncoder(
        f"random:{name}",
        _Transformer(model),
        model.encoder.blocks,
        size=(side, side),
        random=True,
        recipe=_recipe(model),
    )


def _recipe(model: Any) -> dict[str, Any]:
    return {
        "kind": "transformers",
        "config": json.loads(model.config.to_json_string(use_diff=False)),
    }


def _pretrained(source: Path | str, size: int | None, offline: bool) -> NetworkEncoder:
    transformers = _transformers()
    where = str(source)
    if where in EFFICIENTNETS:
        source = f"google/{where.replace('_', '-')}"
    remedy = (
        "save the model into a folder and name that, or random:efficientnet_b0 for random features"
    )
    try:
        model, loading = transformers.AutoModel.from_pretrained(
            str(source),
            local_files_only=offline or isinstance(source, Path),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=torch.float32,
        )
    except Exception as error:  # the hub's client raises its own, HTTP's and the parsers' errors
        found = " ".join(str(error).split())[:160]
        raise ConfigError(
            "the encoder's weights are not there", where=where, found=found, remedy=remedy
        ) from None
    if loading["missing_keys"]:
        raise ConfigError(
            "the encoder's weights are incomplete",
            where=where,
            found=f"without {sorted(loading['missing_keys'])[0]}",
            remedy=remedy,
        )
    side = size or _side(model.config)
    mean, std = _normalisation(source, offline)
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    blocks = max(lists, key=len, default=list(model.children()))
    try:
        return NetworkEncoder(
            where,
            _Transformer(model),
            list(blocks),
            size=(side, side),
            mean=mean,
            std=std,
            recipe=_recipe(model),
        )
    except (
        RuntimeError,
        ValueError,
    ) as error:  # what does not follow from each other shows at the first picture
        found = " ".join(str(error).split())[:160]
        if size is not None:
            raise ConfigError(
                "the encoder does not take pictures of this size",
                where=where,
                expected="null: the encoder's own",
                found=f"{size}: {found}",
            ) from None
        raise ConfigError(
            "the encoder's configuration contradicts itself",
            where=where,
            found=found,
            remedy=remedy,
        ) from None


def _side(config: Any) -> int:
    side = getattr(config, "image_size", 224)
    return int(side[0] if isinstance(side, list | tuple) else side)


def _normalisation(source: Path | str, offline: bool) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation that a saved model's preprocessor_config.json declares, else ImageNet's."""
    path = (
        Path(source) / PREPROCESSING
        if isinstance(source, Path)
        else _cached(source, PREPROCESSING, offline)
    )
    if path is None:
        log.warning(
            "%s: no %s to be had, pictures are normalised by ImageNet's mean and deviation",
            source,
            PREPROCESSING,
        )
    if path is None or not path.is_file():
        return IMAGENET_MEAN, IMAGENET_STD
    try:
        said = json.loads(path.read_bytes())
        return [float(value) for value in said["image_mean"]], [
            float(value) for value in said["image_std"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "the encoder's preprocessing does not parse", where=path, found=f"{error}"[:120]
        ) from None


def _cached(name: str, file: str, offline: bool) -> Path | None:
    """A file of a hub model, in the hub's cache.

    None where the hub has none, or cannot be asked and it was never fetched.
    """
    from transformers.utils import cached_file

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
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
