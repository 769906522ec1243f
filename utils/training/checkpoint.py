"""Checkpoints: a safetensors file, and a JSON file that names it with its digest.

Purpose: save and load weights, their running average and optimizer state so that a crash at any
  moment leaves a complete checkpoint.
Used by: detector.backbone, detector.task, features.encoders.open_encoder,
  features.finetuning.finetune_task, features.heads.run_heads, features.heads.scoring,
  features.heads.train, scripts.infer_view, segmentation.mask_jobs, segmentation.prediction,
  segmentation.unet, utils.training.backbone, utils.training.run.run_state, vqvae.compress.codec,
  vqvae.image_encoder
Design notes: there is no pickle anywhere, so that loading a stranger's checkpoint runs no code.
  Tensors go first, under a name that carries their digest; replacing `checkpoint.json`
  is the commit, and only then is the former tensor file removed. Everything read is bounded,
  compared with its digest, and its weights checked for NaN. Names are flat: "model.<key>",
  "average.<key>", "optimizer.<parameter number>.<key>". Nothing random is stored: it all derives
  from the seed.
Assistant guidance: when extending: new state is a new prefix or a new JSON key; raise FORMAT only
  when old files can no longer be read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as pack_tensors
from torch import Tensor, nn

from warehouse.errors import ConfigError, CorruptError, StateError, TrainingError
from warehouse.format.durable import write_bytes

__all__ = [
    "Checkpoint",
    "has_checkpoint",
    "known_model",
    "load_checkpoint",
    "load_module",
    "prefixed",
    "save_checkpoint",
]

FORMAT = 1
INDEX = "checkpoint.json"
MAX_INDEX_BYTES = 4 << 20
MAX_TENSOR_BYTES = 16 << 30
NAME = re.compile(r"checkpoint-[0-9a-f]{16}\.safetensors")
REMEDY = "train one with python -m scripts.train_detector, or name its folder"
TAKERS = {
    "tiny": "infer_view --infer.checkpoint",
    "big": "infer_view --infer.checkpoint",
    "vqvae": "compress_zarr --compress.checkpoint",
    "unet": "segment_patches --segment.checkpoint",
    "finetuned": "extract_features --features.encoder",
    **{f"head-{kind}": "train_head --head.checkpoint" for kind in ("linear", "mlp", "attention")},
}
"""Kind of model -> the command that takes its checkpoints."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was read and checked.

    Attributes
    ----------
    tensors
        By prefixed name, on the CPU.
    meta
        JSON values.
    path
        The JSON file it came from.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    path: Path

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors under "<prefix>.", without the prefix."""
        return {
            name[len(prefix) + 1 :]: value
            for name, value in self.tensors.items()
            if name.startswith(prefix + ".")
        }


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under names that begin with "<prefix>."."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def save_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, object]
) -> Path:
    """Write both files durably, and delete the former tensors.

    Parameters
    ----------
    meta
        JSON values.

    Returns
    -------
    Path
        The JSON file.

    Raises
    ------
    TrainingError
        The folder cannot be written.
    """
    # Cloned, because safetensors refuses tensors that share memory, as tied weights do.
    data = pack_tensors(
        {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    )
    digest = hashlib.sha256(data).hexdigest()
    name = f"checkpoint-{digest[:16]}.safetensors"
    index = {"format": FORMAT, "file": name, "size": len(data), "sha256": digest, "meta": meta}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / name, data)
        write_bytes(
            folder / INDEX, json.dumps(index, indent=1, sort_keys=True, allow_nan=False).encode()
        )
        # Only now: until the index was replaced, it named the former file.
        for other in folder.iterdir():
            if NAME.fullmatch(other.name) and other.name != name:
                other.unlink(missing_ok=True)
    except OSError as error:
        raise TrainingError(
            "the checkpoint cannot be written",
            where=folder,
            found=error.strerror,
            remedy="choose another output folder",
        ) from None
    return folder / INDEX


def has_checkpoint(folder: Path) -> bool:
    """Return whether a folder has a checkpoint; it is not read."""
    return (folder / INDEX).exists()


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check a checkpoint.

    Parameters
    ----------
    path
        Its folder or its checkpoint.json.

    Raises
    ------
    ConfigError
        There is no checkpoint, or it cannot be read.
    CorruptError
        The bytes do not match their digest, are not a checkpoint, or weights are not finite.
    StateError
        The checkpoint has another format.
    """
    index_path = path / INDEX if path.is_dir() else path
    index = _read_index(index_path)
    name, size, digest, meta = (index.get(key) for key in ("file", "size", "sha256", "meta"))
    # The pattern also keeps a crafted index from naming a file outside the folder.
    if not (
        isinstance(name, str)
        and NAME.fullmatch(name)
        and isinstance(size, int)
        and isinstance(digest, str)
        and isinstance(meta, dict)
    ):
        raise CorruptError(
            "the checkpoint's index is not one of ours", where=index_path, remedy=REMEDY
        )
    data = _read_tensors(index_path.parent / name, size)
    if hashlib.sha256(data).hexdigest() != digest:
        raise CorruptError(
            "the checkpoint disagrees with its digest",
            where=index_path.parent / name,
            remedy="train again",
        )
    try:
        tensors = parse_tensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CorruptError(
            "the checkpoint's tensors do not parse",
            where=index_path.parent / name,
            found=str(error),
        ) from None
    # A run that diverged on its last steps may have saved NaN under a digest that matches.
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CorruptError(
                "the checkpoint has values that are not finite",
                where=f"{index_path.parent / name}, {key}",
                remedy="train again",
            )
    return Checkpoint(tensors, meta, index_path)


