"""The report: figures from a small run folder written by hand, and a page that needs nothing outside itself."""

import json
import os
import re
import signal
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from browser import Browser
from PIL import Image

from launch.command_line import cli
from launch.report.charts import BOTTOM, HEIGHT, TOP, line_chart, nice_ceiling, share_bars, short
from launch.report.collect import MAX_CURVE_POINTS, change_of_ar, collect, curve, shares_asked
from launch.report.page import render_page
from model.checkpoint.manifest import manifest_checksum


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def write_data(folder):
    packed = {
        "kind": "packed",
        "num_rows": 2,
        "sequence_length": 100,
        "tokens_by_source": {"s": 150, "t": 40},
        "num_tokens": 200,
    }
    write(folder / "packed" / "sft" / "a" / "000000.json", packed)
    write(folder / "packed" / "sft" / "a" / "dataset.json", {"kind": "packed_dataset", "sources": {"s": 150, "t": 40}})
    tokens = {
        "kind": "tokens",
        "num_documents": 3,
        "num_tokens": 50,
        "counts_by_class": {"text": 50},
        "quarantined": {"corrupt_image": 1},
    }
    write(folder / "tokens" / "48" / "a" / "000000.json", tokens)


def write_evaluations(folder):
    samples = [
        {
            "group": "text_to_image",
            "prompt": "a <red> circle",
            "prompt_images": ["samples/one.png"],
            "images": ["samples/one.png", "samples/lost.png"],
            "correct": True,
            "wanted_images": ["samples/one.png"],
            "reason": "<no> square",
        }
    ]
    tasks = {name: {"count": 200} for name in ("t2i_accuracy", "edit_accuracy")}
    tasks["real_video_reconstruction"] = {"count": 5}
    figures = {"t2i_accuracy": 0.9, "reconstruction_accuracy": 0.99, "next_state_accuracy": 0.8, "edit_accuracy": 0.7}
    final = {"metrics": figures, "tasks": tasks, "samples": samples, "seen": {"t2i_accuracy": {"accuracy": 0.95}}}
    final["baselines"] = {
        "t2i_accuracy": {"dictionary": {"accuracy": 0.75, "count": 200}},
        "next_state_accuracy": {"copy_of_the_last": {"accuracy": 0.0, "count": 200}},
    }
    write(folder / "evaluation" / "final.json", final)
    write(folder / "evaluation" / "from_scratch.json", {"metrics": {"t2i_accuracy": 0.25}, "seen": {"x": {}}})
    write(folder / "evaluation" / "untrained.json", {"metrics": {"t2i_accuracy": 0.05}})
    (folder / "evaluation" / "samples").mkdir()
    Image.new("RGB", (4, 4), "red").save(folder / "evaluation" / "samples" / "one.png")


