"""The three faces of a demo's summary, on a made-up one that holds hostile text."""

import copy
import json
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from sparsefold import report

HOSTILE = "</pre><script src=//evil>alert('x')</script> & | `a` $x_i$ \x1b[31m \x00 \ud800 https://evil.example \u202e"
FIGURES = ("loss", "latency", "events", "macs", "raster-0", "mask-0")


def a_network(label, bits, rate, density, events):
    macs = {"input": 49_152, "recurrent": 196_608, "decoder": 26_624}
    parts = [
        {"role": role, "macs_dense": n, "macs_weight": n * (density if role == "recurrent" else 1),
         "macs_effective": {"input": 0, "recurrent": n * density * rate}.get(role, n)}
        for role, n in {"embedding": 0, **macs}.items()
    ]  # fmt: skip
    return {
        "label": label,
        "config": {"target_rate": 0.1 if events else None, "density": density, "block": [16, 1], "file": HOSTILE},
        "bits_per_char": bits, "valid_bits_per_char": bits - 0.01, "train_bits_per_char": bits - 0.2,
        "bits_per_char_vs_dense": bits / 1.73, "event_rate": rate, "density": density, "file_bytes": 1_089_000,
        "cost": {"steps": 100, "parts": parts},
        "log": [{"step": s, "seconds": s / 10, "valid_bits_per_char": bits + 100 / s} for s in (100, 200, 300)],
        "event_rate_per_unit": [rate + 0.0001 * i for i in range(32)] if events else None,
        "event_rate_over_time": [rate, rate + 0.01, rate] if events else None, "event_rate_block": 512,
        "raster": {"text": "a$\n\x00<é😀", "events": [[0, 31], [], [5], [5, 6], [1], [2], [3]]} if density < 1 else None,
        "mask": {"block": [16, 1], "gates": 3, "columns": 9, "rows": ["c080", "0080", "3600"]} if density < 1 else None,
    }  # fmt: skip


def a_row(network, engine, rival, p50):
    return {
        "network": network, "engine": engine, "rival": rival, "bits_per_char": 1.73, "ratio_to_fastest_rival": 30 / p50,
        "ratio_to_equal_rival": 15 / p50,
        "latency_us": {"p50": p50, "p99": 1.3 * p50, "mean": p50, "calls": 20_000}, "settings": HOSTILE,
        "parity": {"max_abs_error": 3e-6, "bound": None, "against": HOSTILE, "bytes": 4096},
    }  # fmt: skip


@pytest.fixture
def summary():
    return {
        "schema": report.SCHEMA,
        "provenance": {"command": HOSTILE, "date": "2000-01-02T03:04:05+00:00", "commit": None, "processor": "a processor"},
        "corpus": {"source": "a text", "sha256": "ab", "bytes": {"train": 8, "valid": 1, "test": 1}, "tokens": 104},
        "seconds": {"training": 200.0, "measuring": 30.0, "total": 231.0},
        "networks": {
            "gru": a_network("GRU 256", 1.73, 1.0, 1.0, False),
            "egru": a_network("event GRU 256", 1.76, 0.095, 1.0, True),
            "egru_blocks": a_network("event GRU 256, 25 % of blocks", 1.81, 0.09, 0.25, True),
        },
        "rows": [
            a_row("gru", "sparsefold", False, 20.0), a_row("egru", "sparsefold", False, 4.2),
            a_row("gru", "torch eager", True, 118.0), a_row("gru", "torch int8", True, 132.0),
            a_row("gru", "ONNX Runtime", True, 30.0), a_row("egru_blocks", "sparsefold", False, 3.1),
        ],
        "fastest_rival": {"network": "gru", "engine": "ONNX Runtime", "p50": 30.0},
        "equal_rival": {"network": "gru", "engine": HOSTILE, "p50": 15.0},
        "targets": [
            {"name": "quality", "target": "within 3 %", "measured": 1.0173, "limit": 1.03, "held": True},
            {"name": "latency", "target": "at least 10×", "measured": 9.677, "limit": 10.0, "held": False},
        ],
        "sample": {"network": "egru", "prompt": HOSTILE, "text": HOSTILE, "temperature": 0.7},
    }  # fmt: skip


def page(summary):
    pytest.importorskip("matplotlib", reason="the page's plots need matplotlib (extra 'report')")
    return report.html(summary)


