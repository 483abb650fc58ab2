"""T5 as a fairseq model: `--arch t5`, and by size `t5_small`, `t5_v1_1_base`, `mt5_large`, `flan_t5_xl`, ...

T5 starts a text from its padding symbol, which fairseq masks, and it has no `<s>`. So T5's padding lies in the row of
`<s>` here. The decoder reads that row at its first position, whatever symbol fairseq puts there. The probability that
T5 gives to its padding stands at fairseq's `<pad>`, which generation never chooses; that of `<s>` is 0.
"""

import argparse
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.models import (
    FairseqEncoder,
    FairseqEncoderDecoderModel,
    FairseqIncrementalDecoder,
    register_model,
    register_model_architecture,
)
from fairseq.modules import FairseqDropout
from fairseq.tasks import FairseqTask
from torch import Tensor, nn

from ..errors import BildError
from .t5_config import PRESETS, T5Config, add_options, from_namespace, set_defaults
from .t5_layers import (
    IncrementalState,
    RelativeAttentionBias,
    T5DecoderLayer,
    T5EncoderLayer,
    linear,
    rms_norm,
)

# The score of a row that the model lacks. Its probability is 0 in float32 and its score finite: probability times score
# is then 0, not NaN, which distillation needs. Half precision can hold it.
MISSING_LOGIT = -1e4
# The log-probability of such a row, also finite: label smoothing adds up the log-probabilities of all rows. exp(-105)
# is 0 in float32. A constant has no gradient, so that smoothing does not push the other rows' scores.
MISSING_LPROB = -105.0

# T5 has relative positions only; fairseq wants a limit, and takes the smallest of all limits.
MAX_POSITIONS = 1_000_000


