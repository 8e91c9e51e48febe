"""Rank the experts of a pool by how much they are expected to help a target; one file per measure."""
