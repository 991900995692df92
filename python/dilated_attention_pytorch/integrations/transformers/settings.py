"""Which branches a model has: an entry of its config."""

from __future__ import annotations

from typing import Any

_NEEDED = {"segment_lengths", "dilation_rates"}


def settings_of(config: Any) -> dict[str, Any]:
    """`config.dilated_attention`, as arguments of `dilated_attention`; raises ValueError."""
    settings = getattr(config, "dilated_attention", None)
    if not isinstance(settings, dict):
        raise ValueError(
            "config.dilated_attention must be a dictionary of segment_lengths and dilation_rates, "
            f"got {settings!r}"
        )
    if not _NEEDED <= settings.keys() <= _NEEDED | {"head_offsets", "padding"}:
        raise ValueError(
            "config.dilated_attention must have segment_lengths and dilation_rates, and may have "
            f"head_offsets and padding, got {sorted(settings)}"
        )
    if getattr(config, "is_encoder_decoder", False) or getattr(
        config, "add_cross_attention", False
    ):
        raise ValueError(
            "config must be of an encoder or a decoder with dilated attention, got "
            f"{type(config).__name__} of a model with cross-attention"
        )
    return settings


def without_padding(settings: dict[str, Any]) -> dict[str, Any]:
    """For caches: padding means nothing to a causal call."""
    return {name: value for name, value in settings.items() if name != "padding"}
