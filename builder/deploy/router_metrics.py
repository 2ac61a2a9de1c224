"""A router's metrics, on the page of Triton's own. Runs inside Triton's Python backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

from calibration.routing.metrics import METRICS, REQUESTS, Sample


class TritonMetrics:
    """The families of METRICS, with the label `model`."""

    def __init__(self, model: str) -> None:
        kinds = {"counter": pb_utils.MetricFamily.COUNTER, "gauge": pb_utils.MetricFamily.GAUGE}
        self._model = model
        self._families = {
            name: pb_utils.MetricFamily(name=name, description=help_text, kind=kinds[kind])
            for name, (kind, help_text) in METRICS.items()
        }
        self._metrics: dict[Sample, Any] = {}
        self._values: dict[Sample, float] = {}
        self.write({Sample(name): 0.0 for name in METRICS if name != REQUESTS})

    def write(self, samples: Mapping[Sample, float]) -> None:
        """Brings each metric to its value."""
        for sample, value in samples.items():
            if sample not in self._metrics:
                labels = {"model": self._model, **dict(sample.labels)}
                self._metrics[sample] = self._families[sample.name].Metric(labels=labels)
            elif value == self._values[sample]:
                continue
            if METRICS[sample.name][0] == "gauge":
                self._metrics[sample].set(value)
            else:
                self._metrics[sample].increment(value - self._values.get(sample, 0.0))
            self._values[sample] = value
