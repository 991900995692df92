"""Decoding token by token: a cache that forgets, and attention over an ordinary full one."""

from .full_cache import dilated_attention_with_kvcache
from .kv_cache import DilatedKVCache

__all__ = ["DilatedKVCache", "dilated_attention_with_kvcache"]
