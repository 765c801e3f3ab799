"""The space that gradients span: known ranks, spectra and cosines, and errors of projections."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import lbgm_compress
from lbgm_compress.analysis import GradientSpace

SHAPES = {"weight": (40, 25), "bias": (60,), "scale": ()}


def gradients(matrix, shapes=None, dtype=torch.float32):
    """Return a gradient for each row of a matrix (T, n)."""
    shapes = {"weight": (matrix.shape[1],)} if shapes is None else shapes
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    return [
        {
            name: part.reshape(shape).to(dtype)
            for (name, shape), part in zip(shapes.items(), torch.split(row, sizes), strict=True)
        }
        for row in torch.tensor(matrix)
    ]


def filled(grads, **arguments):
    space = GradientSpace(**arguments)
    for grad in grads:
        space.add(grad)
    return space


def low_rank(rank, epochs, size, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((epochs, rank)) @ rng.standard_normal((rank, size))


def with_spectrum(variances, size=300, seed=0):
    """Return a matrix whose principal components explain these variances."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((len(variances), len(variances))))[0]
    right = np.linalg.qr(rng.standard_normal((size, len(variances))))[0]
    return left @ np.diag(np.sqrt(variances)) @ right.T


def direct(matrix):
    """Return singular values and right singular vectors of the kept float32 rows, in float64."""
    _, values, directions = np.linalg.svd(matrix.astype(np.float32).astype(float), False)
    return values, directions


def smallest(values, share):
    explained = np.cumsum(values**2) / np.sum(values**2)
    return int(np.argmax(explained >= share)) + 1


@pytest.fixture(params=["memory", "file"])
def arguments(request, tmp_path):
    return {} if request.param == "memory" else {"file": tmp_path / "gradients.f32"}


# --- exact -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 7, 29, 40])
def test_known_rank_is_found_exactly(rank, arguments):
    space = filled(gradients(low_rank(rank, 40, 3000)), **arguments)
    assert space.rank() == rank
    assert space.history(1.0)[:rank] == list(range(1, rank + 1))
    assert set(space.history(1.0)[rank:]) <= {rank}


def test_known_rank_of_each_layer_is_found_exactly(arguments):
    ranks = {"weight": 5, "bias": 3, "scale": 1}
    parts = [
        low_rank(rank, 20, int(np.prod(shape)), seed)
        for seed, (rank, shape) in enumerate(zip(ranks.values(), SHAPES.values(), strict=True))
    ]
    grads = gradients(np.concatenate(parts, 1), SHAPES)
    space = filled(grads, per_layer=True, **arguments)
    assert {layer: space.rank(layer=layer) for layer in space.layers} == ranks
    assert space.rank() == sum(ranks.values())


def test_more_gradients_than_entries_span_as_many_directions_as_there_are_entries():
    assert filled(gradients(low_rank(9, 50, 9))).rank() == 9


def test_numbers_of_a_known_spectrum_are_exact(arguments):
    variances = 1 / np.arange(1, 31) ** 2
    space = filled(gradients(with_spectrum(variances)), **arguments)
    assert np.allclose(space.explained(), variances / variances.sum(), atol=1e-7)
    for share in (0.5, 0.9, 0.95, 0.99, 0.999):
        assert space.components(share) == smallest(np.sqrt(variances), share)
    assert space.components() == space.components(0.95)


def test_nineteen_of_twenty_equal_components_are_ninety_five_percent():
    space = filled(gradients(with_spectrum(np.ones(20))))
    assert (space.components(0.95), space.components(0.99)) == (19, 20)


def test_history_is_what_each_prefix_gives(arguments):
    grads = gradients(with_spectrum(0.8 ** np.arange(25)), {"a": (100,), "b": (20, 10)})
    space = filled(grads, per_layer=True, **arguments)
    for layer in (None, "a", "b"):
        prefixes = [filled(grads[:t], per_layer=True) for t in range(1, 26)]
        for share in (0.95, 0.99):
            found = [prefix.components(share, layer) for prefix in prefixes]
            assert space.history(share, layer) == found


