"""Which parameters decay, AdamW against its formulas in float64, Muon against a plain float64 version."""

import copy

import pytest
import torch
import torch.nn as nn

from moe import Transformer
from moe.config import TrainConfig
from moe.train.muon import POLAR_EXPRESS, Muon, orthogonaliser
from moe.train.optimizer import build


def newton_schulz(g):
    """The usual form, one matrix, float64."""
    x = g.double()
    x = x / (x.norm() * 1.01 + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def orthogonalise(g_NMP):
    factor, tall = orthogonaliser(g_NMP)
    return g_NMP @ factor if tall else factor @ g_NMP


def scalar(s):
    for a, b, c in POLAR_EXPRESS:
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_has_one_place_and_only_matrices_decay(cfg, optimizer):
    model = Transformer(cfg.with_overrides(["train.optimizer=" + optimizer]))
    name_of = {id(p): name for name, p in model.named_parameters()}
    optimizers = build(model, model.cfg.train)
    place = {}
    for part in optimizers.parts:
        for group in part.param_groups:
            for p in group["params"]:
                assert name_of[id(p)] not in place
                place[name_of[id(p)]] = (type(part).__name__, group["weight_decay"] > 0)
    assert place.keys() == set(name_of.values())
    matrices = "Muon" if optimizer == "muon" else "AdamW"
    for name, (kind, decays) in place.items():
        inside = any(part in name for part in ("wq", "wk", "wv", "wo", "w_in", "w_out"))
        assert kind == (matrices if inside else "AdamW")
        assert decays == (inside or name in ("head.weight", "blocks.0.moe.router.weight"))


def test_the_embedding_has_a_rate_of_its_own(cfg):
    model = Transformer(cfg)
    optimizers = build(model, cfg.with_overrides(["train.lr=0.01", "train.embedding_lr=20"]).train)
    optimizers.set_lr(0.5)
    rates = {id(p): group["lr"] for part in optimizers.parts for group in part.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert rates[id(p)] == pytest.approx(0.1 if name == "embedding.weight" else 0.005)


def test_adamw_is_its_formula():
    torch.manual_seed(0)
    layer = nn.ModuleDict({"wq": nn.Linear(5, 3, bias=False), "norm": nn.RMSNorm(3)}).double()
    weights = {name: p.detach().clone() for name, p in layer.named_parameters()}
    cfg = TrainConfig(lr=0.01, betas=(0.8, 0.9), weight_decay=0.3)
    optimizers = build(layer, cfg)
    m, v = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for t in range(1, 5):
        scale = 1 / t
        for name, p in layer.named_parameters():
            g = torch.randn_like(p)
            p.grad = g.clone()
            m[name] = 0.8 * m[name] + 0.2 * g
            v[name] = 0.9 * v[name] + 0.1 * g * g
            decay = 0.3 if name == "wq.weight" else 0.0
            step = (m[name] / (1 - 0.8**t)) / ((v[name] / (1 - 0.9**t)).sqrt() + 1e-8)
            weights[name] = weights[name] - 0.01 * scale * (decay * weights[name] + step)
        optimizers.set_lr(scale)
        optimizers.step()
        for name, p in layer.named_parameters():
            torch.testing.assert_close(p.detach(), weights[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32), (64, 1)])
def test_singular_values_are_those_of_the_paper_s_polynomials(shape):
    torch.manual_seed(0)
    n = min(shape)
    u, _ = torch.linalg.qr(torch.randn(shape[0], n, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(shape[1], n, dtype=torch.float64))
    s = torch.logspace(0, -6, n, dtype=torch.float64)
    g = (u * s) @ v.T
    out = orthogonalise(g.float()[None])[0].double()
    # Small ones are below what float32 gives for the input itself, hence the absolute tolerance.
    expected = torch.stack([scalar(x / (s.norm() * 1.01 + 1e-7)) for x in s])
    torch.testing.assert_close(torch.linalg.svdvals(out), expected.sort(descending=True).values, rtol=1e-3, atol=2e-3)


def test_a_random_matrix_becomes_almost_orthogonal():
    values = [scalar(x) for x in torch.linspace(0.003, 1 / 1.01, 10_000).tolist()]
    low, high = min(values), max(values)
    assert low > 0.87
    assert high < 1.13
    torch.manual_seed(0)
    singular = torch.linalg.svdvals(orthogonalise(torch.randn(8, 128, 48)))
    assert low - 1e-3 < singular.min()
    assert singular.max() < high + 1e-3


def test_a_batch_is_its_matrices_one_by_one():
    torch.manual_seed(0)
    g = torch.randn(6, 40, 24)
    for one, g_one in zip(orthogonalise(g), g, strict=True):
        torch.testing.assert_close(one, orthogonalise(g_one[None])[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(one.double(), newton_schulz(g_one), rtol=1e-4, atol=1e-4)


def test_a_zero_gradient_gives_a_zero_update():
    assert orthogonalise(torch.zeros(1, 4, 8)).abs().max() == 0


def test_muon_is_its_formula_for_every_expert(monkeypatch):
    monkeypatch.setattr("moe.train.muon._CHUNK_ELEMENTS", 40)  # several chunks
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(3, 2, 8, 4))
    expected, buffer = p.detach().double(), torch.zeros(3, 2, 8, 4, dtype=torch.float64)
    optimizer = Muon([p], lr=0.1, weight_decay=0.2)
    for _ in range(3):
        g = torch.randn_like(p)
        p.grad = g.clone()
        optimizer.step()
        buffer = 0.95 * buffer + 0.05 * g.double()
        update = 0.05 * g.double() + 0.95 * buffer
        for e in range(3):  # gate over up is one matrix of 16 x 4
            step = 2 * newton_schulz(update[e].reshape(16, 4)).reshape(2, 8, 4)
            expected[e] = (1 - 0.1 * 0.2) * expected[e] - 0.1 * step
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-4, atol=1e-4)


def test_state_goes_through_a_state_dict(cfg):
    cfg = cfg.with_overrides(["train.optimizer=muon"])
    one, other = Transformer(cfg), Transformer(cfg)
    first, second = build(one, cfg.train), build(other, cfg.train)

    def step(model, optimizers, seed):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizers.set_lr(0.5)
        optimizers.step()
        optimizers.zero_grad()

    step(one, first, 1)
    other.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    step(one, first, 2)
    step(other, second, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
