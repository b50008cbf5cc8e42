//! The disk writer and its check: a journal over the whole of a block device, and in memory what each of its blocks must hold.
//!
//! Every record is written past the page cache and flushed before it counts as complete. A block that is to be written is
//! read first: what it holds must be exactly what memory says. So a disk that lost a complete write, or has one that this
//! memory has not made (as a disk that is ahead of a restored memory has), is found by going on as well as by `verify`.

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::pattern::mix;
use crate::clock::monotonic_ns;
use crate::protocol::{DiskInfo, DiskSpec};
use crate::sys::Region;

/// Bytes of one record.
pub const BLOCK: usize = 4096;
/// Records on the device; spread over all of it.
const SLOTS: u64 = 512;
/// First word of a record.
const MAGIC: u64 = 0x4a4c_4e52_534b_5344;
/// Most complaints kept.
const COMPLAINTS: usize = 16;

/// Why there is nothing to say about a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be opened or read.
    #[error("{path}: {source}")]
    Device {
        /// Its path.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// It has no room for the records.
    #[error("{0} has less than {SLOTS} blocks of {BLOCK} bytes")]
    Small(String),
    /// `disk verify` before `disk start`.
    #[error("no disk is written: send disk start DEVICE RATE first")]
    NotStarted,
    /// One device only, and for as long as the guest runs.
    #[error("{0} is written already")]
    Started(String),
    /// No thread, or no memory.
    #[error("starting the writer: {0}")]
    Start(#[from] io::Error),
}

struct Journal {
    path: String,
    file: File,
    /// Blocks from one record to the next.
    stride: u64,
    buffer: Region,
    /// Newest complete record in each slot, and when it was made: 0 before the first.
    slots: Vec<(u64, u64)>,
    completed: u64,
    rate: u64,
    complaints: Vec<String>,
    failed: u64,
}

impl Journal {
    fn open(path: &str, rate: u64) -> Result<Self, DiskError> {
        let error = |source| DiskError::Device { path: path.into(), source };
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path).map_err(error)?;
        let bytes = io::Seek::seek(&mut &file, io::SeekFrom::End(0)).map_err(error)?;
        let stride = bytes / BLOCK as u64 / SLOTS;
        if stride == 0 {
            return Err(DiskError::Small(path.into()));
        }
        let buffer = Region::new(NonZeroUsize::new(BLOCK).unwrap_or(NonZeroUsize::MIN))?;
        let slots = vec![(0, 0); SLOTS as usize];
        let mut journal = Self {
            path: path.into(),
            file,
            stride,
            buffer,
            slots,
            completed: 0,
            rate,
            complaints: Vec::new(),
            failed: 0,
        };
        for slot in 0..SLOTS {
            journal.fill(0, 0);
            journal.file.write_all_at(journal.buffer.bytes(), journal.offset(slot)).map_err(error)?;
        }
        journal.file.sync_data().map_err(error)?;
        Ok(journal)
    }

    fn offset(&self, slot: u64) -> u64 {
        slot * self.stride * BLOCK as u64
    }

    /// What a record looks like; zeroes for none.
    fn fill(&mut self, seq: u64, made: u64) {
        let mut word = mix(seq ^ made.rotate_left(32));
        for (at, to) in self.buffer.words_mut().iter_mut().enumerate() {
            *to = match (seq, at) {
                (0, _) => 0,
                (_, 0) => MAGIC,
                (_, 1) => seq,
                (_, 2) => made,
                _ => {
                    word = mix(word);
                    word
                }
            };
        }
    }

    fn complain(&mut self, text: String) {
        eprintln!("guest: {}: {text}", self.path);
        self.failed += 1;
        if self.complaints.len() < COMPLAINTS {
            self.complaints.push(text);
        }
    }

    /// Whether a slot holds what it must.
    fn check(&mut self, slot: u64) -> Result<(), String> {
        let (seq, made) = self.slots[slot as usize];
        let offset = self.offset(slot);
        self.file
            .read_exact_at(self.buffer.bytes_mut(), offset)
            .map_err(|error| format!("reading slot {slot}: {error}"))?;
        let found = self.buffer.words().to_vec();
        self.fill(seq, made);
        if found == self.buffer.words() {
            return Ok(());
        }
        let known =
            if found[0] == MAGIC { format!("record {} made at {}", found[1], found[2]) } else { "no record".into() };
        Err(format!(
            "slot {slot} must hold record {seq} made at {made}, and holds {known}; {} are complete",
            self.completed
        ))
    }

    /// Writes the next record, the old one checked.
    fn step(&mut self) {
        let seq = self.completed + 1;
        let slot = (seq - 1) % SLOTS;
        if let Err(text) = self.check(slot) {
            self.complain(format!("before record {seq}: {text}"));
        }
        let made = monotonic_ns();
        self.fill(seq, made);
        let offset = self.offset(slot);
        let written = self.file.write_all_at(self.buffer.bytes(), offset).and_then(|()| self.file.sync_data());
        match written {
            Ok(()) => {
                self.slots[slot as usize] = (seq, made);
                self.completed = seq;
            }
            Err(error) => {
                self.complain(format!("writing record {seq}: {error}"));
                self.rate = 0;
            }
        }
    }

    fn info(&self) -> DiskInfo {
        DiskInfo {
            completed: self.completed,
            slots: SLOTS,
            rate: self.rate,
            failed: self.failed,
            complaints: self.complaints.clone(),
        }
    }
}

