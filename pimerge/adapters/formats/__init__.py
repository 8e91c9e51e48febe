"""File formats of adapters, one file each; see :mod:`pimerge.adapters.format`."""
