"""The algorithm: Big Little Decoder over a batch. It knows no fairseq, no engine, no flag and no file."""
