"""Is a report one file that needs nothing else, with the plan's numbers in it, the same in HTML, Markdown and JSON?"""

from __future__ import annotations

import html.parser
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import CONFIGS, ROOT
from warm import edgeft

from edgeft.errors import EdgeftError
from edgeft.machines.profile import list_profiles, load_profile
from edgeft.planning.plan import make_plan
from edgeft.reporting.glossary import glossary, words_of
from edgeft.reporting.markdown import escape, to_markdown
from edgeft.reporting.matrix import Matrix, find_profiles, make_matrix
from edgeft.reporting.pages import largest_run, largest_trained, smallest_machine, to_html, write_report
from edgeft.reporting.read_run import Run
from edgeft.reporting.summary import Compared, Scored, Summary, summarise
from edgeft.reporting.words import amount, cell_text, grouped, signed, symbol
from edgeft.settings.job import make_job
from edgeft.units import GIB, show_bytes

VOID = {"meta", "br", "link", "img", "path", "use", "rect"}
HOSTILE = "a<img src=x onerror=alert(1)>|b`c"


class Page(html.parser.HTMLParser):
    """Tags in balance, every attribute, every <data value=...> with its text, all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.data: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "data":
            self.data.append((dict(attrs)["value"] or "", ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] == "data":
            value, before = self.data[-1]
            self.data[-1] = value, before + data


@pytest.fixture(scope="module")
def summary() -> Summary:
    plan = make_plan(make_job(model=str(CONFIGS / "llama-3.1-8b"), profile="t4", max_memory_bytes=9 * GIB))
    devices = [profile for profile in list_profiles() if "deploy" in profile.roles and profile.detected]
    return summarise(Run(plan, plan_sha256="f" * 64), devices)


@pytest.fixture(scope="module")
def run(summary: Summary) -> Summary:
    """The same after a run, with made-up measurements."""
    score = {"rows": 7, "loss": 1.25, "perplexity": 3.49, "exact_match": 0.5}
    rows = (
        Compared(what="training, peak memory", unit="bytes", predicted=4 * GIB, measured=3 * GIB),
        Compared(what="bundle, decoding", unit="tokens/s", predicted=100.0, measured=40.0, bound=True),
    )
    return summary.model_copy(update={
        "kind": "run", "compared": rows, "scored_on": "test", "loss_curve": ((1, 3.0), (2, 2.0), (3, 1.5)),
        "scores": (Scored.model_validate({"name": "base", "metrics": score}),),
    })  # fmt: skip


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    folder = tmp_path_factory.mktemp("models")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{}")
    found = [(name, str(CONFIGS / name)) for name in ("smollm2-135m", "llama-3.1-8b", "gpt2", "qwen2.5-72b")]
    return make_matrix([*found, ("broken", str(folder / "broken"))], find_profiles("t4,cpu-8gb,raspberrypi5-8gb"))


@pytest.fixture(scope="module")
def reports(summary: Summary, run: Summary, matrix: Matrix) -> list[tuple[Summary | Matrix, str]]:
    """Each kind of report with its page."""
    return [(report, to_html(report)) for report in (summary, run, matrix)]


def tables(text: str) -> list[list[list[str]]]:
    """Every Markdown table as rows of cells, head and rule included."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("| "):
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def test_a_page_needs_nothing_else(reports: list[tuple[Summary | Matrix, str]]) -> None:
    for _, text in reports:
        page = Page(text)
        assert not {"script", "link", "img", "iframe", "object", "embed", "a", "form"} & set(page.tags)
        for tag, name, value in page.attributes:
            assert not name.startswith("on") and name != "src", (tag, name)
            assert "://" not in value and not value.startswith("//"), (tag, name, value)
            assert name != "href" or value.startswith("#")
            assert all(place.startswith("#") for place in re.findall(r"url\(([^)]*)\)", value))
        assert "://" not in text and "@import" not in text and "url(" not in text[: text.index("</style>")]


