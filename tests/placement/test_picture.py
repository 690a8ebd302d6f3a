"""A picture says what the plan says: labels, sizes, reasons; also with thousands of blocks, or none."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lading.errors import MissingExtraError, PlanError
from lading.placement.picture import Bar, Segment, draw

MIB, GIB = 2**20, 2**30
LAYERS = [Segment(f"model.layers.{index}", 400 * MIB, "DecoderLayer") for index in range(16)]
EMBEDDING, HEAD = Segment("embed", GIB, "Embedding"), Segment("lm_head", GIB, "Linear")
BARS = (
    Bar("0", 6 * GIB, (EMBEDDING, *LAYERS[:8]), reserved_bytes=GIB),
    Bar("cpu", 80 * GIB, tuple(LAYERS[8:])),
    Bar("disk", None, (HEAD,)),
)
NOTES = ("model.layers.8 … 15 on cpu: 3.1 GiB more than device 0 has room for", "lm_head on disk: <no> room -- $x_1$")


def texts_of(path: Path) -> list[str]:
    """List every text in a picture: matplotlib draws glyphs and writes each text beside them as a comment."""
    found = path.read_text(encoding="utf-8")
    ElementTree.fromstring(found)
    return [html.unescape(text).strip() for text in re.findall(r"<!--(.*?)-->", found, re.DOTALL)]


def test_picture_as_svg_holds_labels_sizes_and_reasons(tmp_path):
    draw(tmp_path / "plan.svg", bars=BARS, notes=NOTES, title="61.5% of 8.2 GiB resident")
    texts = texts_of(tmp_path / "plan.svg")
    assert {"0", "cpu", "disk", "embed", "lm_head", "61.5% of 8.2 GiB resident", "reserved", "free"} <= set(texts)
    assert {"DecoderLayer", "Embedding", "Linear", NOTES[0]} <= set(texts)
    assert "9 blocks: embed … model.layers.7" in texts
    assert html.escape("\n".join(NOTES), quote=False) in (tmp_path / "plan.svg").read_text(encoding="utf-8")
    assert {"4.1 GiB used", "1.0 GiB reserved", "896.0 MiB free", "76.9 GiB free", "1.0 GiB used"} <= set(texts)


def test_picture_as_png_is_one(tmp_path):
    draw(tmp_path / "plan.png", bars=BARS, notes=NOTES, title="plan")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_picture_of_thousands_of_blocks_names_runs_and_stays_small(tmp_path):
    experts = tuple(
        Segment(f"layers.{layer}.experts.{index}", 9 * MIB + index, "Expert" if index % 8 else f"Kind{layer}")
        for layer in range(48)
        for index in range(128)
    )
    draw(tmp_path / "plan.svg", bars=[Bar("cpu", None, experts)], notes=["why"] * 99, title="experts")
    texts = texts_of(tmp_path / "plan.svg")
    assert "6144 blocks: layers.0.experts.0 … layers.47.experts.127" in texts
    assert not {segment.label for segment in experts} & set(texts)
    assert "other" in texts
    assert texts.count("why") == 20
    assert "… and 79 more" in texts
    assert (tmp_path / "plan.svg").stat().st_size < 2_000_000


def test_picture_of_neighbours_of_one_kind_names_the_run(tmp_path):
    draw(tmp_path / "plan.svg", bars=[Bar("0", None, tuple(LAYERS))], title="")
    assert "model.layers.0 … 15" in texts_of(tmp_path / "plan.svg")


@pytest.mark.parametrize("bars", [[], [Bar("cpu", 0, ())], [Bar("0", None, (Segment("empty", 0, "Buffer"),))]])
def test_picture_of_nothing_is_drawn(bars, tmp_path):
    draw(tmp_path / "plan.svg", bars=bars, title="nothing")
    assert "nothing" in texts_of(tmp_path / "plan.svg")


def test_picture_leaves_matplotlib_as_it_was(tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # whoever imports it now fails
    names = set(matplotlib.rcParams) - {"backend"}  # asking for that one imports pyplot
    before = {name: matplotlib.rcParams[name] for name in names}
    draw(tmp_path / "plan.svg", bars=BARS, title="plan")
    draw(tmp_path / "plan.png", bars=BARS, title="plan")
    assert {name: matplotlib.rcParams[name] for name in names} == before


@pytest.mark.parametrize("name", ["plan.jpg", "plan", "svg"])
def test_picture_of_another_format_is_refused(name, tmp_path):
    with pytest.raises(PlanError, match=r"found suffix .* · expected '\.svg' or '\.png'"):
        draw(tmp_path / name, bars=BARS, title="plan")


def test_picture_without_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"found no module 'matplotlib.figure' .* pip install 'lading\[plot\]'"):
        draw(tmp_path / "plan.svg", bars=BARS, title="plan")
    assert not (tmp_path / "plan.svg").exists()
