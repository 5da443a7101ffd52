"""The YOCO model: configuration, layers, caches, checkpoints in and out."""

from yoco_eval.kernels.sequences import Sequences, Span, Spans, to_device

from .cache import Cache, SelfState
from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .config import YocoConfig
from .decoder import Decoder
from .yoco import Yoco

__all__ = [
    "Cache",
    "CheckpointError",
    "Decoder",
    "SelfState",
    "Sequences",
    "Span",
    "Spans",
    "Yoco",
    "YocoConfig",
    "load_checkpoint",
    "save_checkpoint",
    "to_device",
]
