"""`make results`: what has run is kept until something changes, and its outcome becomes tables and named numbers."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from docs import measure, quotes, results, runs, tables
from nanopost.config import UserError

SOURCE = '''"""Adds."""

def add(a, b):
    """The sum."""
    return a + b  # both
'''


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with one source file, code.py."""
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    (tmp_path / "code.py").write_text(SOURCE)
    return tmp_path


def step(script="echo ran >> $OUT/ran", name="a", **environment):
    return runs.Step(name, script, ["*.py"], environment)


@pytest.mark.parametrize(
    "right, wrong, same",
    [
        ('"""Adds."""', '"""Adds numbers."""', True),
        ('    """The sum."""\n', "", True),
        ("  # both", "", True),
        ("a + b", "(a\n        + b)", True),
        ("a + b", "a - b", False),
        ("(a, b)", "(a, b=0)", False),
    ],
)
def test_comments_docstrings_and_layout_of_the_code_do_not_count(right, wrong, same, project):
    before = runs.fingerprint(step())
    assert right in SOURCE
    (project / "code.py").write_text(SOURCE.replace(right, wrong))
    assert (runs.fingerprint(step()) == before) == same


def test_the_commands_and_what_they_start_from_count(project):
    assert len({runs.fingerprint(step()), runs.fingerprint(step("true")), runs.fingerprint(step(), "other start")}) == 3
    assert runs.fingerprint(step("# why\ntrue")) == runs.fingerprint(step("true"))


def test_a_step_runs_once_and_again_when_the_code_has_changed(project, capsys):
    out = project / "out"
    out.mkdir()
    for expected in (1, 1):
        stamp = runs.run_step(step(OUT=str(out)), out, "")
        assert (out / "ran").read_text().count("ran") == expected and stamp["cpu_seconds"] < 10
    assert "a: kept" in capsys.readouterr().out
    (out / "a" / "left").write_text("from the run before")
    (project / "code.py").write_text("x = 1\n")
    runs.run_step(step(OUT=str(out)), out, "")
    assert (out / "ran").read_text().count("ran") == 2 and not (out / "a" / "left").exists()


@pytest.mark.parametrize("script", ["echo nonsense; false; echo on", "echo nonsense; false | cat"])
def test_a_step_that_fails_says_why_and_is_not_kept(script, project):
    for _ in range(2):
        with pytest.raises(UserError, match=r"a failed: the end of .*log\.txt is\nnonsense\n$"):
            runs.run_step(step(script), project / "out", "")


def test_steps_wait_for_what_they_start_from(project):
    out = project / "out"
    order = [
        step("sleep 0.2; touch $here/made", "data"),
        step("test -e $here/../data/made; sleep 0.2; touch $here/made", "seed0"),
        step("test -e $here/../data/made", "seed1"),
        step("test -e $seed0/made", "b"),
    ]
    stamps = runs.run_all(order, out, jobs=4)
    assert list(stamps) == ["data", "seed0", "seed1", "b"]
    assert stamps["b"]["hash"] == runs.fingerprint(order[3], stamps["seed0"]["hash"])


def test_a_failing_step_stops_those_that_start_from_it(project):
    order = [step("true", "data"), step("false", "seed0"), step("echo $seed0", "b")]
    with pytest.raises(UserError, match="seed0 failed"):
        runs.run_all(order, project / "out", jobs=2)
    assert not (project / "out" / "b").exists()


def test_the_real_steps_know_their_scripts_and_files(tmp_path):
    (tmp_path / "mine.json").write_text("[]")
    steps = {step.name: step for step in runs.all_steps(tmp_path, 3, str(tmp_path / "mine.json"), quick=False)}
    assert {"data", "seed0", "seed1", "seed2", "best", "rest", "measured", "proofs", "instructions"} <= steps.keys()
    assert "train_ppo.py" in steps["seed1"].script and "prepare.py" not in steps["seed1"].script
    for each in steps.values():
        assert all(list(runs.ROOT.glob(pattern)) for pattern in each.code), each.name
    before = runs.fingerprint(steps["instructions"])
    (tmp_path / "mine.json").write_text("[1]")
    assert runs.fingerprint(runs.recipe(tmp_path, str(tmp_path / "mine.json"))) != before
    with pytest.raises(UserError, match="there is no file nowhere.json"):
        runs.all_steps(tmp_path, 1, "nowhere.json", quick=False)


