"""Where linear algebra runs: the card's first use, its memory, and the CPU when it fails.

Without a GPU: on an imitation of one, tests/oracles/card.py.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier, Event, Thread

import numpy as np
import pytest
import torch

from starmerge_models import device, load_task_vectors, merge, merge_state
from starmerge_models.deltas import Dense, LowRank
from starmerge_models.device import CPU, SHARE, Accelerator, run
from starmerge_models.methods import METHODS, Denoise, Knots, Pico, Star, Wudi
from starmerge_models.methods.kinds.spectral import CoreSpaceMerge
from starmerge_models.spectral import GramSVD, UncertainError, svd, svd_dense, truncate_and_rescale
from tests.merge_one import merge_one
from tests.oracles import metric, samples, spectra
from tests.oracles.card import CARD, LAZY, Card
from tests.products import one_in

SPECTRAL = sorted(
    "wudi:steps=20" if name == "wudi" else name
    for name, method in METHODS.items()
    if issubclass(method, CoreSpaceMerge | Star | Denoise | Pico | Knots | Wudi)
    or name in ("svc", "subspace_boosting")
)
OF_MATRICES = [name for name in SPECTRAL if name not in ("star", "denoise")]
"""Methods that see all task vectors of a tensor in Core Space."""
SHAPES = [(9, 7), (12, 40), (40, 12), (130, 140)]
THREADS = 8
CALLS_TO_BE_READY = len(device.ROUTINES) - 1  # a product is of another library


@pytest.fixture
def put_in(monkeypatch):
    """Put a card into the machine, to which matrices of every size go."""

    def put(card):
        monkeypatch.setattr(device, "ACCELERATOR", card)
        monkeypatch.setattr(device, "LARGE", 1)
        return card

    return put


def merged(deltas, method):
    """Merge the deltas of one tensor; return the result and its values."""
    found = merge_state([{"weight": delta} for delta in deltas], method, threads=1)["weight"]
    return found, samples.exact(found)


def fine_tunes(shape, kind="dense"):
    return samples.task_deltas(kind, *shape)


# -------------------------------------------------------------------------------------- First use


def decompose(delta):
    return svd(delta).first(2)


def from_user_threads(deltas):
    """Decompose in threads that the user made, all at the same moment."""
    start = Barrier(THREADS)

    def work(delta):
        start.wait()
        return decompose(delta)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, deltas))


def eight_deltas():
    return [samples.dense(40, 30, seed=seed) for seed in range(THREADS)]


@pytest.fixture
def use(request, tiny_base, make_finetune, tmp_path):
    """One way to come to the card's linear algebra from several threads at once."""
    deltas = {str(seed): delta for seed, delta in enumerate(eight_deltas())}
    models = [make_finetune("a", seed=1), make_finetune("b", seed=2)]
    vectors, out = load_task_vectors(tiny_base, models), tmp_path / "merged"
    return {
        "user threads": lambda: from_user_threads(deltas.values()),
        "merge_state": lambda: merge_state([deltas] * 2, "tsv_m", threads=THREADS),
        "star": lambda: merge(tiny_base, models, "star", output=out, threads=THREADS),
        "iso_c": lambda: merge(tiny_base, models, "iso_c", output=out, threads=THREADS),
        "TaskVectors": lambda: vectors.merge("covariance", threads=THREADS),
    }[request.param]


@pytest.mark.parametrize(
    "use", ["user threads", "merge_state", "star", "iso_c", "TaskVectors"], indirect=True
)
def test_the_card_is_made_ready_once_and_before_any_other_call(use, put_in, caplog):
    ready = []

    class Watched(Card):
        seconds_to_load = 0.05

        def make_ready(self):
            assert not self.calls
            super().make_ready()
            ready.append(len(self.calls))

    card = put_in(Watched())
    use()
    assert len(ready) == 1
    assert len({thread for thread, _ in card.calls[: ready[0]]}) == 1
    assert len(card.calls) > ready[0]
    assert not caplog.records  # such as: Again on the CPU


