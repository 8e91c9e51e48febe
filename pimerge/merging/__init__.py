"""Merge experts or full checkpoints without training; one file per method."""
