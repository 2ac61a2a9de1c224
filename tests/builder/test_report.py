"""The report: three files from a full and from a minimal dictionary, correct texts, a page that needs nothing else."""

import itertools
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from benchmarks.report import panels, render, summary, table_rows
from benchmarks.report.schema import Report
from benchmarks.report.svg import Scale, ticks
from benchmarks.roofline import roofline
from plugins.common.linear_shape import LinearShape
from tests.support.report import MINIMAL, full


def html_of(report: dict[str, Any], out: Path) -> str:
    render(report, out)
    return (out / "report.html").read_text(encoding="utf8")


class Page(HTMLParser):
    """Checks that every element is closed by its own name; keeps tags, attributes and the visible text."""

    VOID = frozenset({"meta", "link", "br", "line", "rect", "circle", "path"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID or (tag in ("rect", "circle") and not self.get_starttag_text().endswith("/>")):  # type: ignore[union-attr]
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.parts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.parts))


def test_the_three_forms_are_written_and_nothing_else(pages: Path) -> None:
    assert sorted(path.name for path in pages.iterdir()) == ["report.html", "report.json", "report.md"]


def test_json_keeps_what_was_given(pages: Path) -> None:
    written, given = json.loads((pages / "report.json").read_text()), full()
    assert written["accuracy"] == given["accuracy"]
    assert written["performance"] == json.loads(json.dumps(given["performance"]))
    assert written["predicted"]["decode"]["built"]["gpu"] == "H100 SXM 80GB"


def test_the_page_is_well_formed_and_shows_the_main_figures(pages: Path) -> None:
    page = Page((pages / "report.html").read_text(encoding="utf8"))
    for fragment in (
        "A gate failed. 1.92x smaller, perplexity +17.0%",
        "24.93",
        "95% interval [+15.2%, +18.9%]",
        "MLPerf open class: pruned",
        "Measured on AMD EPYC, 2 cores",
        "predicted, not measured",
        "H100 SXM 80GB",
        "model.layers.*.mlp.up_proj",
        "2:4 gives no speed on a CPU because",
        "17.0% is above 15.0%",
    ):
        assert fragment in page.text


def test_the_page_needs_no_network_and_no_script(pages: Path) -> None:
    html = (pages / "report.html").read_text(encoding="utf8")
    page = Page(html)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "img", "object", "embed", "base", "form"}
    loaded = [
        value for _, attributes in page.tags for key, value in attributes.items() if key in ("href", "src", "srcset")
    ]
    assert loaded == ["data:,"]  # an empty icon, so that the browser asks for none
    assert not re.search(r"https?:|url\(|@import|\bon\w+=", html)


def test_both_colour_schemes_define_the_same_colours(pages: Path) -> None:
    html = (pages / "report.html").read_text(encoding="utf8")
    light, dark = (
        set(re.findall(r"(--[\w-]+):", block))
        for block in re.search(  # type: ignore[union-attr]
            r":root \{(.*?)\}\s*@media \(prefers-color-scheme: dark\) \{\s*:root \{(.*?)\}", html, re.DOTALL
        ).groups()
    )
    assert light == dark
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    assert used <= light
    assert "#" not in re.sub(r"(?s)<style>.*?</style>", "", html).replace("&#", "")  # marks carry classes, not colours


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_the_contrast_that_wcag_asks_in_light_and_dark(pages: Path) -> None:
    html = (pages / "report.html").read_text(encoding="utf8")
    schemes = re.findall(r":root \{(.*?)\}", html, re.DOTALL)[:2]
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", scheme))
        for name in ("--ink", "--soft", "--dense", "--built", "--good", "--bad", "--unclear"):
            for behind in ("--card", "--page"):
                lighter, darker = sorted((luminance(colours[name]), luminance(colours[behind])), reverse=True)
                assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (name, behind)
        predicted = sorted(luminance(colours[name]) for name in ("--predicted", "--predicted-page"))
        assert (predicted[1] + 0.05) / (predicted[0] + 0.05) >= 4.5


def test_every_plot_is_well_formed_named_and_inside_its_frame(pages: Path) -> None:
    html = (pages / "report.html").read_text(encoding="utf8")
    plots = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(plots) == 2 * (1 + 2 + 4 + 3 + 1)  # wide and narrow: accuracy, 2 loads, 4 ratios, 3 latencies, routing
    for plot in plots:
        root = ElementTree.fromstring(plot)
        width, height = float(root.attrib["width"]), float(root.attrib["height"])
        assert len(root.attrib["aria-label"]) > 20
        for mark in root.iter():
            for keys, limit in ((("x", "x1", "x2", "cx"), width), (("y", "y1", "y2", "cy"), height)):
                for key in keys:
                    assert -0.1 <= float(mark.attrib.get(key, 0)) <= limit, (mark.attrib, root.attrib["aria-label"])


def test_a_minimal_report_renders_and_states_that_nothing_was_measured(tmp_path: Path) -> None:
    page = Page(html_of(MINIMAL, tmp_path))
    assert "Nothing was measured" in page.text
    assert page.text.count("not measured") == 3
    assert "predicted" not in page.text
    assert "MLPerf" not in page.text
    assert not [tag for tag, _ in page.tags if tag == "svg"]


@pytest.mark.parametrize("key", [key for key in full() if key not in MINIMAL])
def test_any_part_may_be_missing(key: str, tmp_path: Path) -> None:
    report = full()
    del report[key]
    Page(html_of(report, tmp_path))


