"""Outputs and costs of settings on sentences, from recorded predictions."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from ..decoding.policies import Policy
from .bootstrap import bootstrap_weights
from .costs import CostModel, features
from .outcomes import Outcome, outcome_of
from .recorded import walk
from .recorder import Recorder
from .scoring import Scorer


class Estimates:
    """What settings would write and what it would take.

    Args:
        settings: thresholds and rules.
        ids: the sentences.
        recorder: where predictions come from; it is made to record what is missing.
        scorer: of the sentences.
        eos: end symbol.
    """

    def __init__(self, settings: Sequence[Policy], ids: Sequence[int], recorder: Recorder, scorer: Scorer, eos: int):
        self._settings, self._ids = settings, ids
        self._recorder, self._scorer, self._eos = recorder, scorer, eos
        self._outcomes: list[list[Outcome]] = [[] for _ in ids]
        self._done = np.zeros((len(settings), len(ids)), dtype=bool)
        self._statistics: np.ndarray | None = None  # (settings, sentences, k)
        self._calls = np.zeros((len(settings), len(ids), 4), dtype=np.float32)
        self._middle = Policy(
            float(np.median([policy.fallback_threshold for policy in settings])),
            float(np.median([policy.rollback_threshold for policy in settings])),
            10,
        )

    def fill(self, active: Sequence[int], columns: Sequence[int], bar: tqdm, saved: Callable[[], None]) -> None:
        """Walks some settings (by number) over some sentences (by column).

        Args:
            bar: counts pairs of a setting and a sentence.
            saved: called after every pass of the models.
        """
        while missing := self._walk(active, np.asarray(columns), bar):
            by_policy = collections.defaultdict(list)
            for job, setting in missing.items():
                # While many are missing, large batches count; of the last ones each goes its own way.
                few = len(missing) <= self._recorder.batch_size
                by_policy[self._settings[setting] if few else self._middle].append(job)
            for policy, jobs in by_policy.items():
                self._recorder.extend(jobs, policy)
            self._outcomes = [[one for one in outcomes if not one.missing] for outcomes in self._outcomes]
            saved()

    def _walk(self, active: Sequence[int], columns: np.ndarray, bar: tqdm) -> dict[tuple[int, tuple[int, ...]], int]:
        """Returns the sentences with the tokens after which predictions are missing, and a setting that needs them."""
        missing: dict[tuple[int, tuple[int, ...]], int] = {}
        for setting in active:
            todo = columns[~self._done[setting, columns]].tolist()
            for column, outcome in self._results(self._settings[setting], todo):
                if outcome.missing:
                    missing.setdefault((self._ids[column], tuple(outcome.tokens)), setting)
                else:
                    self._note(setting, column, outcome)
            bar.update(len(todo) - int((~self._done[setting, todo]).sum()))
        return missing

    def _results(self, policy: Policy, columns: Sequence[int]) -> list[tuple[int, Outcome]]:
        """What becomes of some sentences under a policy, each with its column."""
        results, new = [], []
        for column in columns:
            known = next((one for one in self._outcomes[column] if one.holds_for(policy)), None)
            if known is None:
                new.append(column)
            else:
                results.append((column, known))
        roots = [self._recorder.roots[self._ids[column]] for column in new]
        for column, root, sentence in zip(new, roots, walk(roots, policy, self._eos), strict=True):
            outcome = outcome_of(sentence, root, policy, self._eos)
            self._outcomes[column].append(outcome)
            results.append((column, outcome))
        return results

    def _note(self, setting: int, column: int, outcome: Outcome) -> None:
        values = self._scorer.sentence(self._ids[column], outcome.tokens)
        if self._statistics is None:
            self._statistics = np.zeros((*self._done.shape, len(values)), dtype=np.float32)
        self._statistics[setting, column] = values
        self._calls[setting, column] = features(outcome.counters)
        self._done[setting, column] = True

    def milliseconds(self, active: Sequence[int], columns: Sequence[int], costs: CostModel) -> np.ndarray:
        """Estimated time of all the sentences: (active,)."""
        return self._calls[np.ix_(active, columns)].sum(axis=1) @ costs.costs

    def losses(self, active: Sequence[int], columns: Sequence[int], greedy: np.ndarray) -> np.ndarray:
        """Loss against greedy output in each resample of the sentences: (active, resamples).

        Args:
            greedy: statistics of greedy outputs of all sentences, (sentences, k).
        """
        columns = sorted(columns)  # the same resamples as when the settings are run
        weights = bootstrap_weights(len(columns))
        theirs = self._scorer.from_statistics(weights @ greedy[columns])
        return np.stack([theirs - self._scorer.from_statistics(weights @ self._statistics[s][columns]) for s in active])
