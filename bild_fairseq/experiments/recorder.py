"""Runs two models over sentences and keeps what they predict, and the file that keeps it longer.

Predictions are read from a teacher-forced pass over what one setting has written, in which a position costs little.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from fairseq import utils
from fairseq.tasks import FairseqTask

from ..decoding.constraints import Constraints
from ..decoding.decode import decode
from ..decoding.policies import Policy
from ..decoding.reader import Prediction, Verdict
from ..engines.readers import LogitsReader
from ..errors import BildError
from ..plugin.files import write_text
from ..plugin.pair import Pair
from ..plugin.search import SearchOptions
from .origin import difference
from .recorded import Node, dump, insert, restore

LOGITS_BYTES = 1 << 28  # a pass over many sentences is cut so that its logits take less
SAVE_EVERY = 10  # seconds between two writes of the file

Job = tuple[int, tuple[int, ...]]  # a sentence, and the tokens that it starts with


class Recorder:
    """Records what a pair's models predict.

    Args:
        task: with the subset loaded.
        subset: that has the sentences.
        pair: the two models.
        search: length limits and n-gram blocking.
        ids: the sentences.
        batch_size: sentences in one pass.
        cuda: the models are on a GPU.

    Attributes:
        roots: per sentence the predictions for its first token, once they are recorded.
    """

    def __init__(
        self,
        task: FairseqTask,
        subset: str,
        pair: Pair,
        search: SearchOptions,
        ids: Sequence[int],
        batch_size: int,
        cuda: bool = False,
    ):
        self.roots: dict[int, Node] = {}
        self.batch_size = batch_size
        self._ids, self._pair, self._search, self._cuda = ids, pair, search, cuda
        self._dataset, self._dictionary = task.dataset(subset), task.target_dictionary

    def record_greedy(self, progress: Callable[[int], None] = lambda count: None) -> None:
        """Records every sentence along the large model's greedy output, from which most settings differ little.

        Args:
            progress: called with the number of sentences after each batch.
        """
        for chunk in self._chunks((i, ()) for i in self._ids if i not in self.roots):
            self._record(chunk, None)
            progress(len(chunk))

    def extend(self, missing: Iterable[Job], policy: Policy) -> None:
        """Records what is predicted after given tokens, and along what a policy writes from there.

        Args:
            missing: sentences and their tokens so far, after which nothing is recorded yet.
            policy: one in the middle of those that will be walked, so that they often write the same.
        """
        for chunk in self._chunks(set(missing)):
            self._record(chunk, policy)

    def _chunks(self, jobs: Iterable[Job]) -> list[list[Job]]:
        """Jobs with sources of like length together."""
        jobs = sorted(jobs, key=lambda job: (self._dataset.src_sizes[job[0]], job))
        return [jobs[start : start + self.batch_size] for start in range(0, len(jobs), self.batch_size)]

    @torch.no_grad()
    def _record(self, jobs: Sequence[Job], policy: Policy | None) -> None:
        """Completes sentences and keeps what both models predict along the new part.

        Args:
            jobs: what to complete.
            policy: what it is completed with; None for the large model's greedy choice.
        """
        batch = self._dataset.collater([{**self._dataset[i], "id": number} for number, (i, _) in enumerate(jobs)])
        jobs = [jobs[number] for number in batch["id"].tolist()]
        batch = utils.move_to_cuda(batch) if self._cuda else batch
        limits = [self._limits(i) for i, _ in jobs]
        large, small = self._pair.readers(batch["net_input"], max(limits, key=lambda limit: limit.max_len))
        prefixes = [prefix for _, prefix in jobs]
        eos = self._dictionary.eos()
        sentences = decode(large, small if policy else None, eos, prefixes, policy or Policy(), eos)
        for (i, _), sentence in zip(jobs, sentences, strict=True):
            if sentence.failed:
                raise BildError(f"sentence {i}: {sentence.failed}")
        # Nothing follows the last token, the end symbol.
        tokens = [sentence.tokens[:-1] for sentence in sentences]
        rows = max(1, LOGITS_BYTES // (4 * max(map(len, tokens)) * len(self._dictionary)))
        for start in range(0, len(jobs), rows):
            chunk = range(start, min(start + rows, len(jobs)))
            nodes = iter(self._nodes(large, small, tokens, chunk, prefixes, limits))
            for row in chunk:
                known = len(prefixes[row])
                made = list(islice(nodes, len(tokens[row]) - known))
                # After the longest length only the end symbol is left.
                insert(self.roots, *jobs[row], tokens[row][1 + known :], made[: limits[row].max_len + 1 - known])

    def _nodes(
        self,
        large: LogitsReader,
        small: LogitsReader,
        tokens: Sequence[Sequence[int]],
        rows: Sequence[int],
        prefixes: Sequence[Sequence[int]],
        limits: Sequence[Constraints],
    ) -> list[Node]:
        """What both models predict after each token of some sentences, from the last one of a prefix on."""
        for row in rows:
            small.rollback(row, len(prefixes[row]))
            large.rollback(row, len(prefixes[row]))
        # An exit must have read before the layers above it go on.
        of_small, of_large = (
            _lprobs(reader, tokens, rows, prefixes, limits, drafting=reader is small) for reader in (small, large)
        )
        small_lprobs, small_tokens = of_small.max(dim=-1)
        large_lprobs, large_tokens = of_large.max(dim=-1)
        drafted = of_large.gather(-1, small_tokens[:, None]).squeeze(-1)
        columns = (small_tokens, small_lprobs, large_tokens, large_lprobs, drafted)
        values = zip(*(column.tolist() for column in columns), strict=True)
        return [Node(Prediction(*one[:2]), Verdict(*one[2:])) for one in values]

    def _limits(self, sentence: int) -> Constraints:
        search, words = self._search, self._dictionary
        return Constraints(
            pad=words.pad(),
            unk=words.unk(),
            eos=words.eos(),
            max_len=search.longest(int(self._dataset.src_sizes[sentence]), self._pair.max_positions),
            min_len=search.min_len,
            no_repeat_ngram_size=search.no_repeat_ngram_size,
        )


def _lprobs(
    reader: LogitsReader,
    tokens: Sequence[Sequence[int]],
    rows: Sequence[int],
    prefixes: Sequence[Sequence[int]],
    limits: Sequence[Constraints],
    drafting: bool,
) -> torch.Tensor:
    """Log-probabilities of what follows each token from a prefix's last one on: (predictions, vocab)."""
    firsts = [reader.consumed[row] for row in rows]
    logits, normalizers = reader.logits(tokens, rows, last_only=False, drafting=drafting)
    kept, end = [], 0
    for row, first in zip(rows, firsts, strict=True):
        known = len(prefixes[row])
        start, end = end, end + len(tokens[row]) - first
        start += known - first  # a reader that has not come as far reads more
        positions = [(row, position) for position in range(known, len(tokens[row]))]
        limits[row].apply(logits[start:end], normalizers[start:end], positions, tokens)
        kept += range(start, end)
    return logits[kept] - normalizers[kept, None]


class Record:
    """The file that keeps recorded predictions, if one was asked for.

    Args:
        path: of the file; None for none.
        recorder: gets what the file holds.
        origin: what the predictions depend on.

    Raises:
        BildError: it holds something else, or predictions of other data or models.
    """

    def __init__(self, path: str | None, recorder: Recorder, origin: dict[str, Any]):
        self._path, self._recorder, self._origin = path, recorder, origin
        self._written = time.monotonic()
        if path is None or not Path(path).exists():
            return
        try:
            old = json.loads(Path(path).read_text(encoding="utf-8"))
            differs = difference(old["origin"], origin)
            recorder.roots = {} if differs else restore(old["predictions"])
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise BildError(f"--record {path}: holds no recorded predictions; name another file") from error
        if differs:
            raise BildError(f"--record {path}: was recorded with another {differs}; name another file, or delete it")

    def save(self, at_once: bool = False) -> None:
        """Writes the file, unless that was done a moment ago."""
        if self._path is None or (time.monotonic() - self._written < SAVE_EVERY and not at_once):
            return
        write_text(self._path, json.dumps({"origin": self._origin, "predictions": dump(self._recorder.roots)}))
        self._written = time.monotonic()
