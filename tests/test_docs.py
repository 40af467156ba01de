"""README and CONTRIBUTING against the repository: files, commands, modules, metrics and overrides that they name."""

from __future__ import annotations

import importlib.util
import re
import shlex
from dataclasses import fields
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_elva.config.compose import compose_all
from megatron_elva.config.validate import validate_all
from megatron_elva.training.metrics import StepMetrics

ROOT = Path(__file__).resolve().parents[1]
DOCS = ("README.md", "CONTRIBUTING.md")
STARTS = ("launchers/submit.py", "megatron_elva.training.train")
MADE_BY_USERS = ("runs", "clips", "checkpoints", "logs", "tokenizer")
"""First parts of paths that no checkout has."""
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
        if not IN_THE_REPOSITORY.fullmatch(word) or first in MADE_BY_USERS or first == ".venv":
            continue
        if "/" in word or (word.endswith(SOURCES) and word[0].isupper()) or word == "pyproject.toml":
            named.add(word)
    return named


@pytest.mark.parametrize("name", DOCS)
def test_every_file_named_is_there(name):
    links = {target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose(name)) if "://" not in target}
    named = {*links, *paths(name)}
    assert len(named) > 10, "the search for paths finds hardly any"
    missing = sorted(path for path in named if not list(ROOT.glob(path.rstrip("/"))))
    assert not missing


def test_the_first_two_commands_are_demo_and_test():
    assert commands("README.md")[:2] == (("make", "demo"), ("make", "test"))


@pytest.mark.parametrize("name", DOCS)
def test_every_make_target_is_in_the_makefile(name):
    targets = {word for line in [*commands(name), *(s.split() for s in spans(name))] if line[0] == "make"
               for word in line[1:] if "=" not in word}  # fmt: skip
    assert targets
    assert targets <= set(re.findall(r"^([\w-]+):", text("Makefile"), re.MULTILINE))


def test_every_module_that_is_run_can_be_found():
    modules = {module for name in DOCS for module in re.findall(r"-m ([a-z_][\w.]*)", text(name))}
    assert {"megatron_elva.inference.chat", "dali_pipelines.make_shards", "megatron_elva.training.train"} <= modules
    assert not [module for module in modules if importlib.util.find_spec(module) is None]


def test_the_table_of_metrics_has_exactly_the_fields_of_a_line():
    (table,) = re.findall(r"^\| key \| meaning \|\n\|---\|---\|\n((?:\|.*\n)+)", text("README.md"), re.MULTILINE)
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [f.name for f in fields(StepMetrics)]


def submissions() -> list[tuple[str, ...]]:
    """The overrides of every command that starts training."""
    found = []
    for command in commands("README.md"):
        starts = [i for i, word in enumerate(command) if word in STARTS]
        if starts and "--help" not in command:
            found.append(command[starts[0] + 1 :])
    return found


def test_there_are_submissions_to_check():
    assert len(submissions()) >= 5


@pytest.mark.parametrize("overrides", submissions(), ids=" ".join)
def test_every_submission_is_a_valid_config(overrides):
    validate_all(compose_all(list(overrides)))


@pytest.mark.parametrize("override", sorted({s for s in spans("README.md") if re.fullmatch(r"[\w.]+=[\w./-]+", s)}))
def test_every_override_in_the_text_composes(override):
    # some are named because they are refused, which happens later
    compose_all([override] if override.startswith("stage=") else ["stage=all", override])


def test_every_example_of_an_annotation_is_read(tmp_path):
    from dali_pipelines.make_shards import Entry, read_annotations

    (block,) = blocks("README.md", "json")
    for media in re.findall(r'"(?:video|image)": "([^"]+)"', block):
        (tmp_path / media).touch()
    annotations = tmp_path / "annotations.jsonl"
    annotations.write_text(block)
    entries = list(read_annotations(annotations))
    assert len(entries) == len(block.splitlines())
    assert all(isinstance(entry, Entry) for entry in entries), entries


def test_the_picture_is_well_formed_and_brings_no_other_files():
    picture = text("docs/architecture.svg")
    ElementTree.fromstring(picture)
    assert "href" not in picture and "@import" not in picture and "url(http" not in picture
