"""Sandboxes: a task's command in an OCI container, from its image's lease to the record of how it ended.

One SandboxActor looks after one sandbox.  What a sandbox owns lies at the paths of its task's layout and in the kernel, not in
the actor: the mounted root, the bundle, conmon, the container with its control group in every hierarchy, the attempt's locked
file, pidfds of container and conmon, the read ends of its pipes.  Image and workspace are leased from their actors.

States: pending, creating, running, then stopped (it ran) or failed (it never ran, or nobody can know); `states` has the table of
phases behind them.  A restart of the actor, of the tree or of the daemon costs a sandbox nothing: `recovery` looks at what is
there and goes on.  Only a stop, a time-out, a deletion or the drain of the daemon ends one.  What was asked for in between is in
the store.

Refused: an id that is taken, a second start, sinks after the start, deletion without force while it runs; a command that is not
in the image or cannot be executed; whatever a bundle cannot hold.

    messages                 what is said to and by a sandbox
    states, ending, bundle   decisions: no I/O in them
    actor, recovery          thin: one mailbox, and where to go on
    watching                 container and conmon while they live
    orphans                  what belongs to no sandbox that is known, at the daemon's start
    attempt                  what is made for a container, and undone
    conmon, runtimes         the container itself, through conmon and crun, runc or runsc (gVisor)
    seccomp, cgroup          what the kernel is asked for: system call filter, control groups
"""
