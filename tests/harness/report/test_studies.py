"""Studies beside the bench: their commands, records and tables."""

import csv
import io
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import typer

import castpoint.harness.__main__ as cli
import castpoint.harness.fingerprint.survey as survey
from castpoint.harness.fingerprint import known as plans_known
from castpoint.harness.peers.running import Implementation
from castpoint.harness.report.findings import findings
from castpoint.harness.report.fingerprints import (
    ANOTHER,
    OPEN,
    SAME_BITS,
    THAT,
    answer_words,
    confusion_summary,
    confusion_table,
    implementation_groups,
    implementation_rows,
    implementations_section,
    verdicts_summary,
)
from castpoint.harness.report.markdown import markdown, paragraphs, under
from castpoint.harness.report.studies import SECTIONS, counted, study_sections
from castpoint.harness.runs.frames import latest, load
from castpoint.harness.runs.records import TABLES, Records, load_runs
from castpoint.kernels.plan import KEEP, RNE, RTZ, STORAGE
from castpoint.variants.catalogue import HF, ONE_ROUNDING
from castpoint.variants.eager import eager_norm

HF_WORDS = {"variance": "fp32", "normed": "bf16-rne", "hidden": "bf16-rne", "weight_offset": "none", "eps": "float32"}
ONE_WORDS = HF_WORDS | {"normed": "fp32"}


def missing(device: str) -> plans_known.Norm:
    raise ImportError("the package engine is missing")


def broken(device: str) -> plans_known.Norm:
    raise RuntimeError("driver\ntoo old")


def a_few() -> list[Implementation]:
    def hf(device: str) -> plans_known.Norm:
        return lambda x, w, eps: eager_norm(x, w, eps, False)

    def one(device: str) -> plans_known.Norm:
        return lambda x, w, eps: F.rms_norm(x, (x.shape[-1],), w, eps)

    return [
        Implementation("norm", "torch", "rmsnorm", "eager", hf, "hf", "norm.py"),
        Implementation("norm", "torch", "rmsnorm", "torch.compile", one, "hf", "norm.py"),
        Implementation("norm", "torch", "head_norm", "eager", hf, "hf", "norm.py"),
        Implementation("absent", "engine", "rmsnorm", "eager", missing, "hf", "norm.py"),
        Implementation("broken", "engine", "rmsnorm", "eager", broken, "hf", "norm.py"),
        Implementation("kernel", "engine", "rmsnorm", "triton", hf, "hf", "norm.py"),
    ]


@pytest.fixture
def surveyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.setattr(survey, "implementations", a_few)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which the command unsets
    cli.study("survey", tmp_path, "cpu")
    capsys.readouterr()
    return tmp_path


def test_survey_writes_a_row_an_implementation(surveyed: Path) -> None:
    run_id, frame = latest(surveyed, "implementations")
    assert load_runs(surveyed)[run_id]["command"] == "survey"
    assert list(frame["status"]) == ["identified"] * 3 + ["not installed", "error", "identified"]
    assert list(frame["reason"])[3:] == ["the package engine is missing", "RuntimeError: driver too old", ""]
    assert list(frame["how"])[4:] == ["eager", survey.EXECUTED]
    assert answer_words(frame["plan"][0]) == "normed, hidden" and answer_words(frame["plan"][1]) == "hidden"
    assert answer_words(frame["plan"][2]) == "head_normed, out" and frame["plan"][3] == ""
    assert (frame["share_equal"][:3] == 1).all() and (frame["runner_up_share_equal"][:3] < 0.95).all()
    assert set(frame["expected"]) == {"hf"} and set(frame["source"]) == {"norm.py"}
    assert list(frame["verdict"]) == ["right", "wrong", "right", "", "wrong", "right"]


def test_the_report_says_what_is_wrong_first(surveyed: Path) -> None:
    _, frame = latest(surveyed, "implementations")
    rows = implementation_rows(frame)
    assert list(rows["verdict"]) == ["wrong", "wrong", "right", "right", "", "right"]
    assert list(rows["how"][:1]) == ["torch.compile"] and list(rows["expected"]) == ["hf"] * 6
    assert verdicts_summary(frame) == (
        "4 callables in 5 ways to run them, each held to a right answer that is read from its source or what else "
        "`expected by` names: 3 answered right, 0 right with fp32 steps left open, 2 wrong; 1 more were not asked."
    )
    frame["verdict"] = ["left open", "right", "right", "", "right", "right"]
    assert "4 answered right, 1 right with fp32 steps left open, 0 wrong;" in verdicts_summary(frame)
    assert verdicts_summary(frame) in implementations_section(frame)
    assert verdicts_summary(frame.assign(verdict="")) == ""