def test_queries_after_every_gradient_change_nothing(arguments):
    grads = gradients(low_rank(8, 12, 1061), SHAPES)
    space = GradientSpace(per_layer=True, **arguments)
    for grad in grads:
        space.add(grad)
        space.components()
    once = filled(grads, per_layer=True)
    for layer in (None, *SHAPES):
        assert np.allclose(space.cosines(layer), once.cosines(layer), atol=1e-14)


@pytest.mark.parametrize("piece", [8 * 15, 8 * 15 * 64])
def test_pieces_of_any_width_give_the_same(piece, arguments, monkeypatch):
    matrix = low_rank(10, 15, 1061)
    monkeypatch.setattr("lbgm_compress.analysis.gram.PIECE", piece)
    space = filled(gradients(matrix, SHAPES), per_layer=True, **arguments)
    gram = matrix.astype(np.float32).astype(float) @ matrix.astype(np.float32).astype(float).T
    norms = np.sqrt(np.diag(gram))
    assert np.allclose(space.cosines(), gram / np.outer(norms, norms), atol=1e-13)


def test_cosines_are_those_of_numpys_singular_value_decomposition(arguments):
    matrix = with_spectrum(0.7 ** np.arange(12), size=1061)
    space = filled(gradients(matrix, SHAPES), per_layer=True, **arguments)
    parts = {None: slice(0, 1061), "weight": slice(0, 1000), "bias": slice(1000, 1060)}
    for layer, part in parts.items():
        rows = matrix[:, part].astype(np.float32).astype(float)
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        values, directions = direct(matrix[:, part])
        assert np.allclose(space.cosines(layer), units @ units.T, atol=1e-12)
        assert np.allclose(space.explained(layer), values**2 / np.sum(values**2), atol=1e-12)
        found = space.principal_cosines(0.95, layer=layer)
        assert found.shape == (12, smallest(values, 0.95))
        expected = units @ directions.T[:, : found.shape[1]]
        assert np.allclose(np.abs(found), np.abs(expected), atol=1e-8)
        assert np.allclose(np.abs(found.T @ expected), np.abs(expected.T @ expected), atol=1e-7)


def test_signs_of_principal_components_do_not_depend_on_the_file(tmp_path):
    grads = gradients(low_rank(6, 10, 500))
    found = filled(grads).principal_cosines(count=6)
    assert found.shape == (10, 6)
    # The gradient with the largest part along a component has a positive cosine.
    parts = (
        found
        * np.linalg.norm(np.stack([grad["weight"].numpy() for grad in grads]), axis=1)[:, None]
    )
    assert (parts[np.abs(parts).argmax(0), np.arange(6)] > 0).all()
    again = filled(grads, file=tmp_path / "rows").principal_cosines(count=6)
    assert np.allclose(found, again, atol=1e-9)


def test_names_may_come_in_any_order(arguments):
    grads = gradients(low_rank(4, 6, 1061), SHAPES)
    turned = [dict(reversed(grad.items())) if i % 2 else grad for i, grad in enumerate(grads)]
    space, straight = filled(turned, **arguments), filled(grads)
    assert np.array_equal(space.cosines(), straight.cosines())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("projection", [None, 32])
def test_other_dtypes_are_those_numbers_in_float32(dtype, projection):
    grads = gradients(low_rank(4, 6, 200), dtype=dtype)
    single = [{"weight": grad["weight"].float()} for grad in grads]
    found, expected = filled(grads, projection=projection), filled(single, projection=projection)
    assert np.allclose(found.cosines(), expected.cosines(), atol=1e-7)


def test_views_and_tensors_that_require_gradients_are_taken(arguments):
    weights = [torch.randn(30, 20, requires_grad=True) for _ in range(3)]
    space = filled([{"w": w.t()[::2]} for w in weights], **arguments)
    copies = filled([{"w": w.detach().t()[::2].clone()} for w in weights])
    assert np.array_equal(space.cosines(), copies.cosines())


