"""Keeps fairseq 0.12.2's encoder working with the PyTorch that this package needs."""

from fairseq.modules.transformer_layer import TransformerEncoderLayerBase


def switch_off_encoder_fast_path() -> None:
    """Makes every fairseq encoder layer compute as it does in training.

    Once loaded, the post-norm encoder layers of fairseq 0.12.2 call a private fused kernel of
    PyTorch, without the mask type that PyTorch has asked for since 1.13, and fail on any padded
    batch (fairseq issue 4858). Other versions of fairseq have no such path and stay as they are.
    """
    if "can_use_fastpath" in TransformerEncoderLayerBase.__init__.__code__.co_names:
        # Layers assign the attribute in their constructor, so the class takes no notice of that.
        TransformerEncoderLayerBase.can_use_fastpath = property(lambda layer: False, lambda layer, value: None)
