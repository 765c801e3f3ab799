"""The analysis of a training, run as users run it, and the model that it adds."""

from __future__ import annotations

import csv
import json
import sys

import pytest
import torch

from benchmarks import gradient_space
from benchmarks.common.models import IMAGE_MODELS, build
from tests.idx import write_idx

FILES = [
    "components.csv",
    "components.png",
    "cosines.csv",
    "cosines.png",
    "principal.png",
    "principal_cosines.csv",
    "summary.json",
]
SMALL = ["--epochs", "4", "--batch-size", "200", "--model", "linear"]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def read(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def refused(arguments, capsys):
    """Return the one line that a command line is refused with."""
    with pytest.raises(SystemExit) as stopped:
        gradient_space.main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return printed


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a small run with layers."""
    folder = tmp_path_factory.mktemp("finished") / "results"
    assert gradient_space.main([*SMALL, "--per-layer", "--out", str(folder)]) == 0
    return folder


def test_run_ends_with_tables_pictures_and_summary(finished):
    assert names(finished) == FILES
    for name in FILES:
        if name.endswith(".png"):
            assert (finished / name).read_bytes().startswith(b"\x89PNG")
    rows = read(finished / "components.csv")
    layers = ["whole", "1.weight", "1.bias"]
    assert [row["layer"] for row in rows] == [layer for layer in layers for _ in range(4)]
    accuracies = [float(row["accuracy"]) for row in rows[:4]]
    assert accuracies[0] < accuracies[-1]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["command"].startswith("python benchmarks/gradient_space.py --epochs 4")
    assert summary["arguments"]["lr"] == 0.01
    assert summary["versions"]["torch"] == torch.__version__
    assert not summary["interrupted"]
    assert summary["accuracy"] == pytest.approx(accuracies[-1], abs=1e-6)
    assert [layer["layer"] for layer in summary["layers"]] == layers
    for layer in summary["layers"]:
        last = [row for row in rows if row["layer"] == layer["layer"]][-1]
        assert (int(last["n95"]), int(last["n99"])) == (layer["n95"], layer["n99"])
        assert layer["n95"] <= layer["n99"] <= layer["rank"] <= 4


def test_two_runs_with_one_seed_give_the_same_tables(finished, tmp_path, capsys, monkeypatch):
    # Pictures take longest, and are not compared.
    monkeypatch.setattr(gradient_space.GradientSpace, "plot", lambda *arguments: None)
    assert gradient_space.main([*SMALL, "--per-layer", "--out", str(tmp_path / "again")]) == 0
    printed = capsys.readouterr().out
    assert "epoch 4/4" in printed
    assert "N95" in printed
    assert "1.weight" in printed
    for name in FILES:
        if name.endswith(".csv"):
            assert (tmp_path / "again" / name).read_bytes() == (finished / name).read_bytes()


def test_gradient_of_an_epoch_is_the_sum_of_its_steps(tmp_path, monkeypatch):
    arguments = [*SMALL, "--momentum", "0", "--lr", "0.5", "--images", "500"]
    options = gradient_space.build_parser().parse_args([*arguments, "--out", str(tmp_path)])
    dataset = gradient_space.prepare(options)
    assert len(dataset.train_labels) == 500
    weights = {}

    def evaluate(model, parameters, images, labels):
        weights.update({name: w.detach().clone() for name, w in parameters.items()})
        return 0.0, 0.0

    monkeypatch.setattr(gradient_space, "evaluate", evaluate)
    model = build("linear", (1, 8, 8), 10, options.seed)
    expected = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for gradient, _ in gradient_space.train(options, dataset):
        for name in expected:
            # Without momentum, weights move by the learning rate times all gradients.
            expected[name] -= 0.5 * gradient[name]
            assert torch.allclose(expected[name], weights[name], atol=1e-5)


@pytest.mark.parametrize("model", ["fcn", "cnn"])
def test_other_models_run_projected(model, tmp_path, monkeypatch):
    monkeypatch.setattr(gradient_space.GradientSpace, "plot", lambda *arguments: None)
    arguments = ["--epochs", "2", "--model", model, "--images", "256", "--test-images", "50"]
    arguments += ["--projection", "64", "--out", str(tmp_path)]
    assert gradient_space.main(arguments) == 0
    assert "projection" in json.loads((tmp_path / "summary.json").read_text())["arguments"]


def test_resnet18_runs_on_fashion_mnist(tmp_path):
    write_idx(tmp_path, train=20, test=10)
    arguments = ["--epochs", "1", "--dataset", "fashion-mnist", "--data-dir", str(tmp_path)]
    arguments += ["--model", "resnet18", "--images", "10", "--out", str(tmp_path / "results")]
    assert gradient_space.main(arguments) == 0
    assert names(tmp_path / "results") == FILES


def stopping(after, error):
    """Return a training that ends with an error after so many epochs."""
    train = gradient_space.train

    def stopped(*arguments):
        for number, epoch in enumerate(train(*arguments)):
            if number == after:
                raise error
            yield epoch

    return stopped


def test_ctrl_c_keeps_what_is_finished(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gradient_space, "train", stopping(2, KeyboardInterrupt()))
    assert gradient_space.main([*SMALL, "--out", str(tmp_path)]) == 130
    assert names(tmp_path) == FILES
    assert len(read(tmp_path / "components.csv")) == 2
    assert json.loads((tmp_path / "summary.json").read_text())["interrupted"]
    assert "Interrupted: the files hold 2 epochs" in capsys.readouterr().out


def test_ctrl_c_in_the_first_epoch_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gradient_space, "train", stopping(0, KeyboardInterrupt()))
    assert gradient_space.main([*SMALL, "--out", str(tmp_path)]) == 130
    assert names(tmp_path) == []
    assert "no epoch was finished" in capsys.readouterr().out


def test_training_that_diverges_is_told(tmp_path, capsys):
    diverging = ["--model", "fcn", "--lr", "1e30"]
    assert gradient_space.main([*SMALL, *diverging, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert "is not finite: take a smaller --lr" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "'0' is not a whole number of at least 1"),
        (["--projection", "few"], "'few' is not a whole number"),
        (["--lr", "nan"], "'nan' is not a number above 0"),
        (["--momentum", "2"], "'2' is not a number from 0 to 1"),
        (["--model", "transformer"], "invalid choice"),
        (["--device", "abacus"], "neither cpu nor cuda"),
        (["--seed", "-1"], "not from 0 to 2147483647"),
        (["--data-dir", "."], "--data-dir is for fashion-mnist"),
        (["--dataset", "fashion-mnist", "--data-dir", "missing"], "there is no such folder"),
        (["--dataset", "fashion-mnist", "--data-dir", "."], "no train-images-idx3-ubyte"),
        (["--out", "/proc/nowhere"], "cannot write there"),
        (["--epoch", "3"], "unrecognized arguments"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(arguments, capsys)


def test_without_matplotlib_nothing_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refused(["--out", str(tmp_path)], capsys)


# --- the model -------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [8, 28])
def test_resnet18_has_its_11_million_parameters(side):
    assert "resnet18" in IMAGE_MODELS
    model = build("resnet18", (1, side, side), 10, 0)
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    widths = (64, 128, 256, 512)
    expected = 9 * 64 + 9 * 64 * 64 + (512 + 1) * 10
    for before, width in zip((64, *widths), widths, strict=False):
        expected += 9 * before * width + 9 * width * width * (3 if width > 64 else 2)
        expected += before * width if width > 64 else 0
    # A norm after each of the 20 convolutions, with a weight and a bias.
    expected += 2 * (64 + 4 * 64 + 5 * (128 + 256 + 512))
    assert sum(weight.numel() for weight in model.parameters()) == expected == 11_172_810
    assert len(shapes) == 62
    assert shapes["conv1.weight"] == (64, 1, 3, 3)
    assert shapes["layer4.0.shortcut.0.weight"] == (512, 256, 1, 1)
    assert shapes["fc.weight"] == (10, 512)
    assert model(torch.zeros(3, 1, side, side)).shape == (3, 10)


def test_resnet18_treats_every_image_by_itself():
    model = build("resnet18", (1, 8, 8), 10, 0)
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    together = model(images)
    alone = torch.cat([model(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-4)
