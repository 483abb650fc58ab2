"""Early-exit architectures: one Transformer whose shallow decoder layers are the small model."""

from .early_exit_bart import EarlyExitBARTModel
from .early_exit_transformer import EarlyExitTransformerModel
from .truncated import exit_model

__all__ = ["EarlyExitBARTModel", "EarlyExitTransformerModel", "exit_model"]
