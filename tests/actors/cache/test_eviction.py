"""What goes first, and what never: a table, and a model that is slower and simpler than the thing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.cache.archives import Found, candidates
from actors.cache.eviction import FREE_MARGIN_BYTES, Eviction, Kept, Used, excess_bytes

A, B, C, D, X, Y = (name.encode() for name in "abcdxy")
OLD = Used("old", {A, B}, 1)
NEW = Used("new", {B, C}, 2)
KEPT = {key: Kept(10) for key in (A, B, C)}
GIB = 1 << 30


def decided(eviction: Eviction, wanted: int, fetchable: dict[str, bool]) -> tuple[list[bytes], list[str]]:
    """What goes, and which trees were asked about."""
    asked = []
    while (tree := eviction.next_question(wanted)) is not None:
        asked.append(tree)
        eviction.answer(fetchable.get(tree, True))
    return [key for key, _ in eviction.chosen(wanted)], asked


@pytest.mark.parametrize(
    ("kept", "trees", "held", "wanted", "fetchable", "gone", "asked"),
    [
        # nothing to do
        (KEPT, [OLD, NEW], [], 0, {}, [], []),
        # the oldest tree first; what a younger one has too is as young as that
        (KEPT, [NEW, OLD], [], 1, {}, [A], ["old"]),
        (KEPT, [OLD, NEW], [], 11, {}, [A, B], ["old", "new"]),
        (KEPT, [OLD, NEW], [], 1000, {}, [A, B, C], ["old", "new"]),
        # what no tree has goes before all, and nobody is asked; unless somebody may just be making it
        ({**KEPT, X: Kept(10)}, [OLD, NEW], [], 10, {}, [X], []),
        ({**KEPT, X: Kept(10, young=True)}, [OLD, NEW], [], 10, {}, [A], ["old"]),
        ({X: Kept(10, young=True)}, [], [], 10, {}, [], []),
        ({X: Kept(10), Y: Kept(10)}, [], [], 10, {}, [X], []),
        # being young protects nothing that a tree has
        ({A: Kept(10, young=True)}, [OLD], [], 10, {}, [A], ["old"]),
        # a mounted tree loses nothing, whoever else has it, and however old it is
        (KEPT, [OLD, NEW], [{A, B}], 1000, {}, [C], ["new"]),
        (KEPT, [OLD, NEW], [{B}], 1000, {}, [A, C], ["old", "new"]),
        (KEPT, [OLD, NEW], [{A, B, C}], 1000, {}, [], []),
        # held by a version of a tree that is recorded no more
        ({**KEPT, X: Kept(10)}, [OLD], [{X}], 1000, {}, [C, A, B], ["old"]),
        # what cannot be had again stays, also where it is only the older of two trees that could not get it
        (KEPT, [OLD, NEW], [], 1000, {"old": False}, [C], ["old", "new"]),
        (KEPT, [OLD, NEW], [], 1000, {"new": False}, [A], ["old", "new"]),
        (KEPT, [OLD, NEW], [], 1000, {"old": False, "new": False}, [], ["old", "new"]),
        # a tree of which nothing is here is not asked about
        ({C: Kept(10)}, [OLD, NEW], [], 10, {}, [C], ["new"]),
    ],
)
def test_what_goes(
    kept: dict[bytes, Kept],
    trees: list[Used],
    held: list[set[bytes]],
    wanted: int,
    fetchable: dict[str, bool],
    gone: list[bytes],
    asked: list[str],
) -> None:
    assert decided(Eviction(kept, trees, held), wanted, fetchable) == (gone, asked)


KEYS = [bytes([number]) for number in range(8)]
SETS = st.frozensets(st.sampled_from(KEYS))


@given(
    kept=st.dictionaries(st.sampled_from(KEYS), st.builds(Kept, st.integers(0, 20), st.booleans())),
    trees=st.lists(st.tuples(SETS, st.integers(0, 5), st.booleans()), max_size=5),
    held=st.lists(SETS, max_size=2),
    wanted=st.integers(0, 100),
)
def test_a_model(
    kept: dict[bytes, Kept], trees: list[tuple[frozenset[bytes], int, bool]], held: list[frozenset[bytes]], wanted: int
) -> None:
    used = [Used(str(number), keys, used_ns) for number, (keys, used_ns, _) in enumerate(trees)]
    fetchable = {str(number): can for number, (_, _, can) in enumerate(trees)}
    gone, asked = decided(Eviction(kept, used, held), wanted, fetchable)

    def age(key: bytes) -> tuple[int, str]:
        return max(((tree.used_ns, tree.name) for tree in used if key in tree.keys), default=(-1, ""))

    def may_go(key: bytes) -> bool:
        having = [tree for tree in used if key in tree.keys]
        if any(key in keys for keys in held):
            return False
        return all(fetchable[tree.name] for tree in having) if having else not kept[key].young

    assert len(set(gone)) == len(gone) and all(key in kept and may_go(key) for key in gone)
    assert [age(key) for key in gone] == sorted(age(key) for key in gone)
    # Whatever stays and might have gone is no older than what went, unless enough had gone.
    total = sum(kept[key].size_bytes for key in gone)
    left = [key for key in kept if may_go(key) and key not in gone]
    if total < wanted:
        assert not left
    else:
        assert not gone or total - kept[gone[-1]].size_bytes < wanted
        assert all(age(key) >= age(gone[-1]) for key in left if gone)
    # Asking costs something: nobody is asked about after enough was found, and nobody twice.
    assert len(set(asked)) == len(asked) and (wanted or not asked)


@pytest.mark.parametrize(
    ("taken", "wanted", "cap", "free", "minimum", "waited_for", "excess"),
    [
        (0, 0, 100, 10 * GIB, 0, False, 0),
        (95, 0, 100, 10 * GIB, 0, False, 0),
        (96, 0, 100, 10 * GIB, 0, False, 6),  # down to 90
        (96, 3, 100, 10 * GIB, 0, True, 6),
        (96, 30, 100, 10 * GIB, 0, True, 26),  # so much is wanted
        (80, 30, 100, 10 * GIB, 0, True, 10),
        (80, 500, 100, 10 * GIB, 0, True, 0),  # it will never fit, and nothing goes for it
        (99, 500, 100, 10 * GIB, 0, True, 9),
        (0, 0, 100, GIB, 2 * GIB, False, GIB + FREE_MARGIN_BYTES),
        (0, 0, 100, 2 * GIB + FREE_MARGIN_BYTES, 2 * GIB, False, 0),
        (0, 10, 100, 2 * GIB, 2 * GIB, True, FREE_MARGIN_BYTES + 10),
    ],
)
def test_how_much_goes(taken: int, wanted: int, cap: int, free: int, minimum: int, waited_for: bool, excess: int) -> None:
    assert excess_bytes(taken, wanted, cap, free, minimum, waited_for) == excess


def test_archives_that_may_go() -> None:
    found = [Found("new", 10, 900), Found("old", 10, 1), Found("mounted", 10, 0), Found("middle", 10, 500)]
    assert candidates(found, frozenset({"mounted"}), 40, 930) == []
    # the longest unused first; neither what is mounted nor what was used in the last minute
    assert [each.name for each in candidates(found, frozenset({"mounted"}), 39, 930)] == ["old", "middle"]
