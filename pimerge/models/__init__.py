"""Base models in memory: loading one, putting adapters into it, its heads and the linear probe."""
