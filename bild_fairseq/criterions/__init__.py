"""Training losses."""

from .early_exit_cross_entropy import EarlyExitLabelSmoothedCrossEntropyCriterion
from .word_distillation import WordDistillationCrossEntropyCriterion

__all__ = ["EarlyExitLabelSmoothedCrossEntropyCriterion", "WordDistillationCrossEntropyCriterion"]
