"""Hardware from its files: what is read and cited, what is refused, which file a device's own name means."""

import pytest
import torch

from moe.device import peak_flops
from moe.errors import ConfigError
from moe.plan.hardware import DEVICES, device_hardware, hardware_names, load_hardware
from moe.plan.layout import load_layout
from moe.plan.models import load_shape

GOOD = """
name = "card"
source = "a data sheet"
node_size = 8
memory = "80 GB"
bandwidth = "2000 GB/s"
price = "2 USD/h"
[peak]
dense = true
bf16 = "500 TFLOP/s"
[links]
node = "300 GB/s"
network = "25 GB/s"
"""


@pytest.mark.parametrize("name", hardware_names())
def test_shipped_hardware_reads_and_cites(name: str) -> None:
    hw = load_hardware(name)
    for value in (hw.memory, hw.bandwidth, hw.node, hw.network, hw.price, *hw.peaks.values()):
        assert value.note, f"{name}: {value.key} has no source"
        assert value.value > 0
    assert hw.node >= hw.network


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dense = true", "", "peak.dense = None: peaks must be those without sparsity"),
        ("dense = true", "dense = false", "set dense = true"),
        ('"80 GB"', '"-80 GB"', "must be greater than 0"),
        ('"80 GB"', '"80 GB/s"', "is byte/s; it must be in GB"),
        ('"80 GB"', "80", "must be a number with its unit"),
        ('source = "a data sheet"', "", "has no source"),
        ("bandwidth", "bandwith", "unknown key 'bandwith'; did you mean 'bandwidth'"),
        ("bf16", "bf61", "unknown key 'bf61'; did you mean 'bf16'"),
        ('network = "25 GB/s"', "", "links.network is missing"),
        ("node_size = 8", "node_size = 0", "node_size = 0"),
    ],
)
def test_bad_hardware(tmp_path, old: str, new: str, message: str) -> None:
    place = tmp_path / "card.toml"
    place.write_text(GOOD)
    assert load_hardware(place).peak("bf16").to("TFLOP/s") == 500
    place.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        load_hardware(place)


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="did you mean 'h100-sxm'"):
        load_hardware("h100-smx")
    with pytest.raises(ConfigError, match="did you mean 'gpt4-train'"):
        load_layout("gpt4-trian")
    with pytest.raises(ConfigError, match="did you mean 'mixtral-8x7b'"):
        load_shape("mixtral-8x7")
    with pytest.raises(ConfigError, match="has peaks for"):
        load_hardware("a100-40").peak("fp8")


@pytest.mark.parametrize(
    ("device", "name", "peak"),
    [
        ("NVIDIA B200", "b200", 2250e12),
        ("NVIDIA H200", "h200", 989.4e12),
        ("NVIDIA H100 80GB HBM3", "h100-sxm", 989.4e12),
        ("NVIDIA H100 PCIe", "h100-pcie", 756e12),
        ("NVIDIA A100-SXM4-40GB", "a100-40", 312e12),
        ("NVIDIA A100-SXM4-80GB", "a100-80", 312e12),
        ("NVIDIA A100 80GB PCIe", "a100-80", 312e12),
        ("NVIDIA A100-PCIE-40GB", "a100-40", 312e12),
        ("AMD Instinct MI300X", "mi300x", 1307.4e12),
    ],
)
def test_a_device_is_known_by_its_own_name(device: str, name: str, peak: float, monkeypatch) -> None:
    found = device_hardware(device)
    assert found is not None
    assert found.name == load_hardware(name).name
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == pytest.approx(peak, rel=1e-12)


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA GeForce RTX 4090", "NVIDIA H100 NVL", "NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA RTX A1000",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H200 NVL", "NVIDIA A100X", "NVIDIA H100", "",
    ],
)  # fmt: skip
def test_other_devices_are_measured(device: str) -> None:
    """Those too whose names hold that of a known one: of another card, or of a slice of it."""
    assert device_hardware(device) is None
    assert set(DEVICES.values()) < set(hardware_names())
