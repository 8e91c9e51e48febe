"""Combine experts inside a base and train them on the target's examples; one file per method."""
