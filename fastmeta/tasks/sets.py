"""Sets of tasks: named, read when asked for, split by name, fed in an order that seeds fix.

A kind of signal is one module of this package. It has options (a frozen dataclass: how the data is
read, what a task sees of it) and these names, which training, fitting and evaluation call:

* ``open_splits(source, options, seed) -> (train, validation, test)`` and
  ``open_all(source, options) -> set``; what a set holds (an item) is the module's own business;
* ``shape(options) -> Shape``: what goes into a network and comes out;
* ``learn(items, options, net, seeds, per_step) -> Batch``: T tasks as training sees them;
* ``observe(items, options, net, seeds, count, per_step) -> Batch``: the same at test time, seen
  through ``count`` angles or views (where ``COUNTED`` names what is counted; else None), with the
  unseen rest, or the whole truth, as its query;
* ``picture(net, params, item, options, **how)`` and ``truth(item, options)``: images [H,W,C] in
  [0,1] of a fitted network [P] and of what it should show;
* ``COUNTED``: "angles", "views" or None; ``METRIC``: "psnr" or "mae", how predictions are scored;
  ``PLANAR``: the picture is the signal itself, an image, so that SSIM means something.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, TypeVar

from .. import rng


class Tasks(Protocol):
    """What every set can do: a length, names for its items, ``set[i]``, and ``take(indices)``."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def take(self, indices: Iterable[int]) -> Any: ...


_Set = TypeVar("_Set", bound=Tasks)


