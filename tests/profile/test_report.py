"""The HTML report: whole, on its own, escaped, and with the figures of the profile."""

import base64
import json
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import moe
from moe import profile
from moe.io.page import Section, tag
from moe.model import Transformer
from moe.profile.observe import Pass
from moe.profile.report import svg
from moe.profile.report.page import Material, report
from moe.profile.report.svg import Axis
from moe.profile.report.time import time_section
from tests.conftest import run_cli
from tests.profile.conftest import two_sources

SECTIONS = ["Summary", "Load", "Load over the passes", "Specialisation by source", "Token classes", "Co-activation"]
SECTIONS += ["Correlation", "Decoding steps", "Serving", "Dead and duplicate experts"]


class Reader(HTMLParser):
    """Collects tables (caption -> rows of cells), text by tag, and every attribute; checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.texts.setdefault(tag, []).append("")
        if tag == "table":
            self.rows = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "table" and len(self.texts.get("caption", [])) > len(self.tables):
            self.tables[self.texts["caption"][-1]] = self.rows

    def handle_data(self, data: str) -> None:
        for name in set(self.open):
            self.texts[name][-1] += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def random_profile(n_experts: int = 6, top_k: int = 2, n_layers: int = 3, vocab: int = 40) -> tuple:
    """A profile of two sources and the ids that went into it, [T, L, K]."""
    p, ids_TLK = profile.RoutingProfile(n_experts, vocab), []
    g = torch.Generator().manual_seed(0)
    for n in range(6):
        logits = torch.randn(n_layers, 3 * 20, n_experts, generator=g) + 0.3 * torch.arange(n_experts)
        weights, ids = logits.topk(top_k)
        p.source = "code" if n < 3 else "text"
        p.update(Pass(ids, weights.softmax(-1), logits, (3, 20), torch.randint(max(vocab, 1), (60,), generator=g)))
        ids_TLK.append(ids.transpose(0, 1))
    return p, torch.cat(ids_TLK).numpy()


@pytest.fixture(scope="module")
def material() -> Material:
    p, ids_TLK = random_profile()
    return Material("runs/a", "data/b", p, ids_TLK, lambda i: f"token{i}", expert_bytes=1e9)


def check_stands_alone(text: str, read: Reader) -> None:
    """Nothing is fetched: every reference stays in the file, and there is no other way to make one."""
    for tag_, name, value in read.attributes:
        if name in ("href", "src", "action", "data", "srcset", "poster", "xlink:href", "background"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag_, name, value)
        if tag_ == "a":
            assert ("section", "id", value.removeprefix("#")) in read.attributes or name != "href"
    assert not re.search(r"url\((?!#)|@import|https?:|//\w+\.|fetch\(|XMLHttp|<link|<iframe|<object", text)
    assert ("meta", "content") in {(t, n) for t, n, v in read.attributes if "default-src 'none'" in v}
    labels = [value for tag_, name, value in read.attributes if (tag_, name) == ("svg", "aria-label")]
    assert len(labels) == len(read.texts["svg"])
    assert all(len(label) > 20 for label in labels)


def test_the_report_has_every_section_and_stands_alone(material: Material) -> None:
    text = report(material)
    read = Reader(text)
    assert read.texts["h2"] == SECTIONS
    assert read.texts["a"] == SECTIONS
    check_stands_alone(text, read)
    assert "prefers-color-scheme: dark" in text
    assert 'id="theme"' in text


def test_a_colleagues_sections_come_last(material: Material) -> None:
    read = Reader(report(material, [Section("Time & roofline", "1 < 2", [tag("p", "a <b> c")])]))
    assert read.texts["h2"] == [*SECTIONS, "Time & roofline"]
    assert "a <b> c" in read.texts["p"]
    assert "1 < 2" in read.texts["p"]


def test_its_figures_are_those_of_the_profile(material: Material) -> None:
    """Against counts of the ids that went in."""
    read = Reader(report(material))
    ids = material.ids_TLK
    T, L, K = ids.shape
    counts = [[int((ids[:, layer] == e).sum()) for e in range(6)] for layer in range(L)]
    table = read.tables["routed tokens"]
    assert [[int(c.replace(",", "")) for c in row[1:]] for row in table[1:]] == counts
    load = np.array(counts) / (T * K)
    by_layer = read.tables[f"{T} tokens in 6 passes"]
    column = by_layer[0].index
    for layer, row in enumerate(by_layer[1:]):
        assert row[column("max/mean")] == f"{load[layer].max() * 6:.2f}"
        assert row[column("CV")] == f"{load[layer].std() * 6:.2f}"
    dropped = next(rows for caption, rows in read.tables.items() if caption.startswith("routed tokens dropped"))
    for layer in range(L):
        passes = ids[:, layer].reshape(6, -1)
        most = -(-60 * K // 6)
        lost = sum(max(0, int((one == e).sum()) - most) for one in passes for e in range(6))
        assert dropped[1 + layer][1] == f"{lost / (T * K):.2%}"
    # The load heatmap writes its cells.
    cells = re.findall(r'class="(?:ink|more|less)">([\d.]+)<', report(material))
    assert cells[: L * 6] == [f"{x * 6:.2f}" for x in load.ravel()]
    steps = next(rows for caption, rows in read.tables.items() if caption.startswith("one decoding step"))
    alone = steps[1]
    assert float(alone[steps[0].index("experts")]) == K
    assert alone[steps[0].index("GB per step")] == "2.00"


def test_tokens_and_names_are_escaped(material: Material) -> None:
    evil = "<script>alert('x')</script>&amp;\"'"
    honest = len(Reader(report(material)).texts["script"])
    text = report(replace(material, name=evil, text=evil, show=lambda i: evil))
    read = Reader(text)
    assert len(read.texts["script"]) == honest == 1
    assert evil in read.texts["code"]
    assert read.texts["h1"] == [f"Routing of {evil}"]
    assert read.texts["title"] == [f"Routing of {evil}"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"top_k": 1}, "there are no pairs"),
        ({"n_layers": 1}, "Correlation"),
        ({"vocab": 0}, "tokens were not counted"),
        ({"n_experts": 40, "n_layers": 30}, "Layer 29"),
    ],
)
def test_models_of_other_shapes(given: dict[str, int], says: str) -> None:
    p, ids_TLK = random_profile(**given)
    text = report(Material("m", "t", p, ids_TLK, str))
    read = Reader(text)
    check_stands_alone(text, read)
    assert says in text
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).lower()


def pixels(picture: str) -> np.ndarray:
    """RGBA of the PNG in a heatmap, decoded here by the format's own rules."""
    found = re.search(r"base64,([^\"]+)", picture)
    assert found
    content, at, chunks = base64.b64decode(found[1]), 8, {}
    while at < len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        name, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + size]
        assert struct.unpack(">I", content[at + 8 + size : at + 12 + size])[0] == zlib.crc32(name + body)
        chunks[name], at = body, at + 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    index = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)[:, 1:]
    colours = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)[index]
    return np.concatenate([colours, np.frombuffer(chunks[b"tRNS"], np.uint8)[index][..., None]], 2)


