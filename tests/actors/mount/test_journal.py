"""The journal of a task's syncs, cut at every byte."""

from __future__ import annotations

from pathlib import Path

from actors.mount.journal import Batch, Journal


def test_a_torn_journal_is_cut_off(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path))
    journal.append(Batch(True, conflicts=[(b"a", b"b", "why")]))
    journal.append(Batch(False))
    journal.close()
    whole = (tmp_path / "synced").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "synced").write_bytes(whole[:length])
        journal = Journal(str(tmp_path))
        assert len(journal.batches) <= 1
        journal.append(Batch(True))
        journal.close()
        journal = Journal(str(tmp_path))
        assert journal.batches[-1] == Batch(True)
        journal.close()
