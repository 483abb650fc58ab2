"""Forward passes on a CPU in C, for the usual Transformers; everything else runs on PyTorch's operators."""

from .decoder import NativeDecoder
from .encoder import NativeEncoder
from .stack import missing_option

__all__ = ["NativeDecoder", "NativeEncoder", "missing_option"]