def test_gradient_of_zeros_has_cosine_zero_and_no_component(arguments):
    space = filled([{"w": torch.zeros(9)}, {"w": torch.ones(9)}], per_layer=True, **arguments)
    assert space.cosines("w").tolist() == [[0, 0], [0, 1]]
    assert space.principal_cosines().tolist() == [[0], [1]]
    assert space.history() == [0, 1]
    nothing = filled([{"w": torch.zeros(9)}])
    assert (nothing.components(), nothing.rank(), nothing.explained().tolist()) == (0, 0, [0.0])
    assert nothing.principal_cosines().shape == (1, 0)


def test_space_without_gradients_has_no_components():
    space = GradientSpace()
    assert (len(space), space.components(), space.rank(), space.history()) == (0, 0, 0, [])
    assert space.cosines().shape == (0, 0)


# --- projected -------------------------------------------------------------------------------


def products(grads, **arguments):
    """Return the Gram matrix of the whole gradients."""
    return filled(grads, **arguments).state_dict()["gram"].sum(0).numpy()


def test_projected_inner_products_are_right_in_the_mean_and_have_the_documented_variance():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 400)) * rng.exponential(1, 400)
    y = 0.5 * x + y
    size, seeds = 64, range(400)
    grads = gradients(np.stack([x, y]), dtype=torch.float64)
    found = np.array([products(grads, projection=size, seed=seed)[0, 1] for seed in seeds])
    variance = (x @ x * (y @ y) + (x @ y) ** 2 - 2 * np.sum(x**2 * y**2)) / size
    assert variance <= 2 / size * (x @ x) * (y @ y)
    assert abs(found.mean() - x @ y) < 4 * np.sqrt(variance / len(seeds))
    assert found.var() == pytest.approx(variance, rel=0.3)


@pytest.mark.parametrize("per_layer", [False, True])
def test_projected_cosines_have_the_documented_standard_error(per_layer):
    grads = gradients(low_rank(5, 6, 1500), {"a": (1000,), "b": (500,)})
    exact = filled(grads).cosines()
    size = 100
    errors = np.stack(
        [
            filled(grads, projection=size, seed=seed, per_layer=per_layer).cosines() - exact
            for seed in range(100)
        ]
    )
    above = np.triu_indices(6, 1)
    spread = np.sqrt((errors**2).mean(0))[above]
    assert (spread <= 1.25 * (1 - exact[above] ** 2) / np.sqrt(size)).all()


@pytest.mark.parametrize("per_layer", [False, True])
def test_projected_components_are_within_the_documented_bounds(per_layer):
    rank, epochs, size = 6, 15, 1000
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((epochs, rank)) @ np.diag(0.5 ** np.arange(rank))
    matrix = matrix @ rng.standard_normal((rank, 4000))
    grads = gradients(matrix, {"a": (2500,), "b": (1500,)}, torch.float64)
    values, directions = direct(matrix)
    exact = np.cumsum(values**2) / np.sum(values**2)
    coordinates = matrix @ directions[:rank].T
    inverse = np.linalg.pinv(coordinates)
    squares = []
    for seed in range(30):
        arguments = {"projection": size, "seed": seed, "per_layer": per_layer}
        space = filled(grads, **arguments)
        distorted = inverse @ products(grads, **arguments) @ inverse.T
        eps = np.abs(np.linalg.eigvalsh(distorted) - 1).max()
        squares.append(eps**2)
        assert space.rank() == rank
        missed = 1 - np.cumsum(space.explained())[: rank - 1]
        ratios = missed / (1 - exact[: rank - 1])
        assert (ratios <= (1 + eps) / (1 - eps) + 1e-9).all()
        assert (ratios >= (1 - eps) / (1 + eps) - 1e-9).all()
        for share in (0.95, 0.99):
            low = 1 - (1 - share) * (1 + eps) / (1 - eps)
            high = 1 - (1 - share) * (1 - eps) / (1 + eps)
            found = space.components(share)
            assert smallest(values, low - 1e-9) <= found <= smallest(values, high + 1e-9)
    assert np.mean(squares) <= rank * (rank + 1) / size
    assert np.sqrt(np.mean(squares)) == pytest.approx(2 * np.sqrt(rank / size), rel=0.4)


