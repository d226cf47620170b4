"""Pictures: what is drawn are the numbers of metrics.jsonl and of the reports; whatever else lies there is named."""

import importlib.util
import json
import os
import pickle
import shutil
import sys

import pytest

from conftest import contents
from nanopost.tools import evaluate, plot
from nanopost.tools.plot import PANELS, draw_kl, draw_method, read_report, read_run, series, trajectories

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib: pip install matplotlib"
)
SCRIPTS = ["sft", "rm", "dpo", "ppo"]
HEADER = b'{"method": "sft", "arguments": {}}\n'


@pytest.fixture(scope="module")
def runs(workshop, tmp_path_factory):
    """{method: the folder of a run of it}"""
    folder = tmp_path_factory.mktemp("runs")
    return {script: workshop.run(script, folder / f"my-{script}", steps=4) for script in SCRIPTS}


@pytest.fixture
def steps(metrics):
    """steps(folder): the lines of metrics.jsonl after the first one."""
    return lambda folder: [line for line in metrics(folder) if "step" in line]


def row(stage, kl, gold=None, reward=None):
    return {"stage": stage, "kl": kl} | {name: x for name, x in (("gold", gold), ("reward", reward)) if x is not None}


ROWS = [
    row("ppo/step-10", 3.0, 2.0, 3.0),
    row("ppo", 5.0, 1.0, 4.0),
    row("sft", 0.0, 0.5, 0.1),
    row("ppo/step-5", 2.0, 3.0, 2.0),
    row("dpo", 1.0, 2.5, 1.5),
]


