"""The counter-based draws: Random123's own vectors, and goldens that every worker must meet."""

import torch

from fastmeta import rng


def words(key: tuple[int, int], counter: tuple[int, int, int]) -> list[str]:
    seed = torch.tensor([rng.signed(key[0] | key[1] << 32)])
    out = rng.philox(seed, torch.tensor([counter[0]]), counter[1], counter[2])
    return [f"{int(w):08x}" for w in out]


def test_philox_meets_the_authors_vector():
    """Random123 kat_vectors, philox4x32 10 rounds, counter and key zero."""
    assert words((0, 0), (0, 0, 0)) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_philox_against_a_plain_loop():
    """The same rounds in Python's own integers, from the paper's description."""

    def plain(key, counter):
        k0, k1 = key
        c = [*counter, 0]
        for _ in range(10):
            p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [
                (p1 >> 32) ^ c[1] ^ k0,
                p1 & 0xFFFFFFFF,
                (p0 >> 32) ^ c[3] ^ k1,
                p0 & 0xFFFFFFFF,
            ]
            k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
        return [f"{w:08x}" for w in c]

    for key, counter in [
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF)),
        ((0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E)),
        ((1, 0x80000000), (7, 3, 1)),
    ]:
        assert words(key, counter) == plain(key, counter)


def test_goldens():
    """Every worker draws these numbers; computed once with the plain loop above."""
    seed = torch.tensor([0, 1, -1, 2**62 + 12345])
    assert rng.integers(seed, 4, 1000, 3, rng.POINTS).tolist() == GOLDEN_INTEGERS
    got = rng.uniform(seed, 3, 5, rng.JITTER) * 2**24
    assert got.long().tolist() == GOLDEN_FLOATS
    assert rng.task_seeds(7, 2, 3).tolist() == GOLDEN_SEEDS
    assert rng.permutation(3, 1, 8).tolist() == GOLDEN_PERMUTATION


GOLDEN_INTEGERS = [
    [817, 500, 983, 655],
    [913, 550, 826, 499],
    [625, 489, 331, 290],
    [556, 589, 323, 725],
]
GOLDEN_FLOATS = [
    [12649957, 16086539, 1392931],
    [7225190, 10375207, 4163281],
    [6258628, 423312, 13891786],
    [3021073, 4565327, 14533351],
]
GOLDEN_SEEDS = [7423453018131011071, 7808853396992727528, 5494607582580648938]
GOLDEN_PERMUTATION = [6, 3, 5, 0, 4, 7, 2, 1]


def test_draws_are_uniform_and_in_range():
    seed = torch.arange(50)
    u = rng.uniform(seed, 2000, 0, rng.JITTER, torch.float64)
    assert u.min() >= 0 and u.max() < 1
    # 100 000 draws: the mean within five of its standard errors, √(1/12/1e5)
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / 1e5) ** 0.5
    n = rng.integers(seed, 2000, 7, 0, rng.POINTS)
    counts = torch.bincount(n.flatten(), minlength=7).double()
    assert len(counts) == 7
    chi2 = float(((counts - 1e5 / 7) ** 2 / (1e5 / 7)).sum())
    assert chi2 < 27.9  # six degrees of freedom, one in 10 000
    upper = torch.arange(1, 51)
    assert bool((rng.integers(seed, 100, upper, 0, rng.POINTS) < upper[:, None]).all())


def test_streams_steps_and_seeds_differ():
    seed = torch.tensor([5])
    draws = {
        tuple(rng.integers(s, 8, 10**6, step, stream)[0].tolist())
        for s in (seed, seed + 1)
        for step in (0, 1)
        for stream in (rng.POINTS, rng.JITTER)
    }
    assert len(draws) == 8
    assert len(set(rng.task_seeds(0, 0, 100).tolist() + rng.task_seeds(0, 1, 100).tolist())) == 200


def test_a_permutation_is_one():
    for size in (1, 2, 17, 1000):
        assert sorted(rng.permutation(9, 4, size).tolist()) == list(range(size))
    assert rng.permutation(9, 4, 100).tolist() != rng.permutation(9, 5, 100).tolist()
