"""The report: one JSON document valid against its schema, and the page and Markdown that are made from nothing else."""

import dataclasses
import json
import re
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import html5lib
import jsonschema
import numpy as np
import pytest
from rich.console import Console
from scipy.special import rel_entr, softmax

from asr_core.errors import GateError
from parity import columns, details, page, plots, report, words
from parity.compare import Row
from parity.data import Utterance

HOSTILE = '<script>alert(1)</script> & "two" | *three*'
SAID = ["one two three", "four", "", "five six"]
HEARD = {
    "pytorch-fp32": ["one two three", "four", "", "five six"],
    "onnx-fp32": ["one two three", "four", "", "five six"],
    "onnx-int8": ["one too three", HOSTILE, "noise", "five six"],
    "coreml-fp16": ["one two three", "four", "", "six"],
}
ROWS = [
    Row("pytorch", "fp32", "pass", encoder_max_abs=0.0, logits_max_abs=0.0, token_match=1.0, latency_p50_s=0.2, size_mb=9.0),
    Row("onnx", "fp32", "pass", encoder_max_abs=2e-6, logits_max_abs=4e-5, token_match=1.0, latency_p50_s=0.1, size_mb=9.0),
    Row(
        "onnx",
        "int8",
        "fail",
        f"delta_wer 20 > 0.5 {HOSTILE}",
        encoder_max_abs=float("nan"),
        logits_max_abs=float("inf"),
        token_match=0.25,
        delta_wer=0.2,
        first_divergence={"utterance": "clip-0", "position": 1, "margin": 0.5},
        latency_p50_s=0.05,
        size_mb=3.0,
        speedup=4.0,
    ),
    Row("coreml", "fp16", "pass", "timings unavailable: needs macOS", token_match=0.75, size_mb=5.0),
    Row("tflite", "int8", "unavailable", "tflite needs ai-edge-litert"),
    Row("ncnn", "fp16", "crashed", "segmentation fault"),
]


def number_words(text: str) -> list[int]:
    return [hash(word) % 1000 for word in text.split()]


@pytest.fixture(scope="module")
def logits() -> dict[str, list[np.ndarray]]:
    random = np.random.default_rng(0)
    exact = [random.normal(size=(3, 7)).astype(np.float32), random.normal(size=(2, 7)).astype(np.float32)]
    return {"pytorch": exact, "onnx-int8": [values + random.normal(size=values.shape).astype(np.float32) for values in exact]}


@pytest.fixture(scope="module")
def work(tmp_path_factory, logits) -> Path:
    """Measurement folders as a session leaves them."""
    root = tmp_path_factory.mktemp("work")
    for name, texts in HEARD.items():
        folder = root / ("pytorch" if name == "pytorch-fp32" else name)
        folder.mkdir()
        lines = [
            {
                "text": text,
                "tokens": number_words(text),
                "sum_logprob": -1.0,
                "timings": {"encode_s": 0.1 + i / 100, "decode_s": 0.05, "prompt_s": None},
            }
            for i, text in enumerate(texts)
        ]
        (folder / "decoded.jsonl").write_text("\n".join(map(json.dumps, lines)))
        for i, values in enumerate(logits.get(folder.name, [])):
            np.savez(folder / f"weights-{i}.npz", logits=values)
    return root


@pytest.fixture(scope="module")
def document(work, trained) -> dict:
    utterances = [Utterance(f"clip-{i}", Path("clip.flac"), text, 2.0) for i, text in enumerate(SAID)]
    behind = details.read(work, ROWS, utterances, lambda text, language: text.lower())
    return report.document(trained, utterances, ROWS, 1, details=behind)


@pytest.fixture(scope="module")
def schema() -> dict:
    return json.loads(resources.files("parity").joinpath("report.schema.json").read_text())


def test_the_document_is_valid_and_survives_json(document, schema, tmp_path):
    jsonschema.Draft202012Validator.check_schema(schema)
    report.write_json(tmp_path / "report.json", document)
    again = json.loads((tmp_path / "report.json").read_text())
    assert again == document
    jsonschema.validate(again, schema, jsonschema.Draft202012Validator)


def test_the_schema_describes_every_field_of_a_row(schema):
    assert {field.name for field in dataclasses.fields(Row)} <= schema["$defs"]["row"]["properties"].keys()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d["rows"][0].update(status="fine"),
        lambda d: d["rows"][0].pop("wer"),
        lambda d: d["rows"][0].update(token_match=1.2),
        lambda d: d["rows"][0].update(wer="none"),
        lambda d: d["utterances"][0]["heard"]["onnx-fp32"].pop("text"),
        lambda d: d["thresholds"]["fp32"]["breaks"].pop("reason"),
        lambda d: d.pop("host"),
    ],
)
def test_the_schema_refuses_what_is_no_report(document, schema, spoil):
    spoilt = json.loads(json.dumps(document))
    spoil(spoilt)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spoilt, schema, jsonschema.Draft202012Validator)


