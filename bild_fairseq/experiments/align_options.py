"""What an alignment is told: models, data, and the settings of its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..decoding.policies import Policy
from ..errors import BildError
from ..models.exits import parse_exit_layers
from ..plugin.generator import SearchOptions
from .files import try_folder
from .scoring import ScoreOptions


@dataclass(frozen=True)
class AlignOptions:
    """The flags of ``scripts/align.py``, with the same names and defaults; its ``--help`` says more of each.

    Args:
        data: folder of binarized data.
        source_lang, target_lang: the direction; None for that of the data's files.
        large, small: checkpoints.
        early_exit: the large model's exits after these layers, ``"2"`` or ``"1,2"``, are trained; then there is no
            ``small``.
        exit_own_layers: decoder layers that each exit has for itself.
        out: where the aligned model is written, in half precision with ``half``.
        draft_vocab: how many types to write beside ``out``, in a file of the same name with the suffix ``.vocab.txt``.
        work: folder for all else; None for ``out`` with the suffix ``.work``.
        report: JSON file for the figures; None for ``out`` with the suffix ``.json``.
        cuda: generate and measure on the GPU.
        cpu: train without a GPU.
        seed: of the samples and of the training.
        subset, sample, splice: the sources to learn from.
        valid_subset, valid_sample: the sources to validate with.
        truncate_source: tokens to cut longer sources to.
        part: sentences that the large model writes in one go.
        generate_tokens: tokens of a batch that is generated.
        search: limits of what the large model writes.
        distill, distill_top, epochs, lr, max_tokens, dropout: of the training.
        on_policy: epochs of a second training, with what both models write together; 0 for none.
        train_flags: flags of fairseq-train that win over these.
        sentences, batch_size, fallback, rollback, max_draft, verify_end, lossless_fallback: what is measured.
        score: quality of what is measured.

    Raises:
        BildError: a file that is missing, or a number out of range.
    """

    data: Path
    large: Path
    out: Path
    small: Path | None = None
    early_exit: str | None = None
    exit_own_layers: int = 0
    half: bool = False
    draft_vocab: int | None = None
    work: Path | None = None
    report: Path | None = None
    cuda: bool = False
    cpu: bool = False
    seed: int = 1
    source_lang: str | None = None
    target_lang: str | None = None

    subset: str = "train"
    sample: int | None = None
    splice: int = 0
    valid_subset: str = "valid"
    valid_sample: int = 2000
    truncate_source: int | None = None
    part: int = 5000
    generate_tokens: int = 8000
    search: SearchOptions = field(default_factory=SearchOptions)

    distill: float = 0.0
    distill_top: int = 0
    epochs: int = 10
    lr: float = 1e-3
    max_tokens: int = 4000
    dropout: float = 0.0
    on_policy: int = 0
    train_flags: Sequence[str] = ()

    sentences: int = 100
    batch_size: int = 1
    fallback: float = Policy.fallback_threshold
    rollback: float = Policy.rollback_threshold
    max_draft: int = Policy.max_draft
    verify_end: bool = False
    lossless_fallback: float = 0.25
    score: ScoreOptions = field(default_factory=ScoreOptions)

    def __post_init__(self) -> None:
        for name in ("large", "small"):
            if getattr(self, name) is not None and not getattr(self, name).is_file():
                raise BildError(f"--{name} {getattr(self, name)}: no such file")
        self._check_student()
        if not self.data.is_dir():
            raise BildError(f"{self.data}: no such folder; give what fairseq-preprocess wrote with --destdir")
        if self.out.resolve() in [path.resolve() for path in (self.small, self.large) if path is not None]:
            raise BildError(f"--out {self.out}: is one of the models that are read; name another file")
        for name in ("distill", "fallback", "lossless_fallback"):
            if not 0 <= getattr(self, name) <= 1:
                raise BildError(f"{flag(name)} {getattr(self, name)}: give a number from 0 to 1")
        positive = ("sample", "valid_sample", "part", "generate_tokens", "epochs", "max_tokens", "lr", "sentences")
        for name in (*positive, "batch_size", "max_draft", "truncate_source", "draft_vocab"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise BildError(f"{flag(name)} {getattr(self, name)}: give a number above 0")
        if self.distill_top < 0:
            raise BildError(f"--distill-top {self.distill_top}: give a number of words, 0 for all")
        if self.on_policy < 0:
            raise BildError(f"--on-policy {self.on_policy}: give a number of epochs, 0 for none")
        if self.splice < 0:
            raise BildError(f"--splice {self.splice}: give a number of sources, 0 for none")
        # The class is frozen: a default that depends on another field is set like this.
        object.__setattr__(self, "work", self.work or self.out.with_suffix(".work"))
        object.__setattr__(self, "report", self.report or self.out.with_suffix(".json"))
        if len({self.out.resolve(), self.work.resolve(), self.report.resolve()}) < 3:
            raise BildError(f"--out {self.out}: --work and --report must have other names: {self.work}, {self.report}")

    def _check_student(self) -> None:
        if (self.small is None) == (self.early_exit is None):
            raise BildError("give --small, or --early-exit for exits of the large model")
        if self.early_exit is not None:
            parse_exit_layers(self.early_exit)
        elif self.exit_own_layers:
            raise BildError("--exit-own-layers are of exits: give --early-exit, too")
        if self.exit_own_layers < 0:
            raise BildError(f"--exit-own-layers {self.exit_own_layers}: give a number of layers, 0 for none")
        if self.early_exit is not None and self.distill_top:
            raise BildError("--distill-top is for a small model; an exit learns from the last layer in the same pass")

    @property
    def vocabulary(self) -> Path:
        """The file of the draft vocabulary."""
        return self.out.with_suffix(".vocab.txt")

    def try_outputs(self) -> None:
        """Makes sure that all files can be written.

        Raises:
            BildError: one cannot.
        """
        files = {"--out": self.out, "--report": self.report}
        for name, path in (files | ({"--draft-vocab": self.vocabulary} if self.draft_vocab else {})).items():
            if path.is_dir():
                raise BildError(f"{name} {path}: cannot write there, that is a folder; name a file")
            try_folder(name, path.parent)
        try_folder("--work", self.work)

    def policy(self) -> Policy:
        """The policy that is measured, and that both models write with for ``on_policy``."""
        return Policy(self.fallback, self.rollback, self.max_draft, verify_end=self.verify_end)

    def flags(self, *names: str) -> dict[str, object]:
        """Some settings, or limits of the search, under the names of their flags: what a step depends on."""
        values = {**dataclasses.asdict(self.search), **vars(self)}
        return {flag(name): values[name] for name in names}


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")
