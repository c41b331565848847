import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from offramp.evaluation.decoded import Decoded, Passage, Token, split_text
from offramp.evaluation.demo import DemoConfig, DemoResult
from offramp.evaluation.drawing import EVALUATION, PAPER, draw_figures
from offramp.evaluation.evaluate import confidence_rows, curve_rows, reliability_rows, speed_rows
from offramp.evaluation.findings import Findings
from offramp.evaluation.forced import Point, Reading
from offramp.evaluation.palette import line
from offramp.evaluation.report import render_report
from offramp.evaluation.shares import Shares
from offramp.evaluation.speed import OFF, PLAIN, Speed, exits_at
from offramp.llm.calibrating import calibrate_scores
from offramp.llm.scoring import Scores

LAYERS = (18, 22, 26)


def passage(prompt, layers, random):
    tokens = tuple(
        Token(
            f" word{i}" if i % 7 else "\n<b>&",
            layer,
            None if layer == 30 else 0.5 + 0.4 * random.random(),
            random.random() < 0.9,
            tuple((head, f" said{head}", random.random()) for head in LAYERS),
            f" word{i}",
        )
        for i, layer in enumerate(layers)
    )
    return Passage(prompt, tokens)


def decoded(eps, random, prompts=6, tokens=48):
    layers = [int(layer) for layer in random.choice([*LAYERS, 30], size=prompts * tokens)]
    return Decoded(
        eps,
        (0.31, 0.42, math.inf),
        (*LAYERS, 30),
        tuple(
            passage(f"Explain <topic {i}> & more.", layers[i * tokens : (i + 1) * tokens], random)
            for i in range(prompts)
        ),
    )


def make_result():
    random = np.random.default_rng(0)
    margins = random.random((3, 2000), dtype=np.float32)
    correct = random.random((3, 2000)) < 0.4 + 0.55 * margins
    correct[2] = False
    scores = Scores(
        margins,
        correct,
        np.arange(2000) // 50,
        *[np.zeros((3, 2000), np.int64)] * 1,
        np.zeros(2000),
        np.zeros(2000),
    )
    calibration = calibrate_scores(scores, LAYERS, 30, 0.9, dtype="float32", text_hash="0" * 64)
    config = DemoConfig(prompts=6)
    checked = tuple(decoded(eps, random) for eps in config.eps_checked)
    names = [PLAIN, OFF, exits_at(config.eps)]
    speed = Speed(
        {name: [20.0 + 5 * i, 21.0 + 5 * i, 22.0 + 5 * i] for i, name in enumerate(names)}, True, 48
    )
    machine = {
        "processor": "Imaginary 9000, 2 cores",
        "system": "Linux x86_64",
        "versions": "offramp 0, torch 0",
    }
    return DemoResult(
        "imaginary-135m", calibration, checked, speed, False, {"training": 120.0}, config, machine
    )


def make_sorting(*names, layers=LAYERS, tokens=1500):
    """Tables of head sets whose deeper heads are right more often, and surer than they should be."""
    random = np.random.default_rng(2)
    tables = {"confidence": [], "curves": [], "reliability": []}
    for name in names:
        sure = random.beta(2, 1, (len(layers), tokens))
        correct = random.random(sure.shape) < sure ** np.linspace(2, 1.2, len(layers))[:, None]
        confidence = {
            "margin": sure - (1 - sure) * random.random(sure.shape),
            "max_prob": sure,
            "entropy": -(1 - sure) * 9 * random.random(sure.shape),
        }
        reading = Reading(
            layers,
            30,
            {key: values.astype(np.float32) for key, values in confidence.items()},
            correct.astype(np.int64),
            np.ones(tokens, np.int64),
            np.arange(tokens) // 50,
            np.ones(tokens, np.int64),
        )
        tables["confidence"] += confidence_rows(name, reading)
        tables["curves"] += curve_rows(name, reading)
        tables["reliability"] += reliability_rows(name, reading)
    return tables


