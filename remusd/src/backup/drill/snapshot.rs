//! The memory of an incoming domain as it was at one epoch boundary, read while later epochs go on being fed: what they are about to
//! overwrite is put aside first.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::sync::Mutex;

use crate::audit::gfn;
use crate::backup::host::BackupHost;
use crate::ids::DomId;
use crate::stream::{PAGE_SIZE, PageBatch};

/// Pages read at a time; a fed epoch waits for at most so many.
pub(in crate::backup) const CHUNK: u64 = 1024;

/// Most pages put aside (R8): 256 MiB.
const KEPT: usize = 1 << 16;

/// See the module. Whoever reads holds it; once it is dropped nothing is put aside any more.
pub(in crate::backup) struct Snapshot {
    host: Arc<dyn BackupHost>,
    domid: DomId,
    chunk: u64,
    /// Held while pages are read, so that none is overwritten meanwhile.
    copied: Mutex<Copied>,
}

#[derive(Default)]
struct Copied {
    /// All below are read.
    next: u64,
    /// Put aside; `None` is a hole.
    kept: BTreeMap<u64, Option<Bytes>>,
    failed: Option<String>,
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Snapshot").field("domid", &self.domid).finish_non_exhaustive()
    }
}

impl Snapshot {
    pub(in crate::backup) fn new(host: Arc<dyn BackupHost>, domid: DomId, chunk: u64) -> Self {
        Self { host, domid, chunk, copied: Mutex::default() }
    }

    /// These pages are about to be overwritten.
    pub(in crate::backup) async fn preserve(&self, entries: &[u64]) {
        let mut copied = self.copied.lock().await;
        if copied.failed.is_some() {
            return;
        }
        let wanted = entries.iter().map(|entry| gfn(*entry));
        let wanted: Vec<_> = wanted.filter(|gfn| *gfn >= copied.next && !copied.kept.contains_key(gfn)).collect();
        if copied.kept.len() + wanted.len() > KEPT {
            copied.kept.clear();
            copied.failed =
                Some(format!("the guest writes faster than {} MiB can be copied", (KEPT * PAGE_SIZE) >> 20));
            return;
        }
        for gfns in wanted.chunks(CHUNK as usize) {
            match self.host.read_pages(self.domid, gfns.to_vec()).await {
                Ok(batch) => {
                    copied.kept.extend(gfns.iter().map(|gfn| (*gfn, None)));
                    copied.kept.extend(pages(&batch).map(|(gfn, page)| (gfn, Some(page))));
                }
                Err(error) => {
                    copied.failed = Some(error.to_string());
                    return;
                }
            }
        }
    }

    /// The next pages, in order, up to `last`; `None` after that. An empty batch is a hole.
    pub(in crate::backup) async fn next(&self, last: u64) -> Result<Option<PageBatch>, String> {
        let mut copied = self.copied.lock().await;
        if let Some(why) = &copied.failed {
            return Err(why.clone());
        }
        let from = copied.next;
        if from > last {
            return Ok(None);
        }
        let end = from.saturating_add(self.chunk).min(last + 1);
        let unread: Vec<_> = (from..end).filter(|gfn| !copied.kept.contains_key(gfn)).collect();
        let read = self.host.read_pages(self.domid, unread).await.map_err(|error| error.to_string())?;
        let mut all: BTreeMap<u64, Bytes> = pages(&read).collect();
        let later = copied.kept.split_off(&end);
        let aside = std::mem::replace(&mut copied.kept, later);
        all.extend(aside.into_iter().filter_map(|(gfn, page)| Some((gfn, page?))));
        copied.next = end;
        let mut data = BytesMut::with_capacity(all.len() * PAGE_SIZE);
        all.values().for_each(|page| data.extend_from_slice(page));
        Ok(Some(PageBatch { entries: all.into_keys().collect(), data: data.freeze() }))
    }
}

/// The pages of a batch in which every entry has contents.
fn pages(batch: &PageBatch) -> impl Iterator<Item = (u64, Bytes)> + '_ {
    let page = |index: usize| batch.data.slice(index * PAGE_SIZE..(index + 1) * PAGE_SIZE);
    batch.entries.iter().enumerate().map(move |(index, entry)| (gfn(*entry), page(index)))
}
