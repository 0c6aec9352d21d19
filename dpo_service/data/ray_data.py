"""Ray Data as this service uses it: quiet, in order, in pyarrow."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ray.data import DataContext


@contextmanager
def quiet() -> Iterator[None]:
    """Run pipelines without progress bars and with their rows in order; the driver's own settings come back after."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    # The newer reader lists files in a task of a whole CPU, whatever `num_cpus` says: on two cores it and a pool that
    # holds more than one of them wait for each other for ever.
    context.use_datasource_v2 = False
    logger.setLevel(logging.ERROR)
    try:
        with DataContext.current(context):
            yield
    finally:
        logger.setLevel(level)
