"""`--arch early_exit_bart_base` and the other sizes of BART and mBART."""

from fairseq.models import register_model
from fairseq.models.bart import BARTModel

from .early_exit import EarlyExitMixin, register_early_exit_architectures


@register_model("early_exit_bart")
class EarlyExitBARTModel(EarlyExitMixin, BARTModel):
    """fairseq's BART with prediction heads on chosen decoder layers."""


register_early_exit_architectures("bart")
