"""Layers, overlaid into one tree as the OCI image specification says (layer.md, "Applying Changesets").  No I/O.

What it leaves open is done as containerd does it: an entry below a symbolic link goes where the link leads inside the
root.  Three things differ.  A whiteout never follows a link, so it can only hide what has its own path; and it hides only
what lower layers have put there, wherever in the layer it stands.  A hard link may stand before its target.  And an entry below a
link that leads nowhere, or out of the root, is an error: that is how a layer would climb out.
"""

from __future__ import annotations

import stat

from actors.image.errors import ContentCorrupt, LayerUnsafe
from actors.image.layers.stream import Budget
from actors.image.layers.tar import Entry, shown
from actors.lazytree.erofs import Node

DEPTH_MAX = 2048  # of directories; a path of more would be longer than the kernel takes
LINKS_MAX = 40  # to be followed for one path, as in the kernel
WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_AUFS = b".wh..wh."  # aufs' own files, which no layer should have and old ones do
# What Linux has; others (macOS' com.apple.*) a file system would refuse, and every unpacker then leaves out.
_XATTR_NAMESPACES = (b"user.", b"trusted.", b"security.", b"system.posix_acl_access", b"system.posix_acl_default")


def is_whiteout(entry: Entry) -> bool:
    """Whether the entry is no file of the image but says something about lower layers."""
    return entry.name.rstrip(b"/").rpartition(b"/")[2].startswith(WHITEOUT)


class _NotThere(ContentCorrupt):
    """A hard link's target."""


class LayeredTree:
    """The tree of an image: for each layer from the lowest up `begin_layer`, then `add` each of its entries in order, and `end_layer`.

    `root` is the tree so far.  Directories that layers imply but do not have are 0755, owned by 0:0, of time 0.
    """

    def __init__(self, budget: Budget) -> None:
        self.root = _implied_directory()
        self._budget = budget
        self._fresh: dict[Node, set[bytes]] = {}  # by directory: the names that this layer has put there
        self._early: list[tuple[Node, bytes, Entry]] = []  # hard links whose target has not come yet, and where they are to be

    def begin_layer(self) -> None:
        self._fresh = {}
        self._early = []

    def end_layer(self) -> None:
        """Raises as `add`."""
        while self._early:
            waiting, self._early = self._early, []
            for directory, name, entry in waiting:
                if name in self._fresh.get(directory, ()):
                    continue  # a later entry has taken its place
                try:
                    self._put(directory, name, self._link_target(entry))
                except _NotThere:
                    if len(self._early) + 1 == len(waiting):
                        raise  # no other one can have been its target
                    self._early.append((directory, name, entry))

    def add(self, entry: Entry, key: str | None, data: bytes | None = None) -> None:
        """Add one entry; `key` is the object with its content, None without content, or when it is all in `data`.

        Raises LayerUnsafe for one that climbs out of the root, ContentCorrupt for one that nothing can be made of, OverBounds.
        """
        path = _components(entry.name, entry.name)
        if path and path[-1].startswith(WHITEOUT):
            self._apply_whiteout(path[:-1], path[-1])
        elif entry.is_hard_link:
            if not path:
                raise ContentCorrupt("a layer has a hard link for its root")
            directory = self._directory(path[:-1], entry.name)
            try:
                self._put(directory, path[-1], self._link_target(entry))
            except _NotThere:
                self._fresh.get(directory, set()).discard(path[-1])  # so that only what comes later is newer than it
                self._early.append((directory, path[-1], entry))
        else:
            node = _node(entry, key, data)
            if not path:
                if node.children is None:
                    raise ContentCorrupt("a layer has something else than a directory for its root")
                _copy_metadata(node, self.root)
            else:
                self._put(self._directory(path[:-1], entry.name), path[-1], node)

    def _put(self, directory: Node, name: bytes, node: Node) -> None:
        children = directory.children
        assert children is not None
        existing = children.get(name)
        if existing is not None and existing.children is not None and node.children is not None:
            _copy_metadata(node, existing)  # a directory over a directory: what is in it stays
        else:
            children[name] = node
        self._fresh.setdefault(directory, set()).add(name)

    def _directory(self, path: list[bytes], name: bytes, create: bool = True) -> Node:
        """The directory at `path`, links followed inside the root, missing ones made if `create`; `name` is for errors."""
        chain = [self.root]
        ahead = path[::-1]
        links = 0
        target_from = len(path) + 1  # components of `ahead` from this index on are of a link's target
        while ahead:
            component = ahead.pop()
            in_target = len(ahead) >= target_from
            if component == b"..":
                if len(chain) == 1:
                    raise LayerUnsafe(f"a layer's entry {shown(name)} leads through a symbolic link out of the image's root")
                chain.pop()
                continue
            children = chain[-1].children
            assert children is not None
            node = children.get(component)
            if node is None:
                if in_target:
                    raise LayerUnsafe(f"a layer's entry {shown(name)} leads through a symbolic link to where nothing is")
                if not create:
                    raise _NotThere(f"a layer has a hard link to {shown(name)}, which is not there")
                self._budget.take_entry()
                node = _implied_directory()
                self._put(chain[-1], component, node)
            if node.target is not None:
                links += 1
                if links > LINKS_MAX:
                    raise LayerUnsafe(f"a layer's entry {shown(name)} leads through more than {LINKS_MAX} symbolic links")
                if node.target.startswith(b"/"):
                    del chain[1:]
                if not in_target:
                    target_from = len(ahead)
                ahead += [part for part in reversed(node.target.split(b"/")) if part not in (b"", b".")]
            elif node.children is None:
                raise ContentCorrupt(f"a layer has an entry {shown(name)}, but {shown(component)} in there is not a directory")
            else:
                chain.append(node)
                if len(chain) > DEPTH_MAX:
                    raise ContentCorrupt(f"a layer has an entry more than {DEPTH_MAX} directories deep")
        return chain[-1]

    def _link_target(self, entry: Entry) -> Node:
        path = _components(entry.target, entry.name)
        children = self._directory(path[:-1], entry.target, create=False).children
        assert children is not None
        node = children.get(path[-1]) if path else self.root
        if node is None:
            raise _NotThere(f"a layer has a hard link {shown(entry.name)} to {shown(entry.target)}, which is not there")
        if node.children is not None:
            raise ContentCorrupt(f"a layer has a hard link {shown(entry.name)} to {shown(entry.target)}, which is a directory")
        return node

    def _apply_whiteout(self, parents: list[bytes], whiteout: bytes) -> None:
        directory: Node | None = self.root
        for component in parents:
            directory = (directory.children or {}).get(component) if directory else None
        if directory is None or directory.children is None:
            return  # nothing there, or beyond a link, which whiteouts do not follow
        if whiteout == OPAQUE:
            self._hide_lower(directory)
        elif not whiteout.startswith(_AUFS):
            name = whiteout.removeprefix(WHITEOUT)
            if name in (b"", b".", b".."):
                raise LayerUnsafe(f"a layer has a whiteout {shown(whiteout)}, which hides nothing that could be meant")
            node = directory.children.get(name)
            if node is None:
                return
            fresh = name in self._fresh.get(directory, ())
            if node.children is not None:
                self._hide_lower(node)
                if node.children and not fresh:
                    self._keep_implied(directory, name)
            if not fresh and not node.children:
                del directory.children[name]

    def _hide_lower(self, top: Node) -> None:
        """Remove what lower layers have put below a directory, and nothing of this layer."""
        directories = [top]
        for directory in directories:  # grows while it is walked
            directories += [child for child in (directory.children or {}).values() if child.children is not None]
        for directory in reversed(directories):
            children = directory.children
            assert children is not None
            fresh = self._fresh.get(directory, set())
            for name in children.keys() - fresh:
                if children[name].children:
                    self._keep_implied(directory, name)
                else:
                    del children[name]

    def _keep_implied(self, directory: Node, name: bytes) -> None:
        """The directory `name` is hidden, but this layer has put something into it: it is there anew, as if only implied."""
        children = directory.children
        assert children is not None
        _copy_metadata(_implied_directory(), children[name])
        self._fresh.setdefault(directory, set()).add(name)