_PARTS = {"train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}  # folder -> part


class Shape(NamedTuple):
    """What goes into the networks of a kind of signal and comes out: D, C, the convention of the
    coordinates, and whether the signal lies in [0,1] (then a sine network is shifted by 0.5, a ReLU
    network ends in a sigmoid)."""

    in_features: int
    out_features: int
    coords: str
    bounded: bool


@dataclass(frozen=True, eq=False)
class TaskSet:
    """Items of any kind: ``set[i]`` is ``read(row i)``, each time anew.

    Args:
        read: row -> item; called from several threads.
        names: one for each item; splits go by name.
        rows: the reader's row of each item; None: 0, 1, 2, ...
        about: what all items have in common, such as the rate of sounds.
    """

    read: Callable[[int], Any]
    names: tuple[str, ...]
    rows: Sequence[int] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Any:
        index = range(len(self))[index]
        return self.read(index if self.rows is None else self.rows[index])

    def take(self, indices: Iterable[int]) -> TaskSet:
        """The set of some of the items, in the order given."""
        chosen = [range(len(self))[int(i)] for i in indices]
        rows = chosen if self.rows is None else [self.rows[i] for i in chosen]
        return replace(self, names=tuple(self.names[i] for i in chosen), rows=rows)


def at_least(where: str, options: object, least: int, *names: str) -> None:
    """Raise unless each of these options is None or an integer in [least, 2⁶²)."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not (isinstance(value, int) and least <= value < 2**62):
            raise ValueError(f"{where}: {name} is {value!r}; accepted is an integer >= {least}")


def refuse_changed(options: Any, chosen: str, *names: str) -> None:
    """Raise where one of these options, which have no effect with what was chosen, was given."""
    standing = {f.name: f.default for f in fields(options)}
    for name in names:
        if getattr(options, name) != standing[name]:
            came = f"{name} is {getattr(options, name)!r} with {chosen}"
            raise ValueError(f"{came}, where it has no effect; accepted is without")


def not_counted(kind: str, count: int | None) -> None:
    """Raise where angles or views were asked for of a kind of signal that has none."""
    if count is not None:
        raise ValueError(f"{kind}: count is {count}; accepted is none, nothing is counted here")


def readable(tasks: _Set) -> _Set:
    """The tasks that can be read; a warning names the others.

    Every item is read once, in threads.
    """

    def fault(index: int) -> str | None:
        try:
            tasks[index]
        except (ValueError, OSError) as error:
            return str(error)
        return None

    with ThreadPoolExecutor(2, "fastmeta-check") as pool:
        faults = list(pool.map(fault, range(len(tasks))))
    bad = [what for what in faults if what is not None]
    if bad:
        shown = "; ".join(bad[:10]) + (f"; and {len(bad) - 10} more" if len(bad) > 10 else "")
        warnings.warn(f"{len(bad)} of {len(faults)} left out: {shown}", stacklevel=2)
    return tasks.take(i for i, what in enumerate(faults) if what is None)


def split(
    tasks: _Set,
    *,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    group: str | None = None,
) -> tuple[_Set, _Set, _Set]:
    """(train, validation, test), by a hash of (seed, group): new tasks move no others.

    ``u = hash / 2⁶⁴``: validation where u < validation, test where u < validation + test, else
    train. A part that has a share but no task takes the smallest hash of the largest other part
    (and may give it back as a set grows), so three groups always suffice for three parts.

    Args:
        validation, test: shares in [0,1], together at most 1.
        group: None: each name by itself; or a regular expression with one group, searched for in
            the name: equal groups stay together, as with r"(\\d+)_", a person's number.

    Raises:
        ValueError: shares out of range, an expression that is wrong or does not match a name.
    """
    shares = (1 - validation - test, validation, test)
    if not all(-1e-9 <= share <= 1 for share in shares):
        came = f"validation is {validation}, test {test}"
        raise ValueError(f"split: {came}; accepted are shares >= 0 that sum to at most 1")
    keys = list(tasks.names) if group is None else _groups(tasks.names, group)

    def digest(key: str) -> tuple[int, str]:
        text = f"{seed}/{key}".encode("utf-8", "surrogateescape")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big"), key

    parts: list[list[str]] = [[], [], []]
    for number, key in sorted(map(digest, set(keys))):
        u = number / 2**64
        parts[1 if u < validation else 2 if u < validation + test else 0].append(key)
    for part, share in enumerate(shares):
        donor = max((p for p in (2, 1, 0) if p != part), key=lambda p: len(parts[p]))
        if share > 1e-9 and not parts[part] and len(parts[donor]) > (part != 0):
            parts[part].append(parts[donor].pop(0))
    place = {key: part for part, members in enumerate(parts) for key in members}
    return by_part(tasks, [place[key] for key in keys])


def _groups(names: Sequence[str], group: str) -> list[str]:
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise ValueError(f"split: group {group!r} is no regular expression ({error})") from error
    if pattern.groups != 1:
        raise ValueError(f"split: group {group!r} has {pattern.groups} groups; accepted is one ( )")
    found = []
    for name in names:
        match = pattern.search(name)
        if match is None or match[1] is None:
            raise ValueError(f"split: {name} does not match group {group!r}; every name must")
        found.append(match[1])
    return found


def by_part(tasks: _Set, places: Sequence[int | None]) -> tuple[_Set, _Set, _Set]:
    """(train, validation, test): the tasks whose place is 0, 1, 2; None belongs to no part."""
    train, validation, test = ([i for i, p in enumerate(places) if p == k] for k in range(3))
    return tasks.take(train), tasks.take(validation), tasks.take(test)


def folders_or_split(
    tasks: _Set,
    *,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    group: str | None = None,
) -> tuple[_Set, _Set, _Set]:
    """(train, validation, test): by the folders that names begin with, where there are such, else
    ``split``.

    Names under "train/" and under "val/" ("valid/", "validation/") or "test/" go there; others are
    left out then, and a part without a folder is split off from train by its share.
    Arguments and errors as for ``split``.
    """
    tops = [name.split("/")[0].lower() if "/" in name else "" for name in tasks.names]
    places = [_PARTS.get(top) for top in tops]
    if 0 not in places or not {1, 2} & set(places):
        return split(tasks, validation=validation, test=test, seed=seed, group=group)
    return fill(*by_part(tasks, places), validation=validation, test=test, seed=seed, group=group)


def fill(
    train: _Set,
    given_validation: _Set,
    given_test: _Set,
    *,
    validation: float,
    test: float,
    seed: int,
    group: str | None = None,
) -> tuple[_Set, _Set, _Set]:
    """The three parts of a set that brings its own split; an empty one is split off from train."""
    given = (given_validation, given_test)
    left = [
        0.0 if len(part) else share for part, share in zip(given, (validation, test), strict=True)
    ]
    train, *drawn = split(train, validation=left[0], test=left[1], seed=seed, group=group)
    checks, held_out = (g if len(g) else d for g, d in zip(given, drawn, strict=True))
    return train, checks, held_out


def feed(
    count: int,
    load: Callable[[int, list[int]], Any],
    *,
    tasks: int,
    seed: int,
    start: int = 0,
    stop: int | None = None,
    threads: int = 2,
    ahead: int = 4,
) -> Iterator[tuple[int, Any, list[int]]]:
    """(step, load(step, indices), indices) for step = start .. stop − 1, without end if None.

    Step s takes positions sT .. sT + T − 1 of the permutations ``rng.permutation(seed, epoch, n)``
    laid end to end: a function of (seed, s), so a run resumed at s sees what it would have seen.

    Args:
        count: n, how many tasks there are to choose from.
        load: called ahead of time, in ``threads`` threads, for ``ahead`` steps at most; closing the
            iterator ends them.
        tasks: T of each step.

    Raises:
        ValueError: nothing to choose from, a number out of range; at its step, what ``load`` does.
    """
    if min(tasks, start + 1, threads, ahead, count) < 1:
        came = f"{count} tasks to choose from, tasks {tasks}, start {start}, {threads} threads"
        raise ValueError(f"feed: {came}, ahead {ahead}; accepted are integers >= 1, start >= 0")
    steps = itertools.count(start) if stop is None else iter(range(start, stop))
    return _feed(count, load, tasks, seed, steps, threads, ahead)


def _feed(
    count: int,
    load: Callable[[int, list[int]], Any],
    tasks: int,
    seed: int,
    steps: Iterator[int],
    threads: int,
    ahead: int,
) -> Iterator[tuple[int, Any, list[int]]]:
    order = lru_cache(maxsize=2)(lambda epoch: rng.permutation(seed, epoch, count).tolist())
    pool = ThreadPoolExecutor(threads, "fastmeta-feed")
    waiting: deque[Any] = deque()
    try:
        while True:
            for step in itertools.islice(steps, ahead - len(waiting)):
                positions = range(step * tasks, (step + 1) * tasks)
                indices = [order(p // count)[p % count] for p in positions]
                waiting.append((step, pool.submit(load, step, indices), indices))
            if not waiting:
                return
            step, future, indices = waiting.popleft()
            yield step, future.result(), indices
    finally:
        pool.shutdown(cancel_futures=True)
