"""The merge's table, path by path, and its promises on arbitrary small trees, against a store that is a dictionary."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.mount.listing import Entry, Version
from actors.mount.merge import DECISIONS, Ours, Theirs, plan, plan_move, plan_while_running
from actors.mount.staging import parent
from actors.mount.steps import Action, Conflict, Known, Step, conflict_name, is_directory

FILE, LINK, DIRECTORY = stat.S_IFREG | 0o644, stat.S_IFLNK | 0o777, stat.S_IFDIR | 0o755


def stored(inode: int, mode: int = FILE) -> Entry:
    """A file of the store; what it contains is told by its inode modulo 10."""
    return Entry(mode, inode, (inode, 1, inode))


def staged(inode: int, mode: int = FILE) -> Entry:
    return Entry(mode, inode, (inode, 1, inode), staged=True)


def link(target: bytes) -> Entry:
    return Entry(LINK, target=target)


directory = Entry(DIRECTORY)
Tree = Mapping[bytes, Entry]


class Model:
    """A store: a View, and what carries out steps, strictly."""

    def __init__(self, tree: Tree, ours: Tree) -> None:
        self.tree, self.ours, self.inodes = dict(tree), ours, 1000

    def get(self, path: bytes) -> Entry | None:
        return self.tree.get(path)

    def children(self, path: bytes) -> Iterable[bytes]:
        return [below for below in self.tree if below and parent(below) == path]

    def same_content(self, path: bytes, of: bytes) -> bool:
        one, other = self.tree[path].content, self.ours[of].content
        return one is not None and other is not None and one[0] % 10 == other[0] % 10

    def carry_out(self, step: Step, links: Mapping[Step, Entry]) -> Entry | None:
        now = self.tree.get(step.where)
        assert now == step.expected
        if step.action is Action.REMOVE:
            assert not self.children(step.where), "only an empty directory can be removed"
            del self.tree[step.where]
            return None
        assert step.wanted is not None
        assert not parent(step.where) or is_directory(self.tree.get(parent(step.where)))
        assert is_directory(now) <= (step.action is Action.DESCRIBE), "nothing can be renamed over a directory"
        reached = Entry(step.mode, target=step.wanted.target)
        if step.wanted.content is not None:
            self.inodes += 10
            source = links[step] if step.action is Action.LINK else now if step.action is Action.DESCRIBE else step.wanted
            assert source is not None and source.content is not None
            # A link is the file itself until it is described; here every one is a copy, so that none shares a fate.
            inode = self.inodes + source.content[0] % 10
            reached = Entry(step.mode, step.wanted.mtime_ns, (inode, 1, step.wanted.mtime_ns))
        self.tree[step.where] = reached
        return reached


def merge(known: Known, ours: Tree, model: Model) -> list[Conflict]:
    """Plan and carry out, as a sync does; returns the conflicts."""
    decided = plan(known, ours, model, "T", {})
    links = {step: model.tree[step.source] for step in decided.steps if step.action is Action.LINK}
    seen = {where: model.get(where) for _, where in decided.settled}
    for step in [*decided.removals, *decided.steps]:
        known.settle(step.of, step.where, step.wanted, model.carry_out(step, links))
    undone = {conflict.path for conflict in decided.conflicts if not conflict.beside}
    for path, where in decided.settled:
        known.settle(path, where, ours.get(path), known.theirs.get(where) if path in undone else seen[where])
    known.conflicts.update((conflict.path, conflict) for conflict in decided.conflicts)
    return decided.conflicts


def letters(tree: Tree) -> dict[bytes, object]:
    """A tree with contents for versions."""
    return {path: entry.content[0] % 10 if entry.content else entry.target or "directory" for path, entry in tree.items()}


def test_the_table_is_total() -> None:
    assert set(DECISIONS) == set(product(Ours, Theirs))


BASES = {"nothing": None, "file": stored(11), "link": link(b"l"), "directory": directory}
OURS = {
    "untouched": None,
    "nothing": None,
    "written": staged(22),
    "described": Entry(FILE, 7, (11, 1, 11)),
    "link": link(b"m"),
    "directory": Entry(DIRECTORY | 0o020),
}
THEIRS = {
    "untouched": None,
    "nothing": None,
    "other file": stored(33),
    "file as ours": stored(32),
    "other link": link(b"n"),
    "link as ours": link(b"m"),
    "directory": directory,
}
APPLIED, KEPT, BESIDE = "applied", "kept", "beside"


def expected(base: str, ours: str, theirs: str) -> str:
    """The rule again, from the outside: what becomes of one path.  (`untouched` theirs is the base.)"""
    theirs_kind = base if theirs == "untouched" else theirs
    if ours == "untouched":
        return KEPT
    unchanged = theirs_kind == base or (theirs, base) == ("directory", "directory")
    agreed = (ours, theirs) in {("written", "file as ours"), ("link", "link as ours")} or ours == theirs_kind == "nothing"
    if ours == "directory":
        return APPLIED if unchanged or theirs_kind == "nothing" or theirs_kind == "directory" else BESIDE
    if unchanged or agreed:
        return APPLIED
    return "conflict, kept" if ours in ("nothing", "described") else BESIDE


POSSIBLE = [
    (base, ours, theirs)
    for base, ours, theirs in product(BASES, OURS, THEIRS)
    if (base == "file" or ours != "described") and (base, ours) not in (("nothing", "nothing"), ("directory", "directory"))
]


@pytest.mark.parametrize(("base", "ours", "theirs"), POSSIBLE)
def test_one_path(base: str, ours: str, theirs: str) -> None:
    was = BASES[base]
    listing: Tree = {} if was is None else {b"p": was}
    our_entry = was if ours == "untouched" else OURS[ours]
    tree: Tree = {} if our_entry is None else {b"p": our_entry}
    their_entry = was if theirs == "untouched" else THEIRS[theirs]
    model = Model({} if their_entry is None else {b"p": their_entry}, tree)
    before = letters(model.tree)
    known = Known.listed(listing)
    conflicts = merge(known, tree, model)
    match expected(base, ours, theirs):
        case "applied":
            assert (letters(model.tree), conflicts) == (letters(tree), [])
        case "kept":
            assert (letters(model.tree), conflicts) == (before, [])
        case "conflict, kept":
            assert letters(model.tree) == before
            assert [(conflict.path, conflict.beside) for conflict in conflicts] == [(b"p", b"")]
        case "beside":
            assert letters(model.tree) == before | {b"p.aerie-conflict-T": letters(tree)[b"p"]}
            assert [(conflict.path, conflict.beside) for conflict in conflicts] == [(b"p", b"p.aerie-conflict-T")]
    after = dict(model.tree)
    assert (merge(known, tree, model), model.tree) == ([], after), "again there is nothing to do"


def test_modes_follow_who_changed_them() -> None:
    """Ours where the task changed it, the store's otherwise; a mode alone is never a conflict."""
    for base, ours, theirs, result in (
        (0o644, 0o644, 0o600, 0o600),
        (0o644, 0o755, 0o600, 0o755),
        (0o644, 0o755, 0o644, 0o755),
    ):
        for entry in (staged(22, stat.S_IFREG | ours), Entry(stat.S_IFREG | ours, 11, (11, 1, 11)), Entry(stat.S_IFDIR | ours)):
            kind = stat.S_IFMT(entry.mode)
            was = stored(11, kind | base) if kind == stat.S_IFREG else Entry(kind | base)
            now = stored(11, kind | theirs) if kind == stat.S_IFREG else Entry(kind | theirs)
            model = Model({b"p": now}, {b"p": entry})
            assert merge(Known.listed({b"p": was}), {b"p": entry}, model) == []
            assert model.tree[b"p"].mode == kind | result