def test_without_making_ready_the_imitation_fails_as_torch_does(put_in, caplog):
    class Cold(Card):
        seconds_to_load = 0.05

        def make_ready(self):
            pass

    put_in(Cold())
    from_user_threads(eight_deltas())
    assert any("lazy wrapper" in record.getMessage() for record in caplog.records)


def test_what_makes_the_card_ready_calls_each_routine_that_is_loaded_lazily():
    card = Card()
    assert card.is_usable()
    assert len(card.calls) == CALLS_TO_BE_READY
    assert {routine for _, routine in card.calls} == LAZY


@pytest.mark.parametrize(
    "look",
    [
        LowRank.singular_values,
        LowRank.frobenius,
        lambda delta: svd(delta).S,
        lambda delta: Dense(delta.B).singular_values(),
    ],
)
def test_deltas_that_the_user_put_on_the_card_make_it_ready_too(look, put_in):
    card = Card()
    with card.reserve(1):
        delta = LowRank(torch.randn(9, 3).to(CARD), torch.randn(3, 7).to(CARD))
    put_in(card)
    with card.reserve(1):
        look(delta)
    assert len(card.calls) > CALLS_TO_BE_READY
    assert card.calls[0][1] == "_linalg_eigh"
    assert card.is_usable()


def test_a_card_that_cannot_be_made_ready_is_not_used(put_in, caplog):
    class Broken(Card):
        def make_ready(self):
            raise RuntimeError("CUDA error: no kernel image is available")

    card = put_in(Broken())
    for seed in range(3):
        decompose(samples.dense(30, 20, seed=seed))
    assert not card.visits
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "no kernel image" in caplog.text


def test_without_a_gpu_there_is_no_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not Accelerator().is_usable()


# ----------------------------------------------------------------------------------------- Memory


class Room(Accelerator):
    """A card of 1000 bytes, on which nothing is computed."""

    def free_memory(self):
        return 1000


@contextmanager
def visitor(card, need):
    """A thread that visits the card until the context ends; yields an event: it got in."""
    inside, leave = Event(), Event()

    def visit():
        with card.reserve(need):
            inside.set()
            leave.wait(60)

    thread = Thread(target=visit)
    thread.start()
    try:
        yield inside
    finally:
        leave.set()
        thread.join(60)


def gets_in(inside):
    return inside.wait(10)


def waits(inside):
    return not inside.wait(0.1)


def test_two_that_need_more_than_the_card_has_go_one_after_the_other():
    card, need = Room(), int(1000 * SHARE / 2) + 1
    with visitor(card, need) as first:
        assert gets_in(first)
        second = visitor(card, need)
        inside = second.__enter__()
        assert waits(inside)
    assert gets_in(inside)
    second.__exit__(None, None, None)


def test_two_that_fit_go_together():
    card, need = Room(), int(1000 * SHARE / 2)
    with visitor(card, need) as first, visitor(card, need) as second:
        assert gets_in(first)
        assert gets_in(second)


def test_what_needs_more_than_the_card_has_goes_alone():
    card = Room()
    with visitor(card, 5000) as first:
        assert gets_in(first)
        second = visitor(card, 1)
        inside = second.__enter__()
        assert waits(inside)
    assert gets_in(inside)
    second.__exit__(None, None, None)


def test_small_work_does_not_pass_large_work_that_waits():
    card = Room()
    with visitor(card, 500) as first:
        assert gets_in(first)
        large = visitor(card, 700)
        large_inside = large.__enter__()
        assert waits(large_inside)
        small = visitor(card, 200)
        small_inside = small.__enter__()
        assert waits(small_inside)
    assert gets_in(large_inside)
    assert waits(small_inside)
    large.__exit__(None, None, None)
    assert gets_in(small_inside)
    small.__exit__(None, None, None)


