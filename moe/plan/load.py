"""One device under a stream of requests: from the rate at which they arrive, what runs together and how long it takes.

Little's law closes the circle: at `rate` requests a second, each with `output` tokens, B = rate x output x T sequences
run together, where T, the time of a token, is itself that of a step of B sequences, and of the prompts that come in
meanwhile: T = step(B) / (1 - rate x prompt's time). A roofline, so a floor; arrivals are taken as even.
"""

from collections.abc import Callable

from moe.plan.bounds import real, whole
from moe.plan.flops import flops_per_token
from moe.plan.hardware import Hardware
from moe.plan.layout import Layout
from moe.plan.models import Model, load_shape
from moe.plan.quantities import Sheet, quantity
from moe.plan.serving import stage_loads
from moe.plan.shape import Shape


def under_load(
    model: Model, layout: Layout, hardware: Hardware, *, rate: float, prompt: int, output: int, max_running: int
) -> Sheet:
    """What requests at a rate get from one device, nothing of links counted.

    Args:
        rate: requests a second. prompt, output: tokens of each. max_running: sequences that run together at most.

    Returns:
        load.running: sequences in a step, mean, at most `max_running`; load.latency: of a token; load.throughput: new
        tokens a second; load.utilisation: of the peak, prompts included; load.most: the rate beyond which a queue grows
        without end.

    Raises:
        ConfigError: a rate or number of tokens that cannot be, or a layout of several devices.
    """
    shape = load_shape(model)
    real(1e-12, 1e12, rate=rate)
    whole(prompt=prompt, output=output, max_running=max_running)
    whole(1, 1, gpus=layout.gpus)
    context = prompt + output // 2
    peak = hardware.peak(hardware.compute_dtype(layout.weights)).to("FLOP/s")
    bandwidth = hardware.bandwidth.to("B/s")
    read = prompt * flops_per_token(shape, prompt) / peak  # seconds of a prompt; the weights are read for the others

    def step(batch: float) -> float:
        return _step(shape, layout, batch, context, peak, bandwidth)

    def capacity(batch: float) -> float:
        """Requests a second, at so many together."""
        return 1 / (output * step(batch) / batch + read)

    most, sheet = capacity(max_running), Sheet()
    running = _solve(capacity, min(rate, most), max_running)
    served = min(rate, most)
    latency = step(max(1.0, running)) / max(1e-9, 1 - served * read)
    sheet.put("load.running", quantity(running), "x", "sequences in a step, mean")
    sheet.put("load.latency", quantity(latency, "s"), "ms", "of a token of one user, prompts of others in between")
    sheet.put("load.throughput", quantity(served * output, "token/s"), "token/s", "new tokens")
    done = served * (output + prompt) * flops_per_token(shape, 0)
    sheet.put("load.utilisation", quantity(done / peak), "%", "of the peak, prompts included")
    sheet.put("load.most", quantity(most, "1/s"), "1/s", f"requests that {max_running} together can be served")
    return sheet


def _step(shape: Shape, layout: Layout, batch: float, context: int, peak: float, bandwidth: float) -> float:
    (load,) = stage_loads(shape, layout, batch, context)
    return max((load.weights + load.kv) / bandwidth, load.flops / peak)


def _solve(capacity: Callable[[float], float], rate: float, most: float) -> float:
    """The number together at which `rate` is just served: the lowest, as the time of a token grows with it."""
    low, high = 0.0, most
    for _ in range(60):
        middle = (low + high) / 2
        # Below one sequence a step is that of one, some of the time.
        reached = capacity(middle) if middle >= 1 else middle * capacity(1.0)
        low, high = (middle, high) if reached < rate else (low, middle)
    return high
