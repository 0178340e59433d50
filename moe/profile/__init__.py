"""See what the router does: statistics, traces, replay."""

from moe.profile.observe import NotObservable, Pass
from moe.profile.statistics import RoutingProfile, Share, expert_similarity, routing
from moe.profile.trace import Comparison, Recorder, Trace, TraceError, compare, import_routed_experts, record, replay

__all__ = [
    "Comparison",
    "NotObservable",
    "Pass",
    "Recorder",
    "RoutingProfile",
    "Share",
    "Trace",
    "TraceError",
    "compare",
    "expert_similarity",
    "import_routed_experts",
    "record",
    "replay",
    "routing",
]
