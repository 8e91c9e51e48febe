"""``pimerge merge``."""