class T5Encoder(FairseqEncoder):
    """T5's encoder.

    Attributes:
        layers: of `T5EncoderLayer`.
        relative_attention_bias: the one table of position biases.
        layer_norm: the final RMS norm.
        engine_kind: as of `T5Decoder`.
    """

    engine_kind = "t5_encoder"

    def __init__(self, config: T5Config, dictionary: Dictionary, embed_tokens: nn.Embedding):
        super().__init__(dictionary)
        self.padding_idx = dictionary.pad()
        self.embed_tokens = embed_tokens
        self.relative_attention_bias = RelativeAttentionBias(config, bidirectional=True)
        self.layers = nn.ModuleList(T5EncoderLayer(config) for _ in range(config.num_layers))
        self.layer_norm = rms_norm(config)
        self.dropout_module = FairseqDropout(config.dropout, module_name=self.__class__.__name__)

    def position_bias(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """(..., queries), (..., keys) -> (..., heads, queries, keys), to be added to the attention scores."""
        return self.relative_attention_bias(query_positions, key_positions)

    def forward(self, src_tokens: Tensor, src_lengths: Tensor | None = None) -> dict[str, list[Tensor]]:
        """Encodes a batch.

        Args:
            src_tokens: (batch, source), padded on either side.
            src_lengths: not needed.

        Returns:
            as of fairseq's Transformer: ``encoder_out`` [(source, batch, d_model)] and ``encoder_padding_mask``
            [(batch, source)]; the other lists are empty.
        """
        padding = src_tokens.eq(self.padding_idx)
        positions = torch.arange(src_tokens.size(1), device=src_tokens.device)
        bias = self.position_bias(positions, positions)  # (heads, source, source)
        if padding.any():
            bias = bias.masked_fill(padding[:, None, None], -torch.inf)  # (batch, heads, source, source)
        x = self.dropout_module(self.embed_tokens(src_tokens))  # (batch, source, d_model)
        for layer in self.layers:
            x = layer(x, bias)
        x = self.dropout_module(self.layer_norm(x))
        return {
            "encoder_out": [x.transpose(0, 1)],
            "encoder_padding_mask": [padding],
            "encoder_embedding": [],
            "encoder_states": [],
            "src_tokens": [],
            "src_lengths": [],
        }

    def reorder_encoder_out(self, encoder_out: dict[str, list[Tensor]], new_order: Tensor) -> dict[str, list[Tensor]]:
        """Puts the sentences into another order; they may repeat or be left out."""
        return encoder_out | {
            "encoder_out": [x.index_select(1, new_order) for x in encoder_out["encoder_out"]],
            "encoder_padding_mask": [mask.index_select(0, new_order) for mask in encoder_out["encoder_padding_mask"]],
        }

    def max_positions(self) -> int:
        return MAX_POSITIONS


class T5Decoder(FairseqIncrementalDecoder):
    """T5's decoder.

    Attributes:
        layers: of `T5DecoderLayer`.
        relative_attention_bias: the one table of position biases.
        layer_norm: the final RMS norm.
        output_projection: (vocab, d_model), without bias; shares its weight with `embed_tokens` where T5 ties them.
        output_scale: what the output is multiplied by before `output_projection`.
        start_row: the row that is read at position 0; its score stands at `padding_idx`.
        missing_rows: rows of the dictionary that the model lacks, ascending; `start_row` is the first.
        missing_logit: their score.
        engine_kind: tells the engines that they may compute what this class's own methods compute.
    """

    missing_logit = MISSING_LOGIT
    engine_kind = "t5_decoder"

    def __init__(
        self,
        config: T5Config,
        dictionary: Dictionary,
        embed_tokens: nn.Embedding,
        output_projection: nn.Module | None = None,
    ):
        super().__init__(dictionary)
        self.padding_idx = dictionary.pad()
        self.start_row = dictionary.bos()
        self.missing_rows = [self.start_row, *range(len(dictionary) - config.missing_rows, len(dictionary))]
        self.output_scale = config.output_scale
        self.embed_tokens = embed_tokens
        self.relative_attention_bias = RelativeAttentionBias(config, bidirectional=False)
        self.layers = nn.ModuleList(T5DecoderLayer(config) for _ in range(config.num_decoder_layers))
        self.layer_norm = rms_norm(config)
        self.dropout_module = FairseqDropout(config.dropout, module_name=self.__class__.__name__)
        if output_projection is None:
            output_projection = linear(config.d_model, len(dictionary), std=config.d_model**-0.5)
            if config.tie_word_embeddings:
                output_projection.weight = embed_tokens.weight
        self.output_projection = output_projection

    def position_bias(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """(..., queries), (..., keys) -> (..., heads, queries, keys), to be added to the attention scores.

        Without the causal mask: all keys behind a query have the bias of distance 0.
        """
        return self.relative_attention_bias(query_positions, key_positions)

    def embed(self, tokens: Tensor, first: int = 0) -> Tensor:
        """The embeddings of tokens at positions `first` and up: (batch, new) -> (batch, new, d_model)."""
        if first == 0:
            tokens = tokens.clone()
            tokens[:, 0] = self.start_row
        return self.embed_tokens(tokens)

    def project_to_vocabulary(self, features: Tensor, projection: nn.Module) -> Tensor:
        """Scores of the next token, as T5 has them, from the output of a final norm.

        Args:
            features: (..., d_model).
            projection: `output_projection`, or an exit's.

        Returns:
            (..., vocab); `MISSING_LOGIT` in `missing_rows`.
        """
        if self.output_scale != 1.0:
            features = features * self.output_scale
        logits = projection(features)
        logits[..., self.padding_idx] = logits[..., self.start_row]
        logits[..., self.missing_rows] = MISSING_LOGIT
        return logits

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: dict[str, list[Tensor]],
        incremental_state: IncrementalState | None = None,
        features_only: bool = False,
    ) -> tuple[Tensor, dict[str, list[Any]]]:
        """Predicts what follows each token, or with a state what follows the last one.

        Args:
            prev_output_tokens: (batch, time) from position 0 on, padded on the right.
            encoder_out: as of `T5Encoder`.
            incremental_state: with it, only the last token is read; those before must have been read.
            features_only: leave the output projection out.

        Returns:
            (batch, time or 1, vocab or d_model); and as of fairseq's Transformer ``attn`` [None] and
            ``inner_states``: the input and the output of every layer, (time or 1, batch, d_model) each.
        """
        features, extra = self.extract_features(prev_output_tokens, encoder_out, incremental_state)
        return features if features_only else self.output_layer(features), extra

    def extract_features(
        self,
        prev_output_tokens: Tensor,
        encoder_out: dict[str, list[Tensor]],
        incremental_state: IncrementalState | None = None,
    ) -> tuple[Tensor, dict[str, list[Any]]]:
        """As `forward` with `features_only`: the final norm's output."""
        time = prev_output_tokens.size(1)
        first = 0 if incremental_state is None else time - 1
        keys = torch.arange(time, device=prev_output_tokens.device)
        queries = keys[first:]
        behind = keys > queries[:, None]  # (new, time)
        bias = self.position_bias(queries, keys).masked_fill(behind, -torch.inf)  # (heads, new, time)
        source = encoder_out["encoder_out"][0].transpose(0, 1)  # (batch, source, d_model)
        source_bias = _source_mask(encoder_out, source.dtype)
        x = self.dropout_module(self.embed(prev_output_tokens[:, first:], first))  # (batch, new, d_model)
        states = [x]
        for layer in self.layers:
            x = layer(x, bias, source, source_bias, incremental_state)
            states.append(x)
        features = self.dropout_module(self.layer_norm(x))
        return features, {"attn": [None], "inner_states": [state.transpose(0, 1) for state in states]}

    def output_layer(self, features: Tensor) -> Tensor:
        """(..., d_model) -> (..., vocab), see `project_to_vocabulary`."""
        return self.project_to_vocabulary(features, self.output_projection)

    def get_normalized_probs(
        self, net_output: tuple[Tensor, Any], log_probs: bool, sample: dict[str, Any] | None = None
    ) -> Tensor:
        """(batch, time, vocab) in float32; in `missing_rows` 0, or `MISSING_LPROB` as a logarithm."""
        probs = super().get_normalized_probs(net_output, log_probs, sample)
        if not log_probs:
            return probs
        rows = torch.tensor(self.missing_rows, device=probs.device)
        return probs.index_fill(-1, rows, MISSING_LPROB)

    def max_positions(self) -> int:
        return MAX_POSITIONS


def _source_mask(encoder_out: dict[str, list[Tensor]], dtype: torch.dtype) -> Tensor | None:
    """(batch, 1, 1, source): -inf at padding, 0 elsewhere; None if nothing is padded."""
    masks = encoder_out["encoder_padding_mask"]
    if not masks or not masks[0].any():
        return None
    padding = masks[0][:, None, None]
    return torch.zeros_like(padding, dtype=dtype).masked_fill_(padding, -torch.inf)


@register_model("t5")
class T5Model(FairseqEncoderDecoderModel):
    """T5, mT5 and Flan-T5.

    Attributes:
        cfg: the `T5Config`.
    """

    def __init__(self, args: argparse.Namespace, encoder: T5Encoder, decoder: T5Decoder):
        super().__init__(encoder, decoder)
        self.args = args
        self.cfg = from_namespace(args)

    @classmethod
    def add_args(cls, parser: argparse.ArgumentParser) -> None:
        """Adds the options of `T5Config`."""
        add_options(parser)

    @classmethod
    def build_model(cls, args: argparse.Namespace, task: FairseqTask) -> "T5Model":
        """Builds the model; options that are absent get their defaults.

        Raises:
            BildError: an option, or the task's data, that T5 cannot work with.
        """
        set_defaults(args)
        config = from_namespace(args)
        dictionary = task.target_dictionary
        if task.source_dictionary != dictionary:
            raise BildError("T5 has one dictionary for both sides; use --joined-dictionary in fairseq-preprocess")
        if getattr(getattr(task, "cfg", None), "left_pad_target", False):
            raise BildError("T5 starts a text in the first column; leave --left-pad-target out")
        embed_tokens = nn.Embedding(len(dictionary), config.d_model, dictionary.pad())
        nn.init.normal_(embed_tokens.weight)
        nn.init.zeros_(embed_tokens.weight[dictionary.pad()])
        encoder = cls.build_encoder(args, dictionary, embed_tokens)
        return cls(args, encoder, cls.build_decoder(args, dictionary, embed_tokens))

    @classmethod
    def build_encoder(cls, args: argparse.Namespace, src_dict: Dictionary, embed_tokens: nn.Embedding) -> T5Encoder:
        return T5Encoder(from_namespace(args), src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, args: argparse.Namespace, tgt_dict: Dictionary, embed_tokens: nn.Embedding) -> T5Decoder:
        return T5Decoder(from_namespace(args), tgt_dict, embed_tokens)

    def forward(
        self, src_tokens: Tensor, src_lengths: Tensor | None, prev_output_tokens: Tensor, features_only: bool = False
    ) -> tuple[Tensor, dict[str, list[Any]]]:
        """Encodes the sources and predicts what follows each target token; see `T5Decoder.forward`."""
        encoder_out = self.encoder(src_tokens, src_lengths)
        return self.decoder(prev_output_tokens, encoder_out, features_only=features_only)


def _register(arch: str, sizes: dict[str, Any]) -> None:
    def complete(args: argparse.Namespace) -> None:
        set_defaults(args, **sizes)

    register_model_architecture("t5", arch)(complete)


_register("t5", {})
for _arch, _sizes in PRESETS.items():
    _register(_arch, _sizes)