@pytest.mark.parametrize("number", [1, 2, 12])
@pytest.mark.parametrize("name", [b"a", b"d/e/a", b"d/" + b"n" * 255, "ä".encode() * 127])
def test_conflict_names_fit(name: bytes, number: int) -> None:
    beside = conflict_name(name, "T" * 36, number)
    assert parent(beside) == parent(name)
    assert len(beside.rpartition(b"/")[2]) <= 255
    assert beside.endswith(b".aerie-conflict-" + b"T" * 36 + (b"" if number == 1 else b".%d" % number))


NAMES = st.sampled_from([b"a", b"b"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(b"/".join)


def trees(entries: st.SearchStrategy[Entry]) -> st.SearchStrategy[dict[bytes, Entry]]:
    """Valid trees: what is below something that is no directory is left out."""

    def valid(tree: dict[bytes, Entry]) -> dict[bytes, Entry]:
        kept: dict[bytes, Entry] = {}
        for path in sorted(tree):
            if not parent(path) or is_directory(kept.get(parent(path))):
                kept[path] = tree[path]
        return kept

    return st.dictionaries(PATHS, entries, max_size=10).map(valid)


ENTRIES = st.one_of(
    st.just(directory), st.just(directory), st.sampled_from([link(b"l"), link(b"m")]), st.integers(0, 9).map(stored)
)


@st.composite
def situations(draw: st.DrawFn) -> tuple[dict[bytes, Entry], dict[bytes, Entry], dict[bytes, Entry]]:
    """A base, and two trees that came out of it by replacing, removing and adding; a task also renames files."""

    def renumber(tree: dict[bytes, Entry], first: int) -> dict[bytes, Entry]:
        numbered = {}
        for number, (path, entry) in enumerate(sorted(tree.items())):
            content = entry.content
            numbered[path] = entry if content is None else stored(first + 10 * number + content[0] % 10)
        return numbered

    def overlay(base: dict[bytes, Entry], changes: dict[bytes, Entry], removed: set[bytes]) -> dict[bytes, Entry]:
        tree = {
            path: entry for path, entry in base.items() if not any((path + b"/").startswith(gone + b"/") for gone in removed)
        }
        for path, entry in sorted(changes.items()):
            if not is_directory(entry):
                tree = {below: kept for below, kept in tree.items() if not below.startswith(path + b"/")}
            tree[path] = entry
        return {path: entry for path, entry in tree.items() if not parent(path) or is_directory(tree.get(parent(path)))}

    def settle_parents(tree: dict[bytes, Entry]) -> dict[bytes, Entry]:
        kept: dict[bytes, Entry] = {}
        for path in sorted(tree):
            if not parent(path) or is_directory(kept.get(parent(path))):
                kept[path] = tree[path]
        return kept

    base = renumber(draw(trees(ENTRIES)), 100)
    removals = st.sets(PATHS, max_size=3)
    theirs = settle_parents(overlay(base, renumber(draw(trees(ENTRIES)), 400), draw(removals)))
    ours = settle_parents(overlay(base, renumber(draw(trees(ENTRIES)), 700), draw(removals)))
    files = [entry for entry in base.values() if entry.content is not None]
    for path, entry in ours.items():
        if entry.content is not None and entry.content[0] >= 700:
            moved = draw(st.none() | st.sampled_from(files)) if files else None
            ours[path] = Entry(FILE, entry.mtime_ns, moved.content) if moved else Entry(FILE, 1, entry.content, staged=True)
    return base, ours, theirs


@settings(max_examples=400, deadline=None)
@given(situations())
def test_nothing_is_lost(situation: tuple[dict[bytes, Entry], dict[bytes, Entry], dict[bytes, Entry]]) -> None:
    base, ours, theirs = situation
    known, model = Known.listed(base), Model(theirs, ours)
    conflicts = {conflict.path: conflict for conflict in merge(known, ours, model)}
    for path, entry in theirs.items():
        if base.get(path) != entry and not (is_directory(entry) and is_directory(base.get(path))):
            same = path in ours and letters({path: entry}) == letters({path: ours[path]})
            now = model.tree[path]
            assert now == entry or is_directory(entry) or same, "what others made is where they made it"
    for path, entry in ours.items():
        if base.get(path) == entry or is_directory(entry):
            continue
        wanted = letters({path: entry})[path]
        beside = conflicts.get(path)
        if beside is not None and not beside.beside:
            assert not entry.staged and entry.target is None, "what the task wrote is somewhere"
            continue
        places = (
            [beside.beside] if beside else [path, *(c.beside + path[len(c.path) :] for c in conflicts.values() if c.beside)]
        )
        assert wanted in [letters(model.tree).get(place) for place in places], "what the task wrote is somewhere"
    after = dict(model.tree)
    assert merge(known, ours, model) == []
    assert model.tree == after, "a second merge finds nothing to do"


@settings(max_examples=200, deadline=None)
@given(situations())
def test_one_side_alone_changes_everything(
    situation: tuple[dict[bytes, Entry], dict[bytes, Entry], dict[bytes, Entry]],
) -> None:
    base, ours, theirs = situation
    model = Model(base, ours)
    assert merge(Known.listed(base), ours, model) == []
    assert letters(model.tree) == letters(ours)
    model = Model(theirs, base)
    assert merge(Known.listed(base), base, model) == []
    assert model.tree == theirs


@settings(max_examples=200, deadline=None)
@given(situations())
def test_both_sides_alike(situation: tuple[dict[bytes, Entry], dict[bytes, Entry], dict[bytes, Entry]]) -> None:
    """Who wrote the same as the task is no conflict, and keeps what they have."""
    base, ours, _ = situation
    written = {path: entry for path, entry in ours.items() if entry.staged or entry.content is None or base.get(path) == entry}
    written = {path: entry for path, entry in written.items() if all(up in written for up in _above(path))}
    theirs = {
        path: stored(5000 + entry.content[0] % 10) if entry.staged and entry.content is not None else entry
        for path, entry in written.items()
    }
    model = Model(theirs, written)
    assert merge(Known.listed(base), written, model) == []
    assert letters(model.tree) == letters(theirs)


def _above(path: bytes) -> list[bytes]:
    above = []
    while path := parent(path):
        above.append(path)
    return above


def test_a_conflict_is_updated_where_it_went_unless_that_was_touched() -> None:
    known, model = Known.listed({b"p": stored(11)}), Model({b"p": stored(33)}, {})
    beside = []
    for inode, touched in ((21, False), (22, True), (24, False)):
        model.ours = {b"p": staged(inode)}
        beside += [conflict.beside for conflict in merge(known, model.ours, model)]
        if touched:
            model.tree[beside[-1]] = stored(49)
    assert beside == [b"p.aerie-conflict-T", b"p.aerie-conflict-T", b"p.aerie-conflict-T.2"]
    assert letters(model.tree) == {b"p": 3, beside[0]: 9, beside[2]: 4}


def test_a_directory_is_renamed_as_a_whole_only_when_nobody_else_is_touched() -> None:
    base = {b"d": directory, b"d/x": stored(11), b"d/e": directory, b"d/e/y": stored(12), b"o": directory}
    tree = {
        b"n": directory,
        b"n/m": directory,
        b"n/m/x": stored(11),
        b"n/m/e": directory,
        b"n/m/e/y": stored(12),
        b"o": directory,
    }

    def may(theirs: Tree, ours: Tree = tree) -> list[bytes] | None:
        steps = plan_move(Known.listed(base), ours, Model(theirs, ours), b"d", b"n/m")
        return None if steps is None else [step.where for step in steps]

    assert may(base) == [b"n"]
    assert may({**base, b"n": directory}) == []
    assert may({**base, b"d/e/y": stored(33)}) is None
    assert may({**base, b"d/e/z": stored(33)}) is None
    assert may({**base, b"n": stored(33)}) is None
    assert may({**base, b"n": directory, b"n/m": directory}) is None
    assert may({path: entry for path, entry in base.items() if not path.startswith(b"d")}) is None
    assert may(base, {**tree, b"d": directory}) is None
    known = Known.listed(base)
    known.move(b"d", b"n/m")
    assert known.ours == known.theirs == {path: entry for path, entry in tree.items() if path != b"n"}
    assert (known.present_path(b"d/e"), known.present_path(b"dd")) == (b"n/m/e", b"dd")
    known.move(b"n/m/e", b"o/e")
    known.move(b"n/m", b"o/e/m")
    assert set(known.ours) == {b"o", b"o/e", b"o/e/y", b"o/e/m", b"o/e/m/x"}
    assert known.present_path(b"d/e/y") == b"o/e/y"


def test_while_the_task_runs_what_it_may_still_read_stays() -> None:
    base: dict[bytes, Entry] = {
        **{name: stored(11 + 10 * number) for number, name in enumerate((b"gone", b"old", b"plain", b"mode"))},
        b"d": directory,
    }
    versions: dict[bytes, Version | None] = {name: entry.content for name, entry in base.items()}
    tree = {
        b"old": staged(101),  # the listed one is `new` now
        b"new": Entry(FILE, 21, versions[b"old"]),
        b"plain": staged(102),
        b"mode": Entry(FILE | 0o111, 41, versions[b"mode"]),
        b"d": staged(103),
        b"gone": directory,
        b"gone/x": staged(104),
        b"fresh": directory,
        b"fresh/x": staged(105),
    }
    known, model = Known.listed(base), Model(base, tree)
    decided = plan_while_running(plan(known, tree, model, "T", {}), known, tree)
    assert decided.removals == []
    assert [step.where for step in decided.steps] == [b"fresh", b"fresh/x", b"plain"]
