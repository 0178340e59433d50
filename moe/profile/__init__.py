"""See what the router does: statistics, traces, replay, placement, what it means for serving."""

from moe.profile.observe import NotObservable, Pass
from moe.profile.placement import Placement, place, round_robin
from moe.profile.serving import StepLoad, decode_steps
from moe.profile.similarity import ClosestPair, closest_pairs, expert_similarity
from moe.profile.statistics import RoutingProfile, Share, load_entropy, routing
from moe.profile.trace import Comparison, Recorder, Trace, TraceError, compare, import_routed_experts, record, replay

__all__ = [
    "ClosestPair",
    "Comparison",
    "NotObservable",
    "Pass",
    "Placement",
    "Recorder",
    "RoutingProfile",
    "Share",
    "StepLoad",
    "Trace",
    "TraceError",
    "closest_pairs",
    "compare",
    "decode_steps",
    "expert_similarity",
    "import_routed_experts",
    "load_entropy",
    "place",
    "record",
    "replay",
    "round_robin",
    "routing",
]