def test_the_terminal_table_holds_every_row_and_target_in_118_columns(summary):
    text = report.table(summary)
    assert max(map(len, text.splitlines())) <= 118
    expected = [  # the decoder is the last figure of the MACs; what an other engine executes is the dense network
        ("sparsefold", "1.730 100 % 100 % 272 k 272 k 223 k 27 k 1.09 MB 20.0 26.0 1.50× 0.75×"),
        ("torch eager*", "1.730 100 % 100 % 272 k 272 k 272 k 27 k – 118 153 0.25× 0.13×"),
        ("torch int8*", "1.730 100 % 100 % 272 k 272 k 272 k 27 k – 132 172 0.23× 0.11×"),
        ("ONNX Runtime*", "1.730 100 % 100 % 272 k 272 k 272 k 27 k – 30.0 39.0 1.00× 0.50×"),
        ("sparsefold", "1.730 9.5 % 100 % 272 k 272 k 45 k 27 k 1.09 MB 4.20 5.46 7.14× 3.57×"),
        ("sparsefold", "1.730 9.0 % 25 % 272 k 125 k 31 k 27 k 1.09 MB 3.10 4.03 9.68× 4.84×"),
    ]
    rows = [line for line in text.splitlines() if line.startswith("  ") and line.endswith("×")]
    assert [" ".join(row.split()) for row in rows] == [f"{engine} {figures}" for engine, figures in expected]
    assert "  held      quality: within 3 %. Measured 1.017, limit 1.03." in text
    assert "  not held  latency: at least 10×. Measured 9.677, limit 10." in text
    assert "decoder and Python call included, one thread, pinned" in text


def test_long_and_hostile_names_keep_the_table_in_shape(summary):
    summary["networks"]["egru"]["label"] = HOSTILE * 3
    summary["rows"][0]["engine"] = summary["targets"][0]["name"] = "\x1b[2J" + "x" * 300
    text = report.table(summary)
    assert max(map(len, text.splitlines())) <= 118
    assert not re.search(r"[^\n\x20-\uffff]|[\x7f\ud800\u202e]", text)


def test_the_headline_is_made_of_the_numbers(summary):
    first = " ".join(report.table(summary).split("\n\n")[0].split())
    assert first == (
        "Event GRU 256: a byte in 4.20 µs, 7.1 times faster than ONNX Runtime playing GRU 256, "
        "with 1.7 % more bits per character"
    ), "the fastest of those whose quality is called equal"
    for row in summary["rows"]:
        row["ratio_to_fastest_rival"] = 0.5 if row["network"] == "egru" else 0.4
    summary["networks"]["egru"]["bits_per_char_vs_dense"] = 0.98
    first = " ".join(report.table(summary).split("\n\n")[0].split())
    assert first.startswith("Event GRU 256: a byte in 4.20 µs, 2.0 times slower than ONNX Runtime")
    assert first.endswith("with 2.0 % fewer bits per character")


def test_markdown_rows_have_equal_columns_and_the_same_figures(summary):
    summary["networks"]["egru"]["label"] = "a | b <i>"
    text = report.markdown(summary)
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(summary["rows"])
    assert {len(row) for row in rows} == {13}
    assert rows[-1][7].strip() == "31 k, decoder 27 k of it"
    assert rows[-2][0].strip() == "a \\| b &lt;i&gt;"
    assert "- **held**: quality" in text and "- **not held**: latency: at least 10×. Measured 9.677, limit 10." in text


def test_labels_are_drawn_as_they_are_written(summary):
    summary["networks"]["egru"]["label"] = "$x_i$ 漢字"  # neither a formula nor a warning about the font
    drawn = [data for tag, data in Page(page(summary)).texts if tag == "text"]
    assert "sparsefold, $x_i$ 漢字" in drawn