def test_tensors_no_larger_than_the_projection_are_kept_as_they_are():
    grads = gradients(low_rank(4, 6, 1061), SHAPES)
    exact = filled(grads, per_layer=True)
    projected = filled(grads, per_layer=True, projection=60)
    for layer in ("bias", "scale"):
        assert np.allclose(projected.cosines(layer), exact.cosines(layer), atol=1e-6)
    assert np.abs(projected.cosines("weight") - exact.cosines("weight")).max() > 1e-3
    whole = filled(grads, projection=1061)
    assert np.allclose(whole.cosines(), exact.cosines(), atol=1e-6)


def test_layers_do_not_share_their_random_numbers():
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    # With the same bins and signs, these would be projected to zero.
    gram = products([{"a": x, "b": -x}], projection=400)
    assert gram[0, 0] == pytest.approx(2 * float(x @ x), rel=0.4)


def test_projection_is_that_of_its_seed():
    grads = gradients(low_rank(4, 6, 1061), SHAPES)
    first = filled(grads, projection=50, seed=1).cosines()
    assert np.array_equal(first, filled(grads, projection=50, seed=1).cosines())
    assert not np.allclose(first, filled(grads, projection=50, seed=2).cosines())


# --- errors ----------------------------------------------------------------------------------

GOOD = {"a": torch.ones(2, 3), "b": torch.ones(4)}
BAD = {
    "missing": ({"a": torch.ones(2, 3)}, ValueError, "has no tensor 'b'"),
    "more": ({**GOOD, "c": torch.ones(1)}, ValueError, "has a tensor 'c'"),
    "shape": (
        {"a": torch.ones(3, 2), "b": torch.ones(4)},
        ValueError,
        r"'a' has shape \(3, 2\), expected \(2, 3\)",
    ),
    "nan": ({**GOOD, "b": torch.tensor([1, 2, 3, float("nan")])}, ValueError, "'b' has inf or nan"),
    "inf": ({**GOOD, "b": torch.tensor([1, 2, 3, float("inf")])}, ValueError, "'b' has inf or nan"),
    "beyond": ({**GOOD, "b": torch.full((4,), 1e40, dtype=torch.float64)}, ValueError, "float32"),
    "integers": ({**GOOD, "b": torch.ones(4, dtype=torch.int64)}, TypeError, "'b' must be one of"),
    "array": ({**GOOD, "b": np.ones(4)}, TypeError, "'b' must be a torch.Tensor"),
    "sparse": ({**GOOD, "b": torch.ones(4).to_sparse()}, TypeError, "'b' must be dense"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("projection", [None, 3])
def test_bad_gradient_raises_and_changes_nothing(case, projection):
    grads, kind, message = BAD[case]
    space = GradientSpace(per_layer=True, projection=projection)
    space.add(GOOD)
    with pytest.raises(kind, match=message):
        space.add(grads)
    space.add({name: 2 * grad for name, grad in GOOD.items()})
    assert len(space) == 2
    assert space.history(1.0) == [1, 1]


def test_bad_first_gradient_fixes_no_shapes():
    space = GradientSpace()
    with pytest.raises(ValueError, match="inf or nan"):
        space.add({"a": torch.tensor([float("nan")])})
    with pytest.raises(ValueError, match="at least one"):
        space.add({})
    space.add(GOOD)
    assert len(space) == 1


def test_large_float32_numbers_are_finite():
    space = filled([{"a": torch.full((9,), 3e38)}, {"a": torch.full((9,), -3e38)}])
    assert space.cosines().tolist() == [[1, -1], [-1, 1]]


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="projection must be at least 1, not 0"):
        GradientSpace(projection=0)
    with pytest.raises(ValueError, match="projection or file"):
        GradientSpace(projection=4, file="x")
    space = filled([GOOD])
    with pytest.raises(ValueError, match="share must be above 0 and at most 1, not 95"):
        space.components(95)
    with pytest.raises(ValueError, match="needs a GradientSpace with per_layer=True"):
        space.components(layer="a")
    with pytest.raises(ValueError, match="no layer 'c', the layers are a, b"):
        filled([GOOD], per_layer=True).history(layer="c")
    with pytest.raises(ValueError, match="count must be from 0 to 1, not 2"):
        space.principal_cosines(count=2)


def test_file_of_somebody_else_is_left_alone(tmp_path):
    file = tmp_path / "notes"
    file.write_text("mine")
    space = GradientSpace(file=file)
    with pytest.raises(FileExistsError, match="notes is there already"):
        space.add(GOOD)
    assert (file.read_text(), len(space)) == ("mine", 0)


def test_gradient_that_cannot_be_written_changes_nothing(tmp_path):
    folder = tmp_path / "folder"
    space = GradientSpace(file=folder / "rows")
    with pytest.raises(FileNotFoundError):
        space.add(GOOD)
    folder.mkdir()
    space.add(GOOD)
    with (folder / "rows").open("ab") as file:
        file.write(b"half of a gradient")
    space.add({"a": -torch.ones(2, 3), "b": torch.ones(4)})
    assert (folder / "rows").stat().st_size == 2 * 4 * 10
    assert space.cosines()[0].round(6).tolist() == [1, -0.2]


# --- state -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["memory", "file", "projection"])
def test_saved_space_goes_on_where_it_was(mode, tmp_path):
    arguments = {"memory": {}, "file": {"file": tmp_path / "rows"}, "projection": {"projection": 9}}
    made = {"per_layer": True, **arguments[mode]}
    grads = gradients(low_rank(6, 10, 1061), SHAPES)
    whole = filled(grads, per_layer=True) if mode == "file" else filled(grads, **made)
    space = filled(grads[:6], **made)
    torch.save(space.state_dict(), tmp_path / "state.pt")
    # A gradient that came after the saved state is added again.
    space.add(grads[7])
    again = GradientSpace(**made)
    if mode != "file":
        # One that held something else.
        again = filled(gradients(low_rank(2, 8, 1061, seed=1), SHAPES), **made)
        again.history()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert len(again) == 6
    for grad in grads[6:]:
        again.add(grad)
    assert again.history() == whole.history()
    for layer in (None, *SHAPES):
        assert np.allclose(again.cosines(layer), whole.cosines(layer), atol=1e-13)


def test_state_with_a_file_is_small(tmp_path):
    space = filled(gradients(low_rank(3, 10, 100_000)), file=tmp_path / "rows")
    torch.save(space.state_dict(), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").stat().st_size < 5000
    assert (tmp_path / "rows").stat().st_size == 4 * 10 * 100_000


def test_wrong_state_raises_and_changes_nothing(tmp_path):
    space = filled([GOOD])
    state = space.state_dict()
    with pytest.raises(ValueError, match="per_layer=False, expected True"):
        GradientSpace(per_layer=True).load_state_dict(state)
    with pytest.raises(ValueError, match="in_file=False, expected True"):
        GradientSpace(file=tmp_path / "rows").load_state_dict(state)
    projected = filled([GOOD], projection=4, seed=1)
    with pytest.raises(ValueError, match="seed=1, expected 0"):
        GradientSpace(projection=4).load_state_dict(projected.state_dict())
    part = {name: state[name] for name in list(state)[:5]}
    others = ({"format": 99}, {"count": 2}, {"rows": []})
    for wrong in ({}, part, *({**state, **other} for other in others)):
        with pytest.raises(ValueError, match="state"):
            space.load_state_dict(wrong)
    kept = filled([GOOD], file=tmp_path / "rows").state_dict()
    (tmp_path / "rows").write_bytes(b"short")
    with pytest.raises(ValueError, match="has 5 bytes, expected at least 40"):
        GradientSpace(file=tmp_path / "rows").load_state_dict(kept)
    assert (len(space), space.components()) == (1, 1)


# --- memory ----------------------------------------------------------------------------------

MEASURE = """
import json, re, sys
from pathlib import Path
import numpy as np, torch
from lbgm_compress.analysis import GradientSpace

def status(what):
    return 1024 * int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

grads = {f"layer {i}": torch.empty(250_000) for i in range(8)}
np.linalg.eigh(np.ones((300, 300)) @ np.ones((300, 300)))
for grad in grads.values():
    grad.normal_()
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
space = GradientSpace(**json.loads(sys.argv[1]))
for epoch in range(30):
    for grad in grads.values():
        grad.add_(epoch)
    space.add(grads)
space.history(0.99)
space.principal_cosines()
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        ({"file": "rows", "per_layer": True}, 8),
        ({"projection": 8192}, 1),
    ],
    ids=str,
)
def test_memory_is_bounded_whatever_the_number_of_gradients(arguments, layers, tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc/self")
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(arguments)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    bound = 4 * 2_000_000 + 2**26 + 24 * 30**2 * (layers + 4)
    bound += 8 * arguments.get("projection", 0) * 30 * layers
    assert bound < 4 * 30 * 2_000_000
    assert int(process.stdout) <= bound


# --- files -----------------------------------------------------------------------------------


def read(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_tables_hold_what_the_methods_return(tmp_path):
    grads = gradients(with_spectrum(0.5 ** np.arange(8), size=1061), SHAPES)
    space = filled(grads, per_layer=True)
    accuracies = [0.1 * t for t in range(8)]
    space.write_csv(tmp_path, {"accuracy": accuracies})
    components = read(tmp_path / "components.csv")
    assert list(components[0]) == ["epoch", "layer", "n95", "n99", "accuracy"]
    for layer, name in ((None, "whole"), ("weight", "weight"), ("scale", "scale")):
        rows = [row for row in components if row["layer"] == name]
        assert [int(row["epoch"]) for row in rows] == list(range(1, 9))
        assert [int(row["n95"]) for row in rows] == space.history(0.95, layer)
        assert [int(row["n99"]) for row in rows] == space.history(0.99, layer)
        assert [float(row["accuracy"]) for row in rows] == pytest.approx(accuracies)
        for file, matrix in (
            ("cosines", space.cosines(layer)),
            ("principal_cosines", space.principal_cosines(0.99, layer=layer)),
        ):
            lines = [list(row.values()) for row in read(tmp_path / f"{file}.csv")]
            found = [[float(x) for x in line[2:] if x] for line in lines if line[1] == name]
            assert np.allclose(found, matrix, atol=1e-6)
    assert "-0.000000" not in (tmp_path / "cosines.csv").read_text()


def test_tables_are_the_same_twice(tmp_path):
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        filled(gradients(low_rank(5, 9, 1061), SHAPES), per_layer=True).write_csv(folder)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_wrong_metrics_raise_before_anything_is_written(tmp_path):
    space = filled([GOOD])
    for metrics in ({"accuracy": [0.1, 0.2]}, {"n95": [1.0]}):
        with pytest.raises(ValueError, match=next(iter(metrics))):
            space.write_csv(tmp_path, metrics)
    with pytest.raises(ValueError, match="accuracy has 2 numbers, expected 1"):
        space.plot(tmp_path, [0.1, 0.2])
    with pytest.raises(ValueError, match="nothing to draw"):
        GradientSpace().plot(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layers", [0, 5])
def test_three_figures_are_drawn(layers, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("lbgm_compress.analysis.plots.PANELS", 4)
    shapes = {f"layer {i}": (10 + i,) for i in range(max(layers, 1))}
    size = sum(10 + i for i in range(max(layers, 1)))
    matrix = with_spectrum(0.5 ** np.arange(6), size=max(size, 10))
    # A layer whose gradients are all zero has no component to draw.
    matrix[:, : 10 if layers else 0] = 0
    space = filled(gradients(matrix, shapes), per_layer=layers > 0)
    space.plot(tmp_path, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "a title")
    names = ["components.png", "cosines.png", "principal.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        data = (tmp_path / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) < 200_000


def test_one_gradient_is_enough_to_draw(tmp_path):
    pytest.importorskip("matplotlib")
    filled([GOOD]).plot(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_without_matplotlib_plot_says_what_to_install(tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    # As in a process that has drawn nothing yet.
    monkeypatch.delitem(sys.modules, "lbgm_compress.analysis.plots", raising=False)
    monkeypatch.delattr(lbgm_compress.analysis, "plots", raising=False)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        filled([GOOD]).plot(tmp_path)
