"""The documents against the repository: files, commands, modules, metrics, overrides and figures that they name."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from dataclasses import fields
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from megatron_elva.config.compose import compose_all, group_options
from megatron_elva.config.merge_schedule import ResolvedPoint, cell_layers, kept_cells, resolve
from megatron_elva.config.validate import validate_all
from megatron_elva.layout import PackSpec, SampleSpec, VideoSpec, initial_state
from megatron_elva.model.merging import find_links, link_scores, merge
from megatron_elva.training.metrics import StepMetrics

ROOT = Path(__file__).resolve().parents[1]
DOCS = (
    "README.md", "CONTRIBUTING.md", "docs/merging.md", "docs/data.md", "docs/cluster.md", "docs/failures.md",
    "docs/tracking.md", "docs/gpu.md",
)  # fmt: skip
STARTS = ("launchers/submit.py", "megatron_elva.training.train")
MADE_BY_USERS = (
    "runs", "clips", "checkpoints", "logs", "tokenizer", "merge_index", "code", "answers", "hf", "mlflow",
    "mlflow_artifacts",
)  # fmt: skip
"""First parts of paths that no checkout has."""
KEYS_WITH_A_SLASH = ("by_samples", "system")
"""First parts of metrics in MLflow."""
IN_THE_REPOSITORY = re.compile(r"\.?[\w.-]+(/[\w.*-]+)*/?")
SOURCES = (".py", ".md", ".toml", ".svg")


@cache
def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def blocks(name: str, language: str) -> tuple[str, ...]:
    return tuple(re.findall(rf"^```{language}\n(.*?)^```$", text(name), re.MULTILINE | re.DOTALL))


@cache
def prose(name: str) -> str:
    return re.sub(r"^```.*?^```$", "", text(name), flags=re.MULTILINE | re.DOTALL)


@cache
def spans(name: str) -> tuple[str, ...]:
    """What stands between single backticks."""
    return tuple(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(name)))


@cache
def commands(name: str) -> tuple[tuple[str, ...], ...]:
    """The commands of all shell blocks in order, as words without comments."""
    lines = "\n".join(blocks(name, "bash")).replace("\\\n", " ").splitlines()
    return tuple(words for line in lines if (words := tuple(shlex.split(line, comments=True))))


def paths(name: str) -> set[str]:
    """Paths of the repository that a document names in its text and commands."""
    words = {*spans(name), *(word for command in commands(name) for word in command if word.endswith(SOURCES))}
    named = set()
    for word in words:
        first = word.split("/")[0]
        if not IN_THE_REPOSITORY.fullmatch(word) or first in (*MADE_BY_USERS, *KEYS_WITH_A_SLASH, ".venv"):
            continue
        if "/" in word or (word.endswith(SOURCES) and word[0].isupper()) or word == "pyproject.toml":
            named.add(word)
    return named


@pytest.mark.parametrize("name", DOCS)
def test_every_file_named_is_there(name):
    links = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose(name)) if "://" not in target}
    named = paths(name)
    assert len(named) > (10 if name in ("README.md", "CONTRIBUTING.md") else 2), "the search for paths finds hardly any"
    missing = sorted(path for path in named if not list(ROOT.glob(path.rstrip("/"))))
    missing += sorted(link for link in links if not (ROOT / name).parent.joinpath(link).exists())
    assert not missing


def test_the_first_two_commands_are_demo_and_test():
    assert commands("README.md")[:2] == (("make", "demo"), ("make", "test"))


@pytest.mark.parametrize("name", DOCS)
def test_every_make_target_is_in_the_makefile(name):
    targets = {word for line in [*commands(name), *(s.split() for s in spans(name))] if line[0] == "make"
               for word in line[1:] if "=" not in word}  # fmt: skip
    assert targets or name not in ("README.md", "CONTRIBUTING.md")
    assert targets <= set(re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE))


def test_every_module_that_is_run_can_be_found():
    modules = {module for name in DOCS for module in re.findall(r"-m ([a-z_][\w.]*)", text(name))}
    assert {"megatron_elva.inference.chat", "dali_pipelines.prepare", "megatron_elva.training.train"} <= modules
    assert not [module for module in modules if importlib.util.find_spec(module) is None]


def test_the_table_of_metrics_has_exactly_the_fields_of_a_line():
    (table,) = re.findall(r"^\| key \| meaning \|\n\|---\|---\|\n((?:\|.*\n)+)", text("README.md"), re.MULTILINE)
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [f.name for f in fields(StepMetrics)]


def submissions() -> list[tuple[str, ...]]:
    """The overrides of every command that starts training."""
    found = []
    for command in (command for name in DOCS for command in commands(name)):
        starts = [i for i, word in enumerate(command) if word in STARTS]
        if starts and "--help" not in command:
            found.append(command[starts[0] + 1 :])
    return found


def test_there_are_submissions_to_check():
    assert len(submissions()) >= 7


@pytest.mark.parametrize("overrides", submissions(), ids=" ".join)
def test_every_submission_is_a_valid_config(overrides):
    validate_all(compose_all(list(overrides)))


@pytest.mark.parametrize(
    "override", sorted({s for name in DOCS for s in spans(name) if re.fullmatch(r"[\w.]+=[\w./-]+", s)})
)
def test_every_override_in_the_text_composes(override):
    # some are named because they are refused, which happens later
    compose_all([override] if override.startswith("stage=") else ["stage=all", override])


@pytest.mark.parametrize("name", ["README.md", "docs/data.md"])
def test_every_example_of_an_annotation_is_read(name, tmp_path):
    from dali_pipelines.prepare.layouts import drafts_of
    from dali_pipelines.prepare.scan import check_text
    from dali_pipelines.prepare.sources import rows_of

    (block,) = blocks(name, "json")
    annotations = tmp_path / "annotations.jsonl"
    annotations.write_text(block)
    rows = list(rows_of(annotations))
    assert len(rows) == len(block.splitlines())
    for row in rows:
        (draft,) = drafts_of(row.content)
        check_text(draft.meta, len(draft.media))
        named = re.findall(r'"[^"]+[.](?:mp4|mkv|jpg)"', json.dumps(row.content))
        assert [json.loads(path) for path in named] == list(draft.media)


def test_the_options_of_the_preparation_are_those_of_its_page():
    from dali_pipelines.prepare.arguments import parser

    known = {word for action in parser("")._actions for word in action.option_strings}
    page = text("docs/data.md")
    (command,) = [c for c in commands("docs/data.md") if "--split" in c]
    named = {span.split()[0] for span in spans("docs/data.md") if span.startswith("--")}
    assert {word for word in (*command, *named) if word.startswith("--")} <= known
    assert not {option for option in known if option not in page} - {"-h", "--help", "--input", "--out"}


def test_the_picture_is_well_formed_and_brings_no_other_files():
    picture = text("docs/architecture.svg")
    ElementTree.fromstring(picture)
    assert "href" not in picture and "@import" not in picture and "url(http" not in picture


def test_every_merging_option_is_in_the_table_with_what_it_leaves():
    rows = dict(re.findall(r"^\| `merging=(\w+)` \| (.*) \|$", text("docs/merging.md"), re.MULTILINE))
    assert set(rows) == set(group_options()["merging"])
    for name in ("paper", "fast"):
        (config,) = compose_all(["stage=2", f"merging={name}"])
        wide, flat = resolve(config.merging, 28), resolve(config.merging, 4)
        *places, left, summed = rows[name].split(" | ")
        for points, place in zip((wide, flat), places, strict=True):
            assert {f"layer {p.layer}" for p in points} == set(re.findall(r"layer \d+", place))
        kept = kept_cells(wide, 1000, 100)[-1]
        assert left == f"{kept.bound}{kept.count / 1e5:.0%}"
        shares = [cell_layers(points, layers, 1000, 100) for points, layers in ((wide, 28), (flat, 4))]
        told = [f"{s.count / 1e5 / layers:.1%}" for s, layers in zip(shares, (28, 4), strict=True)]
        assert summed == kept.bound + " and ".join(dict.fromkeys(told))


def test_the_example_of_merging_is_what_the_code_does():
    page = text("docs/merging.md")
    (row,) = re.findall(r"^similarity of neighbours +(.*)$", page, re.MULTILINE)
    scores = torch.tensor([float(s) for s in re.findall(r"-([\d.]+)-", row)])
    angles = torch.cat([torch.zeros(1), scores.acos().cumsum(0)])  # unit vectors that turn one way
    spec = PackSpec((SampleSpec((1, VideoSpec.uniform(5, 1, 1), 1)),))
    state = initial_state(spec)
    hidden = torch.zeros(spec.tokens, 2)
    hidden[state.tubes.token] = torch.stack([angles.cos(), angles.sin()], 1)
    torch.testing.assert_close(link_scores(hidden, state, find_links(state)), scores)

    def matrix(state):
        return "M = " + " ".join(str(int(m)) for m in state.merge_index()[0].flatten())

    threshold = ResolvedPoint(0, 1, "threshold", 0.6, None)
    first, last = (merge(hidden, state, threshold, survivor)[1] for survivor in ("first", "last"))
    between, once = merge(hidden, state, ResolvedPoint(0, 1, "budget", None, 0.6))
    _, twice = merge(between, once, ResolvedPoint(1, 2, "budget", None, 0.4))
    assert re.findall(r"M = [01 ]*[01]", page) == [matrix(s) for s in (first, once, twice, last)]


def test_figures_are_those_of_the_result_files():
    page = text("docs/merging.md")
    for file, head in (("flops_elva_7b", "| merging  "), ("merging_cpu", "| variant  ")):
        (table,) = re.findall(rf"^{re.escape(head)}.*\n(?:\|.*\n)+", page, re.MULTILINE)
        assert table in text(f"benchmarks/results/{file}.md"), f"copy the table of {file}.md anew"


def test_the_picture_of_merging_is_small():
    assert (ROOT / "docs/merging_example.png").stat().st_size < 150_000
