"""``pimerge plot``."""