def test_work_that_fails_gives_its_room_back():
    card = Room()
    with pytest.raises(ZeroDivisionError), card.reserve(700):
        raise ZeroDivisionError
    with visitor(card, 700) as inside:
        assert gets_in(inside)


def test_work_within_work_takes_no_room_of_its_own(put_in):
    card = put_in(Card(memory=1000))

    def outer(place):
        return place, run(lambda place: place, home=CPU, need=900)

    assert run(outer, home=CPU, need=900) == (CARD, CARD)
    assert run(outer, home=CPU, need=None) == (CPU, CPU)
    assert card.visits == 1


@pytest.mark.parametrize("method", SPECTRAL)
def test_what_is_merged_takes_no_more_than_was_asked_for(method, put_in):
    asked = []

    class Asked(Card):
        def reserve(self, need):
            asked.append(need)
            return super().reserve(need)

    for shape in ((130, 140), (130, 200), (200, 130)):
        card = put_in(Asked())
        asked.clear()
        merged(fine_tunes(shape), method)
        if method != "denoise":  # has no stored fine-tunes to look at here
            assert asked
            assert card.peak <= max(asked)


# ----------------------------------------------------------------------------- The same results


@pytest.mark.parametrize(
    ("method", "kind", "shape"), one_in(2, OF_MATRICES, ["dense", "mixed"], SHAPES)
)
def test_every_spectral_method_gives_the_same_on_the_card(method, kind, shape, put_in, caplog):
    deltas = fine_tunes(shape, kind)
    plain, expected = merged(deltas, method)
    card = put_in(Card())
    on_card, found = merged(deltas, method)
    assert not caplog.records  # such as: Again on the CPU
    assert card.visits
    assert type(on_card) is type(plain)
    assert on_card.device == CPU
    assert card.used == 0
    # The same arithmetic, but for cart's eigenvectors: there by LAPACK, here by torch.
    close = 1e-6 if method == "cart" else 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=close * np.abs(expected).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize("method", ["tsv_m", "iso_c", "covariance", "shares", "cart", "regmean"])
def test_merges_with_a_metric_give_the_same_on_the_card(method, side, shape, put_in, caplog):
    deltas = fine_tunes(shape, "mixed" if method == "regmean" else "dense")
    n = shape[side == "columns"]
    roots = [metric.one_root(n, 3 + 20 * t, t) for t in range(4)]
    inputs, _ = metric.inputs_of(n, side=side, roots=roots)
    expected = samples.exact(merge_one(method, deltas, inputs=inputs).delta)
    asked = []

    class Asked(Card):
        def reserve(self, need):
            asked.append(need)
            return super().reserve(need)

    card = put_in(Asked())
    found = merge_one(method, deltas, inputs=inputs).delta
    assert not caplog.records  # such as: Again on the CPU
    assert found.device == CPU
    assert card.visits
    assert card.used == 0
    assert card.peak <= max(asked)
    close = 1e-5 if method == "cart" else 1e-12
    np.testing.assert_allclose(
        samples.exact(found), expected, rtol=0, atol=close * np.abs(expected).max()
    )


@pytest.mark.parametrize("method", SPECTRAL)
def test_adapters_stay_on_the_cpu(method, put_in):
    card = put_in(Card())
    merged(fine_tunes((200, 180), "low-rank"), method)
    merged([samples.low_rank(200, 180, 60, seed=t) for t in range(4)], method)
    assert not card.visits
    assert not card.calls


def test_small_matrices_stay_on_the_cpu(put_in, monkeypatch):
    card = put_in(Card())
    monkeypatch.setattr(device, "LARGE", 131)
    for method in SPECTRAL:
        merged(fine_tunes((130, 140)), method)
    assert not card.visits