def known_model(saved: Checkpoint, kinds: Sequence[str], what: str, remedy: str) -> dict[str, Any]:
    """Return what a checkpoint says of its model.

    Parameters
    ----------
    kinds
        Kinds of model that are accepted.
    what
        The model that is wanted, such as "a detector", for the message.
    remedy
        How to come by one.

    Raises
    ------
    StateError
        The model is of another kind; names the command that takes it.
    """
    model = saved.meta.get("model")
    kind = model.get("kind") if isinstance(model, dict) else None
    if isinstance(model, dict) and kind in kinds:
        return dict(model)
    taker = TAKERS.get(str(kind))
    this = f"this one is for python -m scripts.{taker} {saved.path.parent}; " if taker else ""
    raise StateError(
        f"the checkpoint is not of {what}",
        where=saved.path,
        expected=f"kind {' or '.join(kinds)}",
        found=f"kind {kind!r:.40}" if kind else "no kind of model",
        remedy=this + remedy,
    )


def _read_index(path: Path) -> dict[str, Any]:
    if path.suffix != ".json" and path.is_file():
        raise ConfigError("a checkpoint is named by its folder or its checkpoint.json", where=path)
    if path.is_symlink() or not path.is_file():
        raise ConfigError("no checkpoint there", where=path, remedy=REMEDY)
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_INDEX_BYTES else b""
    except OSError as error:
        raise ConfigError(
            "the checkpoint cannot be read", where=path, found=error.strerror
        ) from None
    if size > MAX_INDEX_BYTES:
        raise CorruptError(
            "the checkpoint's index is too large",
            where=path,
            expected=f"at most {MAX_INDEX_BYTES} bytes",
            found=size,
        )
    try:
        index = json.loads(data)
    # Deeply nested JSON exhausts the parser's stack.
    except (ValueError, RecursionError) as error:
        raise CorruptError(
            "the checkpoint's index does not parse", where=path, found=str(error)
        ) from None
    if not isinstance(index, dict):
        raise CorruptError("the checkpoint's index is not one of ours", where=path, remedy=REMEDY)
    if index.get("format") != FORMAT:
        raise StateError(
            "the checkpoint has another format",
            where=path,
            expected=FORMAT,
            found=f"{index.get('format')!r:.40}",
        )
    return index


def _read_tensors(path: Path, size: int) -> bytes:
    try:
        # A link could lead to any file of the machine.
        if path.is_symlink() or not path.is_file():
            raise CorruptError(
                "the checkpoint's tensors are missing", where=path, remedy="train again"
            )
        # Before anything is read: a forged size must not fill the memory.
        found = os.stat(path).st_size
        if found != size or found > MAX_TENSOR_BYTES:
            raise CorruptError(
                "the checkpoint is truncated or changed",
                where=path,
                expected=f"{size} bytes",
                found=found,
                remedy="train again",
            )
        return path.read_bytes()
    except OSError as error:
        raise CorruptError(
            "the checkpoint cannot be read", where=path, found=error.strerror
        ) from None


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Copy tensors into a module of the same names and shapes, all or nothing.

    Parameters
    ----------
    where
        The checkpoint, for the message.

    Raises
    ------
    StateError
        The checkpoint is of another model; names the first tensor that differs.
    """
    # Compared here first: torch copies what fits before it raises, in a message of many lines.
    own = module.state_dict()
    for name in [*own, *tensors]:
        if name not in own or name not in tensors:
            raise StateError(
                "the checkpoint is of another model",
                where=where,
                expected=f"{name} {'present' if name in own else 'absent'}",
            )
        if own[name].shape != tensors[name].shape:
            raise StateError(
                "the checkpoint is of another model",
                where=where,
                expected=f"{name} of shape {list(own[name].shape)}",
                found=list(tensors[name].shape),
            )
    module.load_state_dict(tensors)
