"""Splits that keep copies of a painting, or all paintings of an artist, on one side."""

import numpy as np


def join(*keys) -> np.ndarray:
    """Number the items, int64 (N,), so that those that share a value in any of the keys (N each) get the same number.

    Copies of a painting share their name or their pixels. "" is no value.
    """
    number = list(range(len(keys[0])))

    def first(item):  # follows a chain to its first member
        while number[item] != item:
            item = number[item]
        return item

    for key in keys:
        seen = {}
        for item, value in enumerate(key):
            if value:
                one, other = first(item), first(seen.setdefault(value, item))
                number[max(one, other)] = min(one, other)
    return np.array([first(item) for item in range(len(number))])


def hold_out(labels: np.ndarray, groups: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose about `fraction` of every class, as a mask (N,), without dividing a group.

    A group counts as its first member's class. Of every class with two groups or more of its own some are chosen; of
    no class are all.
    """
    shuffled = np.random.default_rng(seed)
    _, leaders, group = np.unique(groups, return_index=True, return_inverse=True)
    table = np.zeros((len(leaders), labels.max() + 1), int)  # members of each group in each class
    np.add.at(table, (group, labels), 1)
    sizes, left, chosen = table.sum(1), table.sum(0), np.zeros(len(leaders), bool)
    for label in np.unique(labels[leaders]):
        own = shuffled.permutation(np.flatnonzero(labels[leaders] == label))
        wanted, taken = fraction * sizes[own].sum(), 0
        smallest = own[np.argmin(sizes[own])]  # goes where none is small enough
        for candidate in (*own, smallest):
            fits = taken + sizes[candidate] <= wanted or (candidate == smallest and not taken)
            if fits and not chosen[candidate] and (left > table[candidate])[table[candidate] > 0].all():
                chosen[candidate] = True
                taken += sizes[candidate]
                left = left - table[candidate]
    return chosen[group]