def test_what_a_compiler_moves_is_a_finding(surveyed: Path) -> None:
    run_id, frame = latest(surveyed, "implementations")
    (finding,) = findings(surveyed, load(surveyed, run_id))
    assert finding.line("report.md") == (
        "- **torch.compile moves a boundary** in 1 of 1 public implementations: eager rounds `normed, hidden`, "
        "compiled `hidden`. [More](report.md#what-public-implementations-do)"
    )
    path = surveyed / "implementations.csv"
    lines = path.read_text().splitlines()
    eager, compiled = next(csv.reader([lines[1]])), next(csv.reader([lines[2]]))
    compiled[7] = eager[7]  # the plan
    out = io.StringIO()
    csv.writer(out, lineterminator="").writerow(compiled)
    path.write_text("\n".join([*lines[:2], out.getvalue(), *lines[3:]]) + "\n")
    assert findings(surveyed, load(surveyed, run_id)) == []
    groups = implementation_groups(frame)
    assert list(groups["rounds to bf16"]) == ["normed, hidden", "hidden", "head_normed, out", "–", "–"]
    assert groups["implementations"][2] == "norm (head norm) (eager)"


def test_a_survey_that_was_stopped_goes_on(surveyed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(survey, "identify", never)
    records = Records.of_run(surveyed, next(iter(load_runs(surveyed))))
    survey.survey_implementations(records, "cpu")
    assert len(records.rows("implementations")) == len(a_few())


def test_words_of_an_answer() -> None:
    gemma = ONE_WORDS | {"weight_offset": "bf16-rne", "eps": "bf16", "root": "1/sqrt", "order": "x*(rstd*w)"}
    assert answer_words(json.dumps([gemma])) == "hidden; 1 + w in bf16; eps bf16; root 1/sqrt; order x*(rstd*w)"
    assert answer_words(json.dumps([HF_WORDS | {"hidden": "bf16-rtz"}])) == "normed, hidden (truncated)"
    eight = HF_WORDS | {"out": "e4m3-rne", "weight": "none", "normed": "fp32 or bf16-rne"}
    assert answer_words(json.dumps([eight])) == "normed (fp32 or bf16-rne), hidden, out (e4m3-rne), weight (none)"
    either = [HF_WORDS, HF_WORDS | {"eps": "float64"}]
    assert answer_words(json.dumps(either)) == "normed, hidden; eps float32 **or** float64"
    assert answer_words(json.dumps([HF_WORDS | {"normed": "fp32", "hidden": "fp32"}])) == "nothing"


def known(status: str, planted: dict[str, str], answered: list[dict[str, str]]) -> dict[str, object]:
    row = {"kind": "rmsnorm", "source": "spec", "status": status, "seconds": 1.0}
    return row | {"planted": json.dumps(planted), "answered": json.dumps(answered)}


def test_confusion_counts_what_was_answered() -> None:
    rows = [
        known("identified", HF_WORDS, [HF_WORDS | {"root": "rsqrt"}]),
        known("identified", HF_WORDS, [ONE_WORDS]),  # a wrong answer
        known("undecided", HF_WORDS, [HF_WORDS, ONE_WORDS]),
        known("none", ONE_WORDS, [HF_WORDS]),
        known("identified", HF_WORDS, [HF_WORDS | {"normed": "bf16-rne or fp32"}]),
        known("undecided", HF_WORDS, [HF_WORDS | {"order": "a"}, HF_WORDS | {"order": "b"}]),
    ]
    frame = pd.DataFrame(rows)
    summary = confusion_summary(frame).iloc[0]
    counts = ["plans", THAT, SAME_BITS, OPEN, "undecided", ANOTHER, "none", "error"]
    assert [summary[name] for name in counts] == [6, 1, 1, 1, 1, 1, 1, 0]
    table = confusion_table(frame).set_index("planted")
    assert table.loc["normed = bf16-rne", "bf16-rne"] == 2 and table.loc["normed = bf16-rne", "fp32"] == 1
    assert table.loc["normed = bf16-rne", "bf16-rne or fp32"] == 2 and table.loc["normed = fp32", "none"] == 1


def test_known_subjects_are_the_whole_family_of_a_norm() -> None:
    subjects = list(plans_known.known_subjects())
    norms = [json.dumps(s.planted) for s in subjects if s.source == "spec" and s.kind != "qkv"]
    assert len(norms) == len(set(norms)) == len(plans_known.norm_plans()) == 3**6
    heads = [s.planted for s in subjects if s.kind == "head_norm"]
    assert len(heads) == 73
    assert all(len({planted[name] for planted in heads}) == 3 for name in heads[0])
    chains = [json.dumps(s.planted) for s in subjects if s.kind == "qkv" and s.source == "spec"]
    assert len(chains) == len(set(chains)) == 55
    assert {json.dumps(plans_known.expected(plan, "qkv")) for plan in (HF, ONE_ROUNDING)} < set(chains)
    for name in ("statistics", "variance", "rstd", "normed", "hidden", "weight_offset"):
        words = {s.planted[name] for s in subjects if s.source == "NumPy in fp16"}
        assert words == {KEEP, "fp16-rne", *(["none"] if name == "weight_offset" else ["fp16-rtz"])}
    assert {s.planted.get("weight") for s in subjects} == {None, *STORAGE}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_norm_by_torch_is_that_of_the_spec(dtype: torch.dtype) -> None:
    """In bf16 bit for bit; in fp16 what cut and rounded differ in is an ulp, toward zero."""
    x, w = torch.randn(64, 256).to(dtype), (torch.rand(256) * 3).to(dtype)
    for plan in plans_known.norm_plans()[::61]:
        y = plans_known.norm_in(plan, dtype)(x, w, 1e-6)
        if dtype == torch.bfloat16:
            assert torch.equal(y, plans_known.spec_norm(plan)(x, w, 1e-6)), plan
    cut, near = (plans_known.norm_in(HF.replace(hidden=way), dtype)(x, w, 1e-6).float() for way in (RTZ, RNE))
    assert (cut.abs() <= near.abs()).all() and 0.3 < (cut != near).double().mean() < 0.7


def test_noise_moves_one_element_in_a_thousand_by_an_ulp() -> None:
    x, w = torch.randn(64, 256).bfloat16(), torch.ones(256).bfloat16()
    clean, noisy = plans_known.spec_norm(HF)(x, w, 1e-6), plans_known.with_noise(plans_known.spec_norm(HF))(x, w, 1e-6)
    steps = (clean.view(torch.int16).int() - noisy.view(torch.int16).int()).abs()
    assert steps.max() == 1 and 5 < steps.sum() < 40
    assert torch.equal(noisy, plans_known.with_noise(plans_known.spec_norm(HF))(x, w, 1e-6))


def test_cases_and_budget_commands_fill_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import castpoint.harness.cases.run as cases

    monkeypatch.setattr(cases, "CASES", [case for case in cases.CASES if case.claim.case == 9])
    cli.study("cases", tmp_path)
    assert "vllm #53203" in capsys.readouterr().out
    options = {"layers": "0", "tokens": 8, "plans": "hf,gemma", "device": "cpu", "results": tmp_path}
    with pytest.raises(typer.Exit) as ended:
        cli.bench(only="budget", **options)
    assert ended.value.exit_code == 0
    assert "Shapley shares (layer 0, 8 tokens)" in capsys.readouterr().out
    _, frame = latest(tmp_path, "budget")
    shares = frame[frame["share"].notna()].groupby(["weights", "plan", "measure"])["share"].sum()
    assert len(shares) == 6 and ((shares - 1).abs() < 1e-5).all()  # hf with RoPE too
    assert (frame["player"] == "order of sums").sum() == 4, "two plans, two measures"
    sections = study_sections(tmp_path)
    titles = ["## Error budget", "## RoPE's phase over positions", "## Cases of the field"]
    assert [section.splitlines()[0] for section in sections] == titles
    run_id, frame = latest(tmp_path, "cases")
    assert f"Claims: {counted(frame['verdict'])}." in sections[2] and counted(frame["verdict"]).endswith("; 2 in all")
    commit = load_runs(tmp_path)[run_id]["environment"]["commit"]
    assert study_sections(tmp_path, commit) == sections, "a study of the same commit does not say so"
    assert study_sections(tmp_path, "c0ffee") == [f"{section}\n\nCommit {commit}." for section in sections]


def test_cells_of_a_table() -> None:
    frame = pd.DataFrame({"what": ["a | b", "c|d"], "share": [0.5, None], "words": ["1 %", "2 %"]})
    lines = ["| what | share | words |", "| --- | --: | --: |", "| a + b | 50 % | 1 % |", "| c/d | – | 2 % |"]
    assert markdown(frame, right=["words"]).splitlines() == lines
    assert under("Words.", frame[:0]) == "" and under("Words.", frame).startswith("Words.\n\n| what |")
    assert paragraphs("a", "", "b") == "a\n\nb"


def test_words_are_counted_most_frequent_first() -> None:
    assert counted(pd.Series(["ok", "red", "ok"])) == "2 ok, 1 red; 3 in all"


def test_unfinished_runs_are_not_reported(surveyed: Path) -> None:
    path = surveyed / "environment.json"
    content = json.loads(path.read_text())
    for run in content["runs"].values():
        del run["finished"]
    path.write_text(json.dumps(content))
    assert latest(surveyed, "implementations") is None and study_sections(surveyed) == []


def test_every_section_has_a_table_of_records() -> None:
    assert set(SECTIONS) <= set(TABLES)
