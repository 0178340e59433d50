"""Speculative decoding: what drafting gains when the verification of drafts touches more experts.

A small model drafts g tokens, the large one verifies all of them and one more in a single pass. With acceptance a,
taken as independent, (1 - a^(g+1)) / (1 - a) tokens come out of a pass on average (Leviathan et al. 2023,
arXiv:2211.17192, equation 1); the pass takes T(B (g + 1)) instead of T(B), and drafting g c T(B).
"""

from moe.plan.bounds import real, whole
from moe.plan.experts import touched
from moe.plan.hardware import Hardware
from moe.plan.layout import Layout
from moe.plan.models import Model, load_shape
from moe.plan.quantities import Sheet, assumed, quantity
from moe.plan.serving import decode

DRAFTS = 4  # the article's "runs of about 4 tokens"
DRAFT_COST = 0.05  # of a pass of the large model, for one draft token


def speculate(
    model: Model,
    layout: Layout,
    hardware: Hardware,
    *,
    batch: int,
    acceptance: float,
    drafts: int = DRAFTS,
    context: int = 0,
    draft_cost: float = DRAFT_COST,
    collectives: bool = False,
) -> Sheet:
    """Expected gain in tokens per second of one pass with drafts over one without.

    Args:
        batch: sequences of a pass. acceptance: probability that a draft is accepted.
        drafts: tokens drafted for each sequence; draft_cost: of one, in passes of the large model.

    Raises:
        ConfigError: an acceptance outside [0, 1], a negative number of drafts or cost.
    """
    real(0, 1, "is a probability:", acceptance=acceptance)
    real(0, 1e6, draft_cost=draft_cost)
    whole(0, 1000, drafts=drafts)
    shape = load_shape(model)
    common = {"batch": batch, "context": context, "collectives": collectives}
    plain = decode(shape, layout, hardware, **common)
    verify = decode(shape, layout, hardware, tokens_per_sequence=drafts + 1, **common)
    sheet = Sheet()
    # The sum 1 + a + ... + a^g is the closed form without its 0 / 0 at a = 1.
    accepted = " + ".join(["1", *(f"a ** {i}" for i in range(1, drafts + 1))])
    sheet.derive("speculate.tokens", "x", accepted, "of a pass and sequence, mean", a=acceptance)
    sheet.put("speculate.plain", plain["decode.latency"], "ms", "a pass without drafts")
    sheet.put("speculate.verify", verify["decode.latency"], "ms", "a pass that verifies them")
    if shape.n_experts:
        for name, tokens in (("plain", batch), ("verify", batch * (drafts + 1))):
            count = touched(shape.n_experts, shape.top_k, tokens)
            sheet.put(f"speculate.experts.{name}", quantity(count), "x", "distinct experts of a layer")
    cost = assumed(quantity(draft_cost), "draft cost", note="of a pass, for one draft token")
    sheet.derive(
        "speculate.gain", "x", "tokens / (verify / plain + g * c)", tokens=sheet["speculate.tokens"],
        verify=sheet["speculate.verify"], plain=sheet["speculate.plain"], g=drafts, c=cost,
    )  # fmt: skip
    return sheet
