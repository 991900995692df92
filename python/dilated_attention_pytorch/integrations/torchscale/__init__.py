"""torchscale's LongNet, and what is built of it: GigaPath, LongViT."""

from .attention import LongNetAttention
from .convert import Compat, Conversion, convert

__all__ = ["Compat", "Conversion", "LongNetAttention", "convert"]