def test_what_is_not_a_number_is_kept(document):
    broken = document["rows"][2]
    assert (broken["encoder_max_abs"], broken["logits_max_abs"]) == ("NaN", "Infinity")
    assert "nan" in page.html(document)


def test_kl_by_position_is_scipys(document, logits):
    assert list(document["positions"]) == ["onnx-int8"]
    curves = [
        rel_entr(softmax(p.astype(np.float64), -1), softmax(q.astype(np.float64), -1)).sum(-1)
        for p, q in zip(logits["pytorch"], logits["onnx-int8"], strict=True)
    ]
    got = document["positions"]["onnx-int8"]
    mean = [*np.mean([curves[0][:2], curves[1]], axis=0), curves[0][2]]
    # Logits are float32, everything after is float64 on both sides.
    np.testing.assert_allclose(got["mean"], mean, rtol=1e-12)
    np.testing.assert_allclose(got["max"], [*np.max([curves[0][:2], curves[1]], axis=0), curves[0][2]], rtol=1e-12)


def test_disagreement_counts_utterances(document):
    shares = document["disagreement"]
    assert shares["rows"] == list(HEARD)
    assert shares["texts"] == [[0, 0, 0.75, 0.25], [0, 0, 0.75, 0.25], [0.75, 0.75, 0, 1], [0.25, 0.25, 1, 0]]
    assert shares["tokens"] == shares["texts"]


def test_latencies_are_those_of_the_runtime_only(document):
    heard = document["utterances"][1]["heard"]
    assert heard["onnx-fp32"]["latency_s"] == pytest.approx(0.16)
    assert heard["coreml-fp16"]["latency_s"] is None
    assert heard.keys() == HEARD.keys()


@pytest.mark.parametrize(
    ("said", "heard", "runs"),
    [
        ("a b c", "a b c", [("equal", "a b c", "a b c")]),
        ("a b c", "a c", [("equal", "a", "a"), ("delete", "b", ""), ("equal", "c", "c")]),
        ("a c", "a b c", [("equal", "a", "a"), ("insert", "", "b"), ("equal", "c", "c")]),
        ("daniel", "the young", [("replace", "daniel", "the young")]),
        ("", "noise", [("insert", "", "noise")]),
        ("", "", []),
    ],
)
def test_word_differences(said, heard, runs):
    assert [(run.kind, run.said, run.heard) for run in words.diff(said, heard)] == runs


def test_worst_utterances_come_first(document):
    order = words.worst_first(document, "pytorch-fp32")
    assert [utterance.id for utterance in order] == ["clip-1", "clip-0", "clip-2", "clip-3"]
    assert order[1].versions[0].rows == ["pytorch-fp32", "onnx-fp32", "coreml-fp16"]


def test_the_page_is_one_valid_document_without_addresses(document):
    text = page.html(document)
    html5lib.HTMLParser(strict=True).parse(text)
    assert not re.findall(r"""(?:src|href|action|data)\s*=\s*["']?(?!#|data:,)[^"'>\s]+""", text)
    assert "://" not in text
    assert "url(" not in re.sub(r"url\(#", "", text)
    assert "@import" not in text


def test_ids_are_unique_and_references_lead_somewhere(document):
    tree = html5lib.parse(page.html(document), namespaceHTMLElements=False)
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    named = {name for element in tree.iter() for name in (element.get("aria-labelledby") or "").split()}
    linked = {element.get("href", "")[1:] for element in tree.iter() if (element.get("href") or "").startswith("#")}
    assert named | linked <= set(ids)


def test_every_text_is_escaped(document):
    hostile = json.loads(json.dumps(document).replace("clip-1", "</style><script>x()</script>"))
    hostile["checkpoint"]["name"] = hostile["host"]["processor"] = hostile["versions"]["torch"] = HOSTILE
    hostile["rows"][0]["precision"] = hostile["rows"][1]["target"] = '"><script>y()</script>'
    hostile["positions"] = {columns.name(hostile["rows"][1]): {"mean": [1e-3], "max": [1e-2]}}
    tree = html5lib.parse(page.html(hostile), namespaceHTMLElements=False)
    assert len(list(tree.iter("script"))) == 1
    assert "<script>alert(1)</script>" in "".join(tree.itertext())


def test_what_was_not_measured_says_so(document):
    tree = html5lib.parse(page.html(document), namespaceHTMLElements=False)
    row = next(r for r in tree.find(".//section[@id='cost']").iter("tr") if "tflite-int8" in "".join(r.itertext()))
    assert {cell.text for cell in row.findall("td")[1:]} == {"not measured"}


