"""Case functions that run a whole Trainer in a rank process."""

import contextlib
import io
import logging
from collections.abc import Sequence
from typing import Any

from kmem.config import UserError, parse_config


def trainer_case(tree: dict[str, Any], callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train as `kmem train` does; what was printed, where it ended, or the user's error."""
    from kmem.data.reader import open_data
    from kmem.parallel.joining import join_mesh
    from kmem.train.reporting import MetricsFile, ProgressReport
    from kmem.train.trainer import Trainer

    config = parse_config(tree)
    printed, logged = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(logged)
    logging.getLogger("kmem").addHandler(handler)
    answer: dict[str, Any] = {"error": None, "steps": None}
    try:
        with contextlib.redirect_stdout(printed):
            data = open_data(config.data, config.model.vocab_size)
            trainer = Trainer(config, join_mesh(config), data, [MetricsFile(), ProgressReport(1), *callbacks])
            answer["started_at"] = trainer.step
            trainer.fit()
            answer["steps"] = trainer.step
            answer["tokens"] = trainer.tokens
    except UserError as error:
        answer["error"] = str(error)
    finally:
        logging.getLogger("kmem").removeHandler(handler)
    return answer | {"printed": printed.getvalue(), "logged": logged.getvalue()}
