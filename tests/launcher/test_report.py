import html
import itertools
import json
import re
import shutil
import subprocess
from collections import Counter

import pytest
from run_folders import BEGAN, night, write_lines
from typer.testing import CliRunner

from onetrain.launcher import report_time
from onetrain.launcher.cli import app
from onetrain.launcher.device_peaks import peak_of
from onetrain.launcher.goodput import goodput
from onetrain.launcher.report import report_html, write_report

NASTY = "<script>document.title='hacked'</script></pre><b>&\"'"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SWITCHES = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """History and report of a run with two restarts; nobody changes its folder."""
    folder = tmp_path_factory.mktemp("finished")
    history = night(folder)
    return history, body(report_html(folder, history.time + 60))


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    """The file of a report whose every free text is NASTY."""
    folder = tmp_path_factory.mktemp("nasty")
    history = night(folder, nasty=NASTY)
    return write_report(folder, now=history.time)


def body(document):
    """Without plotly.js, whose 4.7 MB would slow searching down."""
    return document.split("</head>")[1]


def text_of(document):
    """What a reader sees, without figures."""
    bare = re.sub(r"<(script|style)\b.*?</\1>", " ", document, flags=re.S)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", bare)))


def figures(document):
    """Data and layout of every figure."""
    decoder = json.JSONDecoder()
    found = []
    for match in re.finditer(r'Plotly\.newPlot\(\s*"[^"]+",\s*', document):
        data, end = decoder.raw_decode(document, match.end())
        layout, _ = decoder.raw_decode(document, re.compile(r",\s*").match(document, end).end())
        found.append((data, layout))
    return found


def titles(layout):
    return {axis["title"]["text"] for name, axis in layout.items() if "axis" in name and "text" in axis["title"]}


def test_everything_about_a_night(finished):
    history, document = finished
    text = text_of(document)
    for part in (
        "done, 60 s ago", "1,200 step of 1,200", "0.2960 best recall@10, step 1,200", "2 restarts", "1 batches left",
        "node lost rank 6, node 10.0.0.4 432 400", "hang rank 3, node 10.0.0.2 782 700", "12 async", "14.3 GB",
        "shop: 17, 4711", "hang_2.txt", "all_to_all 5120 of 5121", "19 events of the supervisor", "deepspeed 0.19.8",
        "989 TFLOP/s for each rank, the dense bf16 peak of NVIDIA H100 80GB HBM3", "expert_parallel: 2",
    ):  # fmt: skip
        assert part in text, part
    shares = [history.truth[label] / (history.time - BEGAN) for label in ("compute", "recompute", "lost")]
    for label, share in zip(("compute", "recompute", "lost"), shares, strict=True):
        assert re.search(rf" {label} \d+ min {share:.1%} ", text), label
    assert f"{shares[0]:.1%} effective training time" in text
    axes = set().union(*(titles(layout) for _, layout in figures(document)))
    assert axes >= {
        "loss (nats)",
        "learning rate",
        "samples/s",
        "MFU (%)",
        "minutes since the start",
        "size (GB)",
        "layer",
    }
    assert len(figures(document)) == 9


def test_curves_hold_the_logged_numbers(finished, tmp_path):
    history, document = finished
    night(tmp_path)  # the same once more
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    newest = {line["step"]: line for line in lines if line["kind"] == "train"}  # of attempts that made a step twice
    assert len(newest) < sum(line["kind"] == "train" for line in lines)
    drawn = {}
    for data, layout in figures(document):
        drawn |= {(trace.get("name"), str(layout["xaxis"].get("title", {}).get("text"))): trace for trace in data}
    curve = drawn["training", "optimizer step"]
    assert curve["x"] == sorted(newest)
    assert curve["y"] == [newest[step]["loss"] for step in sorted(newest)]
    mfu = drawn["MFU (%)", "optimizer step"]["y"]
    worlds = {1: 8, 2: 6, 3: 8}
    expected = [100 * r["model_gflops_per_s"] / (989.4e3 * worlds[r["attempt"]]) for _, r in sorted(newest.items())]
    assert mfu == pytest.approx(expected)
    spans = goodput(history.events, history.ledger).seconds
    for label in ("compute", "lost", "restart"):
        assert sum(drawn[label, "minutes since the start"]["x"]) * 60 == pytest.approx(spans[label])
    hovers = " ".join(drawn["restart", "minutes since the start"]["hovertext"])
    assert "node 10.0.0.4 is gone" in hovers
    assert "rank 3 stood in step 783" in hovers


def test_a_run_that_goes_on(tmp_path):
    history = night(tmp_path / "night", going=True)
    document = body(report_html(tmp_path / "night", history.time + 1))
    assert " running. " in text_of(document)
    assert "1,150 step of 1,200" in text_of(document)
    (timeline,) = [data for data, layout in figures(document) if "minutes since the start" in titles(layout)]
    end = max(base + length for trace in timeline for base, length in zip(trace["base"], trace["x"], strict=True))
    assert end * 60 == pytest.approx(history.time + 1 - BEGAN)


