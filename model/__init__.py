"""The YOCO model: configuration, layers, caches, checkpoints in and out."""

from .cache import Cache, SelfState
from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .config import YocoConfig
from .yoco import Yoco

__all__ = [
    "Cache",
    "CheckpointError",
    "SelfState",
    "Yoco",
    "YocoConfig",
    "load_checkpoint",
    "save_checkpoint",
]
