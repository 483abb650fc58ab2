"""Research: measuring, calibrating and aligning, for the command lines in ``scripts/``. Nothing of this decodes."""
