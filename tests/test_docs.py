"""README and site: their code runs, their links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pkgutil
import re
import runpy
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed.fsdp

import lbgm_compress
from tests.horovod_ranks import jobs_end, needs_horovod, run_horovod  # noqa: F401  a fixture
from tests.test_grace import checkout, needs_checkout

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
# Guides with a program for ranks, which starts as their diff and goes on in their Python.
HOROVOD = [pytest.mark.horovod, needs_horovod, pytest.mark.xdist_group("horovod of the docs")]
PROGRAMS = {
    "horovod": HOROVOD,
    "ddp": [],
    "diloco": [],
    "fsdp": [
        pytest.mark.skipif(
            not hasattr(torch.distributed.fsdp, "fully_shard"),
            reason="it is in torch 2.6 and later",
        )
    ],
    "grace": [*HOROVOD, pytest.mark.grace, needs_checkout],
    "lightning": [
        pytest.mark.skipif(
            importlib.util.find_spec("lightning") is None, reason="Lightning is not installed"
        )
    ],
    **{
        name: [
            pytest.mark.skipif(
                importlib.util.find_spec(name) is None, reason=f"{name} is not installed"
            )
        ]
        for name in ("transformers", "accelerate")
    },
}
END = "dist.destroy_process_group()\n"


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    line: int
    """The number of its first line."""
    code: str


def blocks(page: Path, language: str) -> list[Block]:
    """Return the fenced blocks of a page in one language."""
    text = page.read_text()
    return [
        Block(found[1], text[: found.start(2)].count("\n") + 1, found[2])
        for found in re.finditer(r"^```(\S+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
        if found[1] == language
    ]


def guide(name: str) -> Path:
    return DOCS / "guides" / f"{name}.md"


def side(diff: str, sign: str) -> str:
    """Return a diff's program with the lines of one sign."""
    lines = [line for line in diff.splitlines() if line[:1] in ("", " ", sign)]
    return "\n".join(line[1:] for line in lines) + "\n"


def changed(diff: str) -> list[str]:
    return [line for line in diff.splitlines() if line[:1] in ("+", "-") and line[1:]]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# --- Python on pages ------------------------------------------------------------------------------

WITH_PYTHON = [
    page
    for page in PAGES
    # tests/test_nvflare.py and tests/test_frameworks.py run the programs of their guides.
    if blocks(page, "python")
    and page not in [guide(name) for name in (*PROGRAMS, "nvflare", "ray")]
]


@contextlib.contextmanager
def program(name: str) -> Iterator[dict[str, object]]:
    """Yield the namespace of a module that exists meanwhile, as dataclasses in it need."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    with torch.random.fork_rng():
        try:
            yield vars(module)
        finally:
            del sys.modules[name]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_of_page_runs(page, tmp_path, monkeypatch):
    if page == guide("flower") and importlib.util.find_spec("flwr") is None:
        pytest.skip("Flower is not installed: it needs Python 3.11")
    monkeypatch.chdir(tmp_path)
    with program("page") as namespace:
        for block in blocks(page, "python"):
            # Errors name the line of the page.
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            exec(code, namespace)


# --- programs for ranks ---------------------------------------------------------------------------


def program_of(name: str, sign: str) -> str:
    """Return the program of a guide before ("-") or after ("+") the change.

    After the change it goes on in the Python blocks of the page, before it leaves its group.
    """
    [diff] = blocks(guide(name), "diff")
    code = side(diff.code, sign)
    if sign == "-":
        return code
    more = "".join(block.code for block in blocks(guide(name), "python"))
    return code.removesuffix(END) + more + (END if code.endswith(END) else "")


def run_program(rank: int, path: str, more: str | None) -> None:
    """Run a program on a rank of Horovod."""
    if more is not None and more not in sys.path:
        sys.path.append(more)
    before = Path.cwd()
    os.chdir(Path(path).parent)
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        os.chdir(before)


@pytest.mark.usefixtures("jobs_end")
@pytest.mark.timeout(250)
@pytest.mark.parametrize("sign", ["-", "+"], ids=["before", "after"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=m) for n, m in PROGRAMS.items()])
def test_program_of_guide_runs_before_and_after_the_change(name, sign, tmp_path):
    path = tmp_path / "train.py"
    path.write_text(program_of(name, sign))
    if name in ("horovod", "grace"):
        run_horovod(run_program, 2, str(path), checkout() if name == "grace" else None)
        return
    ranks = f"--nproc-per-node={4 if name == 'fsdp' else 2}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", ranks]
    # Without the change it is torch alone, which was seen to abort a rank (pytorch #190489).
    for _ in range(2 if sign == "-" else 1):
        done = subprocess.run(
            [*command, str(path)],
            capture_output=True,
            text=True,
            timeout=100,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_change_of_guide_is_a_few_lines(name):
    [diff] = blocks(guide(name), "diff")
    assert 3 <= len(changed(diff.code)) <= 6


def test_change_to_a_flower_app_is_two_lines_and_their_imports():
    pytest.importorskip("flwr", reason="Flower is not installed: it needs Python 3.11")
    from flwr.clientapp import ClientApp
    from flwr.serverapp.strategy import FedAvg

    from lbgm_compress.adapters.flower import CompressedStrategy, compression_mod

    made: list[dict[str, object]] = []
    for diff in blocks(guide("flower"), "diff"):
        assert len([line for line in changed(diff.code) if "import" not in line]) == 2
        for sign in "-+":
            names: dict[str, object] = {}
            exec(side(diff.code, sign), names)
            made.append(names)
    plain_client, client, plain_server, server = made
    assert isinstance(plain_client["app"], ClientApp)
    assert client["app"]._mods == [compression_mod]
    assert isinstance(plain_server["strategy"], FedAvg)
    assert isinstance(server["strategy"], CompressedStrategy)
    assert server["strategy"].compressor == lbgm_compress.LBGM(lbgm_compress.TopK(0.01))


# --- links ----------------------------------------------------------------------------------------


def without_code(page: Path) -> str:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "code", text)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_page_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} does not exist"
        assert file.is_relative_to(ROOT), f"{target} is outside the repository"
        if anchor:
            assert anchor in anchors(file), f"{target} is not a heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page):
    names = re.findall(
        r"(?<![\w/.-])(?:benchmarks|docs|examples|lbgm_compress|tests)/[\w/.-]*\w\.\w+",
        re.sub(r"\]\([^)]*\)", "]", page.read_text()),
    )
    for name in names:
        assert (ROOT / name).exists(), f"there is no {name}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_of_the_package_on_a_page_exist(page):
    for name in re.findall(r"`(lbgm_compress(?:\.\w+)+)[`(]", page.read_text()):
        if "flower" in name and importlib.util.find_spec("flwr") is None:
            continue
        if "nvflare" in name and importlib.util.find_spec("nvflare") is None:
            continue
        if "lightning" in name and importlib.util.find_spec("lightning") is None:
            continue
        if "transformers" in name and importlib.util.find_spec("transformers") is None:
            continue
        assert pkgutil.resolve_name(name) is not None


@pytest.mark.parametrize("image", sorted((DOCS / "images").iterdir()), ids=name_of)
def test_image_is_used(image):
    assert any(f"images/{image.name})" in page.read_text() for page in PAGES)


def test_readme_has_at_most_150_lines():
    assert len(README.read_text().splitlines()) <= 150


def test_every_public_name_is_in_the_reference():
    text = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    for name in lbgm_compress.__all__:
        assert re.search(rf"^\.\. auto\w+:: {name}$", text, re.MULTILINE), name
