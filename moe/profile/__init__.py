"""See what the router does (statistics, traces, replay, placement, serving), and where the time of a step goes."""

from moe.profile.imports import import_routed_experts
from moe.profile.observe import NotObservable, Pass
from moe.profile.placement import Placement, place, round_robin
from moe.profile.serving import StepLoad, decode_steps
from moe.profile.similarity import ClosestPair, closest_pairs, expert_similarity
from moe.profile.statistics import RoutingProfile, Share, load_entropy, routing
from moe.profile.step import (
    Ceilings,
    Memory,
    Run,
    StepProfile,
    make_run,
    measure_ceilings,
    profile_step,
    random_model,
    trace_step,
)
from moe.profile.stopwatch import Timing, timing
from moe.profile.trace import Comparison, Recorder, Trace, TraceError, compare, record, replay

__all__ = [
    "Ceilings",
    "ClosestPair",
    "Comparison",
    "Memory",
    "NotObservable",
    "Pass",
    "Placement",
    "Recorder",
    "RoutingProfile",
    "Run",
    "Share",
    "StepLoad",
    "StepProfile",
    "Timing",
    "Trace",
    "TraceError",
    "closest_pairs",
    "compare",
    "decode_steps",
    "expert_similarity",
    "import_routed_experts",
    "load_entropy",
    "make_run",
    "measure_ceilings",
    "place",
    "profile_step",
    "random_model",
    "record",
    "replay",
    "round_robin",
    "routing",
    "timing",
    "trace_step",
]
