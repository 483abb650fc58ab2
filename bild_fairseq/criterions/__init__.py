"""Training losses."""

from .early_exit_cross_entropy import EarlyExitLabelSmoothedCrossEntropyCriterion

__all__ = ["EarlyExitLabelSmoothedCrossEntropyCriterion"]