def test_a_page_has_no_id_twice_and_prints_on_a4(reports: list[tuple[Summary | Matrix, str]]) -> None:
    for report, text in reports:
        ids = [value for _, name, value in Page(text).attributes if name == "id"]
        assert len(ids) == len(set(ids))
        assert f"size: A4 {'landscape' if isinstance(report, Matrix) else 'portrait'}" in text
        assert "@media print" in text


def test_the_pages_numbers_are_the_plans(reports: list[tuple[Summary | Matrix, str]], summary: Summary) -> None:
    found = Page(reports[0][1]).data
    values = {value for value, _ in found}
    wanted = {summary.peak_bytes, summary.budget_bytes}
    for stage in (*summary.stages, *summary.later_stages):
        wanted |= {stage.expected_bytes, stage.high_bytes, *(term.bytes for term in stage.terms)}
    wanted |= {entry.peak_bytes for entry in summary.disk} | {saving.bytes for saving in summary.savings}
    wanted |= {cell.need_bytes for cell in summary.devices if cell.need_bytes}
    assert {str(number) for number in wanted} <= values
    assert all(text == show_bytes(int(value)) for value, text in found)


def test_the_pages_comparison_is_the_runs(reports: list[tuple[Summary | Matrix, str]]) -> None:
    page = Page(reports[1][1])
    assert (str(float(3 * GIB)), "3.00 GiB") in page.data
    text = " ".join(" ".join(page.text).split())
    assert "training, peak memory 4.00 GiB 3.00 GiB -25.0%" in text
    assert "bundle, decoding at most 100 tokens/s 40 tokens/s 40% of the bound" in text
    assert "base 1.2500 3.49 50.0%" in text and "on 7 test rows" in text


def test_the_matrix_numbers_are_the_cells(reports: list[tuple[Summary | Matrix, str]], matrix: Matrix) -> None:
    page = Page(reports[2][1])
    values = {value for value, _ in page.data}
    text = " ".join(" ".join(page.text).split())
    for model in matrix.models:
        assert model.name in text
        for cell in (*model.training, *model.devices):
            assert cell.need_bytes is None or str(cell.need_bytes) in values
    assert "cannot be planned: missing model_type" in text
    assert "4 of 5 models can be fine-tuned on at least one of 2 machines; 2 of those run on at least one of 2" in text


