"""What a checkpoint holds against what a network needs, in one message of few lines.

Hundreds of keys differ for one reason: a block that is missing, a network of another size, another network beside it.
So the keys are gathered: `down_blocks.0.*` stands for a group of which all keys differ, `layers.{12…23}.*` for groups
that differ in a number alone; and of each list only the first lines are shown, with the number of the rest.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping

SHOWN = 20  # lines of each kind
REMEDY = 'to leave them out: load(..., allow_unused="PATTERN") or --allow-unused PATTERN, such as "{}"'


def differences(
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    same: Callable[[tuple[int, ...], tuple[int, ...]], bool],
    permits: Callable[[str], bool],
    reason: Callable[[str], str | None],
) -> list[str]:
    """The lines of an error, the first its summary; none if the keys and shapes are the network's.

    Args:
      found: shapes in the checkpoint, by key.
      wanted: shapes of the network's parameters, by key.
      same: whether a shape in the checkpoint will do for one of the network.
      permits: whether a key may go unused.
      reason: what an unused key is part of, if it is known.
    """
    missing = sorted(wanted.keys() - found.keys())
    unused = sorted(key for key in found.keys() - wanted.keys() if not permits(key))
    other = [key for key in sorted(wanted.keys() & found.keys()) if not same(found[key], wanted[key])]
    if not (missing or unused or other):
        return []
    lines = [f"{len(missing)} keys missing, {len(unused)} unused, {len(other)} of another shape"]
    if len(missing) == len(wanted) > 1:
        lines.append("  none of the network's keys is there: these are another network's weights")
    elif len(other) > len(wanted) / 2 > 1:
        lines.append("  most shapes differ: these are weights of a network of another size than its configuration's")
    lines += cut([f"  missing: {line}" for line in gathered(missing, wanted, wanted)])
    lines += unused_lines(unused, found, reason, remedy=not missing and not other)
    lines += cut([f"  shape: {key} is {[*found[key]]}, the model wants {[*wanted[key]]}" for key in other])
    return lines


def unused_lines(
    unused: Collection[str],
    found: Mapping[str, tuple[int, ...]],
    reason: Callable[[str], str | None] = lambda key: None,
    *,
    remedy: bool = True,
) -> list[str]:
    """The lines that list unused keys, with what they are part of, and how to permit them."""
    if not unused:
        return []
    of = {what: [key for key in unused if reason(key) == what] for what in dict.fromkeys(map(reason, unused))}
    lines = []
    for what, keys in of.items():
        lines += [f"  unused: {line}{f', of {what}' if what else ''}" for line in gathered(keys, found, found)]
    example = re.sub(r" .*|\.[^.]*$", "", lines[0].removeprefix("  unused: ")) + ".*"
    return cut(lines) + ([f"  {REMEDY.format(example)}"] if remedy else [])


def gathered(keys: Collection[str], shapes: Mapping[str, tuple[int, ...]], among: Collection[str]) -> list[str]:
    """Keys in a few words: a group for all that begin alike, if every key of `among` that begins so is one of them.

    Example:
      >>> among = {"a.0.w": (2,), "a.0.b": (), "a.1.w": (2,), "a.1.b": (), "c.w": (3,), "c.b": (), "d": ()}
      >>> gathered(["a.0.b", "a.0.w", "c.w"], among, among)
      ['a.0.* (2 keys)', 'c.w [3]']
      >>> gathered(["a.0.b", "a.0.w", "a.1.b", "a.1.w", "d"], among, among)
      ['a.* (4 keys)', 'd []']
    """
    ours, all_of_them = Counter(), Counter()
    for counts, names in ((ours, keys), (all_of_them, among)):
        for key in names:
            counts.update(_beginnings(key))
    groups: dict[str, int] = {}
    for key in sorted(keys, key=_natural):
        whole = (start for start in _beginnings(key) if 1 < ours[start] == all_of_them[start])
        group = next(whole, None)
        groups[key if group is None else group] = 0 if group is None else ours[group]
    lines, run = [], []
    for name, count in [*groups.items(), ("", 0)]:
        if run and not _continues(run[-1], (name, count)):
            lines.append(_line(run, shapes))
            run = []
        run.append((name, count))
    return lines


def cut(lines: list[str]) -> list[str]:
    """The first lines; in place of the others, how many there are."""
    rest = len(lines) - SHOWN
    return lines if rest <= 0 else [*lines[:SHOWN], f"  … and {rest} more such lines"]


def _natural(key: str) -> list[int | str]:
    # layers.10 after layers.9
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", key)]


def _beginnings(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _continues(last: tuple[str, int], this: tuple[str, int]) -> bool:
    # layers.2 after layers.1, with as many keys
    (before, _, first), (after, _, second) = last[0].rpartition("."), this[0].rpartition(".")
    numbers = first.isdecimal() and second.isdecimal()
    return numbers and before == after and last[1] == this[1] > 0 and int(second) == int(first) + 1


def _line(run: list[tuple[str, int]], shapes: Mapping[str, tuple[int, ...]]) -> str:
    (first, count), (last, _) = run[0], run[-1]
    if not count:
        return f"{first} {[*shapes[first]]}"
    if len(run) == 1:
        return f"{first}.* ({count} keys)"
    before, _, number = first.rpartition(".")
    return f"{before}.{{{number}…{last.rpartition('.')[2]}}}.* ({len(run) * count} keys)"
