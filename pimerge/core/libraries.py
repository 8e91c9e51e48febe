"""Keep the libraries quiet while pimerge shows its own progress."""

from __future__ import annotations

import os
import warnings


def quiet_libraries() -> None:
    """Turn off the libraries' progress bars, reports and warnings; errors are still shown."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