class Page(HTMLParser):
    """Collects tags, attributes and text, and insists that tags close in order."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))


def test_the_page_is_well_formed_self_contained_and_escapes_what_it_shows(summary):
    text = page(summary)
    parsed = Page(text)
    assert "<?" not in text and text.lower().count("<!doctype") == 1
    assert not {"script", "link", "img", "iframe", "object", "base", "image"} & set(parsed.tags)
    for name, value in parsed.attributes:
        assert not name.startswith("on")
        if not name.startswith("xmlns"):
            assert "//" not in (value or "")
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#")
    style = "".join(data for tag, data in parsed.texts if tag == "style")
    assert "//" not in style and "@import" not in style and "url(" not in style
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\ud800\u202e]", text)
    shown = "".join(data for tag, data in parsed.texts if tag == "pre")
    assert shown == HOSTILE.translate(dict.fromkeys((0x1B, 0, 0xD800, 0x202E), "\ufffd"))
    assert "a$↵\ufffd<é😀" in "".join(data for tag, data in parsed.texts if tag == "text")


def test_the_page_holds_rows_targets_and_figures_whose_ids_are_unique(summary):
    text = page(summary)
    assert text.count("data-label='ratio to rival'") == len(summary["rows"])
    assert text.count("<li class='held'>") == text.count("<li class='missed'>") == 1
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == len(FIGURES)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for name, drawing in zip(FIGURES, drawings, strict=True):
        ElementTree.fromstring(drawing)
        if name == "mask-0":
            continue  # drawn without matplotlib and its stand-in colours
        assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', drawing)) <= set(ids)
        assert f'id="{name}-' in drawing
        assert "#0a0b" not in drawing and "var(--" in drawing  # every stand-in colour became a variable
    for paint in set(re.findall(r"var\(--(\w+)\)", text)):
        assert text.count(f"--{paint}:") == 2, "a light and a dark value"


def test_a_mask_is_drawn_as_runs_of_neighbouring_blocks(summary):
    text = page(summary)
    drawing = re.search(r"<svg[^>]*id='mask-0'.*?</svg>", text, re.DOTALL)[0]
    assert re.findall(r" d='([^']*)'", drawing) == ["M0 0h2M8 0h1", "M8 0h1", "M2 0h2M5 0h2"]
    assert "var(--net2)" in drawing, "the colour of its network"
    assert "a block of 16 x 1 weights that is left, 29.6 % of the recurrent matrix" in text


def test_a_row_with_a_file_of_its_own_shows_its_own_figures(summary):
    cost = {"parts": [{"role": "recurrent", "macs_dense": 5000, "macs_weight": 2000, "macs_effective": 1234}]}
    row = a_row("egru_blocks", "sparsefold w8a8", False, 2.5) | {"event_rate": 0.5, "file_bytes": 7000, "cost": cost}
    summary["rows"].append(row)
    shown = [" ".join(line.split()) for line in report.table(summary).splitlines() if "w8a8" in line]
    assert shown == ["sparsefold w8a8 1.730 50 % 25 % 5.0 k 2.0 k 1.2 k – 7 kB 2.50 3.25 12.0× 6.00×"]


def test_reports_are_deterministic_and_leave_the_summary_and_matplotlib_alone(summary):
    before = copy.deepcopy(summary)
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True}):
        first = page(summary)
        assert matplotlib.rcParams["font.size"] == 30
    assert first == page(summary)
    assert report.table(summary) == report.table(summary) and report.markdown(summary) == report.markdown(summary)
    assert summary == before


def test_missing_fields_become_dashes_and_missing_plots_are_left_out(summary):
    bare = {"schema": report.SCHEMA, "networks": {"gru": {}}, "rows": [{"network": "gru", "engine": "sparsefold"}]}
    assert " ".join(report.table(bare).splitlines()[6].split()) == "sparsefold" + " –" * 12
    assert report.markdown(bare).count("| – ") == 11
    assert "<svg" not in page(bare)
    summary["networks"]["egru"] = dict.fromkeys(summary["networks"]["egru"])
    summary["rows"][1] |= dict.fromkeys(set(summary["rows"][1]) - {"network", "engine"})
    summary |= dict.fromkeys(("provenance", "corpus", "seconds", "fastest_rival", "targets", "sample"))
    assert Page(page(summary)).tags.count("svg") == len(FIGURES)
    assert "Targets" not in report.table(summary)


def test_a_training_that_diverged_is_drawn_up_to_where_it_broke(summary):
    summary["networks"]["egru"]["log"][-1]["valid_bits_per_char"] = float("nan")
    assert 'id="loss-' in page(summary)
    for network in summary["networks"].values():
        network["log"] = [{"step": 100, "valid_bits_per_char": float("inf")}]
    assert 'id="loss-' not in page(summary)


def test_the_loss_frame_begins_below_the_fall_of_the_first_steps(summary):
    assert "lie above the frame" not in page(summary)
    summary["networks"]["gru"]["log"].insert(0, {"step": 1, "valid_bits_per_char": 6.7})
    assert "The first steps lie above the frame." in page(summary)


@pytest.mark.parametrize("p50s", [(3.0, 4.0), (3.0, 400.0)])
def test_the_latency_axis_is_logarithmic_only_where_the_spread_is_big(summary, p50s):
    summary["rows"] = [a_row("gru", engine, False, p50) for engine, p50 in zip("ab", p50s, strict=True)]
    assert (", logarithmic" in page(summary)) == (p50s[1] == 400.0)


@pytest.mark.parametrize("change", [{"schema": "sparsefold-demo/2"}, {"schema": None}, {"rows": [{"network": "lstm"}]}])
def test_a_summary_of_another_kind_is_refused_by_a_sentence(summary, change):
    summary |= change
    for face in (report.table, report.markdown, report.html):
        with pytest.raises(ValueError, match=r"sparsefold-demo/2|None|'lstm', it holds gru, egru") as caught:
            face(summary)
        assert str(caught.value).endswith(".")
    with pytest.raises(ValueError, match="schema None"):
        report.table([])
    with pytest.raises(ValueError, match="no networks and no rows"):
        report.table({"schema": report.SCHEMA})


def test_without_matplotlib_the_tables_work_and_the_page_says_what_to_install(summary, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.table(summary) and report.markdown(summary)
    with pytest.raises(ImportError, match=r"pip install 'sparsefold\[report\]'"):
        report.html(summary)


def test_the_file_written_is_the_page_of_the_summary_read_back_from_json(summary, tmp_path):
    expected = page(summary)
    report.write_report(json.loads(json.dumps(summary)), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text("utf-8") == expected
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
