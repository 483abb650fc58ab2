"""Prints this folder: ``fairseq-generate --user-dir "$(python -m bild_fairseq)" ...`` works from anywhere."""

from pathlib import Path

print(Path(__file__).resolve().parent)
