//! The receiver's half. Safe against any bytes: what does not fit is refused, and nothing makes it hold more than its cache and one part.

use bytes::{Buf, Bytes};
use lz4_flex::block::decompress_into;

use super::cache::PageCache;
use super::{PART_ENTRIES, PART_PAGES, ZERO_PAGE, delta, encoding};
use crate::audit::gfn;
use crate::pool::BufferPool;
use crate::stream::{PAGE_SIZE, PageBatch};

/// Unused page buffers that are kept.
const KEEP: usize = 64;

/// A part that is not as the format says, or comes where it has no place. The session cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("pages arrived damaged: {0}")]
pub struct PagesError(pub &'static str);

/// Decodes the pages of one session, epoch after epoch.
#[derive(Debug)]
pub struct PageDecoder {
    cache: PageCache,
    buffers: BufferPool,
    part: u32,
    open: bool,
}

impl PageDecoder {
    /// With an empty cache of at most `limit` bytes, the encoder's.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { cache: PageCache::new(limit), buffers: BufferPool::new(KEEP), part: 0, open: false }
    }

    /// An epoch begins; one that was not committed is given up.
    pub fn begin(&mut self) {
        self.cache.abandon();
        self.part = 0;
        self.open = true;
    }

    /// The epoch has ended and is whole. Nothing to do outside an epoch.
    pub fn commit(&mut self) {
        if std::mem::take(&mut self.open) {
            self.cache.commit();
        }
    }

    /// The cache, for its size and for tests.
    #[must_use]
    pub fn cache(&self) -> &PageCache {
        &self.cache
    }

    /// The pages of a part's body. Parts of an epoch must come in the order in which they were encoded.
    ///
    /// # Errors
    /// [`PagesError`]; the epoch can then only be given up.
    pub fn decode(&mut self, mut body: Bytes) -> Result<PageBatch, PagesError> {
        if !self.open {
            return Err(PagesError("outside of an epoch"));
        }
        let short = |_| PagesError("a part is too short");
        let number = body.try_get_u32_le().map_err(short)?;
        let count = body.try_get_u32_le().map_err(short)? as usize;
        if number != self.part {
            return Err(PagesError("a part is missing or out of order"));
        }
        if count == 0 || count > PART_ENTRIES {
            return Err(PagesError("a part has no pages or too many"));
        }
        if body.len() < count * super::ENTRY {
            return Err(PagesError("a part is too short"));
        }
        let entries: Vec<u64> =
            body.split_to(count * 8).as_chunks::<8>().0.iter().map(|entry| u64::from_le_bytes(*entry)).collect();
        let codes = body.split_to(count);
        let data = self.contents(&entries, &codes, body)?;
        let batch = PageBatch { entries, data };
        self.cache.take_part(&batch.entries, &codes, &batch.data);
        self.part = self.part.wrapping_add(1);
        Ok(batch)
    }

    fn contents(&self, entries: &[u64], codes: &[u8], body: Bytes) -> Result<Bytes, PagesError> {
        if entries.iter().zip(codes).any(|(entry, code)| PageBatch::has_data(*entry) != (*code != encoding::NONE)) {
            return Err(PagesError("an encoding does not fit its page's type"));
        }
        let pages = codes.iter().filter(|code| **code != encoding::NONE).count();
        // What few bytes can grow to is bounded: the receiver counts frames.
        if pages > PART_PAGES {
            return Err(PagesError("a part has too many contents"));
        }
        if codes.iter().all(|code| matches!(*code, encoding::NONE | encoding::RAW)) {
            // As they came: no copy.
            let whole = body.len() == pages * PAGE_SIZE;
            return if whole { Ok(body) } else { Err(PagesError("contents and encodings do not agree")) };
        }
        let mut out = self.buffers.take(pages * PAGE_SIZE);
        let mut rest = &body[..];
        for (entry, code) in entries.iter().zip(codes).filter(|(_, code)| **code != encoding::NONE) {
            let base = self.cache.committed(gfn(*entry));
            rest = page(*code, base, rest, &mut out)?;
        }
        if rest.is_empty() { Ok(out.freeze()) } else { Err(PagesError("bytes are left over")) }
    }
}

/// Appends one page; returns what is left.
fn page<'a>(code: u8, base: Option<&[u8]>, from: &'a [u8], out: &mut Vec<u8>) -> Result<&'a [u8], PagesError> {
    let at = out.len();
    let base_or_zero = base.unwrap_or(&ZERO_PAGE);
    match code {
        encoding::ZERO => {
            out.extend_from_slice(&ZERO_PAGE);
            Ok(from)
        }
        encoding::RAW => {
            let (page, rest) = from.split_at_checked(PAGE_SIZE).ok_or(PagesError("a page is cut off"))?;
            out.extend_from_slice(page);
            Ok(rest)
        }
        encoding::UNCHANGED => {
            out.extend_from_slice(base.ok_or(PagesError("an unchanged page was never sent"))?);
            Ok(from)
        }
        encoding::SPARSE => {
            let (runs, rest) = prefixed(from)?;
            out.extend_from_slice(base_or_zero);
            delta::apply(runs, &mut out[at..]).map_err(PagesError)?;
            Ok(rest)
        }
        encoding::XOR | encoding::LZ4 => {
            let (block, rest) = prefixed(from)?;
            out.extend_from_slice(&ZERO_PAGE);
            match decompress_into(block, &mut out[at..]) {
                Ok(PAGE_SIZE) => {}
                _ => return Err(PagesError("an LZ4 block is damaged")),
            }
            if code == encoding::XOR {
                delta::xor_into(&mut out[at..], base_or_zero);
            }
            Ok(rest)
        }
        _ => Err(PagesError("an encoding is unknown")),
    }
}

fn prefixed(from: &[u8]) -> Result<(&[u8], &[u8]), PagesError> {
    let (length, rest) = from.split_first_chunk::<2>().ok_or(PagesError("a length is cut off"))?;
    rest.split_at_checked(usize::from(u16::from_le_bytes(*length))).ok_or(PagesError("contents are cut off"))
}
