"""``pimerge.verify``: compare a finished merge with the weighted sum of updates that it claims to be."""
