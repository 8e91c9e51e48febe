"""The measures, one file each; see :mod:`pimerge.ranking.measure`."""
