//! Held records on their way into the journal and back: frames of the stream, with a digest over them that stays in memory.

use std::sync::{Arc, Mutex, PoisonError};

use crate::mirror::core::record::{Record, digest};
use crate::mirror::core::spill::{Chunk, Spill, Stored};
use crate::mirror::io::{Buffer, Journal, JournalError};
use crate::mirror::peer::{Closed, Frame, Reader, Writer};

/// The journal of a disk, which one session at a time has.
pub(super) struct Spills {
    journal: Journal,
    session: Mutex<u64>,
}

impl Spills {
    pub(super) fn new(journal: Journal) -> Arc<Self> {
        Arc::new(Self { journal, session: Mutex::new(0) })
    }

    /// Bytes.
    pub(super) fn size(&self) -> u64 {
        self.journal.size()
    }

    /// The journal is a new session's. What an older one still writes would be written over it: that is refused from now
    /// on. Waits for a write that is under way.
    pub(super) fn begin(&self) -> u64 {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        *session += 1;
        *session
    }

    /// Blocks until the records are in the file.
    pub(super) fn write(&self, session: u64, spill: Spill) -> Result<Stored, String> {
        let mut bytes = Buffer::new(spill.place.length as usize);
        let mut rest = bytes.as_mut();
        let whole = rest.len();
        let mut writer = Writer::new(&mut rest, u128::from(session));
        for record in spill.records {
            // Their frames are no longer than what they cost.
            writer.send(&Frame::Record(record)).map_err(|e| e.to_string())?;
        }
        let written = whole - rest.len();
        let stored = Stored { bytes: written as u64, digest: digest(&bytes.as_ref()[..written]) };
        let owner = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if *owner != session {
            return Err("another session has the journal".into());
        }
        self.journal.write(spill.place, &bytes).map_err(|e| e.to_string())?;
        Ok(stored)
    }

    /// Blocks until the records are read, and are what was written.
    pub(super) fn read(&self, session: u64, chunk: &Chunk) -> Result<Vec<Record>, JournalError> {
        let damaged = || JournalError::Damaged(self.journal.path().to_owned());
        let bytes = self.journal.read(chunk.place)?;
        let bytes = bytes.as_ref().get(..chunk.stored.bytes as usize).ok_or_else(damaged)?;
        if digest(bytes) != chunk.stored.digest {
            return Err(damaged());
        }
        let mut reader = Reader::new(bytes, Some(u128::from(session)));
        let mut records = Vec::new();
        loop {
            match reader.receive() {
                Ok(Frame::Record(record)) => records.push(record),
                Err(Closed::Eof) => return Ok(records),
                Ok(_) | Err(_) => return Err(damaged()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::mirror::core::extent::Extent;
    use crate::mirror::core::record::Payload;
    use crate::mirror::core::spill::Place;

    #[test]
    fn what_comes_back_is_what_was_written_or_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let (path, disk) = (dir.path().join("journal"), dir.path().join("disk"));
        std::fs::write(&disk, [0; 4096]).unwrap();
        let spills = Spills::new(Journal::open(&path, 64 << 10, &disk, None, 0).unwrap());
        let session = spills.begin();
        let extent = Extent::new(1536, 4096 * 2);
        let records = vec![
            Record::Write { extent, payload: Payload::Data(vec![9; 8192].into()) },
            Record::Write { extent, payload: Payload::Zeroes },
            Record::Check { id: 1, extent, digest: 2, verify: true },
            Record::SyncDone,
        ];
        let cost: u64 = records.iter().map(Record::cost).sum();
        let place = Place { at: 60 << 10, length: cost.next_multiple_of(4096) };
        let stored = spills.write(session, Spill { place, records: records.clone() }).unwrap();
        assert!(stored.bytes <= cost);
        let chunk = Chunk { place, stored };
        assert_eq!(spills.read(session, &chunk).unwrap(), records);
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[8], 4096).unwrap();
        file.sync_all().unwrap();
        assert!(matches!(spills.read(session, &chunk), Err(JournalError::Damaged(_))));
        spills.begin();
        assert!(spills.write(session, Spill { place, records }).is_err(), "it is another session's");
    }
}
