"""The script that builds Horovod, short of building it."""

from __future__ import annotations

import sys

import pytest
import torch

from lbgm_compress import LBGM, install_horovod
from lbgm_compress.install_horovod import BEFORE, FILES, InstallError, change_standard
from tests.ranks import run_ranks


def source(folder, lines=1):
    for name in FILES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("project(horovod)\n" + f"    {BEFORE}\n" * lines + "# end\n")
    return folder


def test_change_touches_one_line_of_each_file(tmp_path):
    change_standard(source(tmp_path))
    for name in FILES:
        text = (tmp_path / name).read_text()
        assert text == "project(horovod)\n    set(CMAKE_CXX_STANDARD 17)\n# end\n"


@pytest.mark.parametrize("lines", [0, 2])
def test_other_source_is_refused_and_left_alone(tmp_path, lines):
    source(tmp_path, lines)
    (tmp_path / FILES[0]).write_text(f"{BEFORE}\n")
    with pytest.raises(InstallError, match=r"horovod/torch/CMakeLists\.txt does not have the line"):
        change_standard(tmp_path)
    assert (tmp_path / FILES[0]).read_text() == f"{BEFORE}\n"


def test_wheels_are_kept_by_torch_and_python(tmp_path, monkeypatch):
    folder = install_horovod.wheel_folder(tmp_path)
    assert folder.name.startswith("torch-2.")
    assert sys.implementation.cache_tag in folder.name
    monkeypatch.setattr(install_horovod.metadata, "version", lambda name: "2.99")
    assert install_horovod.wheel_folder(tmp_path).name.startswith("torch-2.99-")


def test_missing_tools_and_failures_are_told_in_words(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(install_horovod.shutil, "which", lambda name: None)
    assert install_horovod.main(["--cache", str(tmp_path)]) == 1
    assert "there is no C++ compiler" in capsys.readouterr().err
    with pytest.raises(InstallError, match=r"it broke \(exit status 3\):\nhere is why"):
        install_horovod._run([sys.executable, "-c", "print('here is why'); exit(3)"], "it broke")
    endless = [sys.executable, "-c", "import threading; threading.Event().wait()"]
    with pytest.raises(InstallError, match="no end after"):
        install_horovod._run(endless, "it broke", None, 0.5)


def without_horovod(rank):
    for name in list(sys.modules):
        if name.split(".")[0] == "horovod" or name.startswith("lbgm_compress.adapters"):
            del sys.modules[name]
    sys.modules["horovod"] = sys.modules["horovod.torch"] = None
    from lbgm_compress.adapters.horovod import DistributedOptimizer

    DistributedOptimizer(torch.optim.SGD(torch.nn.Linear(2, 2).parameters()), LBGM())


def test_without_horovod_the_optimizer_says_what_to_run():
    [failed] = run_ranks(without_horovod, 1, failures=True)
    assert failed.kind == "ImportError"
    assert "Horovod is not installed" in failed.message
    assert "python -m lbgm_compress.install_horovod" in failed.message
