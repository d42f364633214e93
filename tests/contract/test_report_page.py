"""The page in a real browser, without a network: it renders, sorts, asks for nothing, and a transcript stays text."""

import json
import shutil
from pathlib import Path

import pytest

import reference
from asr_core.checkpoint import Checkpoint
from parity import page, report
from parity.compare import Row
from parity.data import Utterance

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")
HOSTILE = "<script>document.title = 'taken'; alert(1)</script><img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Containers run tests as root, where Chromium has no sandbox; it only ever opens our own page.
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    rows = [Row("pytorch", "fp32", "pass", size_mb=9.0, speedup=1.0, latency_p50_s=0.2, token_match=1.0)]
    rows += [
        Row("onnx", f"v{i}", status, HOSTILE, size_mb=size, speedup=speed, encoder_max_abs=10.0**-i, token_match=1.0)
        for i, (status, size, speed) in enumerate([("pass", 10.0, 2.0), ("fail", 9.5, None), ("pass", 100.0, 3.0)])
    ]
    heard = {
        "text": HOSTILE,
        "normalised": HOSTILE,
        "errors": 3,
        "tokens_equal": False,
        "latency_s": 0.1,
        "sum_logprob": -1.0,
    }
    said = {"text": "hello", "normalised": "hello", "duration_s": 1.0}
    names = ["pytorch-fp32", "onnx-v0", "onnx-v1", "onnx-v2"]
    behind = {
        "utterances": [{"id": HOSTILE, **said, "heard": dict.fromkeys(names, heard)}],
        "disagreement": {"rows": names, "tokens": [[0.5] * 4] * 4, "texts": [[0.5] * 4] * 4},
        "positions": {"onnx-v0": {"mean": [1e-3, 2e-3], "max": [1e-2, 1e-2]}},
    }
    checkpoint = Checkpoint.open("reference")
    document = report.document(checkpoint, [Utterance("a", reference.manifest_path(), "hello", 1.0)], rows, 1, details=behind)
    path = tmp_path_factory.mktemp("page") / "report.html"
    page.write_html(path, json.loads(json.dumps(document)))
    return path


@pytest.fixture(params=[(1280, "light"), (390, "dark")], ids=["wide-light", "narrow-dark"])
def opened(request, browser, written):
    """The page at one size and colour scheme, and everything that it complained about or asked for."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    view = context.new_page()
    heard: list[str] = []
    view.on("console", lambda message: heard.append(message.text))
    view.on("pageerror", lambda error: heard.append(str(error)))
    view.on("dialog", lambda dialog: (heard.append(dialog.message), dialog.dismiss()))
    view.on("request", lambda sent: heard.append(sent.url) if sent.url != written.as_uri() else None)
    view.goto(written.as_uri())
    yield view, heard
    context.close()


def test_it_renders_quietly_and_keeps_its_width(opened):
    view, heard = opened
    assert view.title() == "Parity report: reference"
    assert view.locator("figure svg").count() == 5
    assert all(box["width"] > 200 for box in (svg.bounding_box() for svg in view.locator("figure svg").all()))
    assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert heard == []


def test_transcripts_are_text(opened):
    view, heard = opened
    assert view.locator("main script, main img").count() == 0
    assert "<script>document.title" in view.locator("#heard").inner_text()
    assert heard == []


def test_a_table_sorts_from_the_keyboard(opened):
    view, heard = opened
    cost = view.locator("#cost table.sortable")
    head = cost.locator("th", has_text="size (MB)")

    def sizes() -> list[str]:
        return cost.locator("tbody tr td:nth-child(3)").all_inner_texts()

    head.locator("button").focus()
    view.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert sizes() == ["9.0", "9.5", "10.0", "100.0"]
    view.keyboard.press("Space")
    assert head.get_attribute("aria-sort") == "descending"
    assert sizes() == ["100.0", "10.0", "9.5", "9.0"]
    assert heard == []


def test_what_was_not_measured_stays_last_in_both_orders(opened):
    view, _ = opened
    cost = view.locator("#cost table.sortable")
    button = cost.locator("th", has_text="speed-up").locator("button")
    for _ in range(2):
        button.click()
        assert cost.locator("tbody tr td:nth-child(4)").last.inner_text() == "not measured"


def test_colours_follow_the_scheme(opened):
    view, _ = opened
    dark = view.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    channels = "getComputedStyle({}).{}.match(/[0-9.]+/g).slice(0, 3).map(Number)"
    paper = view.evaluate(channels.format("document.body", "backgroundColor"))
    ink = view.evaluate(channels.format("document.querySelector('figure svg text')", "fill"))
    assert (sum(paper) < sum(ink)) == dark
    assert abs(sum(paper) - sum(ink)) > 400


def test_it_prints_on_paper(browser, written, tmp_path):
    context = browser.new_context(color_scheme="dark")
    view = context.new_page()
    view.goto(written.as_uri())
    view.emulate_media(media="print")
    assert view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    view.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    context.close()
