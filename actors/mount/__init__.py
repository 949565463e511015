"""A workspace: a snapshot of a store, what a task does to it, and the way back.

A *store* is a directory, `STATE/workspaces/NAME`.  When a task starts, the store is listed (`listing`): names, modes, times and
sizes become META, and what the content of each file is called by, its *version*, goes into the object table.  The task sees
that snapshot and writes into a *staging* directory, the overlay's upper.  What others do to the store meanwhile is for the next
task to see.

The way back (`sync`) is a three-way merge: of the listing, what staging says the task did (`staging`), and the store as it is
by now.  `merge` decides, one table, no I/O; `publish` carries out, each step only if the name still stands for what the
decision was made on; `journal` remembers what was done, so that a sync killed at any instant goes on where it was, and knows
its own work again.

    listing    the store's listing                   indexing   META and the object table out of it
    staging    an upper directory, read as the tree that the task sees
    steps      what a merge speaks of                merge      listing x staging x store -> steps; both pure
    journal    what a task's syncs have done so far; durable
    changes    whether a staging directory has changed since the last one
    store      one directory store, looked at        publish    steps carried out in it
    copying    files copied while they are written   sync       the loop over all of these
    wire       messages of the syncer                process    the syncer: one for the node, many jobs at once
    source     the store as LAZY's source            serve      the LAZY server of a workspace

What a task has read as a whole through LAZY is copied to OBJECTS by the syncer, for the tasks that come later.

**While the task runs** its workspace is synced every few seconds (`mount.sync_interval`), if staging has changed: what was written is
published; what the task may still read from the store is not touched: removals, renames and changes of mode wait for the end, and a
version that is replaced is put aside, as `.aerie-sync/TASK/was-INODE`, where LAZY finds it.  When the task has ended, all of it is
synced before the result is reported.

**What survives.**  In the task's directory: `listing` and the journal `synced`, with META and staging; in the store, under
`.aerie-sync/`, a task's unfinished temporaries.  A restart of the process or the daemon needs nothing else: a job is sent again
and ends the same.  The directory may go when the outcome is `synced` or `conflict`; with `sync_failed` all of it stays for a
later sync.

**What is never done.**  Nothing that others changed since the listing is overwritten or removed: the task's version is put
beside it as `NAME.aerie-conflict-TASK`, or, where the task only removed or described the file, left undone; both are reported.
Sync follows no symbolic link and leaves no directory; devices, pipes and sockets, setuid and setgid bits, extended attributes,
and times of directories stay behind.

**Owners.**  To the task everything in a workspace belongs to uid and gid 1000, whoever owns it in the store; what a sync writes
belongs to 1000:1000 in the store too.  What the task did not touch keeps its owner.
"""
