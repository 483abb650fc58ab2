"""Why a checkpoint cannot be used, in words of one line; what libraries say of it is for programmers."""

from __future__ import annotations

import errno
import re

from ..errors import first_line

_NO_MEMORY = re.compile("allocate|out of memory|not enough memory|bad_alloc|overflow", re.IGNORECASE)
_EMBEDDING = re.compile(r"(?:models\.[^.]+\.)?(encoder|decoder)\.embed_tokens\.weight")
_MISMATCH = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch.Size\(\[([\d, ]*)\]\) from checkpoint, "
    r"the shape in current model is torch.Size\(\[([\d, ]*)\]\)"
)


def reading_error(error: Exception) -> str:
    """Why the content of a file cannot be read."""
    text = str(error)
    # Words of torch's unpickler; its advice is to load such files unsafely.
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused:
        return f"it holds {refused[1]}, not only data, and could run code; it is not opened"
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return f"it cannot be read: {error.strerror}"
    if type(error).__module__.startswith("omegaconf"):
        return f"its options and the ones that override them cannot be read: {first_line(error)}"
    return _memory_or_option(error) or "it is damaged, or no checkpoint at all"


def building_error(error: Exception) -> str:
    """Why no model can be made of a checkpoint that has been read."""
    if "loading state_dict" in str(error):
        return _misfit(str(error))
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ImportError):
        return f"it needs a package that is not there: {first_line(error)}"
    if isinstance(error, KeyError):
        return f"its options name {first_line(error)}, which is not known"
    if "requires a joined dictionary" in str(error):
        return (
            "it was trained with one dictionary for both languages, and this data has two; give its dict.*.txt to "
            "fairseq-preprocess with --srcdict and --tgtdict"
        )
    return _memory_or_option(error) or f"its options make no model: {first_line(error)}"


def _memory_or_option(error: Exception) -> str | None:
    text = str(error)
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        return "it needs more memory than there is"
    missing = re.search(r"has no attribute '(\w+)'|Key '(\w+)' is not in struct|Missing key (\w+)", text)
    return f"its options lack {next(filter(None, missing.groups()))}" if missing else None


def _misfit(text: str) -> str:
    """What torch's list of keys that do not fit comes down to."""
    for name, *sizes in _MISMATCH.findall(text):
        have, want = ([int(size) for size in size.split(",") if size.strip()] for size in sizes)
        embedding = _EMBEDDING.fullmatch(name)
        if embedding and len(have) == len(want) == 2 and have[0] != want[0] and have[1] == want[1]:
            side = {"encoder": "source", "decoder": "target"}[embedding[1]]
            return (
                f"it was trained with another {side} dictionary ({have[0]} symbols, this data has {want[0]}); models "
                "and data need the same ones (fairseq-preprocess --srcdict and --tgtdict)"
            )
    found = []
    for label, wanted in (("Missing", "{} is missing"), ("Unexpected", "{} belongs to no such model")):
        keys = re.search(rf'{label} key\(s\) in state_dict: ("[^\n]*")', text)
        if keys:
            names = keys[1].split(", ")
            found.append(wanted.format(names[0].strip('"')) + _and_more(names))
    mismatches = _MISMATCH.findall(text)
    if mismatches:
        name, have, want = mismatches[0]
        found.append(f"{name} is {_shape(have)}, not {_shape(want)}{_and_more(mismatches)}")
    uncopied = re.findall(r'the parameter named "([^"]*)"', text)
    if uncopied:
        found.append(f"{uncopied[0]} is of another kind{_and_more(uncopied)}")
    return "its weights are not those of the model that its options describe: " + "; ".join(found)


def _shape(sizes: str) -> str:
    return sizes.replace(", ", " x ") or "a single number"


def _and_more(names: list) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