def drawn(ax) -> list:
    """[(style, xs, ys)] of the lines of a panel."""
    return [(line.get_linestyle(), list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines]


def write_report(path, rows=ROWS):
    path.write_text(json.dumps({"rows": rows, "gold_max": None}))
    return str(path)


# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_is_its_method_and_its_logged_steps(runs, script, steps):
    assert read_run(str(runs[script])) == (script, steps(runs[script]))
    assert len(steps(runs[script])) >= 4


@pytest.mark.parametrize("lines", [0, 1, 2, 3])
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unfinished_run_is_read_up_to_its_last_whole_line(runs, script, lines, tmp_path, steps):
    header, *logged = (runs[script] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join([header, *logged[:lines]]) + logged[lines][:25])  # it died here
    assert read_run(str(tmp_path)) == (script, steps(runs[script])[:lines])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_without_held_out_data_is_read_too(workshop, script, tmp_path):
    out = workshop.run(script, tmp_path / "out", steps=1, valid="")
    method, lines = read_run(str(out))
    assert method == script and [line["step"] for line in lines] == [1]


@pytest.mark.parametrize("broken", [b'{"step": 1, "lo\n', b"[1]\n", b'"step"\n', b"3\n", b'{"step": 1, "\xff": 2}\n'])
def test_a_broken_line_is_told_with_its_file_and_number(command, tmp_path, broken):
    (tmp_path / "metrics.jsonl").write_bytes(HEADER + broken + b'{"step": 2, "loss": 1}\n')
    code, out, err = command("nanopost/__main__.py", "plot", tmp_path, "--out", tmp_path / "plots")
    assert (
        (code, out) == (2, "") and err.startswith(f"error: {tmp_path / 'metrics.jsonl'}:2: ") and err.count("\n") == 1
    )
    assert not (tmp_path / "plots").exists()


def test_a_folder_without_metrics_is_no_run(tmp_path):
    assert read_run(str(tmp_path)) is None
    for text in ("", '{"step": 1, "something": 2}\n', '{"method": "a fork of ppo"}\n{"step": 1}\n', '{"method": "sft"'):
        (tmp_path / "metrics.jsonl").write_text(text)
        assert read_run(str(tmp_path)) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "{}",
        '{"rows": 3}',
        '{"rows": [1]}',
        '{"rows": ["stage kl"]}',
        '{"rows": []}',
        '{"rows": [{"stage": "a"}]}',
        '{"rows": [{"stage": "a", "kl": 1}]}',
    ],
)
def test_a_file_without_rewards_and_kl_is_no_report(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    assert read_report(str(tmp_path / "x.json")) is None


def test_a_report_is_read_as_evaluate_writes_it(workshop, tmp_path):
    evaluate.main(
        evaluate.Config(
            [workshop.path("sft"), workshop.path("base")],
            workshop.path("sft"),
            max_new_tokens=8,
            reward=workshop.path("rm"),
            prompts=workshop.path("prompts_valid.jsonl"),
            device="cpu",
            json=str(tmp_path / "report.json"),
        )
    )
    rows = read_report(str(tmp_path / "report.json"))
    assert rows == json.loads((tmp_path / "report.json").read_text())["rows"] and len(rows) == 2
    assert list(trajectories(rows).items()) == [("sft", rows[:1]), ("base", rows[1:])]


def test_a_series_are_the_steps_that_have_the_metric():
    lines = [{"step": 0, "eval/a": 1.0}, {"step": 5, "a": 2.0}, {"step": 10, "a": None}, {"step": 15, "a": 0.0}]
    assert series(lines, "a") == ([5, 15], [2.0, 0.0])  # null is no number, 0 is one
    assert series(lines, "eval/a") == ([0], [1.0]) and series(lines, "") == ([], [])


# --------------------------------------------------------------------------------------------------- trajectories


def test_kept_copies_come_in_the_order_of_training_from_the_reference_to_the_end():
    ppo_10, ppo, sft, ppo_5, dpo = ROWS
    assert trajectories(ROWS) == {"ppo": [sft, ppo_5, ppo_10, ppo], "sft": [sft], "dpo": [dpo]}


def test_steps_are_ordered_as_numbers():
    rows = [row(f"ppo/step-{n}", 1.0 + n, 0.0) for n in (100, 5, 10, 20, 9)]
    assert [r["stage"] for r in trajectories(rows)["ppo"]] == [f"ppo/step-{n}" for n in (5, 9, 10, 20, 100)]


def test_the_reference_starts_no_line_to_itself():
    rows = [row("sft/step-5", 2.0, 1.0), row("sft", 0.0, 2.0), row("ppo/step-5", 1.0, 3.0), row("ppo", 2.0, 3.0)]
    assert trajectories(rows) == {"sft": rows[:2], "ppo": [rows[1], *rows[2:]]}


def test_without_the_reference_in_the_report_nothing_is_made_up():
    rows = [row("ppo/step-5", 1.0, 3.0), row("ppo", 1e-9, 3.0)]
    assert trajectories(rows) == {"ppo": rows}


def test_each_temperature_has_its_own_line_from_the_reference_of_that_temperature():
    def at_half(stage, *values):
        return row(f"{stage}@0.5", *values) | {"temperature": 0.5}

    plain = [row("sft", 0.0, 1.0), row("ppo/step-5", 1.0, 2.0), row("ppo", 2.0, 3.0)]
    half = [at_half("sft", 0.5, 1.0), at_half("ppo/step-5", 1.5, 2.0), at_half("ppo", 2.5, 3.0)]
    lines = trajectories([row for both in zip(half, plain) for row in both])
    assert lines == {"sft@0.5": half[:1], "sft": plain[:1], "ppo@0.5": half, "ppo": plain}


def test_rows_without_a_kl_are_not_in_the_picture(tmp_path):
    greedy = {"stage": "sft@0", "temperature": 0.0, "gold": 4.0}
    best = {"stage": "sft best of 4", "temperature": 1.0, "gold": 3.0, "kl_bound": 0.6}
    assert read_report(write_report(tmp_path / "x.json", [greedy, *ROWS, best])) == ROWS


def test_a_folder_called_step_something_is_no_kept_copy():
    assert list(trajectories([row("ppo/step-final", 1.0, 2.0)])) == ["ppo"]


# -------------------------------------------------------------------------------------------------------- drawing


@needs_matplotlib
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_lines_of_a_picture_are_the_numbers_of_the_log(runs, script, steps):
    lines = steps(runs[script])
    axes = draw_method(script, {"one": lines, "two": lines[:-2]}).axes
    assert len(axes) == len(PANELS[script])
    for ax, (title, training, held_out) in zip(axes, PANELS[script]):
        expected = [
            (style, *series(part, name))
            for part in (lines, lines[:-2])
            for name, style in ((training, "-"), (held_out, "--"))
            if series(part, name)[0]
        ]
        assert drawn(ax) == expected and ax.get_title() == title
        assert expected, f"{script} logs nothing that is called {training or held_out}"
        for name in (training, held_out):  # a name that no script logs would be an empty panel forever
            assert not name or any(name in line for line in lines)
        both = bool(training) + bool(held_out)
        assert [line.get_color() for line in ax.lines] == ["C0"] * both + ["C1"] * both


@needs_matplotlib
def test_training_is_solid_and_held_out_is_dashed_in_every_panel():
    for panels in PANELS.values():
        for _, training, held_out in panels:
            assert not training.startswith("eval/") and held_out.startswith("eval/") == bool(held_out)
            assert not (training and held_out) or training.split("/")[-1] == held_out.split("/")[-1]
    assert legend_of(draw_method("sft", {"a": [], "b": []})) == ["a", "b", "training", "held out"]


def legend_of(figure) -> list[str]:
    [legend] = figure.legends
    return [text.get_text() for text in legend.get_texts()]


@needs_matplotlib
def test_a_single_number_is_seen_as_a_point():
    axes = draw_method("sft", {"run": [{"step": 3, "loss": 1.5}]}).axes
    assert [line.get_marker() for line in axes[0].lines if len(line.get_xdata())] == ["o"]


@needs_matplotlib
def test_rewards_are_drawn_against_kl_solid_for_gold_and_dashed_for_the_score():
    figure = draw_kl(ROWS)
    [ax] = figure.axes
    assert drawn(ax) == [
        ("-", [0.0, 2.0, 3.0, 5.0], [0.5, 3.0, 2.0, 1.0]),
        ("--", [0.0, 2.0, 3.0, 5.0], [0.1, 2.0, 3.0, 4.0]),
        ("-", [0.0], [0.5]),
        ("--", [0.0], [0.1]),
        ("-", [1.0], [2.5]),
        ("--", [1.0], [1.5]),
    ]
    assert [line.get_color() for line in ax.lines] == ["C0", "C0", "C1", "C1", "C2", "C2"]
    assert legend_of(figure) == ["ppo", "sft", "dpo", "gold reward", "reward model's score"]
    to_axis = ax.xaxis.get_transform().transform
    assert to_axis([0.0, 4.0, 9.0]).tolist() == pytest.approx([0, 2, 3])


@needs_matplotlib
def test_a_report_without_gold_reward_shows_the_score_and_names_its_runs():
    figure = draw_kl([row("sft", 0.0, reward=0.1), row("ppo", 5.0, reward=4.0)])
    assert drawn(figure.axes[0]) == [("--", [0.0], [0.1]), ("--", [5.0], [4.0])]
    assert legend_of(figure)[:2] == ["sft", "ppo"]


@needs_matplotlib
def test_a_kl_that_was_estimated_below_0_is_drawn_at_0():
    [ax] = draw_kl([row("a", -0.01, 1.0)]).axes
    assert ax.xaxis.get_transform().transform(ax.lines[0].get_xdata()).tolist() == [0.0]
    assert ax.get_xlim()[0] == 0.0


# --------------------------------------------------------------------------------------------------- the command


@needs_matplotlib
def test_there_is_a_picture_for_each_method_and_each_report(runs, tmp_path, command):
    for name in ("kl", "report"):
        write_report(tmp_path / f"{name}.json")
    (tmp_path / "samples.jsonl").write_text("{}\n")
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    entries = [*runs.values(), *sorted(tmp_path.iterdir())]
    code, out, err = command("nanopost/__main__.py", "plot", *entries, "--out", tmp_path / "a" / "b")
    assert (code, err) == (0, "")
    names = [*SCRIPTS, "kl", "report"]
    assert sorted(p.stem for p in (tmp_path / "a" / "b").iterdir()) == sorted(names)
    for name in names:
        assert (tmp_path / "a" / "b" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"wrote {tmp_path / 'a' / 'b' / name}.png" in out
    skipped = [line for line in out.splitlines() if not line.startswith("wrote ")]
    assert skipped == [f"skipped {tmp_path / name}" for name in ("empty", "other.json", "samples.jsonl")]


@needs_matplotlib
@pytest.mark.slow
def test_the_same_numbers_are_the_same_bytes(runs, tmp_path):
    for out in ("a", "b"):
        plot.main(plot.Config([str(runs["ppo"]), write_report(tmp_path / "kl.json")], str(tmp_path / out)))
    for name in ("ppo.png", "kl.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.fixture
def figures(monkeypatch, tmp_path):
    """figures(entries) -> {name of a picture: what is drawn in it}."""

    def figures(*entries):

        class Figure:
            def __init__(self, what):
                self.what = what

            def savefig(self, f, **_):
                f.write(pickle.dumps(self.what))

        monkeypatch.setattr(plot, "draw_method", lambda method, runs: Figure(runs))
        monkeypatch.setattr(plot, "draw_kl", Figure)
        plot.main(plot.Config(list(map(str, entries)), str(tmp_path / "plots")))
        return {path.stem: pickle.loads(path.read_bytes()) for path in (tmp_path / "plots").iterdir()}

    return figures


def test_several_runs_of_a_method_are_in_one_picture_under_the_names_of_their_folders(runs, figures, tmp_path, steps):
    other = shutil.copytree(runs["dpo"], tmp_path / "other")
    assert figures(f"{runs['dpo']}/", other, runs["rm"]) == {
        "dpo": {"my-dpo": steps(runs["dpo"]), "other": steps(other)},
        "rm": {"my-rm": steps(runs["rm"])},
    }


def test_runs_and_reports_of_the_same_name_do_not_hide_each_other(runs, figures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        shutil.copytree(runs["sft"], tmp_path / folder / "sft")
        for name in ("sft.json", "kl.json"):
            write_report(tmp_path / folder / name, [row(folder, 1.0, 2.0)])
    drawings = figures("a/sft", "b/sft", "a/sft.json", "b/sft.json", "a/kl.json", "b/kl.json")
    assert list(drawings["sft"]) == ["sft", "b-sft"]
    assert drawings.keys() == {"sft", "a-sft", "b-sft", "kl", "b-kl"}
    assert drawings["kl"] == [row("a", 1.0, 2.0)] and drawings["b-kl"] == [row("b", 1.0, 2.0)]


def test_each_report_has_a_picture_of_its_own_since_each_has_its_own_reference(figures, tmp_path):
    one = write_report(tmp_path / "one.json", [row("sft", 0.0, 1.0)])
    two = write_report(tmp_path / "two.json", [row("sft", 4.0, 1.0)])
    assert figures(one, two) == {"one": [row("sft", 0.0, 1.0)], "two": [row("sft", 4.0, 1.0)]}


def test_what_cannot_be_drawn_is_told_in_one_line(command, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for entries, message in (
        ([tmp_path / "notes.txt", tmp_path], "nothing to draw: give folders"),
        ([tmp_path / "nowhere"], f"No such file or directory: {tmp_path / 'nowhere'}"),
    ):
        code, out, err = command("nanopost/__main__.py", "plot", *entries, "--out", tmp_path / "plots")
        assert code == 2 and err.startswith(f"error: {message}") and len(err.splitlines()) == 1
        assert "wrote" not in out and not (tmp_path / "plots").exists()


@pytest.mark.parametrize("value", ['"high"', "NaN", "Infinity", "1e400", "9" * 400, "[1]", "{}"])
def test_what_is_no_number_is_told_with_its_place(tool, tmp_path, value):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(HEADER.decode() + f'{{"step": 1, "loss": {value}}}\n')
    (tmp_path / "kl.json").write_text(f'{{"rows": [{{"stage": "sft", "kl": 1.0, "gold": {value}}}]}}')
    for entry, where in ((run, "metrics.jsonl:2: loss"), (tmp_path / "kl.json", "kl.json: sft: gold")):
        code, out, err = tool("plot", entry, "--out", tmp_path / "plots")
        assert (code, out, err.count("\n")) == (2, "", 1) and f"{where} must be a finite number, not " in err
    assert not (tmp_path / "plots").exists()


@needs_matplotlib
def test_a_name_is_text_and_no_mathematics(tool, tmp_path):
    report = write_report(tmp_path / "kl.json", [row(r"$\frac$ \x1b[2J", 1.0, 2.0)])
    assert tool("plot", report, "--out", tmp_path / "plots")[0] == 0


@needs_matplotlib
def test_a_picture_that_cannot_be_written_leaves_the_one_before(tool, tmp_path, monkeypatch):
    report = write_report(tmp_path / "kl.json")
    assert tool("plot", report, "--out", tmp_path / "plots")[0] == 0
    before = contents(tmp_path / "plots")

    def fail(figure, f, **_):
        f.write(b"half")
        raise OSError(28, "No space left on device", f.name)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    code, _, err = tool("plot", write_report(tmp_path / "kl.json", ROWS[:1]), "--out", tmp_path / "plots")
    assert code == 2 and "No space left on device" in err and contents(tmp_path / "plots") == before


def test_a_pipe_is_skipped_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    assert read_report(str(tmp_path / "pipe.json")) is None


def test_without_matplotlib_it_says_what_to_install(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = command(
        "nanopost/__main__.py", "plot", write_report(tmp_path / "kl.json"), "--out", tmp_path / "plots"
    )
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert err.startswith('error: plots need matplotlib: pip install matplotlib (or "nanopost[plot]")')
    assert not (tmp_path / "plots").exists()
