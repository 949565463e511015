"""What is kept of images and workspaces on this node's disk, and what goes when there is too much of it.

Purpose.  OBJECTS (content, shared by every daemon of the node) and archives (metadata, maybe shared by nodes) have a hard cap each, and
a minimum of their disk stays free.  Who publishes finds out by itself that there is no room (`lazytree.ledger`), keeps nothing
then and says that it wanted to; this package makes room again.  `eviction` decides what goes, `archives` the same for archives; both
pure.  The evictor (`process`, a process of its own, killed at any instruction without harm) looks what is there and carries it out
(`evictor`), and asks registries what they still have (`sources`).  The CacheActor (`actor`) starts one when there is too much.

**The order.**  First what belongs to nothing: layers' files that a later layer hides, versions of a store's files that are no more.  Then
by trees, an image's or a workspace's, the one that was used (mounted, or unmounted) the longest ago first.  An object that several trees
share is as young as the youngest of them.

**Never evicted** is

- an object of a tree that is mounted, by any daemon of the node: a task may come to open it, and what it was mounted without need not be
  there.  So a running task is never asked to fetch again what was here when it began;
- an object, or archive, that could not be fetched again now: the evictor asks the image's registry (the mirrors count) for a byte of
  each of its layers just before.  What a task brought a login for is believed to be there when the registry answers that one is wanted.
  A workspace's object can be copied from its store; when the store has another version by now, no task that comes can want the old one;
- what somebody is just building.

So the cap may be reached with nothing to evict.  Then what is read is served and not kept; an image that is larger than the cap is used
like that.

**What is damaged** on this disk is found by the checker (`checking`), a little at a time, and fetched again; removed, if that cannot be.

**What is counted.**  Space counts as free when the kernel has freed it: a file that was unlinked while somebody holds it open is counted
until then.  Spools are not in there: each has a bound of its own (`image.spool_max`).
"""
