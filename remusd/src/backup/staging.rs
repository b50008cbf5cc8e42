//! The epoch in progress: counted, digested, and kept in memory until it is known to be whole (DESIGN R2, R7, R8).

use bytes::BytesMut;

use crate::enforced::enforced;
use crate::ids::Epoch;
use crate::link::{EpochEnd, StatePart};
use crate::stream::digest::Digester;
use crate::stream::{PageBatch, Record};

/// What a batch takes beside its entries and contents, in bytes: also one that has none.
const BATCH: usize = 128;

/// Why an epoch cannot become whole.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StageError {
    /// A frame came where it has no place.
    #[error("the primary broke the protocol: {0}")]
    Order(&'static str),
    /// What arrived is not what was captured.
    #[error("epoch {epoch} arrived damaged: its {what} do not match what the primary captured")]
    Mismatch {
        /// Which epoch.
        epoch: Epoch,
        /// What differs.
        what: &'static str,
    },
    /// The epoch does not fit.
    #[error(
        "epoch {epoch} needs more than the {} MiB that this host may stage; raise the backup's staging limit or let the guest write less per epoch",
        .limit >> 20
    )]
    TooLarge {
        /// Which epoch.
        epoch: Epoch,
        /// The limit in bytes.
        limit: usize,
    },
}

/// A whole, verified epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whole {
    /// Which epoch.
    pub epoch: Epoch,
    /// Whether it may be activated.
    pub armed: bool,
    /// Its pages as far as they were staged, in order.
    pub pages: Vec<PageBatch>,
    /// Decoded bytes of all of it, passed-through ones included.
    pub bytes: u64,
}

struct Open {
    epoch: Epoch,
    pages: Vec<PageBatch>,
    records: Vec<Record>,
    partial: Option<(StatePart, BytesMut)>,
    digester: Digester,
    page_count: u64,
    bytes: u64,
    staged: usize,
    /// Pages go on at once instead of being staged.
    through: bool,
}

impl std::fmt::Debug for Open {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Open").field("epoch", &self.epoch).field("staged", &self.staged).finish_non_exhaustive()
    }
}

/// Holds at most one open epoch, and the newest whole epoch's state.
#[derive(Debug)]
pub struct Staging {
    limit: usize,
    open: Option<Open>,
    /// Newest whole epoch.
    whole: Option<Epoch>,
    /// Newest whole armed epoch.
    armed: Option<Epoch>,
    state: Vec<Record>,
}

