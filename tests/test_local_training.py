"""Local training of language models: short real runs in processes, and their summary."""

from __future__ import annotations

import pytest
import torch

from benchmarks import local_training
from benchmarks.common.demo import _restored, _transformed
from benchmarks.common.language import PLAYS, read_text
from benchmarks.common.local_methods import DENSE, METHODS
from benchmarks.common.power_sgd import average_by_power_sgd
from benchmarks.local_training import Row, Run, seconds, summaries
from tests.ranks import run_ranks
from tests.test_frontier import plays


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plays")
    plays(folder, PLAYS)
    return str(folder)


def run(folder, out, *arguments):
    options = ["--text-dir", folder, "--out", str(out), "--seeds", "0", "--width", "16"]
    return local_training.main(
        [*options, "--workers", "2", "--partitions", "iid", "--sync-every", "2", *arguments]
    )


# One of each kind.
KINDS = [
    *("dense", "PowerSGD 4", "SparseLoCo", "top 1/66 in model", "alone", "DeMo", "data-parallel"),
    "2 bits with Muon",
]


@pytest.mark.timeout(280)
def test_methods_of_every_kind_train_and_are_kept(tmp_path, folder, capsys):
    assert run(folder, tmp_path, "--rounds", "2", "--methods", ",".join(KINDS)) == 0
    runs = local_training.read_runs(tmp_path / "local_training.csv")
    assert [what.method for what in runs] == [name for name in METHODS if name in KINDS] == KINDS
    assert {rows[-1].final for rows in runs.values()} == {True}
    dense = runs[Run("3x16", 2, "iid", 2, 2, DENSE, 0)][-1]
    # 2 exchanges of float32, and at most 2 % more for heads and for agreeing.
    assert dense.dense_bytes <= dense.message_bytes < 1.02 * dense.dense_bytes
    assert (tmp_path / "local-training.png").stat().st_size > 10_000
    before = (tmp_path / "local_training.csv").read_bytes()
    capsys.readouterr()
    assert run(folder, tmp_path, "--rounds", "2", "--methods", "dense,SparseLoCo") == 0
    assert "1 of" not in capsys.readouterr().out
    assert (tmp_path / "local_training.csv").read_bytes() == before


@pytest.mark.timeout(120)
def test_two_runs_with_one_seed_give_the_same_rows(tmp_path, folder):
    for name in ("a", "b"):
        run(folder, tmp_path / name, "--rounds", "3", "--methods", "top 1/66 in model,DeMo")
    first, second = ((tmp_path / name / "local_training.csv").read_bytes() for name in "ab")
    assert first == second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "dens"], "--methods: 'dens' is none of dense,"),
        (["--partitions", "clubs"], "--partitions: 'clubs' is none of iid, plays"),
        (["--seeds", "-1"], "--seeds are from 0"),
        (["--width", "18"], "--width 18 is not a multiple of 4"),
        (["--text-dir", "/nowhere"], "/nowhere holds 0 plays, 36 are needed"),
    ],
)
def test_wrong_options_are_one_line(tmp_path, folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        run(folder, tmp_path, *arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_plays_are_dealt_whole_and_sequences_at_random(folder):
    whole, mixed = (read_text(folder, 4, partition, 0) for partition in ("plays", "iid"))
    for text in (whole, mixed):
        assert text.parts[0].shape[1] == 65
    assert sum(map(len, whole.parts)) == sum(map(len, mixed.parts))
    assert torch.equal(whole.test, mixed.test)
    # The end of a sequence is the beginning of the one that follows it in the play.
    joined = [
        (part[:-1, -1] == part[1:, 0]).float().mean() for part in (*whole.parts, *mixed.parts)
    ]
    assert min(joined[:4]) > 0.98
    assert max(joined[4:]) < 0.5


def test_summary_compares_with_dense_of_the_same_seeds():
    def row(method, seed, loss, sent, round_=100):
        return Row("3x128", 4, "iid", 100, 30, method, seed, round_, loss, loss, sent, 4000, True)

    rows = [row(DENSE, 0, 1.6, 4000), row(DENSE, 1, 1.8, 4000), row("SparseLoCo", 1, 1.9, 20)]
    # Results that were kept may have methods that are not in the table any more.
    rows.append(row("earlier", 1, 1.9, 20))
    runs = {of.run: [of] for of in rows}
    dense, sparse, _ = summaries(runs, "3x128", 4, "iid")
    assert (dense.method, dense.seeds, dense.above, dense.saving) == (DENSE, 2, 0.0, 1.0)
    assert sparse.above == pytest.approx(0.1)
    assert sparse.saving == pytest.approx(200)
    assert sparse.bits == pytest.approx(32 / 200 / 30)
    # A gather brings the messages of three others, a sum one and a half times the tensor.
    assert seconds(sparse, 4, 10) == pytest.approx(3 * 0.2 * 8 / 10e6)
    assert seconds(dense, 4, 10) == pytest.approx(1.5 * 40 * 8 / 10e6)


@pytest.mark.parametrize("shape", [(128, 512), (41, 64), (130,), (3, 5, 7)])
def test_cosine_transform_of_tiles_is_orthonormal(shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    components = _transformed(tensor)
    torch.testing.assert_close(_restored(components, tensor), tensor)
    torch.testing.assert_close(components.square().sum(), tensor.square().sum())
    # The first component of each tile is its mean, times the root of its size.
    constant = _transformed(torch.ones(shape))
    assert int((constant.abs() > 1e-4).sum()) * (constant.max() ** 2).round() == tensor.numel()


def power_sgd_keeps_what_it_misses(rank):
    generator = torch.Generator().manual_seed(rank)
    tensors = [torch.randn(32, 24, generator=generator), torch.randn(32, generator=generator)]
    state, applied = {}, torch.zeros(32, 24)
    for _ in range(5):
        averages, size = average_by_power_sgd(tensors, 2, state)
        applied += averages[0]
    return averages[1], applied, state["residual", 0], tensors, size


def test_power_sgd_keeps_what_it_misses():
    found = run_ranks(power_sgd_keeps_what_it_misses, 2)
    mean = (found[0][3][0] + found[1][3][0]) / 2
    left = (found[0][2] + found[1][2]) / 2
    torch.testing.assert_close(found[0][1] + left, 5 * mean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0][0], (found[0][3][1] + found[1][3][1]) / 2)
    assert torch.equal(found[0][1], found[1][1])
    # Two factors and a vector in float32.
    assert found[0][4] == 4 * (2 * (32 + 24) + 32)
