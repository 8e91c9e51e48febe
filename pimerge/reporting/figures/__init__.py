"""Figures, one file each; see :class:`pimerge.reporting.figure.Figure`."""
