"""Images: from a reference such as `ubuntu` to a read-only root file system that any number of tasks share.

Purpose.  A reference is resolved to the digest of one manifest (`registry`).  The image builder, a process of its own, reads the
registry's unmodified layers once (`layers`), overlays them into one tree, fills OBJECTS with the content of its files, and writes the
image's archive (`archives`): the EROFS META that the kernel mounts, the table of objects, where in the layers one may start to read, and
what a task needs of the image's config.  Nodes of a fleet share archives through S3.  The kernel mounts META :: OBJECTS :: LAZY
(`actors.lazytree`).  LAZY is an image mount, a process of its own (`serve`), which fetches what is read and is not here (`lazy`).  What
tasks of one command read at their start is recorded, packed, and streamed at the next mount (`prefetch`).  Each folder knows those named
before it, and `errors`, which all share; none knows the actor.

The ImageActor (`actor`) says which image is meant (`catalogue`), has it built, mounts it (`mounted`) and keeps it mounted while somebody
has a lease on it (`leases`); what is mounted is held (`holding`), and not evicted (`actors.cache`).  `messages` is what others say to it,
`wire` what it and its processes say to each other.

Owns.  The archives in `image.archive_dir` (one file per manifest digest, maybe shared with other daemons), the image objects in
`image.cache_dir` (named by the sha256 of their content), the mounts below `image.mount_dir`, their servers and spools, the image builders
and prefetchers.

Survives a restart.  Archives and objects, which are whole or not there at all; mounts and leases, until the machine goes down; servers
and spools, which the keeper holds: a restarted actor adopts them.  A builder that was under way is lost with nothing left but whole
objects; the next call starts another.  A prefetcher is not missed.

Refuses, each with an error that says whose fault it is (`errors`): a reference that is none, an image or platform that the registry does
not have, a registry that is away or wants credentials, content that is not what its digest says, a layer that climbs out of the root, and
everything over the bounds on unpacked bytes, entries and time.
"""
