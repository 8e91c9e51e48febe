"""Keep the libraries quiet while pimerge tells its own progress."""

from __future__ import annotations

import os
import warnings


def quiet_libraries() -> None:
    """Keep the libraries' own bars, reports and warnings off the screen; their errors still come."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
