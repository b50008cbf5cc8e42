//! Copied pages on their way from the guest to the queue.

use bytes::Bytes;

use crate::pool::{BufferPool, Pooled};
use crate::stream::{PAGE_SIZE, PageBatch};
use crate::xen::foreign::Windows;

/// Pages of one batch: 4 MiB.
pub(super) const BATCH: usize = 1024;

/// Some pages, copied.
pub(super) struct Copied {
    gfns: Vec<u64>,
    data: Pooled,
}

impl Copied {
    /// Copies the pages, in batches. Buffers come from the pool; there is one allocation for each batch.
    pub(super) fn of(windows: &Windows, gfns: &[u64], pool: &BufferPool, out: &mut Vec<Self>) {
        for gfns in gfns.chunks(BATCH) {
            let mut data = pool.take_full(BATCH * PAGE_SIZE);
            windows.gather(gfns, &mut data[..gfns.len() * PAGE_SIZE]);
            out.push(Self { gfns: gfns.to_vec(), data });
        }
    }

    /// Keeps the pages for which `keep` says so.
    pub(super) fn retain(&mut self, keep: impl Fn(u64) -> bool) {
        let mut kept = 0;
        for index in 0..self.gfns.len() {
            let gfn = self.gfns[index];
            if !keep(gfn) {
                continue;
            }
            if kept != index {
                self.gfns[kept] = gfn;
                self.data.copy_within(index * PAGE_SIZE..(index + 1) * PAGE_SIZE, kept * PAGE_SIZE);
            }
            kept += 1;
        }
        self.gfns.truncate(kept);
    }

    /// Pages in it.
    pub(super) fn pages(&self) -> usize {
        self.gfns.len()
    }

    /// The pages' numbers.
    pub(super) fn gfns(&self) -> &[u64] {
        &self.gfns
    }

    /// For the queue; `None` when nothing is in it.
    pub(super) fn batch(self) -> Option<PageBatch> {
        if self.gfns.is_empty() {
            return None;
        }
        let length = self.gfns.len() * PAGE_SIZE;
        let data: Bytes = self.data.freeze().slice(..length);
        // An HVM or PVH guest's pages all have type NOTAB, which is 0.
        Some(PageBatch { entries: self.gfns, data })
    }
}