def test_numbers_are_written_as_documents_quote_them():
    assert [tables.fixed(x) for x in (4.086, -0.004, -3.0)] == ["4.09", "0.00", "-3.00"]
    assert [tables.percent(0.7075), tables.percent(0.7075, 1)] == ["71%", "70.8%"]
    errors = [tables.rounded(x) for x in (0, 2.6e-15, 3e-4, 0.0063, 0.044, 2.31, 12.0)]
    assert errors == ["0", "3e-15", "3e-4", "0.0063", "0.044", "2.3", "12"]
    for text in ["4.09", "0.00", "-3.00", "70.8%", "1.71 ± 0.07", "87 ± 1%", "16,148", *errors]:
        numbers = {"a.b": text}
        page = quotes.fill("It is <!--a.b-->.", quotes.Results(numbers))
        assert page == f"It is {text}<!--a.b-->." and quotes.differences(page, quotes.Results(numbers)) == []


def test_errors_of_the_tests_get_the_names_that_documents_ask_for(tmp_path):
    (tmp_path / "measured.txt").write_text("""...
 2.2e-16 <= 1e-12  proofs/test_a.py::test_gae_is_a_sum
 3.3e-16 <= 1e-12  proofs/test_a.py::test_gae_too
-1.0e-03 <= 1e-09  proofs/test_b.py::test_best_of_n
 6.0e-03 <= 2e-02  proofs/test_b.py::test_ppo[a b]
4 passed
""")
    text = "0<!--proof.gae--> 0<!--proof.ppo--> 0<!--proof.unknown--> 0<!--parity.gae-->"
    page = tables.Page()
    table = tables.measured_errors(page, tmp_path / "measured.txt", "proof", text)
    assert page.numbers == {"proof.gae": "3e-16", "proof.ppo": "0.006"}
    assert table.count("\n") == 5 and "| 0     | 1e-09 | `proofs/test_b.py::test_best_of_n`" in table
    with pytest.raises(
        UserError, match=r"proof\.b begins the names of tests in proofs/test_a\.py and proofs/test_b\.py"
    ):
        text = "0<!--proof.b-->"
        (tmp_path / "measured.txt").write_text(
            " 1e-16 <= 1e-12  proofs/test_a.py::test_b\n 1e-16 <= 1e-12  proofs/test_b.py::test_bb\n"
        )
        tables.measured_errors(page, tmp_path / "measured.txt", "proof", text)


def test_the_gap_below_the_best_accuracy_goes_to_the_parts_that_were_not_seen(lines, tokenizer, monkeypatch):
    greeted, closed = "Hi Ben, thank you so much for the lamp.", "Thank you so much for the lamp. Best wishes."
    slipped = "Thank you so much for the lamp. Lamp the."  # a clause that no template makes: -1.5, and -0.1 a word
    first = {
        "prompt": "Write a note to thank Ben for the lamp.",
        "chosen": closed,
        "rejected": greeted,
        "probability": 0.6,
    }
    again = first | {"chosen": greeted, "rejected": closed, "probability": 0.4}  # the same pair, labelled otherwise
    second = first | {"chosen": slipped, "rejected": greeted, "probability": 0.1}
    rewards = {text: i for i, text in enumerate((closed, greeted, slipped))}  # both pairs the wrong way round

    def score_examples(model, examples):
        texts = [tokenizer.decode(example.response).removesuffix("<|end|>") for example in examples]
        return torch.tensor([float(rewards[text]) for text in texts])

    def sequence_logprobs(model, examples):  # the garbled answer is unlikely, the others are alike
        garbled = ["Lamp the" in tokenizer.decode(example.response) for example in examples]
        return torch.where(torch.tensor(garbled), -99.0, -9.0)

    monkeypatch.setattr(measure, "score_examples", score_examples)
    monkeypatch.setattr(measure, "sequence_logprobs", sequence_logprobs)
    model = SimpleNamespace(config=SimpleNamespace(block_size=512))
    gap = measure.gap(model, model, tokenizer, lines([first, second]))
    assert measure.gap(model, model, tokenizer, lines([again, second])) == gap
    # 0.6 - 0.4 of the first pair's judgements for the closing; 0.9 - 0.1 of the second's for no slip and a greeting
    assert gap["pairs"] == 2 and gap["parts"] == pytest.approx(
        {"unknown": 40 * 1.7 / 2.7, "greeting": 40 * 1 / 2.7, "closing": 10}
    )
    assert gap["with_sft"] == gap["parts"]
    rewards |= {slipped: 1.1}  # hardly more than the other answer's: now the log-probability decides
    assert measure.gap(model, model, tokenizer, lines([first, second]))["with_sft"] == pytest.approx({"closing": 10})
    rewards |= {greeted: -1}
    assert measure.gap(model, model, tokenizer, lines([first, again]))["parts"] == {}


