"""The GPUs that the kernels know: what each has that the choice of tiles depends on, and which cannot run them.

`moe.kernels.ahead` compiles for each of CARDS that is not refused; a GPU in a machine is asked what it has.
"""

from functools import cache
from typing import NamedTuple

import torch


class Card(NamedTuple):
    """A GPU as the kernels see it."""

    arch: str  # "sm_90", "gfx942"
    shared: int  # bytes of shared memory that one block may have
    multiprocessors: int
    name: str

    @property
    def capability(self) -> tuple[int, int] | None:
        """NVIDIA's compute capability: (9, 0) of sm_90; None of AMD's."""
        return divmod(int(self.arch[3:]), 10) if self.arch.startswith("sm_") else None


# One for each target of the compiler; of the cards named, the multiprocessors are those of the first.
CARDS = {
    card.arch: card
    for card in (
        Card("sm_70", 98_304, 80, "V100"),
        Card("sm_75", 65_536, 40, "T4, RTX 20"),
        Card("sm_80", 166_912, 108, "A100, A30"),
        Card("sm_86", 101_376, 84, "A40, A10, RTX A6000, RTX 30"),
        Card("sm_89", 101_376, 142, "L40S, L4, RTX 6000 Ada, RTX 40"),
        Card("sm_90", 232_448, 132, "H100, H200, GH200"),
        Card("sm_100", 232_448, 148, "B200, GB200"),
        Card("sm_120", 101_376, 188, "RTX PRO 6000, RTX 50, DGX Spark (sm_121)"),
        Card("gfx90a", 65_536, 104, "MI250X, MI210"),
        Card("gfx942", 65_536, 304, "MI300X, MI325X"),
        Card("gfx950", 163_840, 256, "MI355X, MI350X"),
    )
}


PRECISIONS = ("ieee", "tf32", "tf32x3")


def card(device: torch.device) -> Card:
    """What a CUDA or ROCm device is, remembered after the first question."""
    return _card(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _card(index: int) -> Card:
    found = torch.cuda.get_device_properties(index)
    arch = found.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{found.major}{found.minor}"
    # ROCm does not say; then, and of an AMD GPU not known here, what the known ones have at least.
    shared = getattr(found, "shared_memory_per_block_optin", None)
    shared = shared or (CARDS[arch].shared if arch in CARDS else 65_536)
    return Card(arch, shared, found.multi_processor_count, found.name)


def why_not(device: torch.device) -> str | None:
    """Why a CUDA or ROCm device cannot run the Triton kernels; None where it can, or is not there (fake tensors)."""
    return _why_not(device.index or 0)


# As torch.compiler.assume_constant_result does, which would import the compiler: a trace takes the answer as it is.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not_precision(device: torch.device, precision: str) -> str | None:
    """Why a CUDA or ROCm device cannot multiply float32 so; None where it can, or is not there."""
    return _why_not_precision(device.index or 0, precision)


why_not_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _why_not_precision(index: int, precision: str) -> str | None:
    if index >= torch.cuda.device_count() or precision in precisions(found := _card(index)):
        return None
    return f"{found.name} ({found.arch}) has {', '.join(precisions(found))}"


def precisions(card: Card) -> tuple[str, ...]:
    """How Triton can multiply float32 on a card: of AMD's, tensor cores of one take it, and none three times."""
    if card.capability:
        return PRECISIONS
    return PRECISIONS[:2] if card.arch == "gfx942" else PRECISIONS[:1]


@cache
def _why_not(index: int) -> str | None:
    return refusal(_card(index)) if index < torch.cuda.device_count() else None


def why_not_e4m3(device: torch.device) -> str | None:
    """Why Triton cannot read float8_e4m3fn on a CUDA or ROCm device; None where it can, or the device is not there."""
    index = device.index or 0
    found = _card(index) if index < torch.cuda.device_count() else None
    return found and e4m3_refusal(found)


def e4m3_refusal(card: Card) -> str | None:
    """Why a card cannot read float8_e4m3fn; None where it can."""
    fits = card.arch == "gfx950" if card.capability is None else card.capability >= (8, 9)
    return (
        None if fits else f"float8_e4m3fn needs compute capability 8.9 or later, or gfx950, not {card.arch}; use int8"
    )


def refusal(card: Card) -> str | None:
    """Why the Triton kernels are not for a card; None where they are."""
    if card.capability is None:
        known = [arch for arch in CARDS if arch.startswith("gfx")]
        if card.arch not in known:
            return f"of AMD's GPUs it is checked for {', '.join(known)}, not for {card.arch} ({card.name})"
    elif card.capability < (8, 0):
        major, minor = card.capability
        return f"it needs compute capability 8.0 (A100, RTX 30) or later; {card.name} has {major}.{minor}"
    return None
