"""The seam to fairseq: flags, checkpoints, generator and what reaches into its programs."""
