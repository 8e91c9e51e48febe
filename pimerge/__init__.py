"""Choose, merge and tune the experts of a pool for a new task with few labels."""

from pimerge.core.version import __version__

__all__ = ["__version__"]
