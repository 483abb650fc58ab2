"""The engine in C, for the usual Transformers on a CPU."""

from .engine import NativeEngine
from .options import missing_option

__all__ = ["NativeEngine", "missing_option"]
