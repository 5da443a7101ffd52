"""The families of models that there are, and which of them a checkpoint is of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yoco_eval.kernels.group import Group
from yoco_eval.printable import shown

from .checkpoint import MODEL_TYPE, load_shape, open_yoco, resolve_checkpoint
from .costs import YocoCosts
from .errors import CheckpointError
from .folder import CONFIG, is_folder, read_json
from .gemma3n import Gemma3n, gemma3n_weights
from .gemma3n_config import Gemma3nConfig, read_gemma3n
from .gemma4 import Gemma4, gemma4_weights
from .gemma4_config import Gemma4Config, read_gemma4
from .hub import hub_commit
from .interface import Blueprint, Config, Costs, Model, PartCosts, default_dtype
from .linear import set_weights
from .phi4flash import Phi4Flash
from .phi4flash_config import Phi4FlashConfig, read_phi4flash
from .phi4flash_weights import phi4flash_weights
from .yoco import Yoco


@dataclass(frozen=True)
class Family:
    """A family beside YOCO, whose checkpoints are Hugging Face folders.

    Attributes:
        name: what people call it.
        config, model: the classes of its configurations and of its models; the latter has
            `costs_of` and `empty`, as `Yoco` has them.
        read: takes what a `config.json` says to a configuration, or to None where it is of another
            family; raises ValueError where it cannot be used.
        weights: reads a folder's weights, by the names of the model's parameters, for a
            configuration and the dtype that they are going to be converted to; raises
            CheckpointError.
    """

    name: str
    config: type[Any]
    model: Any
    read: Callable[[Mapping[str, Any]], Any]
    weights: Callable[[Path, Any, torch.dtype], Mapping[str, Tensor]]


_YOCO = "YOCO"
_ONE_CACHE = "whose layers read one cache"
_FAMILIES = (
    Family("Gemma 3n", Gemma3nConfig, Gemma3n, read_gemma3n, gemma3n_weights),
    Family("Gemma 4", Gemma4Config, Gemma4, read_gemma4, gemma4_weights),
    Family("Phi-4-mini-flash", Phi4FlashConfig, Phi4Flash, read_phi4flash, phi4flash_weights),
)


def open_checkpoint(name: str | Path, revision: str | None = None) -> Blueprint:
    """The model of a checkpoint, given by path, or by the name of a bundled one or one on the hub.

    Only its configuration is read, and fetched from the hub, before the model is made.

    Args:
        name, revision: as `resolve_checkpoint` takes them.

    Raises:
        CheckpointError: nothing there, or of no family, or an unsafe or damaged checkpoint; faults
            of the weights when the model is made.
    """
    path = resolve_checkpoint(name, revision)
    blueprint = open_folder(path) or open_yoco(path)
    return replace(blueprint, make=partial(_make, blueprint, name, hub_commit(path)))


def open_folder(path: Path) -> Blueprint | None:
    """The model of a Hugging Face folder; None where it is YOCO's, or there is no such folder.

    Raises:
        CheckpointError: it is of no family, or its configuration cannot be used; faults of the
            weights when the model is made.
    """
    found = _read(path / CONFIG) if is_folder(path) else None
    if found is None:
        return None
    family, config = found

    def make(device: torch.device, dtype: torch.dtype) -> Model:
        weights = family.weights(path, config, dtype)
        made = family.model.empty(config, device, dtype)
        set_weights(made, weights)
        model: Model = made
        return model

    return Blueprint(config, family.model.costs_of(config), make)


def read_shape(path: Path) -> Config:
    """The configuration in a `config.json` of any family, or in what else `load_shape` takes.

    Raises:
        CheckpointError: as `open_folder` and `load_shape`.
    """
    file = path / CONFIG if is_folder(path) else path
    found = _read(file) if file.suffix == ".json" else None
    return load_shape(path) if found is None else found[1]


def model_class(config: Config) -> Any:
    """That of models with such a configuration, which has `costs_of` and `empty`, as `Yoco`."""
    family = _family(config)
    return family.model if family else Yoco


def family_name(config: Config) -> str:
    """What people call models with such a configuration."""
    family = _family(config)
    return family.name if family else _YOCO


def check_together(blueprint: Blueprint, option: str) -> None:
    """Refuses an option of having texts held by several processes together, where models cannot do
    that.

    Raises:
        ValueError: which family it is, or that attention is sparse, and what to do.
    """
    held = (
        "texts are held by one process each: leave it out, and several processes answer different "
        "prompts"
    )
    costs = _yoco_costs(blueprint, f"{option} is for {_YOCO} models", held)
    if costs.sparse is not None:
        raise ValueError(f"{option} is not for sparse attention, of which {held}")


def costs_together(costs: Costs, parts: int) -> PartCosts:
    """Of a model with these costs, which `check_together` takes: what it costs each of `parts`
    processes that hold texts together."""
    assert isinstance(costs, YocoCosts)
    return replace(costs, parts=parts)


def join_group(model: Model, group: Group) -> None:
    """Has a model, of a blueprint that `check_together` takes, hold texts together with the other
    processes of a group."""
    assert isinstance(model, Yoco)
    model.group = group


def with_sparse(blueprint: Blueprint, most: int, option: str) -> Blueprint:
    """The same model, each token of which chooses `most` blocks of the cache to read.

    Args:
        option: that asks for it, for messages.

    Raises:
        ValueError: models of this family cannot do that.
    """
    reads = "each token reads all of its text: leave it out"
    costs = _yoco_costs(blueprint, f"{option} is for {_YOCO} models, {_ONE_CACHE}", reads)

    def set_sparse(model: Yoco) -> None:
        model.sparse = most

    return _changed(blueprint, replace(costs, sparse=most), set_sparse)


def with_eight_bits(blueprint: Blueprint, option: str) -> Blueprint:
    """The same model, whose cache holds keys and values in eight bits.

    Args:
        option: that asks for it, for messages.

    Raises:
        ValueError: models of this family cannot do that.
    """
    held = "keys and values are held in the model's dtype: leave it out"
    costs = _yoco_costs(blueprint, f"{option} is for {_YOCO} models, {_ONE_CACHE}", held)

    def set_eight_bits(model: Yoco) -> None:
        model.eight_bits = True

    return _changed(blueprint, replace(costs, eight_bits=True), set_eight_bits)


def _yoco_costs(blueprint: Blueprint, needs: str, otherwise: str) -> YocoCosts:
    """The costs of a YOCO model.

    Raises:
        ValueError: it is of another family, which `needs` does not take, and of which `otherwise`
            is so.
    """
    if family := _family(blueprint.config):
        raise ValueError(f"{needs}; of {family.name}, {otherwise}")
    assert isinstance(blueprint.costs, YocoCosts)
    return blueprint.costs


def _changed(blueprint: Blueprint, costs: YocoCosts, change: Callable[[Yoco], None]) -> Blueprint:
    """With other costs, and a change of the model that has been made."""

    def make(device: torch.device, dtype: torch.dtype) -> Model:
        model = blueprint.make(device, dtype)
        assert isinstance(model, Yoco)
        change(model)
        return model

    return Blueprint(blueprint.config, costs, make)


def _family(config: Config) -> Family | None:
    return next((family for family in _FAMILIES if isinstance(config, family.config)), None)


def _read(file: Path) -> tuple[Family, Any] | None:
    """The family of a `config.json` and its configuration; None where it is YOCO's."""
    settings = read_json(file)
    if settings.get("model_type") in (None, MODEL_TYPE):
        return None
    for family in _FAMILIES:
        try:
            config = family.read(settings)
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}") from error
        if config is not None:
            return family, config
    known = ", ".join((_YOCO, *(family.name for family in _FAMILIES)))
    raise CheckpointError(
        f"{file}: says model_type {shown(settings['model_type'])}, none of {known}; evaluate other "
        "models with lm-eval's own backends, such as --model hf"
    )


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> Model:
    """A model for evaluation; no code of the checkpoint is run.

    Args:
        name, revision: as `open_checkpoint` takes them.
        device: default: the GPU if there is one, else the CPU.
        dtype: default: that of `default_dtype`.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return open_checkpoint(name, revision).make(device, dtype or default_dtype(device))


def _make(
    blueprint: Blueprint,
    name: str | Path,
    commit: str | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Model:
    resolve_checkpoint(name, commit, weights=True)
    return blueprint.make(device, dtype)
