"""Architectures: T5, and early exit, where the shallow decoder layers of one model are the small model."""

from .early_exit_bart import EarlyExitBARTModel
from .early_exit_t5 import EarlyExitT5Model
from .early_exit_transformer import EarlyExitTransformerModel
from .t5 import T5Model
from .truncated import exit_model

__all__ = ["EarlyExitBARTModel", "EarlyExitT5Model", "EarlyExitTransformerModel", "T5Model", "exit_model"]
