import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from offramp.evaluation.decoded import Decoded, Passage, Token, split_text
from offramp.evaluation.demo import DemoConfig, DemoResult
from offramp.evaluation.findings import Findings
from offramp.evaluation.forced import Point
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
    areas = {
        "aurc": 0.1234,
        "aurc_low": 0.1,
        "aurc_high": 0.2,
        "e_aurc": 0.05,
        "augrc": 0.06,
        "ece": math.nan,
    }
    rows = [{"heads": "a-rather-long-name-of-heads", "layer": 18, "confidence": "margin", **areas}]
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="900" height="600"><rect width="900" height="600"/></svg>'
    gallery = {"Fig. 1: <something> & more.": svg, "Fig. 2: else.": svg}
    return replace(result.findings(), forced=points, confidence=rows, gallery=gallery)


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
    assert len(pictures) == 4
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


def test_pieces_of_a_character_wait_for_its_end():
    data = {0: b"a", 1: b"\xc3", 2: b"\xa9", 3: b" b"}
    tokenizer = SimpleNamespace(
        decode=lambda ids, **_: b"".join(data[i] for i in ids).decode("utf-8", errors="replace")
    )
    assert split_text(tokenizer, [0, 1, 2, 3]) == ["a", "", "é", " b"]
    assert split_text(tokenizer, [0, 1]) == ["a", "�"]
