"""Forward passes with PyTorch's operators."""