def make_findings():
    """Everything a report can hold."""
    result = make_result()
    random = np.random.default_rng(1)
    groups = np.repeat(np.arange(5), 20)
    points = []
    for eps in (0.5, 0.95):
        depths = random.choice([*LAYERS, 30], size=100)
        shares = Shares.of(groups, random.random(100) < eps, depths, 30)
        exits = {layer: int((depths == layer).sum()) for layer in (*LAYERS, 30)}
        points.append(Point(eps, (0.1, 0.2, math.inf), exits, (0.9, 0.9, math.nan), shares, 0.0123))
    sorting = make_sorting("a-rather-long-name-of-heads")
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="900" height="600"><rect width="900" height="600"/></svg>'
    gallery = {"Fig. 1: <something> & more.": svg, "Fig. 2: else.": svg}
    return replace(result.findings(), forced=points, sorting=sorting, gallery=gallery)


@pytest.fixture(scope="module")
def result():
    return make_result()


@pytest.fixture(scope="module")
def page():
    return render_report(make_findings())


class Reader(HTMLParser):
    """Collects the page's text, tags and attributes, and insists that tags are closed in order."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_the_page_loads_nothing(page, read):
    for tag, attributes in read.tags:
        assert tag not in ("link", "iframe", "object", "base"), tag
        if tag == "img":
            assert attributes.pop("src").startswith("data:image/svg+xml;base64,")
            assert attributes["alt"]
        for name in ("src", "srcset", "xlink:href", "href"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(", page)


def test_every_token_is_there_with_its_exit(result, read):
    spans = [attributes for tag, attributes in read.tags if tag == "span" and "data-about" in attributes]
    tokens = [token for item in result.shown.passages for token in item.tokens]
    assert len(spans) == len(tokens)
    for attributes, token in zip(spans, tokens, strict=True):
        classes = (attributes.get("class") or "").split()
        assert [c for c in classes if c.startswith("exit")] == (
            [] if token.layer == 30 else [f"exit{LAYERS.index(token.layer)}"]
        )
        assert ("differs" in classes) == (not token.agrees)
        if token.margin is not None:
            assert f"margin {token.margin:.3f}" in attributes["data-about"]
        else:
            assert "whole model" in attributes["data-about"]
        for layer, choice, margin in token.heads:
            assert f"after {layer}: “{choice}” {margin:.3f}" in attributes["data-about"]


def test_text_of_the_model_is_escaped(page, read):
    assert "<topic" not in page
    assert "<b>" not in page
    assert "Explain <topic 0> & more." in "".join(read.text)


def test_numbers_of_the_tables_are_the_results(result, read):
    text = "".join(read.text)
    for item in result.decoded:
        for value in (item.agreement, item.early_agreement, item.early):
            assert f"{value:.1%}" in text
    for threshold, coverage in zip(result.calibration.thresholds, result.calibration.coverage, strict=True):
        assert (f"{threshold:.6f}" if math.isfinite(threshold) else "never exits") in text
        assert f"{coverage:.1%}" in text
    assert "no guarantee (sequential)" in text
    assert f"{result.speed.ratio(exits_at(0.9), OFF):.2f}" in text
    for name in result.speed.tokens_per_second:
        low, high = result.speed.interval(name)
        assert low < high
        assert f"{result.speed.median(name):.1f} [{low:.1f}–{high:.1f}]" in text


def test_a_guarantee_stands_beside_its_threshold(result):
    found = replace(result.calibration.cascade(), delta=0.1)
    assert found.found
    known = {(0.9, "sequential", 0.1, tuple(range(len(LAYERS)))): found}
    page = render_report(Findings("m", replace(result.calibration, delta=0.1, _known=known)))
    assert "<td>at least 0.9, at confidence 0.9</td>" in page
    assert "no guarantee" not in page


def test_a_report_without_text_or_timing_leaves_them_out(result):
    page = render_report(Findings("m", result.calibration))
    assert 'class="passage"' not in page
    assert "Thresholds" in page
    assert len(re.findall("<svg", page)) == 1


def test_pictures_are_well_formed_and_take_the_pages_colours(page):
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(pictures) == 6
    ids = []
    for picture in pictures:
        ids += [element.get("id") for element in ElementTree.fromstring(picture).iter() if element.get("id")]
        assert "currentColor" in picture
        assert "#0102" not in picture
        assert "#0103" not in picture
    defined = set(re.findall(r"(--\w+):", page))
    assert set(re.findall(r"var\((--\w+)\)", page)) <= defined
    clips = [name for name in ids if re.fullmatch(r"p[0-9a-f]{10}", name)]
    assert len(clips) == len(set(clips))


def drawn(name, tables):
    figure = Figure(figsize=(6.4, 4))
    (PAPER | EVALUATION)[name].drawn_from(tables, figure)
    return figure


def of_head(rows, heads, layer):
    return [row for row in rows if (row["heads"], row["layer"]) == (heads, layer)]


def test_risk_coverage_curves_are_those_of_the_tables():
    tables = make_sorting("one", "other")
    figure = drawn("risk-coverage", tables)
    assert len(figure.axes) == 2 * len(LAYERS)
    for ax, (heads, layer) in zip(figure.axes, product(("one", "other"), LAYERS), strict=True):
        assert ax.get_title() == f"{heads}\nafter layer {layer}"
        found = {row["confidence"]: row["aurc"] for row in of_head(tables["confidence"], heads, layer)}
        names = [text.get_text() for text in ax.get_legend().get_texts()]
        assert names == [f"{name} {aurc:.3f}" for name, aurc in found.items()]
        for shown, name in zip(ax.lines, found, strict=True):
            rows = [row for row in of_head(tables["curves"], heads, layer) if row["confidence"] == name]
            assert len(rows) > 100
            assert list(shown.get_xdata()) == [row["coverage"] for row in rows]
            assert list(shown.get_ydata()) == [row["risk"] for row in rows]
        for look in ("color", "marker"):
            assert len({getattr(shown, f"get_{look}")() for shown in ax.lines}) == len(found)


def test_reliability_diagrams_are_those_of_the_tables():
    tables = make_sorting("mine", tokens=40)
    figure = drawn("reliability", tables)
    assert [ax.get_title() for ax in figure.axes] == [f"after layer {layer}" for layer in LAYERS]
    for ax, layer in zip(figure.axes, LAYERS, strict=True):
        rows = of_head(tables["reliability"], "mine", layer)
        held = [row for row in rows if row["tokens"]]
        assert len(held) < len(rows)
        diagonal, right = ax.lines
        assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
        assert list(right.get_xdata()) == [row["mean_max_prob"] for row in held]
        assert list(right.get_ydata()) == [row["accuracy"] for row in held]
        assert [bar.get_height() for bar in ax.patches] == [row["tokens"] / 40 for row in rows]
        assert [bar.get_x() for bar in ax.patches] == [row["bin_from"] for row in rows]
        (ece,) = (row["ece"] for row in of_head(tables["confidence"], "mine", layer) if row["ece"] >= 0)
        assert [text.get_text() for text in ax.texts] == [f"ECE {ece:.3f}"]


def test_the_page_shows_areas_and_calibration_errors_in_its_pictures(page):
    pictures = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    for row in make_findings().sorting["confidence"]:
        assert f">{row['confidence']} {row['aurc']:.3f}<" in pictures
        if math.isfinite(row["ece"]):
            assert f">ECE {row['ece']:.3f}<" in pictures


def test_a_score_stands_between_its_standard_errors():
    rows = [
        {"task": task, "metric": "acc", "eps": eps, "score": score, "standard_error": error}
        for task, found in {
            "a": [(math.nan, 0.8, 0.05), (0.5, 0.3, 0.125), (0.9, 0.7, 0.25)],
            "b": [(math.nan, 0.5, 0.1), (0.5, 0.4, math.nan), (0.9, 0.6, 0.0625)],
        }.items()
        for eps, score, error in found
    ]
    (ax,) = drawn("fig2-score", {"score": rows}).axes
    bars = [collection.get_segments() for collection in ax.collections]
    ends = [[tuple(segment[:, 1]) for segment in group] for group in bars]
    expected = [[(0.175, 0.425), (0.45, 0.95)], [(0.75, 0.85)], [(0.4, 0.4), (0.5375, 0.6625)], [(0.4, 0.6)]]
    assert len(ends) == len(expected)
    for found, wanted in zip(ends, expected, strict=True):
        np.testing.assert_allclose(found, wanted)


def test_lines_are_told_apart_without_colour():
    looks = [(look["marker"], str(look["linestyle"])) for look in map(line, range(49))]
    assert len(set(looks)) == 49
    for column in zip(*looks[:7], strict=True):
        assert len(set(column)) == 7
    rows = [
        {"heads": "h", "layer": layer, "step": step, "accuracy": 0.1 * layer, "entropy": 1.0}
        for layer in range(1, 6)
        for step in (0, 1)
    ]
    figure, file = drawn("fig1-training", {"training": rows}), io.StringIO()
    lines = figure.axes[0].lines
    assert len({shown.get_marker() for shown in lines}) == len({shown.get_color() for shown in lines}) == 5
    figure.savefig(file, format="svg")
    # One of the five is solid.
    assert len(set(re.findall(r"stroke-dasharray: ([^;\"]+)", file.getvalue()))) >= 4


def test_pictures_are_written_twice_and_only_where_there_are_rows(tmp_path):
    tables = make_sorting("mine", tokens=60)
    drawn = draw_figures(EVALUATION, tables | {"reliability": []}, tmp_path)
    assert drawn == {"risk-coverage": tmp_path / "risk-coverage.png"}
    assert drawn["risk-coverage"].read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(tmp_path / "risk-coverage.svg").getroot().tag.endswith("svg")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_keyboard_reaches_every_passage(read, result):
    passages = [attributes for tag, attributes in read.tags if attributes.get("class") == "passage"]
    assert len(passages) == len(result.shown.passages)
    assert all(attributes["tabindex"] == "0" and attributes["aria-labelledby"] for attributes in passages)


def test_decoded_text_survives_storage(result):
    stored = json.loads(json.dumps(result.shown.to_dict(), allow_nan=False))
    assert Decoded.from_dict(stored) == result.shown


def test_agreement_counts_tokens():
    def make(*tokens):
        return Passage("p", tuple(Token("x", layer, None, agrees) for layer, agrees in tokens))

    item = Decoded(0.9, (0.5,), (2, 4), (make((2, True), (2, False), (4, True)), make((4, True), (2, True))))
    assert item.exits == {2: 3, 4: 2}
    assert item.agreement == 4 / 5
    assert item.early_agreement == 2 / 3
    assert item.early == pytest.approx(3 / 5)
    assert item.mean_layers == pytest.approx((3 * 2 + 2 * 4) / 5)
    # Two prompts are drawn as one of 2/3, both, or one of 1.
    assert item.intervals["agreement"] == pytest.approx((2 / 3, 1))
    assert item.intervals["mean_layers"] == pytest.approx((8 / 3, 3))
    assert math.isnan(Decoded(0.9, (0.5,), (2, 4), (make((4, True)),)).early_agreement)


def test_speed_takes_ratios_prompt_by_prompt():
    speed = Speed({PLAIN: [10.0, 20.0, 40.0], OFF: [15.0, 40.0, 40.0]}, True, 8)
    assert speed.median(OFF) == 40.0
    assert speed.ratio(OFF) == 1.5
    assert speed.ratio(PLAIN, OFF) == pytest.approx(1 / 1.5)


def test_speed_has_intervals_over_the_prompts():
    speed = Speed({PLAIN: [10.0, 20.0, 40.0], OFF: [15.0, 40.0, 40.0]}, True, 8)
    # With three prompts one is drawn thrice in some of the draws.
    assert speed.interval(PLAIN) == (10.0, 40.0)
    assert speed.interval(OFF) == (15.0, 40.0)
    assert all(map(math.isnan, Speed({PLAIN: [10.0]}, True, 8).interval(PLAIN)))
    many = Speed({PLAIN: list(np.random.default_rng(0).random(9))}, True, 8)
    assert many.interval(PLAIN) == replace(many, seed=0).interval(PLAIN)
    assert len({replace(many, seed=seed).interval(PLAIN) for seed in range(20)}) > 1
    rows = speed_rows(speed)
    assert (rows[0]["tokens_per_second_low"], rows[0]["tokens_per_second_high"]) == (10.0, 40.0)
    assert speed.to_dict()["tokens_per_second_interval"][OFF] == (15.0, 40.0)


def test_pieces_of_a_character_wait_for_its_end():
    data = {0: b"a", 1: b"\xc3", 2: b"\xa9", 3: b" b"}
    tokenizer = SimpleNamespace(
        decode=lambda ids, **_: b"".join(data[i] for i in ids).decode("utf-8", errors="replace")
    )
    assert split_text(tokenizer, [0, 1, 2, 3]) == ["a", "", "é", " b"]
    assert split_text(tokenizer, [0, 1]) == ["a", "�"]
