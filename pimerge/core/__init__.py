"""Errors, files, manifests, progress and the registry of strategies: used by all other folders."""
