"""Encoders from saved models.

The numbers are `transformers`' own, and whatever is not whole is refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional

from features.encoders.network import IMAGENET_MEAN
from features.encoders.open_encoder import open_encoder
from features.encoders.pretrained import _normalisation
from warehouse.errors import ConfigError


def efficientnet(**changes: Any) -> transformers.EfficientNetModel:
    """A small one whose weights differ by the seed alone."""
    settings: dict[str, Any] = {
        "width_coefficient": 0.25,
        "depth_coefficient": 0.1,
        "hidden_dim": 320,
        "image_size": 32,
    } | changes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.EfficientNetModel(transformers.EfficientNetConfig(**settings))
        # As drawn by the library its norms are near 0, and so is all that comes out.
        for part in model.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(part.weight, 0.5, 1.5)
    return model.eval()


def vit() -> transformers.ViTModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        sizes = {"hidden_size": 24, "intermediate_size": 48, "image_size": 32, "patch_size": 8}
        config = transformers.ViTConfig(num_hidden_layers=3, num_attention_heads=2, **sizes)
        return transformers.ViTModel(config).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    efficientnet().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def pictures(count: int = 3, side: int = 32) -> torch.Tensor:
    return torch.randint(
        0,
        256,
        (count, 3, side, side),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(2),
    )


def normalised(
    value: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    return (value / 255 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)


def test_a_saved_model_gives_what_transformers_gives(saved: Path) -> None:
    encoder = open_encoder(str(saved))
    with torch.inference_mode():
        said = efficientnet()(
            pixel_values=normalised(pictures(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        found = encoder(pictures())
    torch.testing.assert_close(found.pooled, said.pooler_output.flatten(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.spatial, said.last_hidden_state, rtol=1e-4, atol=1e-4)
    assert (encoder.width, encoder.size, encoder.random) == (320, (32, 32), False)
    assert found.pooled.std() > 0


def test_pictures_of_another_size_are_resized_and_a_size_can_be_asked_for(saved: Path) -> None:
    with torch.inference_mode():
        small = functional.interpolate(
            pictures(side=48).float(),
            (32, 32),
            mode="bilinear",
            antialias=True,
            align_corners=False,
        )
        one, other = (
            open_encoder(str(saved))(pictures(side=48)),
            open_encoder(str(saved))(small / 255),
        )
    torch.testing.assert_close(one.pooled, other.pooled, rtol=1e-4, atol=1e-4)
    assert open_encoder(str(saved), size=64).size == (64, 64)


def test_the_normalisation_a_model_was_saved_with_is_used_and_told(saved: Path) -> None:
    plain = open_encoder(str(saved)).fingerprint()
    (saved / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]})
    )
    encoder = open_encoder(str(saved))
    with torch.inference_mode():
        said = efficientnet()(pixel_values=normalised(pictures(), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
        torch.testing.assert_close(
            encoder(pictures()).pooled, said.pooler_output.flatten(1), rtol=1e-4, atol=1e-4
        )
    assert encoder.fingerprint()["preprocessing"]["mean"] == [0.5, 0.4, 0.3]
    assert encoder.fingerprint() != plain
    (saved / "preprocessor_config.json").write_text('{"image_mean": 3}')
    with pytest.raises(ConfigError, match="preprocessing does not parse"):
        open_encoder(str(saved))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the hub's cache would have of lab/small, which is all that can be asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit, folder = "0" * 40, tmp_path / "models--lab--small"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    efficientnet().save_pretrained(folder / "snapshots" / commit)
    return folder / "snapshots" / commit


def test_a_hub_model_s_own_normalisation_is_used_too(
    hub: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (hub / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]})
    )
    encoder = open_encoder("lab/small", offline=True)
    with torch.inference_mode():
        said = efficientnet()(pixel_values=normalised(pictures(), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
        torch.testing.assert_close(
            encoder(pictures()).pooled, said.pooler_output.flatten(1), rtol=1e-4, atol=1e-4
        )
    assert encoder.fingerprint()["preprocessing"]["std"] == [0.2, 0.3, 0.4]
    assert "ImageNet" not in caplog.text


def test_a_hub_model_that_declares_none_is_normalised_by_imagenet_s_and_that_is_told(
    hub: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = open_encoder("lab/small", offline=True)
    assert encoder.fingerprint()["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
    assert (
        "lab/small: no preprocessor_config.json was found; images are normalised by ImageNet's"
        in caplog.text
    )


@pytest.mark.parametrize("offline", [True, False])
def test_the_hub_is_asked_for_the_normalisation_only_where_it_may_be(
    hub: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    asked: list[tuple[str, str, bool]] = []
    monkeypatch.setattr(
        "transformers.utils.hub.cached_file",
        lambda name, file, *, local_files_only: asked.append((name, file, local_files_only)),
    )
    mean, _ = _normalisation("lab/small", offline)
    assert (asked, mean) == ([("lab/small", "preprocessor_config.json", offline)], IMAGENET_MEAN)


def test_tokens_become_a_map_and_the_last_blocks_are_the_layers(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    encoder = open_encoder(str(tmp_path))
    with torch.inference_mode():
        said = vit()(
            pixel_values=normalised(pictures(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        )
        found = encoder(pictures())
    torch.testing.assert_close(
        found.spatial.squeeze(-1).transpose(1, 2), said.last_hidden_state, rtol=1e-4, atol=1e-4
    )
    assert [type(block).__name__ for block in encoder.last_blocks(2)] == ["ViTLayer"] * 2
    with pytest.raises(ConfigError, match="expected 1 to 3, found 4"):
        encoder.last_blocks(4)


def test_other_weights_are_another_fingerprint(saved: Path) -> None:
    one = open_encoder(str(saved)).fingerprint()
    weights = load_file(saved / "model.safetensors")
    name = next(name for name, value in weights.items() if value.ndim == 4)
    save_file(
        weights | {name: weights[name] + 1e-3},
        saved / "model.safetensors",
        metadata={"format": "pt"},
    )
    other = open_encoder(str(saved)).fingerprint()
    assert one["weights_sha256"] != other["weights_sha256"]
    assert {**one, "weights_sha256": ""} == {**other, "weights_sha256": ""}


def incomplete(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        dict(list(weights.items())[1:]), folder / "model.safetensors", metadata={"format": "pt"}
    )


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def contradicting(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_dim": 2560}))


def too_small(folder: Path) -> None:
    """All weights fit, and no picture of this side can be seen through."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_size": 3}))


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    "harm", [incomplete, pickled, cut, contradicting, too_small, without_weights]
)
def test_a_model_that_is_not_whole_is_refused_and_never_random(harm: Any, saved: Path) -> None:
    harm(saved)
    with pytest.raises(
        ConfigError,
        match=(
            r"the encoder's (weights are not there|weights are incomplete|configuration "
            r"contradicts itself).*random:efficientnet_b0"
        ),
    ):
        open_encoder(str(saved))


def test_a_size_that_the_model_cannot_take_is_refused(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError,
        match=r"does not accept images of this size.*expected null.*found 64: .*\(64\*64\)",
    ):
        open_encoder(str(tmp_path), size=64)


def test_a_folder_without_a_model_says_what_it_should_hold(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"the folder holds no encoder.*config\.json and model\.safetensors"
    ):
        open_encoder(str(tmp_path))
