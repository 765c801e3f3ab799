"""Public names, optional imports, the wheel and the citation."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import lbgm_compress
from lbgm_compress import compressors, reducibles

ROOT = Path(__file__).parent.parent


def test_public_names_are_pinned():
    ends = ["Compressor", "OutOfSyncError", "PayloadError", "Receiver", "Sender"]
    released = {
        *("Atomo", "ErrorFeedback", "Identity", "LBGM", "LookBackSubspace", "NormBudget"),
        *("SignSGD", "TopK"),
    }
    assert released <= set(compressors.__all__)
    assert reducibles.__all__ == ["PowerSGD", "SharedLBGM", "SharedSubspace"]
    assert lbgm_compress.__all__ == [
        *sorted([*ends, *compressors.__all__, *reducibles.__all__]),
        "parse_compressor",
    ]
    for name in lbgm_compress.__all__:
        assert getattr(lbgm_compress, name).__doc__


def test_citation_is_of_this_version():
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {lbgm_compress.__version__}" in lines


def test_importing_the_package_imports_no_engine_and_no_benchmark_library():
    code = (
        "import sys, lbgm_compress; "
        "heavy = {'horovod', 'torchft', 'flwr', 'nvflare', 'grace_dl', 'ray', 'matplotlib'};"
        "heavy |= {'rich', 'sklearn', 'scipy'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("missing", ["flwr", "safetensors"])
def test_without_flower_its_adapter_says_what_to_install(missing):
    if missing == "safetensors":
        pytest.importorskip("flwr", reason="Flower is not installed: it needs Python 3.11")
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "try:\n    import lbgm_compress.adapters.flower\n"
        "except ImportError as error:\n    print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert "pip install 'lbgm_compress[flower]'" in found.stdout


@pytest.mark.timeout(240)
def test_wheel_installed_elsewhere_round_trips(tmp_path):
    run = {"check": True, "timeout": 200, "capture_output": True, "text": True}
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], **run
    )
    [wheel] = tmp_path.glob("*.whl")
    home = tmp_path / "elsewhere"
    # torch and numpy are those of the running environment; the package is the wheel's alone.
    venv.create(home, with_pip=False, system_site_packages=False)
    target = home / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], **run)
    assert (target / "lbgm_compress" / "py.typed").exists()
    code = """
import sys, torch, lbgm_compress
from lbgm_compress import LBGM, Receiver, Sender, TopK
assert lbgm_compress.__file__.startswith(sys.argv[1]), lbgm_compress.__file__
grads = {"w": torch.randn(50, 20), "b": torch.randn(20)}
sender, receiver = Sender(LBGM(TopK(0.1))), Receiver(LBGM(TopK(0.1)), grads)
first = receiver.decompress(0, sender.compress(grads))
second = receiver.decompress(0, sender.compress(grads))
assert all(torch.allclose(first[name], second[name]) for name in grads)
print("round trip")
"""
    environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONSAFEPATH": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code, str(target)], cwd=tmp_path, env=environment, **run
    )
    assert found.stdout.strip() == "round trip"
