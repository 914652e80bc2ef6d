"""docs/: links lead to files, and nothing that the code defines is missing."""
import ast
import dataclasses
import importlib
import re
from pathlib import Path

import pytest

import analysis
import evaluate
from benchmarks import METHODS
from lib import config, datasets, run
from probes import annotation_files, common

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def read(name):
    return (ROOT / "docs" / f"{name}.md").read_text()


def anchors(text):
    """Those that GitHub makes of the titles of a page."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_all_pages_are_there():
    assert {page.stem for page in PAGES} == {
        "README", "results", "probes", "metrics", "cluster", "datasets", "own-data",
        "first-day"}


def test_readme_is_one_page_and_its_table_has_the_lines_of_each_method():
    text = (ROOT / "README.md").read_text()
    assert len(text.encode()) <= 12_000
    for method in METHODS:
        lines = len((ROOT / f"{method}.py").read_text().splitlines())
        assert re.search(rf"^\| \[{method}\.py\].*\| {lines} \|", text, re.M), (method, lines)
    for task in evaluate.TASKS:
        assert f"`{task}`" in text, task


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_titles(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_lines_fit_a_screen_and_commands_have_a_language(page):
    in_code = False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            in_code = not in_code
            assert (line != "```") == in_code, line
        assert len(line) <= 100 or line.lstrip().startswith(("|", "![")), line
    assert not in_code


@pytest.mark.parametrize("task", evaluate.TASKS)
def test_each_task_has_a_section_with_its_flags(task):
    section = re.search(rf"^### {task}\n(.*?)(?=^##|\Z)", read("probes"), re.M | re.S)[1]
    for field in dataclasses.fields(common.Options):
        flag = f"--{field.name.replace('_', '-')}"
        if task in field.metadata["only_for"]:
            assert f"`{flag}" in section, f"{task}: {flag}"
        elif field.metadata["only_for"]:                   # and no flag that it refuses
            assert not re.search(rf"^- \*\*Flags:\*\*[^-]*`{flag}`", section, re.M), flag


def logged_keys(path):
    """Keywords of run.log(...) in a script, and the names of losses that it logs as a dict."""
    text = path.read_text()
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Attribute) and node.func.attr == "log"]
    keys = {keyword.arg for call in calls for keyword in call.keywords} - {None}
    return keys | set(re.findall(r'\["(loss_\w+)"\]', text))


@pytest.mark.parametrize("method", METHODS)
def test_each_logged_number_is_explained(method):
    keys = logged_keys(ROOT / f"{method}.py")
    assert keys >= {"lr"}
    for key in keys:
        assert f"`{key}`" in read("metrics"), key


def test_each_number_of_all_methods_is_explained():
    keys = set(run.FORMATS) | {"step", "loss", "feat_std", "data_time", "memory_gib"}
    for key in keys:
        assert f"| `{key}` |" in read("metrics"), key


@pytest.mark.parametrize("name", [*datasets.NAMES, *annotation_files.LAYOUT])
def test_each_data_set_is_listed(name):
    name = {"ade20k-full": "ade20k"}.get(name, name)       # the name that --data takes
    assert f"`{name}`" in read("datasets")
    for layouts in (datasets.LAYOUT, annotation_files.LAYOUT):
        if name in layouts and name not in ("coco", "imagenet", "imagenet100", "imagenet10"):
            layout = layouts[name][0]
            assert layout.split(", val sorted")[0] in read("datasets"), layout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags_exist(page):
    known = {method: config.fields(importlib.import_module(method).Config) for method in METHODS}
    for script, options in (("evaluate", common.Options), ("analysis", analysis.Options)):
        known[script] = {field.name for field in dataclasses.fields(options)}
    text = page.read_text().replace("\\\n", " ").replace("--help", "")
    for script, flags in re.findall(r"(?<![\w/])(\w+)\.py((?: +[^`|#\n]*)?)", text):      # commands
        for flag in re.findall(r"--([\w-]+)", flags) if script in known else ():
            assert flag.replace("-", "_") in known[script], f"{script}.py --{flag}"
    of_benchmarks = {"table", "seeds", "methods", "minutes"}
    everywhere = set().union(*known.values(), of_benchmarks)
    for flag in re.findall(r"`--([\w-]+)", text):                                        # prose
        assert flag.replace("-", "_") in everywhere, f"--{flag}"
