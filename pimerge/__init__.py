"""Choose, merge and tune the experts of a pool for a new task with few labels.

The stages meet on disk, so each can be called from a script on its own:
``fisher`` and ``store`` (embed), ``ranking``, ``merging``, ``tuning``, ``evaluation``.
"""

__version__ = "0.1.0"