def _components(path: bytes, name: bytes) -> list[bytes]:
    """A path of a tar, normalised as containerd does (`..` by the text of it).  Raises LayerUnsafe when it climbs out."""
    components: list[bytes] = []
    for part in path.split(b"/"):
        if part == b"..":
            if not components:
                raise LayerUnsafe(f"a layer's entry {shown(name)} climbs out of the image's root with '..'")
            components.pop()
        elif part not in (b"", b"."):
            components.append(part)
    return components


def _node(entry: Entry, key: str | None, data: bytes | None) -> Node:
    return Node(
        # Linux gives symbolic links no permissions of their own: all of them are 0777, whatever a layer says.
        mode=entry.mode | 0o777 if stat.S_ISLNK(entry.mode) else entry.mode,
        uid=entry.uid,
        gid=entry.gid,
        mtime_ns=entry.mtime_ns,
        size=entry.size,
        target=entry.target if stat.S_ISLNK(entry.mode) else None,
        rdev=entry.rdev,
        xattrs={name: value for name, value in entry.xattrs.items() if name.startswith(_XATTR_NAMESPACES)},
        children={} if stat.S_ISDIR(entry.mode) else None,
        key=key,
        data=data,
    )


def _copy_metadata(source: Node, target: Node) -> None:
    target.mode, target.uid, target.gid = source.mode, source.uid, source.gid
    target.mtime_ns, target.xattrs = source.mtime_ns, source.xattrs


def _implied_directory() -> Node:
    return Node(stat.S_IFDIR | 0o755, children={})