/// The writer of one disk; off until started.
#[derive(Default)]
pub struct DiskWriter {
    shared: Arc<(Mutex<Option<Journal>>, Condvar)>,
}

impl DiskWriter {
    fn lock(&self) -> MutexGuard<'_, Option<Journal>> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts writing, or changes the rate: records per second, 0 to stand still. Blocks while the device is cleared.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn start(&self, spec: &DiskSpec) -> Result<DiskInfo, DiskError> {
        let mut journal = self.lock();
        if let Some(journal) = &mut *journal {
            if journal.path != spec.device {
                return Err(DiskError::Started(journal.path.clone()));
            }
            journal.rate = spec.rate;
            self.shared.1.notify_all();
            return Ok(journal.info());
        }
        let new = Journal::open(&spec.device, spec.rate)?;
        let info = new.info();
        *journal = Some(new);
        let shared = Arc::clone(&self.shared);
        thread::Builder::new().name("disk".into()).spawn(move || run(&shared))?;
        Ok(info)
    }

    /// How far it is. Waits for the record that is being written.
    ///
    /// # Errors
    /// [`DiskError::NotStarted`].
    pub fn info(&self) -> Result<DiskInfo, DiskError> {
        self.lock().as_ref().map(Journal::info).ok_or(DiskError::NotStarted)
    }

    /// Reads every record back; what is wrong is among the complaints. Nothing is written meanwhile.
    ///
    /// # Errors
    /// [`DiskError::NotStarted`].
    pub fn verify(&self) -> Result<DiskInfo, DiskError> {
        let mut journal = self.lock();
        let journal = journal.as_mut().ok_or(DiskError::NotStarted)?;
        for slot in 0..SLOTS {
            if let Err(text) = journal.check(slot) {
                journal.complain(text);
            }
        }
        Ok(journal.info())
    }
}

fn run(shared: &(Mutex<Option<Journal>>, Condvar)) {
    let mut journal = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        let rate = journal.as_ref().map_or(0, |journal| journal.rate);
        if rate == 0 {
            journal = shared.1.wait(journal).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        let began = Instant::now();
        if let Some(journal) = journal.as_mut() {
            journal.step();
        }
        // The lock is given up while waiting, so that others get it between records.
        let left = Duration::from_secs(1).checked_div(rate as u32).unwrap_or_default().saturating_sub(began.elapsed());
        let left = left.max(Duration::from_millis(1));
        journal = shared.1.wait_timeout(journal, left).unwrap_or_else(PoisonError::into_inner).0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(dir: &std::path::Path) -> (Journal, File) {
        let path = dir.join("disk");
        let file = File::options().create(true).truncate(true).read(true).write(true).open(&path).unwrap();
        file.set_len(SLOTS * BLOCK as u64 * 2).unwrap();
        (Journal::open(path.to_str().unwrap(), 0).unwrap(), file)
    }

    #[test]
    fn a_lost_write_and_one_from_the_future_are_found() {
        let dir = std::env::temp_dir().join(format!("disk-writer-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (mut journal, file) = journal(&dir);
        (0..SLOTS + 3).for_each(|_| journal.step());
        assert_eq!((journal.completed, journal.failed), (SLOTS + 3, 0), "{:?}", journal.complaints);
        assert!((0..SLOTS).all(|slot| journal.check(slot).is_ok()));

        // A later record than memory knows.
        let slot = 3;
        journal.fill(SLOTS + 4, 5);
        file.write_all_at(journal.buffer.bytes(), journal.offset(slot)).unwrap();
        assert!(journal.check(slot).unwrap_err().contains("holds record 516 made at 5"));
        journal.step();
        assert_eq!(journal.failed, 1, "going on finds it too");

        // A complete one that is gone.
        file.write_all_at(&[0; BLOCK], journal.offset(0)).unwrap();
        assert!(journal.check(0).unwrap_err().contains("holds no record"));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
