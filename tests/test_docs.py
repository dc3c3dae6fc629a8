"""README and docs/ are true: links resolve, flags exist, the code of docs/api.md runs."""

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("weights/*/README.md")])
CODE = re.compile(r"^```.*?^```$|^(?: {4}[^\n]*\n)+", re.M | re.S)  # fenced or indented
LINK = re.compile(r"\]\(([^)\s]+)\)")
# `python X.py ...` or `torchrun ... X.py ...` up to a remark, another command, a code span's end
COMMAND = re.compile(
    r"(?:python|torchrun)(?: --nproc_per_node \w+)? (-m (?:kernels|common|compat)\.\w+|[\w/]+\.py)"
    r"((?: {1,2}[^`\n& ]+)*)"
)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def anchors(page):
    """The anchors that GitHub gives a page's headings."""
    text = CODE.sub("", page.read_text())
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page):
    """[(script with what chooses its parser, its flags)] of every command that a page shows."""
    found = []
    text = re.sub(r" *\\\n *", " ", page.read_text())  # a command over several lines is one
    for script, rest in COMMAND.findall(text):
        flags = re.findall(r"(?<![\w-])--[a-z][\w-]*", rest)
        parser = script.split()
        if script == "data.py":
            parser += [command for command in ("prepare", "check") if command in rest.split()]
        found.append((tuple(parser), flags))
    return found


@functools.cache
def known_flags(parser):
    """What a script's --help names."""
    done = subprocess.run(
        [sys.executable, *parser, "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{shlex.join(parser)} --help: {done.stderr[-500:]}"
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", done.stdout))


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    wide = [line for line in lines if len(line) > 120 and not line.startswith("|")]
    assert not wide, wide


@pytest.mark.parametrize("name", ["directing", "faq", "files"])
def test_pages_fit_a_screen(name):
    """But for tables, whose rows are one line each."""
    lines = (ROOT / "docs" / f"{name}.md").read_text().splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


def test_readme_has_the_two_commands_that_ci_reads():
    lines = [
        line.strip()
        for line in (ROOT / "README.md").read_text().splitlines()
        if re.match(r" *pip install -r requirements\.txt && ", line)
    ]
    assert lines == [
        "pip install -r requirements.txt && python sample.py demo.mp4",
        "pip install -r requirements.txt && python -m pytest",
    ]


@each_page
def test_links_resolve(page):
    for target in LINK.findall(CODE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue  # another site's
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), f"{target}: no such file"
        if anchor:
            assert anchor in anchors(linked), f"{target}: no such heading"


@each_page
def test_commands_name_flags_that_exist(page):
    for parser, flags in commands(page):
        script = parser[0] if parser[0] != "-m" else f"{parser[1].replace('.', '/')}.py"
        assert (ROOT / script).is_file(), f"{shlex.join(parser)}: no such script"
        unknown = set(flags) - known_flags(parser) if flags else set()
        assert not unknown, f"{shlex.join(parser)} has no {', '.join(sorted(unknown))}"


def test_commands_are_found():
    """A page without commands passes the test above; these have some."""
    found = dict(commands(ROOT / "README.md"))
    assert {("sample.py",), ("ldm.py",), ("cavp.py",), ("evaluate.py",)} <= set(found)
    assert ("data.py", "prepare") in dict(commands(ROOT / "docs" / "training.md"))


@pytest.mark.filterwarnings("ignore")
def test_the_code_of_the_interface_page_runs(tmp_path):
    """Every block in order, as a reader runs them, with two steps instead of 25."""
    blocks = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs" / "api.md").read_text(), re.M | re.S
    )
    code = "\n".join(blocks)
    assert code.count("steps=25") == 2
    code = code.replace("steps=25", "steps=2")
    if subprocess.run([sys.executable, "-c", "import IPython"], capture_output=True).returncode:
        code = re.sub(r"^(from IPython.*|Audio\(.*)$", "", code, flags=re.M)
    code = "import matplotlib; matplotlib.use('Agg')\n" + code
    code += "\nassert len(result.wav) == 128000 and len(wav) == 131072 and result.marked"
    for name in ("demo.mp4", "weights"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "dubbed.mp4").stat().st_size and (tmp_path / "dubbed.wav").stat().st_size
