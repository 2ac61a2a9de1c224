"""The metrics of a router, in Prometheus' text format. Losses in nats per token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

REQUESTS = "twofour_router_requests_total"
REROUTED = "twofour_router_rerouted_total"
UNPREDICTED = "twofour_router_unpredicted_total"
PREDICTED = "twofour_router_predicted_total"
PREDICTED_LOSS = "twofour_router_predicted_loss_sum"
MEASURED = "twofour_router_measured_total"
MEASURED_LOSS = "twofour_router_measured_loss_sum"
RECENT_LOSS = "twofour_router_measured_loss"
BUDGET = "twofour_router_budget"
THRESHOLD = "twofour_router_threshold"
SHADOW_SHARE = "twofour_router_shadow_share"
SHADOWS_DROPPED = "twofour_router_shadows_dropped_total"
SHADOWS_FAILED = "twofour_router_shadows_failed_total"
SHADOWS_DISCARDED = "twofour_router_shadows_discarded_total"
DRIFT = "twofour_router_drift"
DRIFT_ALARM = "twofour_router_drift_alarm"
SECONDS = "twofour_router_seconds_total"
TIMED = "twofour_router_timed_total"

METRICS: dict[str, tuple[Literal["counter", "gauge"], str]] = {
    REQUESTS: ("counter", "Requests, by answering variant and requested quality"),
    REROUTED: ("counter", "Requests sent to another variant because theirs was down or full"),
    UNPREDICTED: ("counter", "`auto` requests whose loss could not be predicted"),
    PREDICTED: ("counter", "Requests routed by the threshold"),
    PREDICTED_LOSS: ("counter", "Sum of their predicted losses; 0 for requests answered by the dense variant"),
    MEASURED: ("counter", "Completed shadow runs"),
    MEASURED_LOSS: ("counter", "Sum of the measured losses; 0 for requests beyond the threshold"),
    RECENT_LOSS: ("gauge", "Mean of the recent measured losses, to compare with the budget"),
    BUDGET: ("gauge", "The budget: mean loss over the requests routed by the threshold"),
    THRESHOLD: ("gauge", "Highest predicted loss at which the cheap variant answers"),
    SHADOW_SHARE: ("gauge", "Share of the requests selected for shadow runs"),
    SHADOWS_DROPPED: ("counter", "Shadow runs dropped because their queue was full"),
    SHADOWS_FAILED: ("counter", "Shadow runs that failed on an engine"),
    SHADOWS_DISCARDED: ("counter", "Shadow runs without effect: during drift, or with a loss that is not finite"),
    DRIFT: ("gauge", "Greatest population stability index of a feature against the training prompts"),
    DRIFT_ALARM: ("gauge", "1 while drift routes all requests to the dense variant"),
    SECONDS: ("counter", "Seconds spent on features, with the prefill if it is read, prediction and decision"),
    TIMED: ("counter", "Requests counted in twofour_router_seconds_total"),
}


class Sample(NamedTuple):
    """A metric's name, and its labels by name."""

    name: str
    labels: tuple[tuple[str, str], ...] = ()


def render(samples: Mapping[Sample, float]) -> str:
    """The page that Prometheus reads. Each sample's name must be in METRICS; one that never counted is 0."""
    lines = []
    for name, (kind, help_text) in METRICS.items():
        lines += [f"# HELP {name} {help_text}", f"# TYPE {name} {kind}"]
        values = {sample: value for sample, value in samples.items() if sample.name == name}
        if not values and name != REQUESTS:  # its labels are not known before a request
            values = {Sample(name): 0.0}
        lines += [f"{name}{_labels(sample)} {float(value):.9g}" for sample, value in values.items()]
    return "\n".join(lines) + "\n"


def _labels(sample: Sample) -> str:
    pairs = ",".join(f'{name}="{_escaped(value)}"' for name, value in sample.labels)
    return f"{{{pairs}}}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