def test_measured_and_predicted_figures_never_stand_in_one_table(pages: Path) -> None:
    html = (pages / "report.html").read_text(encoding="utf8")
    inside = re.search(r'<section class="predicted">.*?</section>', html, re.DOTALL)
    assert inside
    outside = html.replace(inside[0], "")
    assert "H100 SXM 80GB" not in outside
    for measured in ("24.93", "AMD EPYC"):
        assert measured not in inside[0]
    markdown = (pages / "report.md").read_text(encoding="utf8")
    assert "H100 SXM 80GB" not in markdown.split("## Predicted, not measured")[0]


def test_a_dense_build_carries_no_mlperf_mark(tmp_path: Path) -> None:
    report = full()
    report["recipe"]["sparsity"] = None
    for row in report["layers"]:
        row["sparse"] = False
    assert "MLPerf" not in Page(html_of(report, tmp_path)).text


def test_names_from_outside_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    report = full()
    attack = '<script>alert("x")</script>"\'&<svg onload=alert(1)>'
    report["model"] = report["notes"][0] = report["layers"][0]["name"] = report["pareto"][0]["label"] = attack
    report["performance"][0]["workload"]["input_tokens"] = attack
    page = Page(html_of(report, tmp_path))
    assert not [tag for tag, attributes in page.tags if tag == "script" or "onload" in attributes]
    assert attack in page.text


def test_what_is_not_finite_becomes_null_and_still_renders(tmp_path: Path) -> None:
    report = full()
    report["accuracy"]["built"]["perplexity"] = math.inf
    report["accuracy"]["perplexity_increase"] = math.nan
    report["accuracy"]["perplexity_increase_interval"] = [math.nan, math.nan]
    Page(html_of(report, tmp_path))
    assert json.loads((tmp_path / "report.json").read_text())["accuracy"]["built"]["perplexity"] is None


def test_a_wrong_report_is_refused_with_the_place(tmp_path: Path) -> None:
    report = full()
    report["performance"][1]["dense"]["request_latency"]["mean"] = "fast"
    with pytest.raises(ValidationError, match=r"performance\.1\.dense\.request_latency\.mean"):
        render(report, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ratio", "interval", "fragment"),
    [
        (1.21, (1.15, 1.27), "1.21x as fast as dense"),
        (0.96, (0.9, 1.02), "as fast as dense within the noise (0.96x)"),
        (0.8, (0.7, 0.9), "0.80x as fast as dense"),
        (1.5, None, "as fast as dense within the noise (1.50x)"),
    ],
)
def test_the_verdict_claims_no_more_than_the_interval(ratio: float, interval: Any, fragment: str) -> None:
    report = full()
    report["gates"] = []
    report["performance"] = report["performance"][:1]
    report["performance"][0]["speedup"]["output_token_throughput"] |= {"ratio": ratio, "interval": interval}
    assert summary.verdict(Report.model_validate(report | {"predicted": None})).endswith(fragment)


def test_layers_are_grouped_over_blocks_and_bytes_add_up() -> None:
    layers = Report.model_validate(full() | {"predicted": None}).layers
    groups = table_rows.group_layers(layers)
    assert [(group.name, group.count) for group in groups] == [
        ("model.layers.*.mlp.up_proj", 6),
        ("model.layers.*.mlp.down_proj", 6),
        ("lm_head", 1),
    ]
    assert sum(group.built_bytes or 0 for group in groups) == sum(layer.built_bytes or 0 for layer in layers)


def test_one_odd_layer_gets_a_row_of_its_own() -> None:
    report = full()
    report["layers"][3]["sparse"] = False
    groups = table_rows.group_layers(Report.model_validate(report | {"predicted": None}).layers)
    assert [group.count for group in groups] == [5, 1, 6, 1]
    assert groups[1].name == "model.layers.3.mlp.up_proj"


def test_a_gpu_that_lacks_the_format_gives_the_reason_instead_of_a_figure(tmp_path: Path) -> None:
    report, card = full(), roofline.gpu("A100")
    report["predicted"]["decode"]["built"] = roofline.decode_ceiling(card, [LinearShape(64, 64, "fp8")], 1, 1, 1)
    assert "fp8 needs SM89" in Page(html_of(report, tmp_path)).text


def test_a_ceiling_of_a_model_that_fits_the_l2_cache_is_called_no_limit(tmp_path: Path) -> None:
    report, card = full(), roofline.gpu("H100")
    for side in ("dense", "built"):
        report["predicted"]["decode"][side] = roofline.decode_ceiling(card, [LinearShape(4096, 4096)], 1, 1, 1)
    assert "fit the L2 cache, so this is not a real limit" in Page(html_of(report, tmp_path)).text


def test_markdown_tables_have_as_many_cells_in_each_row(pages: Path) -> None:
    for table in re.findall(r"(?:^\|.*\n)+", (pages / "report.md").read_text(), re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.003), (12, 26.7), (1.4, 1.81), (0, 3214), (1e-9, 2e-9)])
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    made = ticks(low, high)
    assert 2 <= len(made) <= 12
    assert all(low - 1e-12 <= tick <= high * (1 + 1e-9) for tick in made)
    assert Scale(low, high, 0, 100)(high) == pytest.approx(100)


@pytest.mark.parametrize(("low", "high"), [(0.85, 1.6), (0.9, 1.1), (0.2, 6.0)])
def test_labels_of_ratios_do_not_touch(low: float, high: float) -> None:
    x = Scale(low, high, 30, 200, log=True)
    labelled = panels._apart(panels._ratio_ticks(low, high), x)
    places = sorted(x(ratio) for ratio in labelled)
    assert 1.0 in labelled
    assert all(after - before >= panels.LABEL_WIDTH for before, after in itertools.pairwise(places))