@pytest.fixture
def run_folder(tmp_path):
    entries = {name: {"state": "done", "wall_seconds": 5.0, "peak_memory_bytes": 7} for name in ("pretrain_1", "sft")}
    write(
        tmp_path / "curriculum.json",
        {"name": "small", "wall_seconds": 10.0, "peak_memory_bytes": 7, "entries": entries},
    )
    tokenizer = {"psnr_db": 30.5, "codebook_use": 0.9, "loss_last": 0.1}
    tokenizer |= {"colliding_captions_2304": 0, "colliding_captions_2304_of": 40, "colliding_captions_2304_names": []}
    tokenizer |= {"colliding_captions_576": 1, "colliding_captions_576_of": 40}
    tokenizer |= {"colliding_captions_576_names": ["a red <circle> / a red square"]}
    write(tmp_path / "vision_tokenizer" / "summary.json", tokenizer)
    steps = [{"step": step, "loss": 1.0 / step, "loss_l1": 0.5, "psnr_db": 20.0 + step} for step in (1, 2)]
    write(tmp_path / "vision_tokenizer" / "metrics.jsonl", "".join(json.dumps(step) + "\n" for step in steps))
    for index, name in enumerate(("sft", "pretrain_1")):
        summary = {
            "name": name,
            "tensor": 1 + index,
            "pipeline": 1,
            "context": 1,
            "data": 1,
            "steps": 2,
            "tokens": 64,
            "loss_first": 4.0,
            "loss_last": 2.0,
            "wall_seconds": 5.0,
            "peak_memory_bytes": 7,
            "checkpoint": "x",
        }
        write(tmp_path / name / "summary.json", summary)
        lines = [
            {
                "step": step,
                "loss": 5.0 - step,
                "loss_text": 4.0,
                "loss_visual": None,
                "learning_rate": "damaged" if step == 2 else 1e-3,
                "held_out_loss": {"photos": {"all": 3.0 / step}},
                "tokens_by_source": {"s": 20, "t": 10, "b": 10},
            }
            for step in (1, 2)
        ]
        write(tmp_path / name / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        datasets = {
            "a": {"path": str(tmp_path / "packed" / "sft" / "a"), "weight": 1.0},
            "b": {"path": "q", "weight": 3.0},
            "left_out": {"path": "r", "weight": 0.0},
        }
        write(
            tmp_path / name / "config.yaml",
            yaml.safe_dump({"seed": 7, "machine": {"host": "n<1>"}, "stage": {"data": {"datasets": datasets}}}),
        )
    write_data(tmp_path)
    write_evaluations(tmp_path)
    return tmp_path


def test_shares_that_change_within_a_stage_are_asked_for_on_the_mean():
    data = {
        "datasets": {"a": {"weight": 1.0}, "b": {"weight": 3.0}, "c": {"weight": 0.0}},
        "weight_changes": {"late": {"from_step": 6, "weights": {"a": 0.0, "c": 1.0}}},
    }
    assert shares_asked(data, 6) == {"a": 0.25, "b": 0.75}
    assert shares_asked(data, 8) == pytest.approx({"a": 0.1875, "b": 0.75, "c": 0.0625})


def test_report_json_has_the_figures_and_keys(run_folder, capsys):
    assert cli.main(["report", f"run_folder={run_folder}", "json=true"]) == 0
    answer = json.loads(capsys.readouterr().out)
    report = json.loads((run_folder / "report.json").read_text())
    assert report == answer
    assert report["wall_seconds"] == 10.0
    assert report["tokenizer"] == {
        "psnr_db": 30.5,
        "codebook_use": 0.9,
        "colliding_captions": {
            "576": {"pairs": 1, "captions": 40, "names": ["a red <circle> / a red square"]},
            "2304": {"pairs": 0, "captions": 40, "names": []},
        },
    }
    assert report["tokenizer_curves"] == {
        "loss": {"all": [[1.0, 1.0], [2.0, 0.5]], "l1": [[1.0, 0.5], [2.0, 0.5]]},
        "psnr db": {"all": [[1.0, 21.0], [2.0, 22.0]]},
    }
    assert report["packing"]["fill"] == pytest.approx(190 / 200)
    assert [stage["name"] for stage in report["stages"]] == ["pretrain_1", "sft"]
    wanted = {
        "name",
        "tensor",
        "pipeline",
        "context",
        "data",
        "steps",
        "tokens",
        "loss_first",
        "loss_last",
        "wall_seconds",
    }
    assert wanted <= set(report["stages"][0])
    assert report["metrics"] == {
        "reconstruction_accuracy": 0.99,
        "t2i_accuracy_untrained": 0.05,
        "t2i_accuracy": 0.9,
        "next_state_accuracy": 0.8,
        "edit_accuracy": 0.7,
        "num_prompts": 200,
        "baselines": {
            "t2i_accuracy": {"dictionary": 0.75, "from_scratch": 0.25, "untrained": 0.05},
            "next_state_accuracy": {"copy_of_the_last": 0.0},
        },
        "seen_accuracy": {"t2i_accuracy": 0.95},
    }
    page = (run_folder / "report.html").read_text()
    assert page.count('<div class="wanted" title="wanted"><img') == 1
    assert "<b>&lt;no&gt; square</b>" in page
    row = (
        "<tr><td>text to image</td><td>90.0%</td><td>95.0%</td><td>75.0%</td><td>25.0%</td><td>5.0%</td><td>-</td></tr>"
    )
    assert '<td data-title="seen in training">95.0%</td>' in page
    assert row in without_titles(page)
    assert "<td>576 pixels</td><td>1</td><td>40</td><td>a red &lt;circle&gt; / a red square</td>" in without_titles(
        page
    )
    assert report["tokens"][0]["quarantined"] == {"corrupt_image": 1}


def test_mixture_and_curves_come_from_the_metrics(run_folder):
    stage = collect(run_folder)["stages"][0]
    assert stage["held_out"] == {"photos": {"all": [(1.0, 3.0), (2.0, 1.5)]}}
    assert stage["figures"] == {"learning_rate": [(1.0, 1e-3)]}
    assert stage["mixture"] == [
        {"source": "s", "tokens": 40, "share": 0.5, "weight": pytest.approx(0.25 * 150 / 190)},
        {"source": "t", "tokens": 20, "share": 0.25, "weight": pytest.approx(0.25 * 40 / 190)},
        {"source": "b", "tokens": 20, "share": 0.25, "weight": 0.75},
    ]
    assert (stage["run"]["seed"], stage["run"]["machine"], stage["run"]["versions"]) == (7, {"host": "n<1>"}, {})
    assert stage["run"]["files"] == ["pretrain_1/config.yaml", "pretrain_1/metrics.jsonl"]
    page = render_page(collect(run_folder), run_folder)
    assert "host n&lt;1&gt;" in page
    assert '<a href="pretrain_1/metrics.jsonl">' in page
    assert stage["curves"] == {"all": [(1.0, 4.0), (2.0, 3.0)], "text": [(1.0, 4.0), (2.0, 4.0)]}


def write_checkpoint_that_read(stage_folder: Path, record: object) -> None:
    manifest = {"format_version": 1, "keys": {}, "files": {}, "consumed_samples": 8, "data_read": record}
    write(
        stage_folder / "checkpoints" / "step_00000002" / "manifest.json",
        manifest | {"manifest_crc32": manifest_checksum(manifest)},
    )


def test_the_report_says_how_much_of_each_dataset_was_read(run_folder):
    a = {"fingerprint": "of a", "num_rows": 4, "stream": "0/sft/a", "first": 0, "share": 1}
    write_checkpoint_that_read(run_folder / "sft", {"datasets": {"a": a}, "before": {}})
    by_name = {stage["name"]: stage["data_read"] for stage in collect(run_folder)["stages"]}
    assert by_name == {"sft": {"a": {"num_rows": 4, "rows_read": 8, "epochs": 2.0}}, "pretrain_1": {}}
    cli.main(["report", f"run_folder={run_folder}"])
    page = without_titles((run_folder / "report.html").read_text())
    assert "<td>sft</td><td>a</td><td>4</td><td>8</td><td>2.00 </td>" in page
    write_checkpoint_that_read(run_folder / "sft", {"datasets": {"a": {}}})
    report = collect(run_folder)
    assert report["stages"][1]["data_read"] == {}
    assert any(line.startswith(str(run_folder / "sft")) for line in report["damaged"])


def without_titles(page: str) -> str:
    return re.sub(r' data-title="[^"]*"', "", page)


CUT_OFF = """[...document.querySelectorAll('main *')].filter((element) => {
    const box = element.getBoundingClientRect(), line = element.closest('svg') || document.documentElement
    const outer = line.getBoundingClientRect()
    return box.width && (box.left < outer.left - 1 || box.right > outer.right + 1)
}).map((element) => element.tagName + ' ' + element.textContent.slice(0, 40))"""


@pytest.mark.parametrize("width", [420, 1280])
def test_nothing_is_cut_off_on_a_narrow_page(run_folder, tmp_path_factory, width):
    shown = json.loads((run_folder / "sft/summary.json").read_text())
    write(
        run_folder / "sft" / "summary.json", shown | {"colliding_captions_576_names": ["a red circle on the left " * 8]}
    )
    lines = [json.dumps({"step": step, "loss": -5e-8 * step, "learning_rate": 0.0625}) for step in (1, 99_999)]
    write(run_folder / "sft" / "metrics.jsonl", "\n".join(lines))
    cli.main(["report", f"run_folder={run_folder}"])
    browser = Browser(tmp_path_factory.mktemp("browser"))
    try:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.ask("Emulation.setDeviceMetricsOverride", **size)
        browser.open((run_folder / "report.html").as_uri())
        assert browser.run("innerWidth") == width
        assert browser.run(CUT_OFF) == []
    finally:
        browser.close()


class Outside(HTMLParser):
    """Collects what a page would load from elsewhere, and counts open tags."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.names: list[str] = []  # of attributes

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.names += [name for name, _ in attributes]
        self.references += [value for name, value in attributes if name in ("src", "href") and value]


def test_the_page_is_self_contained_and_escapes_prompts(run_folder):
    cli.main(["report", f"run_folder={run_folder}"])
    text = (run_folder / "report.html").read_text()
    page = Outside()
    page.feed(text)
    loaded = [reference for reference in page.references if reference.startswith("data:")]
    assert len(loaded) == 3  # given, made, wanted
    assert "lost.png is missing" in text
    assert all(reference.startswith("data:image/png;base64,") for reference in loaded)
    assert all((run_folder / reference).exists() for reference in page.references if reference not in loaded)
    assert "script" not in page.tags
    assert (
        page.tags.count("svg") == 10
    )  # loss, held-out loss, rate and mixture for each of two stages; two of the tokenizer
    assert "a &lt;red&gt; circle" in text
    assert not re.search(r"url\(|@import", text)


def test_names_of_files_and_data_are_text_in_the_page(run_folder):
    """Whatever a run's files call things: no tag, no attribute, no end of one comes of it."""
    hostile = """"><script>alert(1)</script><img src=x onerror='x' \x1b]0;x\x07"""
    for name in ("curriculum.json", "sft/summary.json", "evaluation/final.json", "packed/sft/a/000000.json"):
        values = json.loads((run_folder / name).read_text())
        write(run_folder / name, poisoned(values, hostile))
    lines = [json.dumps({"step": 1, "loss": 1.0, "tokens_by_source": {hostile: 3}})]
    write(run_folder / "sft" / "metrics.jsonl", "\n".join(lines))
    write(run_folder / hostile.replace("/", "") / "summary.json", "{")
    cli.main(["report", f"run_folder={run_folder}"])
    text = (run_folder / "report.html").read_text()
    page = Outside()
    page.feed(text)
    assert "script" not in page.tags
    assert "onerror" not in page.names
    assert text.count("&lt;script&gt;") >= 5


def poisoned(values, hostile):
    """All texts but those by which the report finds things."""
    if isinstance(values, dict):
        kept = ("kind", "state", "name", "format")
        return {
            key: value if key in kept and key != "name" else poisoned(value, hostile) for key, value in values.items()
        }
    if isinstance(values, list):
        return [poisoned(value, hostile) for value in values]
    return values + hostile if isinstance(values, str) else values


def test_a_run_that_has_only_begun_gives_a_report_too(tmp_path, capsys):
    assert cli.main(["report", f"run_folder={tmp_path}"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["metrics"]["t2i_accuracy"] is None
    assert report["packing"]["fill"] is None
    assert "<h1>" in (tmp_path / "report.html").read_text()


def test_a_pipe_in_place_of_a_file_is_not_waited_on(run_folder):
    names = ("curriculum.json", "sft/summary.json", "pretrain_1/metrics.jsonl", "pretrain_1/config.yaml")
    names += ("evaluation/final.json", "packed/sft/a/000000.json")
    for name in names:
        (run_folder / name).unlink()
        os.mkfifo(run_folder / name)
    signal.alarm(30)  # ends the tests where one is
    try:
        report = collect(run_folder)
    finally:
        signal.alarm(0)
    assert [stage["name"] for stage in report["stages"]] == ["pretrain_1"]
    assert len(report["damaged"]) >= 4


DAMAGES = (b"", b'{"loss_last": 2', b"[1, 2]", b"\xff\xfe\x00", b'{"loss_last": "low", "kind": "packed"}')


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name",
    [
        "curriculum.json",
        "sft/summary.json",
        "sft/metrics.jsonl",
        "vision_tokenizer/summary.json",
        "evaluation/final.json",
        "packed/sft/a/000000.json",
        "packed/sft/a/dataset.json",
        "tokens/48/a/000000.json",
    ],
)
def test_a_damaged_file_is_told_and_the_rest_is_reported(run_folder, capsys, name, damage):
    (run_folder / name).write_bytes(damage)
    assert cli.main(["report", f"run_folder={run_folder}"]) == 0
    told = capsys.readouterr().err
    report = json.loads((run_folder / "report.json").read_text())
    assert "pretrain_1" in [stage["name"] for stage in report["stages"]]
    assert [name in line for line in report["damaged"]] in ([True], [])
    # Valid JSON that only lacks what a part would say is no damage, nor is an empty log.
    if damage not in (DAMAGES[4], b""):
        assert name in told or name == "sft/metrics.jsonl"
        assert report["damaged"] or name == "sft/metrics.jsonl"
    assert ("Could not be read" in (run_folder / "report.html").read_text()) == bool(report["damaged"])


def test_damaged_lines_of_a_log_are_counted_and_left_out(run_folder, capsys):
    path = run_folder / "sft" / "metrics.jsonl"
    good = path.read_bytes()
    bad = b'{"step": 3, "loss"\n[3]\n{"loss": 1.0}\n{"step": 4, "loss": "low"}\n'
    path.write_bytes(good[: good.index(b"\n") + 1] + bad + good[good.index(b"\n") + 1 :] + b'{"step": 5, "lo')
    assert cli.main(["report", f"run_folder={run_folder}"]) == 0
    assert f"{path}: 4 of 6 lines are damaged and left out" in capsys.readouterr().err
    (stage,) = [stage for stage in collect(run_folder)["stages"] if stage["name"] == "sft"]
    assert stage["curves"]["all"] == [(1.0, 4.0), (2.0, 3.0)]


def test_tasks_of_another_world_are_shown(tmp_path):
    tasks = {"chess_accuracy": {"count": 30}, "go_accuracy": {"count": 20}}
    write(tmp_path / "evaluation" / "a.json", {"metrics": {"chess_accuracy": 0.25, "go_accuracy": 0.5}, "tasks": tasks})
    write(tmp_path / "evaluation" / "untrained.json", {"metrics": {"go_accuracy": 0.125}})
    assert cli.main(["report", f"run_folder={tmp_path}"]) == 0
    metrics = json.loads((tmp_path / "report.json").read_text())["metrics"]
    known = {"chess_accuracy": 0.25, "go_accuracy": 0.5, "go_accuracy_untrained": 0.125, "num_prompts": 20}
    assert {name: value for name, value in metrics.items() if isinstance(value, int | float)} == known
    page = (tmp_path / "report.html").read_text()
    for part in ("chess accuracy", "25.0%", "go accuracy untrained", "12.5%", "20 held-out prompts"):
        assert part in page
    assert "next state" not in page


def test_long_curves_are_averaged_over_equal_windows():
    lines = [{"step": step, "loss": float(step)} for step in range(1, 1001)]
    points = curve(lines, "loss")
    assert len(points) == MAX_CURVE_POINTS
    assert points[0] == (5.0, 3.0)
    assert points[-1] == (1000.0, 998.0)


def test_charts_place_points_inside_the_picture():
    svg = line_chart({"text": [(0.0, 0.0), (10.0, 2.0)]}, x_label="step", y_label="loss")
    (points,) = re.findall(r'points="([^"]+)"', svg)
    (x0, y0), (x1, y1) = (tuple(map(float, point.split(","))) for point in points.split())
    assert x0 < x1
    assert y1 < y0  # upwards is a smaller y
    for values in ([-3.0, 1.0], [-2.0, -0.5], [0.0, 0.0]):
        lowered = line_chart({"text": list(enumerate(values))}, x_label="step", y_label="loss")
        (points,) = re.findall(r'points="([^"]+)"', lowered)
        assert all(TOP <= float(point.split(",")[1]) <= HEIGHT - BOTTOM for point in points.split()), values
    assert "nothing recorded" in line_chart({}, x_label="", y_label="")
    values = (0.0, 0.000625, 0.25, 7500.0, 75_000.0, 3.2e6, 1.5e9, 50.5)
    assert list(map(short, values)) == ["0", "6.3e-4", "0.25", "7500", "75k", "3.2M", "1.5G", "50.5"]
    assert [nice_ceiling(value) for value in (0.03, 1.0, 2.2, 6.0, 0.0)] == [0.05, 1.0, 2.5, 10.0, 1.0]
    assert share_bars([("a", 0.5, 0.25)]).count("<rect") == 1


def test_a_change_of_token_by_token_decoding_is_told_of_the_same_prompts_only():
    ar = {"accuracies": {"t2i_accuracy": 0.9, "own": 1.0}, "num_prompts": {"t2i_accuracy": 200, "own": 200}}
    final = {
        "metrics": {"t2i_accuracy": 0.95, "own": 0.5},
        "tasks": {"t2i_accuracy": {"count": 100}, "own": {"count": 200}},
    }
    assert change_of_ar(ar, final) == {"own": 0.5}


def test_parallel_decoding_is_reported_beside_token_by_token(tmp_path):
    by_steps = {steps: {"joint": joint, "entropy_ratio": 1.01} for steps, joint in (("1", 0.2), ("6", 0.79))}
    walked = {"accuracy_by_step": [1.0, 0.5], "strips": ["samples/dida/strip.png"]}
    ar = {"joint": 0.8, "num_forwards": 48, "seconds": 0.3, "accuracies": {"t2i_accuracy": 0.9, "own": 1.0}}
    dida = {"num_forwards": 12, "seconds": 0.1, "accuracies": {"t2i_accuracy": 0.85}, "by_steps": by_steps}
    dida["difference_from_ar"] = {"t2i_accuracy": {"mean": -0.05, "interval": [-0.06, -0.04]}}
    dida |= {"rollout": walked, "refinement": ["samples/dida/refined_0.png"]}
    by_steps["6"]["accuracies"] = {"t2i_accuracy": 0.85}
    dida["num_prompts"] = by_steps["6"]["num_prompts"] = {"t2i_accuracy": 1000}
    by_steps["1"]["num_prompts"] = {"t2i_accuracy": 250}
    write(tmp_path / "evaluation" / "final.json", {"metrics": {"t2i_accuracy": 0.95}})
    write(tmp_path / "evaluation" / "dida.json", {"dida_steps": 6, "decoders": {"ar": ar, "dida": dida}, "metrics": {}})
    write(tmp_path / "curriculum.json", {"entries": {"dida": {"state": "done", "wall_seconds": 200.0}}})
    assert cli.main(["report", f"run_folder={tmp_path}"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    found = report["dida"]
    assert report["rollout"]["accuracy_by_step"] == [1.0, 0.5]
    assert found["joint_ar"] == 0.8
    assert found["joint_by_steps"] == {"1": 0.2, "6": 0.79}
    assert found["entropy_ratio_by_steps"] == {"1": 1.01, "6": 1.01}
    assert found["accuracies_by_steps"] == {"1": {}, "6": {"t2i_accuracy": 0.85}}
    assert found["chosen_steps"] == 6
    assert found["forwards_ratio"] == 4.0
    assert found["wall_ratio_batch1"] == pytest.approx(3.0)
    assert found["ar_after_minus_before"] == {"t2i_accuracy": pytest.approx(-0.05)}
    assert found["wall_seconds"] == 200.0
    page = (tmp_path / "report.html").read_text()
    assert "Images in parallel" in page
    assert "<td>6</td><td>-</td><td>85.0%</td><td>79.0%</td>" in without_titles(page)
    assert "<td>1 (accuracies of 250 prompts)</td>" in without_titles(page)
    assert "<td>dida</td><td>-</td><td>85.0% (-5.0%, -6.0% to -4.0%)</td>" in without_titles(page)
    assert "refined_0.png is missing" in page
    assert "World rollout" in page