impl Staging {
    /// Empty, for epochs of at most `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { limit, open: None, whole: None, armed: None, state: Vec::new() }
    }

    /// The newest whole epoch.
    #[must_use]
    pub fn whole(&self) -> Option<Epoch> {
        self.whole
    }

    /// The newest whole armed epoch. Once there is one, all later ones are armed, so it is the newest whole one.
    #[must_use]
    pub fn armed(&self) -> Option<Epoch> {
        self.armed
    }

    /// The newest whole epoch's state records, in order.
    #[must_use]
    pub fn state(&self) -> &[Record] {
        &self.state
    }

    /// Whether pages go on at once: the reader must then be held back by the feed.
    #[must_use]
    pub fn passes_through(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.through)
    }

    /// Bytes held for the open epoch.
    #[must_use]
    pub fn staged(&self) -> usize {
        self.open.as_ref().map_or(0, |open| open.staged)
    }

    /// Forgets the open epoch (R2).
    pub fn discard_open(&mut self) {
        self.open = None;
    }

    /// Begins an epoch; one that was not ended is forgotten.
    ///
    /// # Errors
    /// [`StageError::Order`] if it is not newer than the newest whole one.
    pub fn begin(&mut self, epoch: Epoch) -> Result<(), StageError> {
        if self.whole.is_some_and(|whole| epoch <= whole) {
            return Err(StageError::Order("an epoch began that is not newer than the last one"));
        }
        self.open = Some(Open {
            epoch,
            pages: Vec::new(),
            records: Vec::new(),
            partial: None,
            digester: Digester::new(),
            page_count: 0,
            bytes: 0,
            staged: 0,
            // The first copy is as large as the guest. It is no copy yet, so a torn one is thrown away whole (hazard F21).
            through: self.whole.is_none(),
        });
        Ok(())
    }

    fn open(&mut self, epoch: Epoch) -> Result<&mut Open, StageError> {
        match &mut self.open {
            Some(open) if open.epoch == epoch => Ok(open),
            Some(_) => Err(StageError::Order("a frame of another epoch than the open one")),
            None => Err(StageError::Order("a frame of an epoch that was not begun")),
        }
    }

    /// Takes pages. Returns those that go on at once.
    ///
    /// # Errors
    /// [`StageError`].
    pub fn pages(&mut self, epoch: Epoch, batch: PageBatch) -> Result<Vec<PageBatch>, StageError> {
        let (limit, armed) = (self.limit, self.armed.is_some());
        let open = self.open(epoch)?;
        if open.partial.is_some() {
            return Err(StageError::Order("pages inside of a state record"));
        }
        open.digester.pages(&batch);
        open.page_count += batch.entries.len() as u64;
        open.bytes += batch.data.len() as u64;
        if open.through || !enforced("R2-pages-wait-for-the-whole") {
            return Ok(vec![batch]);
        }
        open.staged += batch.size() + BATCH;
        open.pages.push(batch);
        if open.staged <= limit {
            return Ok(Vec::new());
        }
        if armed {
            return Err(StageError::TooLarge { epoch, limit });
        }
        // Nothing can be activated yet, so nothing is lost by going on like the first copy.
        open.through = true;
        let pages = std::mem::take(&mut open.pages);
        open.staged -= pages.iter().map(|batch| batch.size() + BATCH).sum::<usize>();
        Ok(pages)
    }

    /// Takes a part of a state record.
    ///
    /// # Errors
    /// [`StageError`].
    pub fn part(&mut self, part: &StatePart) -> Result<(), StageError> {
        let limit = self.limit;
        let open = self.open(part.epoch)?;
        open.staged += part.data.len();
        if open.staged > limit {
            return Err(StageError::TooLarge { epoch: part.epoch, limit });
        }
        let (first, mut body) = match open.partial.take() {
            Some((first, body)) => (first, body),
            None if part.offset == 0 => (part.clone(), BytesMut::new()),
            None => return Err(StageError::Order("a state record without its beginning")),
        };
        let same = (first.layer, first.kind, first.total) == (part.layer, part.kind, part.total);
        if !same || part.offset as usize != body.len() {
            return Err(StageError::Order("parts of a state record that do not belong together"));
        }
        body.extend_from_slice(&part.data);
        if body.len() < part.total as usize {
            open.partial = Some((first, body));
            return Ok(());
        }
        let record = Record { layer: part.layer, kind: part.kind, body: body.freeze() };
        open.digester.record(&record);
        open.bytes += record.body.len() as u64;
        open.records.push(record);
        Ok(())
    }

    /// Ends the open epoch: everything must be there and match.
    ///
    /// # Errors
    /// [`StageError`]; the open epoch is forgotten.
    pub fn end(&mut self, end: &EpochEnd) -> Result<Whole, StageError> {
        self.open(end.epoch)?;
        let Some(mut open) = self.open.take() else {
            return Err(StageError::Order("an epoch ended that was not begun"));
        };
        let mismatch = |what| StageError::Mismatch { epoch: end.epoch, what };
        if open.partial.is_some() {
            return Err(StageError::Order("an epoch ended inside of a state record"));
        }
        if open.page_count != end.pages {
            return Err(mismatch("pages"));
        }
        if open.records.len() as u64 != u64::from(end.records) || open.records.is_empty() {
            return Err(mismatch("state records"));
        }
        if open.bytes != end.bytes {
            return Err(mismatch("bytes"));
        }
        if enforced("R7-digest") && open.digester.finish() != end.digest {
            return Err(mismatch("contents"));
        }
        let armed = end.armed || !enforced("R4-armed-first");
        if self.armed.is_some() && !armed {
            return Err(StageError::Order("an unarmed epoch after an armed one"));
        }
        self.whole = Some(end.epoch);
        if armed {
            self.armed = Some(end.epoch);
        }
        self.state = open.records;
        Ok(Whole { epoch: end.epoch, armed, pages: open.pages, bytes: open.bytes })
    }
}
