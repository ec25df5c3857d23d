"""Whether the kernels of this installation are right on a card."""
