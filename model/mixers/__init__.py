"""The kinds of self-decoders, each a file of its own; `contract` says what they answer."""

from __future__ import annotations

from .contract import Mixer, MixerState, Settings
from .gated_retention import GatedRetentionSettings
from .sliding_window import SlidingWindowSettings

# By the names under which configuration files state them.
KINDS: dict[str, type[Settings]] = {
    settings.kind: settings for settings in (GatedRetentionSettings, SlidingWindowSettings)
}

__all__ = [
    "KINDS",
    "GatedRetentionSettings",
    "Mixer",
    "MixerState",
    "Settings",
    "SlidingWindowSettings",
]
