"""The engine in C, for the usual Transformers on a CPU."""

from .engine import NativeEngine
from .stack import missing_option

__all__ = ["NativeEngine", "missing_option"]