def test_a_slip_is_an_answer_with_a_clause_that_no_template_makes(monkeypatch):
    texts = [
        "Hi Ben, many thanks for the lamp.",
        "Many thanks for the cup.",
        "Leave me alone.",
        "Best lamp. Best wishes.",
    ]
    monkeypatch.setattr(measure, "sample_text", lambda *_, **options: [SimpleNamespace(text=text) for text in texts])
    prompts = ["Write a note to thank Ben for the lamp."] * 4
    assert measure.slips(None, None, prompts, [[0]] * 4) == 0.25


def test_the_speeds_come_with_the_profile_where_there_is_one(tmp_path):
    side = {name: {"median": value} for name, value in (("tokens_per_s", 2000), ("of_floor", 0.5), ("memory_mb", 300))}
    figures = {"conditions": {"cpu": "x"}, "machine": {"flops": 87e9}, "rows": {"sft": {"nanopost": side}}}
    page, path = tables.Page(), tmp_path / "speed.json"
    path.write_text(json.dumps(figures | {"profile": {"matrix products": 0.57, "the rest": 0.43}}))
    tables.speed(page, [str(path)])
    assert "is 87 GFLOP/s. An SFT step, by operations: matrix products 57%, the rest 43%." in page.sections["Speed"]
    path.write_text(json.dumps(figures))
    tables.speed(page, [str(path)])
    assert "2,000" in page.sections["Speed"] and "operations" not in page.sections["Speed"]


def test_every_number_of_a_seed_stands_under_its_own_head(tmp_path):
    columns = ("gold", "reward", "win_rate", "kl", "entropy", "length", "ended", "distinct")

    def write(name, stages):
        rows = [{"stage": stage, **dict.fromkeys(columns, gold)} for stage, gold in stages.items()]
        rows = [row | {f"{column}_stderr": 0.0 for column in columns} for row in rows]
        report = {"rows": rows, "gold_max": 5.0, "seconds": 60.0, "rm_accuracy": 0.7, "rm_accuracy_ceiling": 0.75}
        (tmp_path / "seed0" / name).write_text(json.dumps(report | {"reads_prompt": 0.5}))

    (tmp_path / "seed0").mkdir()
    write("report.json", {"sft": 1.0, "sft@0": 0.9, "sft best of 4": 2.0, "dpo": 3.0, "ppo": 4.0})
    write("hacked.json", {"ppo-beta0": -4.0})
    write("variants.json", {"ppo-trunk": 3.5, "ppo-two-passes": 3.75})
    page = tables.Page()
    tables.pipeline(page, tmp_path, {"data": {}, "seed0": {}})
    lines = page.sections["The pipeline"].splitlines()
    head, _, row = [line.strip("|").split("|") for line in lines if line.startswith("|")][-3:]
    cells = {name.strip(): cell.strip() for name, cell in zip(head, row, strict=True)}
    gold = {"SFT": "1.00", "SFT, greedy": "0.90 (-2%)", "best of 4": "2.00 (25%)", "DPO": "3.00 (50%)"}
    gold |= {"PPO": "4.00 (75%)", "on one trunk": "3.50", "PPO, two passes": "3.75", "beta 0": "-4.00"}
    assert gold.items() <= cells.items()
    assert cells["RM's accuracy"] == "70.0% of 75.0%" and cells["KL DPO / PPO / beta 0"] == "3.00 / 4.00 / -4.00"
    assert page.numbers["ppo-two-passes.gold"] == "3.75" and page.numbers["dpo.way"] == "50%"


