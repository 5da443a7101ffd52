"""The kinds of self-decoders, each a file of its own; `contract` says what they answer."""

from __future__ import annotations

from .contract import Mixer, MixerState, Settings
from .gated_deltanet import GatedDeltaNetSettings
from .gated_retention import GatedRetentionSettings
from .retention import RetentionSettings
from .sliding_window import SlidingWindowSettings

# By the names under which configuration files state them.
KINDS: dict[str, type[Settings]] = {
    settings.kind: settings
    for settings in (
        GatedRetentionSettings,
        RetentionSettings,
        SlidingWindowSettings,
        GatedDeltaNetSettings,
    )
}

__all__ = [
    "KINDS",
    "GatedDeltaNetSettings",
    "GatedRetentionSettings",
    "Mixer",
    "MixerState",
    "RetentionSettings",
    "Settings",
    "SlidingWindowSettings",
]
