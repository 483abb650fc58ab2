"""The engine in C."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fairseq.models.transformer import TransformerEncoder, TransformerEncoderBase
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from torch import nn

from ...decoding.constraints import Constraints
from ...decoding.reader import Prediction, Tokens, Verdict
from ..base import Engine, Logits, Pass, State
from ..precision import rounded_copy
from ..readers import EngineReader
from .decoder import NativeDecoder
from .encoder import NativeEncoder
from .stack import missing_option


class NativeEngine(Engine):
    """A fairseq encoder-decoder model in C."""

    def __init__(self, model: nn.Module, precision: str = "float32"):
        super().__init__()
        self.decoder = NativeDecoder(model.decoder, precision)
        self.depth = self.decoder.depth
        self._native_encoder = None
        if is_stock(model.encoder) and missing_option(model.encoder) is None:
            self._native_encoder = NativeEncoder(model.encoder, precision)
        else:
            self._encoder = rounded_copy(model, precision).encoder

    def start(self, net_input: dict[str, Any]) -> State:
        return self.timed(self._start, net_input)

    def _start(self, net_input: dict[str, Any]) -> State:
        if self._native_encoder is not None:
            encoder_out, padding = self._native_encoder(net_input["src_tokens"])
        else:
            out = self._encoder.forward_torchscript(net_input)
            encoder_out, masks = out["encoder_out"][0], out["encoder_padding_mask"]
            padding = masks[0] if masks else None
        return self.decoder.start(encoder_out, padding, len(net_input["src_tokens"]))

    def run(self, state: State, step: Pass) -> Logits | None:
        return self.timed(
            self.decoder.read, state, step.tokens, step.rows, step.starts, step.layers, step.predict, step.keep
        )

    def reader(
        self,
        state: State,
        layers: tuple[int, int],
        constraints: Constraints,
        below: EngineReader | None = None,
        keep: bool = False,
    ) -> EngineReader:
        return NativeReader(self, state, layers, constraints, below, keep)


class NativeReader(EngineReader):
    """Drafts and verifies in one call into C each, where constraints allow."""

    def draft(self, tokens: Tokens, rows: Sequence[int], limit: float, threshold: float) -> list[list[Prediction]]:
        limits = [min(limit, self.constraints.max_len - len(tokens[row]) + 1) for row in rows]
        if self.constraints.depend_on_text or limit <= 0 or min(limits) <= 0:
            return super().draft(tokens, rows, limit, threshold)
        step = self.next_pass(tokens, rows, "last")
        minima = [max(0, self.constraints.min_len - len(tokens[row]) + 1) for row in rows]
        drafts = self.engine.timed(
            self.engine.decoder.draft,
            *(self.state, step.tokens, step.rows, step.starts, step.layers),
            *(self.constraints, threshold, limits, minima, step.keep),
        )
        drafts = [[Prediction(*one) for one in made] for made in drafts]
        unended = [
            index
            for index, (made, most) in enumerate(zip(drafts, limits, strict=True))
            if len(made) == most < limit
            and made[-1].token != self.constraints.eos
            and not self._ends(made[-1], threshold)
        ]
        texts = list(tokens)
        for row, made in zip(rows, drafts, strict=True):
            self.consumed[row] = len(tokens[row]) + len(made) - 1
            texts[row] = [*tokens[row], *(one.token for one in made)]
        if unended:
            more = super().draft(texts, [rows[index] for index in unended], 1, threshold)
            for index, one in zip(unended, more, strict=True):
                drafts[index] += one
        return drafts

    def _ends(self, prediction: Prediction, threshold: float) -> bool:
        from ...decoding.policies import falls_back

        return prediction.lprob != prediction.lprob or falls_back(prediction.lprob, threshold)

    def verify(self, tokens: Tokens, rows: Sequence[int]) -> list[list[Verdict]]:
        c = self.constraints
        if c.depend_on_text or any(len(tokens[row]) > c.max_len for row in rows) or c.prefix_lengths:
            return super().verify(tokens, rows)
        step = self.next_pass(tokens, rows, "all")
        drafted = [t for row, start in zip(rows, step.starts, strict=True) for t in (*tokens[row][start + 1 :], c.eos)]
        may_end = [
            position >= c.min_len
            for row, start in zip(rows, step.starts, strict=True)
            for position in range(start, len(tokens[row]))
        ]
        verdicts = iter(
            self.engine.timed(
                self.engine.decoder.judge,
                *(self.state, step.tokens, step.rows, step.starts, step.layers, c, drafted, may_end, step.keep),
            )
        )
        return [[Verdict(*next(verdicts)) for _ in unread] for unread in step.tokens]


def is_stock(encoder: nn.Module) -> bool:
    """Whether an encoder computes what fairseq's own does."""
    return (
        type(encoder) in (TransformerEncoder, TransformerEncoderBase)
        and all(type(layer).forward is TransformerEncoderLayerBase.forward for layer in encoder.layers)
        and not getattr(encoder, "return_fc", False)
    )
