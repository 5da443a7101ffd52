"""The models: what they have in common, YOCO and its self-decoders, checkpoints in and out."""

from yoco_eval.kernels.sequences import Sequences, Span, Spans, to_device

from .checkpoint import (
    CheckpointError,
    load_checkpoint,
    save,
    save_checkpoint,
)
from .config import YocoConfig
from .decoder import Decoder
from .families import load, open_checkpoint
from .interface import Blueprint, Costs, Model, Rows
from .mixers import GatedRetentionSettings, SlidingWindowSettings
from .states import Cache, State, Stretches
from .yoco import Yoco

__all__ = [
    "Blueprint",
    "Cache",
    "CheckpointError",
    "Costs",
    "Decoder",
    "GatedRetentionSettings",
    "Model",
    "Rows",
    "Sequences",
    "SlidingWindowSettings",
    "Span",
    "Spans",
    "State",
    "Stretches",
    "Yoco",
    "YocoConfig",
    "load",
    "load_checkpoint",
    "open_checkpoint",
    "save",
    "save_checkpoint",
    "to_device",
]
