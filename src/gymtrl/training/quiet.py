"""The libraries' own bars and remarks, kept off the terminal."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the libraries' own bars and remarks off the terminal while our one bar is there."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        # The libraries announce to each other what their next versions will rename.
        warnings.simplefilter("ignore", FutureWarning)
        yield