def test_quick_runs_train_for_a_few_steps_only(tmp_path):
    scripts = [step.script.replace("\\\n", " ") for step in runs.all_steps(tmp_path, 1, "", quick=True)]
    commands = [line for script in scripts for line in script.splitlines() if "train_" in line and ".py" in line]
    assert len(commands) > 12
    for command in commands:
        [steps] = re.findall(r"--steps (\d+)", command)
        assert int(steps) <= (400 if "train_sft.py" in command else 30), command
        assert "--epochs" not in command or "train_ppo.py" in command, command  # there: passes over a few answers


def test_each_reward_model_has_a_row_with_its_own_numbers(tmp_path, monkeypatch):
    def report(folder, name="report.json"):
        x = {"seed0": 0.5, "report20.json": 0.6, "report50.json": 0.7, "pairs": 0.8}
        x = x[name if folder.name == "contrast" else folder.name]
        return {"rm_accuracy": x, "reads_prompt": x + 0.01}, {"sft best of 4": {"gold": 10 * x}}

    monkeypatch.setattr(tables, "read_report", report)
    monkeypatch.setattr(tables, "pipeline_rows", report)
    page = tables.Page()
    tables.other_pairs(page, tmp_path)
    [text] = page.sections.values()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "%" in line]
    assert rows == [
        ["as in quickstart", "50.0%", "51%", "5.00"],
        ["20% for contrast", "60.0%", "61%", "6.00"],
        ["50% for contrast", "70.0%", "71%", "7.00"],
        ["four times as many", "80.0%", "81%", "8.00"],
    ]
    assert page.numbers["pairs40000.accuracy"] == "80.0%" and page.numbers["contrast50.reads_prompt"] == "71%"


def test_ppo_has_the_same_beta_wherever_it_is_named():
    """What is measured beside quickstart's PPO must not be left behind when the recipe changes."""
    beta, other = f"--beta {measure.BETA} ", f"at beta {measure.BETA}:"
    assert re.findall(r"train_ppo\.py .*(--beta \S+ )", runs.QUICKSTART.read_text()) == [beta]
    assert re.findall(r"--beta \S+ ", runs.VARIANTS) == [beta, beta]
    assert other in (runs.ROOT / "docs" / "tables.py").read_text()
    assert f"$\\beta = {measure.BETA}$" in (runs.ROOT / "docs" / "faq.md").read_text()


def test_what_was_not_measured_stays_as_it_was(capsys):
    sections = ["# Results", "## The pipeline\n\nOld.", "## Real instructions\n\nBefore.\n\n| a |", "## Speed\n\nFast."]
    earlier = "\n\n".join([*sections, quotes.write_list("legend", {"ppo.gold": "1.00", "instructions.kl": "2.7"})])
    page = tables.Page()
    page.section("The pipeline", "New.")
    page.section("Speed", "Faster.")
    results.keep_earlier(page, earlier)
    assert page.numbers == {"instructions.kl": "2.7"}
    assert page.sections["The pipeline"] == "New." and page.sections["Speed"] == "Faster."
    assert page.sections["Real instructions"] == "Before.\n\n| a |"
    assert "Not measured yet" in page.sections["Parity with transformers"]
    assert "--instructions FILE" in capsys.readouterr().out


def test_a_report_that_is_not_there_is_refused_before_anything_runs():
    with pytest.raises(UserError, match="--bench: there is no file nowhere.json"):
        results.Config(bench="nowhere.json")
    with pytest.raises(UserError, match="--versus: there is no file nowhere.json"):
        results.Config(versus="nowhere.json")