def test_heatmap_colours() -> None:
    """Even is the page's own colour; more is orange, less violet, both the stronger the further; nan is grey."""
    ratio = np.array([[1.0, 1.3, 2.0, 4.0, 9.0], [0.0, 0.25, 0.5, 0.8, np.nan]])
    rgba = pixels(svg.heatmap(ratio, Axis("r"), Axis("c"), "label"))
    assert rgba.shape == (2, 5, 4)
    assert rgba[0, 0, 3] == 0
    assert all(tuple(c[:3]) == svg.MORE for c in rgba[0, 1:])
    assert all(tuple(c[:3]) == svg.LESS for c in rgba[1, :4])
    assert 0 < rgba[0, 1, 3] < rgba[0, 2, 3] < rgba[0, 3, 3] == rgba[0, 4, 3]
    assert rgba[1, 0, 3] == rgba[1, 1, 3] > rgba[1, 2, 3] > rgba[1, 3, 3] > 0
    assert abs(int(rgba[0, 2, 3]) - int(rgba[1, 2, 3])) <= 1, "twice and half are equally strong"
    assert tuple(rgba[1, 4]) == (128, 128, 128, 60)


def bar_heights(picture: str) -> list[float]:
    """In pixels, of the bars of the first series."""
    path = re.search(r'class="bar s0" d="([^"]*)"', picture)
    assert path
    return [float(foot) - float(top) for foot, top in re.findall(r"M[\d.]+ ([\d.]+)V([\d.]+)h", path[1])]