def test_markdown_and_json_agree_on_a_plan(summary: Summary) -> None:
    merge = next(stage for stage in summary.later_stages if stage.name == "merge")
    small = merge.model_copy(update={"limit_bytes": merge.high_bytes // 2})
    later = tuple(small if stage is merge else stage for stage in summary.later_stages)
    summary = summary.model_copy(update={"later_stages": later})
    held = json.loads(summary.model_dump_json())
    stages = [*held["stages"], *held["later_stages"]]
    by_head = {tuple(table[0]): table[2:] for table in tables(to_markdown(summary))}
    memory = by_head["phase", "expected", "high", "limit", "measured"]
    over = {stage.name: "\N{BALLOT X} " * stage.over for stage in (*summary.stages, *summary.later_stages)}
    assert [name for name, mark in over.items() if mark] == ["merge"]
    pages = {stage.name: r"\*" * stage.by_pages for stage in (*summary.stages, *summary.later_stages)}
    assert any(pages.values()) and "above the limit by pages of weight files alone" in to_markdown(summary)
    assert [row[1:4] for row in memory] == [
        [show_bytes(s["expected_bytes"]), over[s["name"]] + show_bytes(s["high_bytes"]) + pages[s["name"]],
         "-" if s["limit_bytes"] is None else show_bytes(s["limit_bytes"])] for s in stages
    ]  # fmt: skip
    terms = by_head["phase", "term", "memory", "how it is counted"]
    assert [row[1:3] for row in terms] == [[t["name"], show_bytes(t["bytes"])] for s in stages for t in s["terms"]]
    ways = by_head["way", "points given up", "memory", "a step", "fits"]
    assert [row[2] for row in ways] == [show_bytes(o["high_bytes"]) for o in held["options"] if o["frontier"]]
    assert [row[0].startswith("chosen: ") for row in ways] == [o["chosen"] for o in held["options"] if o["frontier"]]


def test_markdown_and_json_agree_on_a_matrix(matrix: Matrix) -> None:
    held: dict[str, Any] = json.loads(matrix.model_dump_json())
    training, running = tables(to_markdown(matrix))
    for rows, part, machines in ((training, "training", "training_machines"), (running, "devices", "devices")):
        assert [cell.split(",")[0] for cell in rows[0][2:]] == [machine["name"] for machine in held[machines]]
        assert [row[0] for row in rows[2:]] == [model["name"] for model in held["models"]]
        for row, model in zip(rows[2:], held["models"], strict=True):
            for text, cell in zip(row[2:], model[part], strict=False):
                if cell["need_bytes"] is None:
                    continue
                need, budget = map(float, re.search(r"([\d.]+) of ([\d.]+) GiB", text).groups())  # type: ignore[union-attr]
                assert need == pytest.approx(cell["need_bytes"] / GIB, abs=0.11)
                assert budget == pytest.approx(cell["budget_bytes"] / GIB, abs=0.051)
                assert (need <= budget) == (cell["need_bytes"] <= cell["budget_bytes"])


def test_cells_are_told_apart_without_colour(matrix: Matrix) -> None:
    marks = {symbol(cell) for model in matrix.models for cell in (*model.training, *model.devices)}
    assert len(marks) >= 3
    for model in matrix.models:
        for cell in (*model.training, *model.devices):
            assert (symbol(cell) == "\u25cb") == (not cell.fits)


@pytest.fixture
def hostile(tmp_path: Path) -> Summary:
    """A plan of a model and a machine whose names want to be markup."""
    folder = tmp_path / HOSTILE
    shutil.copytree(CONFIGS / "smollm2-135m", folder)
    profile = tmp_path / f"{HOSTILE}.toml"
    text = (ROOT / "profiles" / "t4.toml").read_text()
    profile.write_text(text.replace("NVIDIA T4, 16 GB", "<script>alert(1)</script>"))
    plan = make_plan(make_job(model=str(folder), profile=str(profile)))
    return summarise(Run(plan), [load_profile("cpu-8gb").model_copy(update={"name": HOSTILE})])


def test_names_from_outside_stay_text(hostile: Summary, tmp_path: Path) -> None:
    machine = load_profile("t4").model_copy(update={"name": HOSTILE, "description": "<script>alert(1)</script>"})
    grid = make_matrix([(HOSTILE, str(tmp_path / HOSTILE))], [machine], settings={"rank": "8"})
    for report in (hostile, grid):
        page = Page(to_html(report))
        assert not {"script", "img"} & set(page.tags)
        assert HOSTILE in "".join(page.text)
        text = to_markdown(report)
        assert "<" not in text and escape(HOSTILE) in text
        for table in tables(text):
            assert len({len(row) for row in table}) == 1, table


def test_the_same_report_gives_the_same_bytes(reports: list[tuple[Summary | Matrix, str]]) -> None:
    for report, text in reports:
        again = type(report).model_validate_json(report.model_dump_json())
        assert to_html(again) == text and to_markdown(again) == to_markdown(report)


def test_three_files_are_written_whole(
    reports: list[tuple[Summary | Matrix, str]], matrix: Matrix, tmp_path: Path
) -> None:
    made = write_report(matrix, tmp_path / "new" / "grid.html")
    assert [path.name for path in made] == ["grid.html", "grid.md", "grid.json"]
    assert Matrix.read(made[2]) == matrix
    assert made[0].read_text(encoding="utf-8") == reports[2][1]
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgeftError, match=r"cannot write: .*\n\nhint: choose another place with --out"):
        write_report(matrix, tmp_path / "file" / "grid.html")


def test_the_largest_and_the_smallest(matrix: Matrix) -> None:
    cpu, t4 = (largest_trained(matrix, i) for i in range(2))
    assert [model and model.name for model in t4["largest"]] == ["smollm2-135m", "llama-3.1-8b", "qwen2.5-72b"]
    assert (cpu["fits"], t4["fits"]) == (3, 4)  # 8B on 8 GB, and 72B on a T4, with layers left in their files
    pi = largest_run(matrix, 0)
    assert [model and model.name for model in pi["largest"]] == ["llama-3.1-8b", "smollm2-135m"]
    by_name = {model.name: smallest_machine(model) for model in matrix.models}
    assert by_name["smollm2-135m"]["first"].machine == "cpu-8gb"
    assert by_name["smollm2-135m"]["fastest"].machine == "t4"
    assert by_name["llama-3.1-8b"]["first"].machine == "cpu-8gb" and by_name["llama-3.1-8b"]["best"] is None
    assert by_name["qwen2.5-72b"]["first"].machine == "t4" and by_name["qwen2.5-72b"]["why"] == ""
    assert by_name["gpt2"]["why"] == "onnxruntime-genai's builder does not know GPT2LMHeadModel"


def test_the_words_of_a_page_are_explained_on_it() -> None:
    rows = [line for line in (ROOT / "docs" / "glossary.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(glossary()) == len(rows) >= 35 and [word.names for word in glossary()] == [
        r.split(" | ")[0][2:] for r in rows
    ]
    assert [word.names for word in words_of("The ladder's rungs; a **Golden vector** and Mtok.")] == [
        "golden vectors", "ladder, rung", "Mtok"
    ]  # fmt: skip
    assert words_of("artifacts")[0].names == "artifact" and not words_of("a stagecoach")
    page = Page(to_html(summarise(Run(make_plan(make_job(model=str(CONFIGS / "smollm2-135m"), profile="t4"))))))
    said = " ".join(" ".join(page.text).split())
    assert "Words on this page" in said and "the folder that goes to the device" in said
    assert page.tags.count("dt") == page.tags.count("dd") >= 5


def test_wording() -> None:
    assert [signed(value) for value in (1.25, -0.04, -3.0)] == ["+1.2", "0", "-3.0"]
    assert grouped("8030261248 in nf4, 17694720 x 4 B, 2048 tokens, 0.51587") == (
        "8,030,261,248 in nf4, 17,694,720 x 4 B, 2048 tokens, 0.51587"
    )
    assert [amount(90, "seconds"), amount(GIB, "bytes"), amount(1234.5, "tokens/s")] == [
        "1 min 30 s", "1.00 GiB", "1,234 tokens/s"
    ]  # fmt: skip


def test_the_verb_writes_a_matrix(tmp_path: Path) -> None:
    out = tmp_path / "grid.html"
    done = edgeft("report", "--models", str(CONFIGS / "gpt2"), "--profiles", "t4,cpu-8gb", "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    found = Matrix.model_validate_json(done.stdout)
    assert [model.name for model in found.models] == ["gpt2"] and found == Matrix.read(tmp_path / "grid.json")
    assert cell_text(found.models[0].training[1]) in (tmp_path / "grid.md").read_text()


def test_the_verb_writes_a_plans_report_beside_it(tmp_path: Path) -> None:
    plan = make_plan(make_job(model=str(CONFIGS / "gpt2"), profile="t4"))
    plan.write(tmp_path / "plan.json")
    done = edgeft("report", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(tmp_path / f"report.{kind}") for kind in ("html", "md", "json")]
    assert Summary.read(tmp_path / "report.json").peak_bytes == plan.peak_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "report: no plan given"),
        (("plan.json", "--models", "."), "report: a plan and --models were given"),
        (("absent.json",), "absent.json: no such file"),
        (("--models", "absent"), "absent: no such folder"),
        (("--models", str(CONFIGS / "gpt2"), "--set", "rnak=8"), "--set: unknown setting 'rnak'"),
    ],
)
def test_the_verb_says_what_is_wrong(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done = edgeft("report", *arguments, cwd=tmp_path)
    assert done.returncode == 1 and f"edgeft: {message}" in done.stderr and not done.stdout
