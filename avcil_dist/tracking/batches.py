"""Values of runs in batches: a value that the server refuses is cut to what it takes, or left out alone.

Servers differ in their limits (MLflow 2.7 takes 500 characters of a parameter, MLflow 3 takes 6,000), and a refused
batch has none of its values. So limits are read from the refusal, and a refused batch is sent again in halves.
"""

import logging
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.utils.validation import MAX_METRICS_PER_BATCH, MAX_PARAMS_TAGS_PER_BATCH

from avcil_dist.tracking.faults import FAULTS, delivery_error
from avcil_dist.tracking.outcomes import RejectedError

T = TypeVar("T")
Text = TypeVar("Text", Param, RunTag)

LENGTHS = (5000, 500, 250)  # tried where a refusal names no limit
_LIMIT = re.compile(r"(?:limit of|maximum length of|at most)\s+(\d+)")
_logger = logging.getLogger(__name__)


class BatchWriter:
    """Writer of parameters, tags and metrics. `check` is called at a refusal, and raises where it is that of the run.

    Raises those of FAULTS that are not the refusal of a value. A value that is cut or left out costs one warning.
    """

    def __init__(self, client: MlflowClient, shown: str, check: Callable[[], None]) -> None:
        self._client, self._shown, self._check = client, shown, check
        self._limits: dict[type, int] = {}  # of the values of parameters and of tags, as far as they are known

    def params(self, run_id: str, values: Sequence[Param]) -> None:
        """Log parameters that the run does not have."""
        self._texts(values, lambda some: self._client.log_batch(run_id, params=some, synchronous=True))

    def tags(self, run_id: str, values: Sequence[RunTag]) -> None:
        """Set tags."""
        self._texts(values, lambda some: self._client.log_batch(run_id, tags=some, synchronous=True))

    def metrics(self, run_id: str, values: Sequence[Metric]) -> None:
        """Log values of metrics."""
        for some in _chunks(values, MAX_METRICS_PER_BATCH):
            self._halves(
                some,
                lambda batch: self._client.log_batch(run_id, metrics=batch, synchronous=True),
                lambda metric, reason: self._left_out("metric", metric.key, reason),
            )

    def _texts(self, values: Sequence[Text], log: Callable[[Sequence[Text]], None]) -> None:
        def log_cut(some: Sequence[Text]) -> None:
            log([self._cut(value) for value in some])

        for some in _chunks(values, MAX_PARAMS_TAGS_PER_BATCH):
            self._halves(some, log_cut, lambda value, reason: self._shorter(value, reason, log))

    def _halves(
        self, values: Sequence[T], log: Callable[[Sequence[T]], None], refused: Callable[[T, str], None]
    ) -> None:
        """Log the values in one call, those of a refused call in two, down to the ones that are `refused`."""
        reason = self._refusal(log, values)
        if reason is None:
            return
        if len(values) == 1:
            refused(values[0], reason)
            return
        middle = len(values) // 2
        self._halves(values[:middle], log, refused)
        self._halves(values[middle:], log, refused)

    def _shorter(self, value: Text, reason: str, log: Callable[[Sequence[Text]], None]) -> None:
        """Log a refused parameter or tag in the length that the server takes, if there is one."""
        kind, length = type(value), len(value.value)
        named: list[int] = [int(limit) for limit in _LIMIT.findall(reason)][-1:]
        for limit in [limit for limit in (*named, *LENGTHS) if 0 < limit < length]:
            if self._refusal(log, [kind(value.key, value.value[:limit])]) is None:
                if limit in named:
                    self._limits[kind] = limit
                _logger.warning("%s: takes %d characters; %s is cut there", self._shown, limit, value.key)
                return
        self._left_out("value of", value.key, reason)

    def _cut(self, value: Text) -> Text:
        limit = self._limits.get(type(value), len(value.value))
        return value if len(value.value) <= limit else type(value)(value.key, value.value[:limit])

    def _refusal(self, log: Callable[[Sequence[T]], None], values: Sequence[T]) -> str | None:
        """The reason why the server refuses these values, or None after it has taken them."""
        try:
            log(values)
        except FAULTS as error:
            fault = delivery_error(error)
            if not isinstance(fault, RejectedError):
                raise
            self._check()
            return str(fault)
        return None

    def _left_out(self, kind: str, key: str, reason: str) -> None:
        _logger.warning("%s: refuses the %s %s (%s); it is left out there", self._shown, kind, key[:100], reason)


def _chunks(values: Sequence[T], size: int) -> list[Sequence[T]]:
    return [values[first : first + size] for first in range(0, len(values), size)]
