"""The fault model: what may happen at any instant, and what must hold all the same.

**Faults.**  SIGKILL of any process of the daemon at any instruction: keeper, root supervisor, fork server, the FUSE server of an
image or a workspace, an image builder, an image prefetcher (which makes a pack, or streams one), the evictor and the checker of the
object cache, the syncer, the output mover, a task's conmon, an OCI runtime while it creates or deletes a container (crun and runc are
not executed to start one).  Two of them within 50 ms; keeper and root supervisor together, when whoever
started the daemon starts it again.  A hang (SIGSTOP) of any.  A full disk.  A registry that is away or lies.  A client that sends
anything, or dies.  Not in the model: a power cut's effect on what was never acknowledged, the death of every holder of a task's
descriptors at the same instant as its conmon, a kernel that breaks its word.

What strikes at random is `storm`; what strikes between any two durable operations of a root supervisor, or of an isolated process that
has any, one after the other, `failpoints`.

**Invariants**, whatever happens:

1. no operation inside a task sees an error that it would not have seen, and every byte it reads is right;
2. each byte that it prints is in the log once and in its stream's order (a killed conmon may cost the 8 KiB in its hands, and a
   gap record says so);
3. each task has one result, with the true exit code, and is run once;
4. its workspace is synced before the result is there;
5. what the object cache takes is what its accounts say, and no more than it may; nothing holds what no task uses;
6. the log tells of no fault of our own: no traceback, and nothing is called damaged that nobody has damaged;
7. when the task is over and the daemon stopped, nothing is left: no process, mount, namespace, control group or directory.
"""
