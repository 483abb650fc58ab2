"""`--arch early_exit_transformer` and its sizes."""

from fairseq.models import register_model
from fairseq.models.transformer import TransformerModel

from .early_exit import EarlyExitMixin, register_early_exit_architectures


@register_model("early_exit_transformer")
class EarlyExitTransformerModel(EarlyExitMixin, TransformerModel):
    """fairseq's Transformer with prediction heads on chosen decoder layers."""


register_early_exit_architectures("transformer")