def test_groups_are_never_mixed(document):
    tree = html5lib.parse(page.html(document), namespaceHTMLElements=False)
    heads = {
        group.key: "".join(tree.find(f".//section[@id='{group.key}']").find(".//thead").itertext()) for group in columns.GROUPS
    }
    assert "WER" in heads["policy"]
    assert "WER" not in heads["weights"] + heads["cost"]
    assert "encoder" not in heads["policy"] + heads["cost"]


def test_failures_come_first(document):
    tree = html5lib.parse(page.html(document), namespaceHTMLElements=False)
    names = [row.find("th").text for row in tree.find(".//section[@id='verdicts']").find(".//tbody")]
    assert names == ["ncnn-fp16", "onnx-int8", "tflite-int8", "onnx-fp32", "coreml-fp16"]


def test_the_page_is_a_function_of_the_document(document):
    assert page.html(document) == page.html(json.loads(json.dumps(document)))


def test_pictures_can_be_read_aloud(document):
    for draw in (plots.trade_off, plots.error_by_stage, plots.logits_kl, plots.kl_by_position, plots.latency):
        plot = draw(document)
        assert 'role="img"' in plot.svg
        assert plot.title in plot.svg
        assert "<text" in plot.svg
        assert "onnx-int8" in plot.svg


def test_an_error_that_is_no_number_is_drawn_as_such(document):
    assert ">not a number<" in plots.error_by_stage(document).svg
    curves = {"onnx-int8": {"mean": ["NaN"], "max": ["NaN"]}}
    assert ">not a number<" in plots.logits_kl({**document, "positions": curves}).svg


def test_a_dollar_sign_is_no_formula(document):
    rows = [{**row, "precision": "$x$"} for row in document["rows"]]
    assert ">onnx-$x$<" in plots.error_by_stage({**document, "rows": rows}).svg


def test_a_report_without_measurements_is_still_a_page(document):
    old = {key: document[key] for key in ("schema", "checkpoint", "host", "data")} | {"rows": document["rows"][-1:]}
    text = page.html(old)
    html5lib.HTMLParser(strict=True).parse(text)
    assert "ncnn-fp16" in text
    assert "not measured" in text
    assert "ncnn-fp16" in page.markdown(old)


def test_hosts_of_a_merged_report_are_told_apart(document):
    there = [{**row, "host": "Mac"} for row in document["rows"]]
    hosts = {"Linux": {"host": document["host"]}, "Mac": {"host": document["host"], "versions": {}}}
    merged = {**document, "hosts": hosts, "rows": [{**row, "host": "Linux"} for row in document["rows"]] + there}
    text = page.html(merged)
    assert "coreml-fp16 (B)" in text
    assert "Host B: Mac" in text


def test_calibrated_bounds_go_before_typed_ones(document):
    bound = {"max": 8e-6, "noise": 2e-6, "floor": 1e-7, "factor": 4, "reason": "measured"}
    text = page.html({**document, "calibration": {"noise": [{"kind": "threads"}], "bounds": {"fp32": {"logits_error": bound}}}})
    assert "≤ 8e-06" in text
    assert "4 × PyTorch" in text


def test_intervals_are_shown_however_they_are_kept():
    (column,) = (c for group in columns.GROUPS for c in group.columns if c.key == "delta_wer")
    assert column.cell({"delta_wer": 0.01, "delta_wer_interval": [-0.005, 0.02]}).text == "+1.00 [-0.50, +2.00]"
    assert column.cell({"delta_wer": 0.01, "delta_wer_low": -0.005, "delta_wer_high": 0.02}).text == "+1.00 [-0.50, +2.00]"
    assert column.cell({"delta_wer": 0.01}).text == "+1.00"
    assert column.cell({}).text is None


def test_markdown_keeps_its_tables_and_escapes_marks(document):
    text = page.markdown(document)
    assert "<script>" not in text
    assert "\\*three\\*" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1, table
    assert "not measured" in text
    assert "**too** three" in text


def test_the_terminal_has_a_table_for_each_group():
    console = Console(width=160, record=True, file=SimpleNamespace(write=lambda text: None, flush=lambda: None))
    console.print(report.table(ROWS))
    text = console.export_text()
    for group in columns.GROUPS:
        assert group.title in text
    assert text.count("onnx-int8") == 4
    assert "nan" in text


def test_a_precision_without_bounds_is_no_obstacle(trained):
    assert report.document(trained, [], [Row("onnx", "?", "fail", "damaged")], 1)["thresholds"] == {}
    with pytest.raises(GateError):
        report.compare.thresholds("parity", "?")