@pytest.mark.parametrize("draw", ["bars", "histogram"])
def test_bars_are_as_high_as_their_values(draw: str) -> None:
    values = np.array([0.1, 0.4, 0.3, 0.2])
    makers: dict[str, Callable[[], str]] = {
        "bars": lambda: svg.bars([(values, None)], "label", "x", "y", None),
        "histogram": lambda: svg.histogram(values, values, "label", "x", "y"),
    }
    heights = bar_heights(makers[draw]())
    assert np.array(heights) / sum(heights) == pytest.approx(values, abs=0.002)


def test_a_histogram_of_many_values_joins_them() -> None:
    mass = np.full(401, 1 / 401)
    heights = bar_heights(svg.histogram(mass, mass, "label", "x", "y"))
    assert len(heights) <= 41
    assert heights[0] == pytest.approx(heights[5])


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's directory as training leaves it, and prepared data of two sources."""
    root = tmp_path_factory.mktemp("report")
    two_sources(root)
    cfg = moe.load_config("replica-tiny").scaled(d_model=192, n_layers=2, vocab_size=300, max_seq_len=64)
    model = moe.Transformer(cfg)
    with torch.no_grad():  # experts 3 and 9 of layer 1 become copies
        model.blocks[1].moe.experts.w_in_EGFD[9] = model.blocks[1].moe.experts.w_in_EGFD[3]  # type: ignore[index, union-attr]
        model.blocks[1].moe.experts.w_out_EDF[9] = model.blocks[1].moe.experts.w_out_EDF[3]  # type: ignore[index, union-attr]
    load = torch.full((2, 16), 1 / 16).tolist()
    records = [{"kind": "train", "step": 10 * i, "tokens": 1000 * i, "load": load} for i in range(1, 5)]
    for name in ("run/final", "run/checkpoints/step-000020", "elsewhere"):
        moe.save(model, root / name)
    (root / "run" / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    return root


def test_from_the_command_line(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", place / "data", "--tokens", 1500, "--seq-len", 32, "--batch", 4]
    assert run_cli("profile", "report", place / "run/final", *arguments, "--out", tmp_path / "sub" / "r.html") == 0
    assert str(tmp_path / "sub" / "r.html") in capsys.readouterr().out
    assert run_cli("profile", "routing", place / "run/final", *arguments, "--out", tmp_path / "f.json") == 0
    assert "3 and 9" in capsys.readouterr().out
    text = (tmp_path / "sub" / "r.html").read_text(encoding="utf-8")
    read, figures = Reader(text), json.loads((tmp_path / "f.json").read_text())
    check_stands_alone(text, read)
    assert read.texts["h2"] == [*SECTIONS[:3], "Load over training", *SECTIONS[3:], "Time"]
    assert "at each of 4 log points" in text
    counts = [[int(c.replace(",", "")) for c in row[1:]] for row in read.tables["routed tokens"][1:]]
    assert counts == figures["counts_LE"]
    closest = read.tables["closest experts, by the cosine of all their weights; copies have 1"]
    assert closest[2][1:3] == ["3 and 9", "1.0000"]
    assert figures["closest_experts"][1]["experts"] == [3, 9]
    assert any(caption.startswith(("share of prose", "share of code")) for caption in read.tables)


@pytest.mark.parametrize(("name", "says"), [("run/checkpoints/step-000020", "at each of 2 log"), ("elsewhere", "")])
def test_the_training_of_a_checkpoint(place: Path, tmp_path: Path, name: str, says: str) -> None:
    """A checkpoint within a run shows the run up to it, one elsewhere shows none."""
    arguments = ["--data", place / "data", "--tokens", 300, "--seq-len", 32, "--out", tmp_path / "r.html"]
    assert run_cli("profile", "report", place / name, *arguments) == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert says in text
    assert ("Load over training" in text) == bool(says)


def test_the_section_on_time() -> None:
    """One row per part of the step, pictures that refer to nothing outside and take the page's colours."""
    pytest.importorskip("matplotlib")
    model = Transformer(moe.load_config("replica-tiny"))
    section = time_section(model, torch.randint(512, (2, 17)), rounds=1)
    whole = "".join(section.body)
    for component in ("attention", "router", "permute", "up", "down", "combine", "head"):
        assert f">{component}</td>" in whole
    assert whole.count("<svg") == whole.count('role="img"') == 2
    assert "var(--ink)" in whole
    assert "#0072b2" not in whole.lower()
    assert 'href="http' not in whole.replace('xlink:href="#', "")
