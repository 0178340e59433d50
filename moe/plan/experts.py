"""How many tokens an expert gets, and how many experts a batch touches, under independent uniform routing.

Each of B tokens chooses k different experts of E. One expert's load is binomial(B, k/E); two experts' loads have the
covariance B [k (k - 1) / (E (E - 1)) - (k/E)^2], negative, since a token that goes to one goes less to the other.
Distinct experts touched: E (1 - (1 - k/E)^B) on average, never min(E, B k).
"""

import math

from moe.plan.bounds import whole
from moe.plan.quantities import Sheet


def touched(n_experts: int, top_k: int, tokens: float) -> float:
    """Mean number of distinct experts that `tokens` tokens reach in one layer."""
    return n_experts * (1 - (1 - top_k / n_experts) ** tokens)


def load_probability(n_experts: int, top_k: int, tokens: int, load: int) -> float:
    """Probability that a given expert gets exactly `load` of `tokens` tokens: binomial."""
    if not 0 <= load <= tokens:
        return 0.0
    p = top_k / n_experts
    if p >= 1:
        return float(load == tokens)
    # In logarithms: the binomial coefficients of thousands of tokens overflow.
    log = math.lgamma(tokens + 1) - math.lgamma(load + 1) - math.lgamma(tokens - load + 1)
    return math.exp(log + load * math.log(p) + (tokens - load) * math.log1p(-p))


def load_quantile(n_experts: int, top_k: int, tokens: int, level: float) -> int:
    """The least load whose cumulative probability reaches `level`."""
    cumulative = 0.0
    for load in range(tokens + 1):
        cumulative += load_probability(n_experts, top_k, tokens, load)
        if cumulative >= level - 1e-12:
            return load
    return tokens


def load_covariance(n_experts: int, top_k: int, tokens: int) -> float:
    """Covariance of the loads of two different experts."""
    e, k = n_experts, top_k
    if e == 1:
        return 0.0
    return tokens * (k * (k - 1) / (e * (e - 1)) - (k / e) ** 2)


def busiest_mean(n_experts: int, top_k: int, tokens: int) -> float:
    """Mean load of the busiest expert, taking loads as independent binomials.

    The loads' negative covariance makes this a slight overestimate; for E = 16, k = 2 it is below 2%.
    """
    mean, below = 0.0, 0.0
    for load in range(tokens + 1):
        # E[max] = sum over x of P(max > x) = sum of 1 - P(one load <= x)^E.
        below += load_probability(n_experts, top_k, tokens, load)
        mean += 1 - min(1.0, below) ** n_experts
        if below > 1 - 1e-13:
            break
    return mean


def experts_sheet(n_experts: int, top_k: int, tokens: int) -> Sheet:
    """Load and experts touched when `tokens` tokens share one pass through a layer.

    Raises:
        ConfigError: no experts, more chosen than there are, or no tokens.
    """
    whole(n_experts=n_experts)
    whole(1, n_experts, top_k=top_k)
    whole(1, 10**6, tokens=tokens)
    sheet = Sheet()
    inputs = {"E": n_experts, "k": top_k, "B": tokens}
    sheet.derive("experts.touched", "x", "E * (1 - (1 - k / E) ** B)", "distinct experts of a layer, mean", **inputs)
    sheet.derive("experts.share", "%", "1 - (1 - k / E) ** B", "probability that an expert is touched", **inputs)
    sheet.derive("experts.idle", "%", "(1 - k / E) ** B", "probability that an expert gets nothing", **inputs)
    sheet.derive("experts.load", "token", "token * B * k / E", "mean of an expert", **inputs)
    sheet.derive("experts.variance", "x", "B * k / E * (1 - k / E)", "of an expert's load", **inputs)
    sheet.put("experts.covariance", load_covariance(n_experts, top_k, tokens), "x", "of two experts' loads")
    sheet.put("experts.busiest", busiest_mean(n_experts, top_k, tokens), "token", "mean load of the busiest expert")
    sheet.put("experts.most", tokens, "token", "the most that one expert can get: all tokens")
    for level in (0.05, 0.95):
        load = load_quantile(n_experts, top_k, tokens, level)
        sheet.put(f"experts.p{round(100 * level)}", load, "token", f"{level:.0%} quantile of an expert's load")
    sheet.derive("experts.imbalance", "x", "busiest / load", "max over mean", busiest=sheet["experts.busiest"],
                 load=sheet["experts.load"])  # fmt: skip
    return sheet
