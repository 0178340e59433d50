"""See what the router does: statistics, traces, replay, placement, what it means for serving."""

from moe.profile.observe import NotObservable, Pass
from moe.profile.placement import Placement, place, round_robin
from moe.profile.serving import DecodeStep, decode_steps
from moe.profile.statistics import RoutingProfile, Share, expert_similarity, routing
from moe.profile.trace import Comparison, Recorder, Trace, TraceError, compare, import_routed_experts, record, replay

__all__ = [
    "Comparison",
    "DecodeStep",
    "NotObservable",
    "Pass",
    "Placement",
    "Recorder",
    "RoutingProfile",
    "Share",
    "Trace",
    "TraceError",
    "compare",
    "decode_steps",
    "expert_similarity",
    "import_routed_experts",
    "place",
    "record",
    "replay",
    "round_robin",
    "routing",
]
