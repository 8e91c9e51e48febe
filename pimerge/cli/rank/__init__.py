"""``pimerge rank``."""
