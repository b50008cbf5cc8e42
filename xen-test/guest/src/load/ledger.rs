//! A ledger on a real file system: an ext4, on it a SQLite database, in it entries that a client outside asks for one by one.
//!
//! An entry is answered once its transaction is complete, which SQLite calls it only after its fsyncs. Memory keeps how many there are,
//! so that a disk which goes on from another moment than the memory is found by [`Ledger::check`], which reads past all caches.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::mount::{MsFlags, mount, umount};
use rusqlite::{Connection, params};

use crate::boot::{self, BootError};
use crate::protocol::LedgerInfo;

/// Where its file system is mounted.
const MOUNT: &str = "/data";
/// The database's file name there.
const FILE: &str = "ledger.db";
/// Accounts between which entries move amounts.
const ACCOUNTS: u64 = 64;
/// Bytes of text with each entry, so that the database grows by more than a page now and then.
const NOTE: usize = 200;

/// Why there is nothing to say about the ledger.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// ext4 is not in the kernel, and could not be loaded.
    #[error(transparent)]
    Module(#[from] BootError),
    /// The file system, or a file of the kernel's.
    #[error("{what}: {source}")]
    System {
        /// What was done to what.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// SQLite said no.
    #[error("the database: {0}")]
    Database(#[from] rusqlite::Error),
    /// `ledger open` was not sent, or the ledger is closed.
    #[error("no ledger is open: send ledger open DEVICE first")]
    Closed,
    /// It is open already.
    #[error("a ledger is open already, on {0}")]
    Open(String),
    /// The client asks for another entry than the next.
    #[error("entry {asked} is not the next one: {committed} are there")]
    Order {
        /// What it asked for.
        asked: u64,
        /// What memory knows to be complete.
        committed: u64,
    },
}

/// An open ledger.
struct Book {
    device: String,
    database: Connection,
    /// Entries whose transactions are complete, as memory knows.
    committed: u64,
}

/// The ledger of a guest; closed until opened.
#[derive(Default)]
pub struct Ledger {
    book: Mutex<Option<Book>>,
}

fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> LedgerError {
    let what = what.into();
    move |source| LedgerError::System { what, source }
}

impl Ledger {
    fn lock(&self) -> MutexGuard<'_, Option<Book>> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Mounts the ext4 that `device` has and opens the database there, made if there is none.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn open(&self, device: &str) -> Result<LedgerInfo, LedgerError> {
        let mut book = self.lock();
        if let Some(book) = &*book {
            return Err(LedgerError::Open(book.device.clone()));
        }
        boot::load_modules("ext4")?;
        fs::create_dir_all(MOUNT).map_err(system(MOUNT))?;
        mount(Some(device), MOUNT, Some("ext4"), MsFlags::empty(), Some("errors=continue"))
            .map_err(|e| system(format!("mounting {device} on {MOUNT}"))(e.into()))?;
        match Book::open(device, Path::new(MOUNT)) {
            Ok(new) => {
                let info = new.info()?;
                *book = Some(new);
                Ok(info)
            }
            Err(error) => {
                let _ = umount(MOUNT);
                Err(error)
            }
        }
    }

    /// Makes entry `n`, which must be the next, and returns once its transaction is complete.
    ///
    /// # Errors
    /// [`LedgerError`]; the entry is not there then, unless the database could not say.
    pub fn put(&self, n: u64) -> Result<u64, LedgerError> {
        self.lock().as_mut().ok_or(LedgerError::Closed)?.put(n)
    }

    /// Reads all of it from the disk: the database is closed, the kernel's caches are dropped, and SQLite looks into every page.
    ///
    /// # Errors
    /// [`LedgerError`]; what is wrong with the contents is no error but in the answer.
    pub fn check(&self) -> Result<LedgerInfo, LedgerError> {
        let mut slot = self.lock();
        let Book { device, database, committed } = slot.take().ok_or(LedgerError::Closed)?;
        database.close().map_err(|(_, error)| error)?;
        nix::unistd::sync();
        fs::write("/proc/sys/vm/drop_caches", "3").map_err(system("/proc/sys/vm/drop_caches"))?;
        let mut book = Book::open(&device, Path::new(MOUNT))?;
        book.committed = committed;
        slot.insert(book).info()
    }

    /// Closes the database and unmounts its file system.
    ///
    /// # Errors
    /// [`LedgerError`].
    pub fn close(&self) -> Result<LedgerInfo, LedgerError> {
        let mut slot = self.lock();
        let book = slot.take().ok_or(LedgerError::Closed)?;
        let info = book.info()?;
        book.database.close().map_err(|(_, error)| error)?;
        umount(MOUNT).map_err(|e| system(format!("unmounting {MOUNT}"))(e.into()))?;
        Ok(info)
    }
}

impl Book {
    fn open(device: &str, dir: &Path) -> Result<Self, LedgerError> {
        let database = Connection::open(dir.join(FILE))?;
        // The safest that SQLite has: the rollback journal is on the disk before the database changes, and so is its end.
        database.execute_batch(
            "PRAGMA journal_mode = DELETE; PRAGMA synchronous = EXTRA;
             CREATE TABLE IF NOT EXISTS account (id INTEGER PRIMARY KEY, total INTEGER NOT NULL);
             CREATE TABLE IF NOT EXISTS entry (n INTEGER PRIMARY KEY, giver INTEGER NOT NULL, taker INTEGER NOT NULL,
                                               amount INTEGER NOT NULL, note TEXT NOT NULL);",
        )?;
        let mut book = Self { device: device.into(), database, committed: 0 };
        book.committed = book.count()?.1;
        Ok(book)
    }

    fn put(&mut self, n: u64) -> Result<u64, LedgerError> {
        if n != self.committed + 1 {
            return Err(LedgerError::Order { asked: n, committed: self.committed });
        }
        let (giver, taker, amount) = (n % ACCOUNTS, (n / ACCOUNTS + n * 7) % ACCOUNTS, n % 1000 + 1);
        let note = format!("{n:0>NOTE$}");
        let transaction = self.database.transaction()?;
        transaction.execute("INSERT INTO entry VALUES (?1, ?2, ?3, ?4, ?5)", params![n, giver, taker, amount, note])?;
        const MOVE: &str = "INSERT INTO account VALUES (?1, ?2) ON CONFLICT (id) DO UPDATE SET total = total + ?2";
        transaction.execute(MOVE, params![giver, -(amount as i64)])?;
        transaction.execute(MOVE, params![taker, amount])?;
        transaction.commit()?;
        self.committed = n;
        Ok(n)
    }

    /// How many entries there are, and the newest one's number.
    fn count(&self) -> Result<(u64, u64), LedgerError> {
        Ok(self
            .database
            .query_row("SELECT count(*), coalesce(max(n), 0) FROM entry", [], |row| Ok((row.get(0)?, row.get(1)?)))?)
    }

    fn info(&self) -> Result<LedgerInfo, LedgerError> {
        let (entries, newest) = self.count()?;
        let sum = |query| self.database.query_row(query, [], |row| row.get::<_, i64>(0));
        Ok(LedgerInfo {
            committed: self.committed,
            entries,
            newest,
            // What one account loses another gains, or half a transaction is there.
            balance: sum("SELECT coalesce(sum(total), 0) FROM account")?,
            disagreeing: sum(
                "SELECT count(*) FROM account a WHERE total != (SELECT coalesce(sum(amount), 0) FROM entry WHERE taker = a.id)
                 - (SELECT coalesce(sum(amount), 0) FROM entry WHERE giver = a.id)",
            )?,
            integrity: self.database.query_row("PRAGMA integrity_check", [], |row| row.get(0))?,
            errors: file_system_errors(&self.device),
        })
    }
}

/// Errors that ext4 has met on the device since its superblock was made; 0 where it is no ext4.
fn file_system_errors(device: &str) -> u64 {
    let name = device.rsplit('/').next().unwrap_or_default();
    fs::read_to_string(format!("/sys/fs/ext4/{name}/errors_count"))
        .ok()
        .and_then(|n| n.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_in_order_and_half_of_one_is_noticed() {
        let dir = std::env::temp_dir().join(format!("ledger-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let mut book = Book::open("none", &dir).unwrap();
        for n in 1..=200 {
            assert_eq!(book.put(n).unwrap(), n);
        }
        assert!(matches!(book.put(200), Err(LedgerError::Order { asked: 200, committed: 200 })));
        let sound = book.info().unwrap();
        assert!(sound.is_sound(), "{sound:?}");
        assert_eq!((sound.committed, sound.entries, sound.newest), (200, 200, 200));

        book.database.execute("DELETE FROM entry WHERE n = 200", []).unwrap();
        let behind = book.info().unwrap();
        assert!(!behind.is_sound(), "the disk is behind the memory: {behind:?}");
        assert_ne!(behind.disagreeing, 0);
        drop(book);
        assert_eq!(Book::open("none", &dir).unwrap().committed, 199, "an opened book knows what is there");
        fs::remove_dir_all(&dir).unwrap();
    }
}
