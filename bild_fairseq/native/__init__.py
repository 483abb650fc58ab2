"""Forward passes on a CPU in C, for the usual Transformers; everything else runs on PyTorch's operators."""

from .decoder import NativeDecoder
from .encoder import NativeEncoder
from .transformer import DraftRules, missing_option

__all__ = ["DraftRules", "NativeDecoder", "NativeEncoder", "missing_option"]
