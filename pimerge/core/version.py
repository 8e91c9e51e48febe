"""The version of pimerge, which the manifests of its outputs record."""

__version__ = "0.1.0"
