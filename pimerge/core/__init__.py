"""Errors, files, manifests, progress and the registry of strategies: what every other folder uses."""