@pytest.mark.parametrize("shape", [(128, 128), (130, 301), (301, 130)])
@pytest.mark.parametrize("family", ["low rank and noise", "power law", "deficient"])
@pytest.mark.parametrize("eta", [40, 90])
def test_truncations_are_those_of_the_cpu(eta, family, shape, put_in):
    matrix = torch.from_numpy(spectra.FAMILIES[family](*shape, 0)).float()
    expected, told = truncate_and_rescale(svd_dense(Dense(matrix)), eta=eta)
    card = put_in(Card())
    found, report = truncate_and_rescale(svd_dense(Dense(matrix)), eta=eta)
    assert card.visits
    assert card.used == 0
    assert report.rank == told.rank
    assert report.nuclear_before == pytest.approx(told.nuclear_before, rel=1e-5)
    size = float(torch.linalg.vector_norm(expected.to_dense()))
    assert float(torch.linalg.vector_norm(found.to_dense() - expected.to_dense())) <= 2e-5 * size


def test_singular_values_are_those_of_the_cpu_and_nothing_stays_on_the_card(put_in):
    delta = Dense(torch.from_numpy(spectra.FAMILIES["power law"](140, 200, 0)))
    expected = GramSVD(Dense(delta.tensor)).S
    card = put_in(Card())
    found = GramSVD(delta)
    assert card.used == 0
    assert found.S.device == found.error.device == CPU
    torch.testing.assert_close(found.S, expected, rtol=1e-12, atol=0)
    first = found.first(20)
    assert first.U.device == first.S.device == first.V.device == CPU
    assert card.used == 0
    exact = found.exact()
    assert exact.U.device == CPU
    assert card.used == 0
    assert card.visits == 3


# ------------------------------------------------------------------------------- The CPU behind it


@pytest.mark.parametrize("method", SPECTRAL)
def test_a_card_whose_memory_is_full_leaves_it_to_the_cpu(method, put_in):
    deltas = fine_tunes((130, 140))
    expected = merged(deltas, method)[1]
    whole = put_in(Card())
    merged([Dense(delta.tensor) for delta in deltas], method)
    for share in (0.05, 0.5, 0.99):
        small = put_in(Card(memory=int(share * whole.peak)))
        found = merged([Dense(delta.tensor) for delta in deltas], method)[1]
        assert bool(small.visits) == bool(whole.visits)
        assert small.used == 0
        # What fits may still have been done there: see the test of the same results.
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("step", ["first", "exact"])
def test_a_decomposition_of_the_card_is_finished_by_the_cpu(step, put_in):
    delta = Dense(torch.from_numpy(spectra.FAMILIES["power law"](140, 200, 0)))
    expected = svd_dense(Dense(delta.tensor)).exact()
    card = put_in(Card())
    decomposed = svd_dense(delta)
    card.memory = 1000
    found = decomposed.first(20) if step == "first" else decomposed.exact()
    values = (found.U[:, :20] * found.S[:20]) @ found.V[:, :20].T
    right = (expected.U[:, :20] * expected.S[:20]) @ expected.V[:, :20].T
    # As far as vectors of a Gram matrix are known; see test_gram.py.
    torch.testing.assert_close(values, right, rtol=0, atol=1e-9 * float(right.abs().max()))
    assert card.used == 0


def test_what_a_decomposition_is_not_sure_of_is_not_done_again(put_in):
    card = put_in(Card())
    with pytest.raises(UncertainError):
        GramSVD(Dense(torch.full((140, 150), float("nan"))))
    assert card.visits == 1


def test_an_error_of_the_driver_is_told_and_left_to_the_cpu(put_in, caplog):
    put_in(Card())

    def work(place):
        if place == CARD:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return "done"

    assert run(work, home=CPU, need=1) == "done"
    assert "illegal memory access" in caplog.text


def test_an_error_of_the_work_itself_is_raised_by_the_cpu(put_in):
    put_in(Card())
    with pytest.raises(torch.linalg.LinAlgError):
        svd(Dense(torch.full((20, 30), float("nan"))))