def versus_report(path, verdict, equal_kl, **more):
    runs = {"a": [{"gold": 1.0, "kl": 2.0}, {"gold": 2.0, "kl": 3.0}], "b": [{"gold": 2.0}, {"gold": 4.0}]}
    numbers = {"difference": 1.5, "low": -0.25, "high": 3.25, "detectable": 2.0}
    report = {"a": "train_dpo.py", "b": "mine.py --beta 1", "metric": "gold", "runs": runs, "equal_kl": equal_kl}
    path.write_text(json.dumps(report | numbers | {"verdict": verdict} | more))
    return str(path)


def test_verdicts_are_written_as_the_reports_have_them_and_nothing_else_changes(tmp_path, monkeypatch, capsys):
    apart = versus_report(tmp_path / "1.json", "b", {"kl": 1.25, "difference": -0.5, "verdict": "none"})
    alike = versus_report(tmp_path / "2.json", "none", {"reason": "no copies"})
    before = "# Results\n\n## The pipeline\n\nOld.\n\n" + quotes.write_list("legend", {"ppo.gold": "1.00"})
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.md")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    results.RESULTS.write_text(before)
    (tmp_path / "README.md").write_text("# A\n\n<!--table:versus-->\n<!--end-->\n")
    for _ in range(2):  # a second time it replaces the section
        results.main(results.Config(versus=f"{apart},{alike}"))
    text = results.RESULTS.read_text()
    assert text.startswith(before.split("## Every")[0]) and text.endswith(before[before.index("## Every") :])
    assert text.count("## Verdicts over seeds") == 1
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "mine.py" in line]
    assert rows[0][2:] == ["1.50 / 3.00", "+1.50", "-0.25 to +3.25", "2.00", "b is better", "2.50", "-0.50 at 1.2 nats"]
    assert rows[1][6] == "not to be told apart" and rows[1][8] == ""
    assert "b is better" in (tmp_path / "README.md").read_text()


def test_check_runs_nothing_and_names_the_line_that_differs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.md")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(runs, "run_all", None)
    config = results.Config(check=True)
    with pytest.raises(UserError, match="there is no .*results.md"):
        results.main(config)
    (tmp_path / "results.md").write_text(quotes.write_list("legend", {"ppo.gold": "4.09"}))
    (tmp_path / "README.md").write_text("# Page\n\nIt is 4.09<!--ppo.gold-->.\n")
    results.main(config)
    assert "quote" in capsys.readouterr().out
    (tmp_path / "README.md").write_text("# Page\n\nIt is 4.10<!--ppo.gold-->.\n")
    with pytest.raises(UserError, match=r"README\.md:3: ppo\.gold is 4\.09 in results\.md, not 4\.10"):
        results.main(config)
    assert "4.10" in (tmp_path / "README.md").read_text()


def test_rows_without_a_kl_have_an_empty_cell_or_a_bound_in_the_tables():
    rows = {
        "sft@0": {"gold": 4.0, "gold_stderr": 0.1},
        "sft": {"gold": 1.0, "gold_stderr": 0.1, "kl": 0.0, "kl_stderr": 0.0},
        "sft best of 4": {"gold": 3.0, "gold_stderr": 0.1, "kl_bound": 0.636},
    }
    lines = tables.report_table(rows, "gold", "kl").splitlines()
    assert [line.split("|")[3].strip() for line in lines[2:]] == ["", "0.00 ± 0.00", "at most 0.64"]
    assert "kl" not in tables.values(rows["sft@0"]) and "kl" not in tables.values(rows["sft best of 4"])


@pytest.mark.parametrize("stage", ["sft@0", "sft@0.5", "sft best of 4", "ppo-beta0"])
def test_the_numbers_of_every_row_have_names_that_documents_can_quote(stage):
    name = f"{tables.number_name(stage)}.gold"
    assert quotes.fill(f"1<!--{name}-->", quotes.Results({name: "2"})) == f"2<!--{name}-->"
