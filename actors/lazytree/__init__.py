"""One mechanism for images and workspaces: a tree of names with content that need not be here yet.

    lowerdir = META :: OBJECTS :: LAZY          upperdir = the task's own

The kernel does the hot path.  META has every name, mode, owner, time, size and attribute, and no content; a file in it says by
`trusted.overlay.metacopy` and `trusted.overlay.redirect=/ab/<62 hex>` which *object* has its content.  Overlayfs looks for that path
in the data-only layers behind it, in order: OBJECTS, a directory on local disk that everything on the node shares, and LAZY, a FUSE
mount that answers for what is not in OBJECTS.  So `stat`, `readdir`, and reads of what is cached never enter Python, and a FUSE server
serves immutable bytes only: every request can be executed twice, and a killed server is replaced without an error.

    erofs      writes META: an EROFS image, metadata only
    table      the objects of one tree as a file that a server maps; node ids of LAZY are indexes into it
    objects    OBJECTS: an object is there whole or not at all
    ledger     what OBJECTS take of the disk, counted right whoever is killed, and bounded
    trees      which trees OBJECTS are kept for, and which of them are mounted: what may be evicted (by `actors.cache`), and what not
    mounts     mounting all of it, finding and removing what is mounted
    greeting   what the kernel is told on LAZY's connection before there is a server
    wire       what a LAZY server and its parent say to each other (no FUSE in it: the parent imports it)
    server     the LAZY server (pyfuse3), over a `Source` of content
    served     a LAZY mount and its servers, one after another, for the actor that owns the tree

An overlay inode stays bound to the layer in which its object was at first open; an object that comes to OBJECTS later is used by
the next mount.  Overlayfs does not check an object's size: what is in OBJECTS must be right.
"""