def test_what_is_missing_is_told(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    write_lines(
        folder / "metrics.jsonl", [{"step": 10, "time": BEGAN, "kind": "train", "loss": 2.5, "grad_norm": None}]
    )
    document = body(report_html(folder, BEGAN + 5))
    text = text_of(document)
    assert len(figures(document)) == 1
    for part in (
        "No validation has been made yet", "No accuracy by level", "nobody knows where its time went", "No attempt has",
        "Nothing of this has been logged yet: samples_per_s", "No MFU", "No expert metrics", "has no checkpoint",
        "No rank has hung", "no environment.json", "no config.yaml", "had no supervisor",
    ):  # fmt: skip
        assert part in text, part
    (folder / "metrics.jsonl").write_text('{"step": 1}\nbroken\n{"kind": "train"}\n')
    assert figures(body(report_html(folder, BEGAN))) == []


def test_a_run_of_torchrun_on_a_cpu(tmp_path):
    history = night(tmp_path / "night", device="x86_64")
    for name in ("events.jsonl", "heartbeats.json"):
        (tmp_path / "night" / name).unlink()
    document = body(report_html(tmp_path / "night", history.time + 9))
    text = text_of(document)
    assert "ended (finished) 12 s ago; it had no supervisor" in text
    assert "a CPU has no published peak" in text
    assert "No expert was without a token" not in text  # some were, early on
    assert "MFU (%)" not in set().union(*(titles(layout) for _, layout in figures(document)))
    assert "unknown" in text  # kind of the restarts


def test_tables_of_evaluations(tmp_path):
    table = {"step": 1200, "time": BEGAN, "kind": "table", "name": "evaluation_test", "columns": ["subset", "recall@5"]}
    rows = [[["stale <b>", 0.1]], [["all <b>", 0.327]]]
    write_lines(tmp_path / "metrics.jsonl", [table | {"rows": some} for some in rows])
    text = text_of(body(report_html(tmp_path, BEGAN)))
    assert "Evaluation test Of the model after step 1,200. subset recall@5 all <b> 0.3270" in text
    assert "stale" not in text


def test_no_text_becomes_markup(nasty):
    head, document = nasty.read_text().split("</head>")
    assert head.count("<title>night&lt;script&gt;") == 1
    assert "<script>document" not in document
    assert "</pre><b>" not in document
    assert text_of(document).count(NASTY) >= 7
    hovers = [text for data, _ in figures(document) for trace in data for text in trace.get("hovertext", [])]
    assert any("&lt;script&gt;" in text for text in hovers)
    assert not any("<script" in text for text in hovers)


def test_long_timelines_are_drawn_coarser():
    spans = []
    labels = ["data_wait", "compute", "checkpoint", "validation", "lost", "restart", "recompute"]
    begin, attempt = 0.0, 1
    for number in range(5000):
        label = labels[number % 2] if number % 700 else labels[2 + number // 700 % 5]
        attempt += label == "restart"
        spans.append(report_time.Span(begin, begin + 1 + number % 7, label, attempt, number))
        begin = spans[-1].end
    drawn = report_time.condensed(spans, 200)
    assert len(drawn) < 300
    for some in (spans, drawn):
        assert all(a.end == pytest.approx(b.begin) for a, b in itertools.pairwise(some))
    sums = [Counter(), Counter()]
    for total, some in zip(sums, (spans, drawn), strict=True):
        for span in some:
            total[span.label, span.attempt] += span.seconds
    assert sums[0] == pytest.approx(sums[1])
    assert report_time.condensed(drawn, 300) == drawn


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835.5), ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500), ("NVIDIA GH200 480GB", 989.4),
    ],
)  # fmt: skip
def test_peaks_by_the_names_of_torch(name, bf16):
    assert peak_of(name).flops("bf16") == pytest.approx(bf16 * 1e12)
    assert peak_of(name).flops("fp32") < peak_of(name).bf16


def test_devices_without_a_peak():
    assert peak_of("x86_64") is None
    assert peak_of("NVIDIA GeForce RTX 3060") is None


def test_the_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("onetrain.launcher.report.report_html", lambda folder, now: f"of {folder.name}")
    (tmp_path / "config.yaml").write_text("name: night\n")
    assert write_report(tmp_path) == tmp_path / "report.html"
    place = tmp_path / "elsewhere" / "r.html"
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--output", str(place)])
    assert done.exit_code == 0, done.output
    assert f"saved: {place}" in done.output.replace("\n", "")
    assert place.read_text() == f"of {tmp_path.name}"

    def full(*arguments, **options):
        raise OSError(28, "no space left")

    monkeypatch.setattr("onetrain.cluster.atomic.os.replace", full)
    monkeypatch.setattr("onetrain.launcher.report.report_html", lambda folder, now: "other")
    with pytest.raises(OSError, match="no space"):
        write_report(tmp_path, place)
    assert place.read_text() == f"of {tmp_path.name}"
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_browser_draws_every_figure(nasty, tmp_path):
    plots = len(figures(body(nasty.read_text())))
    profile = [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", nasty.as_uri()]
    shown = subprocess.run([CHROMIUM, *SWITCHES, *profile], capture_output=True, text=True, timeout=120)
    assert [line for line in shown.stderr.splitlines() if "CONSOLE" in line] == []
    drawn = body(shown.stdout)
    assert plots == 9
    assert len(re.findall(r'class="[^"]*js-plotly-plot"', drawn)) == plots
    assert drawn.count('class="main-svg"') >= 2 * plots
    for part in ("attempt 3", "minutes since the start", "router entropy, share of the largest possible"):
        assert re.search(rf"<text[^>]*>{part}", drawn), part
    assert drawn.count('class="point"') > 20  # bars and markers
    assert "<title>night&lt;script&gt;" in shown.stdout  # the script in the title has not run
