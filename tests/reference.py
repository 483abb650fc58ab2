"""A naive Big Little Decoder to check the real one against: one sentence, no cache, stock fairseq forward passes.

Every call of a model reads the whole sentence from its start. The loop follows the definition of the algorithm
line by line, and none of the package's code takes part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

LARGE, SMALL = "large", "small"


@dataclass(frozen=True)
class Rules:
    """All that decides a sentence's output besides the models and the source."""

    fallback_threshold: float = 0.6  # probability
    rollback_threshold: float = 2.0  # nats
    max_draft: float = 10
    start: str = LARGE
    verify_end: bool = False
    max_len: int = 20  # tokens before the end symbol
    min_len: int = 1
    source_length: int | None = None  # with --match-source-len: exactly so many tokens before the end symbol
    unk_penalty: float = 0.0
    temperature: float = 1.0
    no_repeat_ngram_size: int = 0
    draft_types: tuple[int, ...] | None = None  # all that the small model has, except where it scores a prefix
    prefix: tuple[int, ...] = ()
    start_symbol: int | None = None  # the end symbol, unless given
    normalize_scores: bool = True
    len_penalty: float = 1.0


@dataclass
class Result:
    tokens: list[int]
    positional_scores: list[float]
    score: float
    counters: dict[str, int]


@dataclass
class _Count:
    tokens: int = 0
    large_calls: int = 0
    small_calls: int = 0
    drafted: int = 0
    accepted: int = 0
    unverified: int = 0
    discarded: int = 0
    fallbacks: int = 0
    rollbacks: int = 0


@dataclass
class _Model:
    """An ensemble (of one or more) that has encoded one source."""

    members: list[tuple[nn.Module, dict]]  # model, its encoder's output

    def lprobs(self, y: list[int], symbols: Dictionary, rules: Rules, types: Sequence[int] | None = None) -> "_Rows":
        """Row m is the log-distribution of the token after y[:m], constraints applied; no row after an end symbol.

        With ``types`` these are all that there is.
        """
        history = [symbols.eos() if rules.start_symbol is None else rules.start_symbol, *y]
        if y and y[-1] == symbols.eos():
            history.pop()  # nothing follows, and it can lie beyond the last learned position
        each = []
        for model, encoder_out in self.members:
            logits = model.decoder(torch.tensor([history]), encoder_out=encoder_out)[0][0]
            if types is not None:
                others = [token for token in range(len(symbols)) if token not in types]
                logits[:, others] = -math.inf
            each.append(torch.log_softmax(logits.float() / rules.temperature, dim=-1))
        lprobs = torch.stack(each).logsumexp(dim=0) - math.log(len(each))  # of the mean probability
        return _Rows(lprobs, history, symbols, rules)


@dataclass
class _Rows:
    """Log-distributions of the tokens after the first 1, 2, ... of a history; constrained as they are read."""

    lprobs: Tensor  # (history, vocabulary)
    history: list[int]
    symbols: Dictionary
    rules: Rules

    def __getitem__(self, m: int) -> Tensor:
        m = range(len(self.history))[m]
        row = self.lprobs[m].clone()
        _constrain(row, self.history[: m + 1], self.symbols, self.rules)
        return row


def _encode(models: Sequence[nn.Module], source: Sequence[int]) -> _Model:
    tokens, length = torch.tensor([list(source)]), torch.tensor([len(source)])
    return _Model([(model, model.encoder(tokens, src_lengths=length)) for model in models])


def _constrain(lprobs: Tensor, history: list[int], symbols: Dictionary, rules: Rules) -> None:
    """Changes the log-distribution after ``history`` (start symbol included) as fairseq's SequenceGenerator does."""
    eos = symbols.eos()
    length = len(history) - 1
    lprobs[symbols.pad()] = -math.inf
    lprobs[symbols.unk()] -= rules.unk_penalty
    if length < len(rules.prefix) and length < rules.max_len:
        return  # the token here is forced, whatever the rest of the distribution
    if length >= rules.max_len:
        end = lprobs[eos].item()
        lprobs[:] = -math.inf
        lprobs[eos] = end
    else:
        if length < rules.min_len:
            lprobs[eos] = -math.inf
        n = rules.no_repeat_ngram_size
        if n > 0:
            last = history[len(history) - (n - 1) :]
            for i in range(len(history) - n + 1):
                if history[i : i + n - 1] == last:
                    lprobs[history[i + n - 1]] = -math.inf
    if rules.source_length is not None:
        # fairseq's LengthConstrainedBeamSearch, which runs last.
        if length < rules.source_length:
            lprobs[eos] = -math.inf
        else:
            lprobs[eos] = 0.0


@torch.inference_mode()
def bild(
    large_models: Sequence[nn.Module],
    small_models: Sequence[nn.Module],
    source: Sequence[int],
    symbols: Dictionary,
    rules: Rules,
) -> Result:
    """Big Little Decoder; with no small model, greedy decoding by the large one.

    Args:
        large_models: the large model, or an ensemble whose probabilities are averaged.
        small_models: the same for the small model.
        source: source tokens, end symbol included, without padding.
        symbols: target dictionary.
        rules: thresholds, constraints, forced prefix.
    """
    large, small = _encode(large_models, source), _encode(small_models, source)
    eos = symbols.eos()
    y = list(rules.prefix[: rules.max_len])
    prefix = len(y)
    scores = [math.nan] * prefix
    verified = prefix
    count = _Count()
    turn = rules.start if small_models else LARGE

    def read(model: _Model, types: Sequence[int] | None = None) -> _Rows:
        if prefix or types is None:
            lprobs = model.lprobs(y, symbols, rules)
        for m in range(prefix):
            if model is large or math.isnan(scores[m]):
                scores[m] = lprobs[m][y[m]].item()
        return lprobs if types is None else model.lprobs(y, symbols, rules, types)

    done = False
    if y and y[-1] == eos:
        # A complete sentence was forced; one call gives its scores.
        if turn == LARGE:
            count.large_calls += 1
            read(large)
        else:
            count.small_calls += 1
            read(small)
        done = True

    while not done:
        if turn == SMALL:
            while len(y) - verified < rules.max_draft:
                count.small_calls += 1
                best, token = read(small, rules.draft_types)[-1].max(dim=-1)
                if best.exp().item() < rules.fallback_threshold:
                    count.fallbacks += 1
                    break
                y.append(token.item())
                scores.append(best.item())
                count.drafted += 1
                if y[-1] == eos:
                    break
            if y and y[-1] == eos and not rules.verify_end:
                count.unverified += len(y) - verified
                break

        count.large_calls += 1
        lprobs = read(large)
        drafts = len(y) - verified
        kept = drafts
        for m in range(verified, len(y)):
            row = lprobs[m]
            best, token = row.max(dim=-1)
            if -row[y[m]].item() > rules.rollback_threshold and token.item() != y[m]:
                count.rollbacks += 1
                kept = m - verified
                y, scores = y[:m] + [token.item()], scores[:m] + [best.item()]
                break
            scores[m] = row[y[m]].item()
        else:
            if not y or y[-1] != eos:
                best, token = lprobs[-1].max(dim=-1)
                y.append(token.item())
                scores.append(best.item())
        count.accepted += kept
        count.discarded += drafts - kept
        verified = len(y)
        done = y[-1] == eos
        turn = SMALL if small_models else LARGE

    count.tokens = len(y)
    score = sum(scores)
    if rules.normalize_scores:
        score /= len(y) ** rules.len_penalty
    if rules.source_length is not None and len(y) - 1 > rules.source_length:
        score = -math.inf
    return Result(y, scores, score, vars(count))
