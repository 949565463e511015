"""What a task prints: durable first, then brought to whoever wants it.

conmon appends each chunk, with time and stream, to the task's *journal*; that file is the log.  `journal` parses it, `follower`
reads it as it grows (the client's `logs -f` does that itself, in its own process), and the *output mover*, one isolated
process for the node, brings lines to the sinks (`lines`, `sinks`): console, files.

When conmon is killed, the read ends of the task's pipes are still held.  The mover's *pump* then moves what comes with splice(2) into
a *spill* file for each stream: splice takes from the pipe exactly what it puts into the file, so a pump that is killed has lost
nothing and doubled nothing.  What conmon had read and not yet written is gone, at most 8 KiB; a record in `gaps` says so.

    journal          TIME STREAM P|F TEXT, a line each; F: the text was a whole line
    stdout.spill     raw bytes that follow the journal's of that stream
    stderr.spill
    gaps             a JSON object a line: where output may be missing

A stream's bytes are its records' in the journal, then its spill.  All positions are offsets in these files, and each sink's is
durable, so that the mover, the actor or the daemon may be killed at any instant: no line is lost, doubled or moved within its
stream.  (The console cannot be asked what it has: there a line may come twice.)
"""
