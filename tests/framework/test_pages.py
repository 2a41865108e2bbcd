"""The layout of heads in pages, against loops: every token keeps its place, no two share one, and the room suffices."""

from types import ModuleType

import array_api_compat.numpy
import array_api_compat.torch
import array_api_strict
import jax.numpy
import numpy as np
import pytest

from framework.pages import Pages, first_places, joined, owners, pages, places, slots_of, taken

SPACES = {
    "numpy": array_api_compat.numpy,
    "torch": array_api_compat.torch,
    "jax": jax.numpy,
    "strict": array_api_strict,
}
COUNTS = np.array([[5, 0, 17, 8], [1, 16, 9, 31], [3, 3, 24, 7]], np.int32)  # 3 rows, 4 heads
SLOTS = 33


@pytest.fixture(params=SPACES)
def xp(request: pytest.FixtureRequest) -> ModuleType:
    return SPACES[request.param]


def expected_layout(counts: np.ndarray, size: int, spare: int) -> tuple[list[int], list[int]]:
    """Where each head begins and the head of each page, one head after the other."""
    first, owner = [], []
    for head, count in enumerate(counts.flatten()):
        first.append(len(owner) * size)
        while len(owner) * size < first[-1] + count + spare:
            owner.append(head)
    return first, owner


@pytest.mark.parametrize("spare", [1, 6])
def test_heads_stand_one_behind_the_other(xp: ModuleType, spare: int) -> None:
    first, owner = expected_layout(COUNTS, 8, spare)
    layout = Pages(size=8, count=len(owner) + 2, spare=spare)
    found = first_places(xp, xp.asarray(COUNTS), layout)
    assert np.asarray(found).tolist() == np.array(first).reshape(3, 4).tolist()
    left_over = [11, 11]  # two pages more than needed: the last head's
    assert np.asarray(owners(xp, found, layout)).tolist() == owner + left_over


def test_what_goes_into_pages_comes_out_again(xp: ModuleType) -> None:
    random = np.random.default_rng(5)
    layout = Pages(size=8, count=len(expected_layout(COUNTS, 8, 2)[1]), spare=2)
    first = first_places(xp, xp.asarray(COUNTS), layout)
    filled = np.arange(SLOTS) < COUNTS[..., None]
    for rest in ((), (5,)):
        x = random.normal(size=(3, 4, SLOTS, *rest)).astype(np.float32)
        x[~filled] = -9.0
        run = taken(xp, joined(xp.asarray(x), xp), slots_of(xp, first, layout, SLOTS), -9.0)
        assert run.shape == (layout.places, *rest)
        numbers = np.asarray(run)
        for row in range(3):
            for head in range(4):
                begin, count = int(np.asarray(first)[row, head]), COUNTS[row, head]
                np.testing.assert_array_equal(numbers[begin : begin + count], x[row, head, :count])
        assert (numbers != -9.0).sum() == x[filled].size
        back = taken(xp, run, places(xp, first, layout, SLOTS), -9.0)
        np.testing.assert_array_equal(np.asarray(back), x)


def test_no_place_belongs_to_two_heads(xp: ModuleType) -> None:
    layout = Pages(size=8, count=len(expected_layout(COUNTS, 8, 3)[1]), spare=3)
    first = first_places(xp, xp.asarray(COUNTS), layout)
    place = np.asarray(places(xp, first, layout, 60))
    mine = place[place >= 0]
    assert len(set(mine.tolist())) == len(mine) == layout.places
    assert ((place >= 0).sum(-1) >= COUNTS + 3).all()


def test_pages_suffice_however_the_total_is_divided() -> None:
    random = np.random.default_rng(7)
    for _ in range(300):
        heads, mean = int(random.integers(1, 17)), int(random.integers(1, 700))
        spare, growth = int(random.integers(1, 20)), int(random.integers(0, 10))
        total = heads * mean
        layout = pages(total, heads, spare, growth)
        shares = random.multinomial(total, random.dirichlet(np.full(heads, 0.3)))
        needed = sum(-(-(int(one) + growth + spare) // layout.size) for one in shares)
        assert needed <= layout.count, (total, heads, spare, growth, shares)
        assert layout.size in (8, 16, 32, 64, 128, 256)


def test_pages_waste_little() -> None:
    """At 8 heads of 1024 and an eviction at every step: an eighth; padded to one head of three times that, 200%."""
    layout = pages(8 * 1024, 8, spare=2, growth=1)
    assert layout.places <= 1.13 * 8 * 1024
