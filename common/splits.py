"""Splits that keep copies of a painting, or all paintings of an artist, on one side."""

import numpy as np


def connected_groups(*keys) -> np.ndarray:
    """Group numbers, int64 (N,): items that share a value in any of the keys (N each) are in the same group.

    Duplicates of a painting share their name or their pixels. "" is not a value.
    """
    parent = list(range(len(keys[0])))

    def root(item):
        while parent[item] != item:
            item = parent[item]
        return item

    for key in keys:
        first_with = {}
        for item, value in enumerate(key):
            if value != "":
                a, b = root(item), root(first_with.setdefault(value, item))
                parent[max(a, b)] = min(a, b)
    return np.array([root(item) for item in range(len(parent))])


def hold_out(labels: np.ndarray, groups: np.ndarray, fraction: float, seed: int, at_least_one=True) -> np.ndarray:
    """Choose about `fraction` of every class at random, as a mask (N,), without dividing a group.

    A group counts as its first member's class. Of no class are all chosen. With `at_least_one`, of every class with two
    groups or more some are chosen, even if its smallest group is more than `fraction` of the class.
    """
    random = np.random.default_rng(seed)
    _, leaders, group = np.unique(groups, return_index=True, return_inverse=True)
    members = np.zeros((len(leaders), labels.max() + 1), int)  # of each group in each class
    np.add.at(members, (group, labels), 1)
    sizes, remaining, chosen = members.sum(1), members.sum(0), np.zeros(len(leaders), bool)
    for label in np.unique(labels[leaders]):
        candidates = random.permutation(np.flatnonzero(labels[leaders] == label))
        target, taken = fraction * sizes[candidates].sum(), 0
        smallest = candidates[np.argmin(sizes[candidates])]  # the last resort, if no group fits
        for candidate in (*candidates, smallest):
            fits = taken + sizes[candidate] <= target or (at_least_one and candidate == smallest and not taken)
            leaves_some = (remaining > members[candidate])[members[candidate] > 0].all()
            if fits and leaves_some and not chosen[candidate]:
                chosen[candidate] = True
                taken += sizes[candidate]
                remaining = remaining - members[candidate]
    return chosen[group]
