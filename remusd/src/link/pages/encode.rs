//! The sender's half.

use bytes::Bytes;
use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use rayon::prelude::*;

use super::cache::PageCache;
use super::delta::{self, Difference, SPARSE_MAX};
use super::{ENTRY, HEAD, PART_ENTRIES, PART_PAGES, encoding};
use crate::audit::gfn;
use crate::pool::{BufferPool, Pooled};
use crate::stream::{PAGE_SIZE, PageBatch};

/// An LZ4 block above this size is not worth the receiver's time: 7/8 of a page.
const LZ4_MAX: usize = PAGE_SIZE / 8 * 7;
/// After so many pages in a row that LZ4 did not shrink, only every [`LZ4_PROBE`]th is tried.
const LZ4_PATIENCE: u32 = 4;
const LZ4_PROBE: u32 = 16;
/// Batches of fewer pages are encoded on the caller's core: waking others takes as long.
const PARALLEL: usize = 4 * PART_PAGES;
/// Unused part buffers that are kept.
const KEEP: usize = 64;

/// What a byte less on the wire may cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// The link takes what comes: no LZ4, which is slower than a fast link.
    Fast,
    /// The link is the narrow place: everything that makes a page smaller.
    Dense,
}

/// How pages were encoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Pages of zeros.
    pub zero: u64,
    /// Pages as committed.
    pub unchanged: u64,
    /// Pages as runs of changed words.
    pub sparse: u64,
    /// Pages as LZ4 of the difference.
    pub xor: u64,
    /// Pages as LZ4 of themselves.
    pub lz4: u64,
    /// Pages as they are.
    pub raw: u64,
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.zero += other.zero;
        self.unchanged += other.unchanged;
        self.sparse += other.sparse;
        self.xor += other.xor;
        self.lz4 += other.lz4;
        self.raw += other.raw;
    }
}

/// Encodes the pages of one session, epoch after epoch.
#[derive(Debug)]
pub struct PageEncoder {
    cache: PageCache,
    buffers: BufferPool,
    part: u32,
    open: bool,
    counts: Counts,
}

/// What one core needs to encode a part.
struct Scratch {
    table: CompressTable,
    runs: [u8; SPARSE_MAX],
    difference: [u8; PAGE_SIZE],
    block: [u8; get_maximum_output_size(PAGE_SIZE)],
    failures: u32,
}

impl Scratch {
    fn new() -> Self {
        Self {
            table: CompressTable::small(),
            runs: [0; SPARSE_MAX],
            difference: [0; PAGE_SIZE],
            block: [0; get_maximum_output_size(PAGE_SIZE)],
            failures: 0,
        }
    }

    /// Whether LZ4 is worth a try after what it did to the pages before.
    fn tries(&mut self) -> bool {
        if self.failures < LZ4_PATIENCE {
            return true;
        }
        self.failures += 1;
        self.failures.is_multiple_of(LZ4_PROBE)
    }
}

impl PageEncoder {
    /// With an empty cache of at most `limit` bytes; the decoder must have the same.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            cache: PageCache::new(limit),
            buffers: BufferPool::new(KEEP),
            part: 0,
            open: false,
            counts: Counts::default(),
        }
    }

    /// An epoch begins; one that was not committed is given up.
    pub fn begin(&mut self) {
        self.cache.abandon();
        self.part = 0;
        self.open = true;
    }

    /// The epoch has ended: its pages are what the next one is encoded against. Nothing to do outside an epoch.
    pub fn commit(&mut self) {
        if std::mem::take(&mut self.open) {
            self.cache.commit();
        }
    }

    /// How the pages since the start were encoded.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// The cache, for its size and for tests.
    #[must_use]
    pub fn cache(&self) -> &PageCache {
        &self.cache
    }

    /// The bodies of the parts that carry this batch, in order. Uses all cores for a large one. The batch's contents must agree with
    /// its entries; what has none is left out. Between [`begin`](Self::begin) and [`commit`](Self::commit).
    pub fn encode(&mut self, batch: &PageBatch, effort: Effort) -> Vec<Bytes> {
        debug_assert!(self.open, "outside of an epoch");
        let pieces = cut(batch);
        let first = self.part;
        self.part = first.wrapping_add(pieces.len() as u32);
        let (cache, buffers) = (&self.cache, &self.buffers);
        let work = |scratch: &mut Scratch, (index, piece): (usize, &Piece<'_>)| {
            let number = first.wrapping_add(index as u32);
            part(cache, buffers, scratch, number, piece, effort)
        };
        let parts: Vec<(Pooled, Counts)> = if batch.data.len() / PAGE_SIZE < PARALLEL {
            let mut scratch = Scratch::new();
            pieces.iter().enumerate().map(|piece| work(&mut scratch, piece)).collect()
        } else {
            pieces.par_iter().enumerate().map_init(Scratch::new, work).collect()
        };
        for (piece, (body, counts)) in pieces.iter().zip(&parts) {
            self.counts.add(*counts);
            let encodings = &body[HEAD + piece.entries.len() * 8..];
            self.cache.take_part(piece.entries, encodings, piece.data);
        }
        parts.into_iter().map(|(body, _)| frozen(body)).collect()
    }
}

/// What waits to be sent is counted by its length: a part that shrank must not hold on to the buffer of a raw one.
fn frozen(body: Pooled) -> Bytes {
    if body.len() * 4 < body.capacity() { Bytes::copy_from_slice(&body) } else { body.freeze() }
}

/// A stretch of a batch.
struct Piece<'a> {
    entries: &'a [u64],
    data: &'a [u8],
}

fn cut(batch: &PageBatch) -> Vec<Piece<'_>> {
    let mut pieces = Vec::new();
    let (mut entries, mut data) = (batch.entries.as_slice(), &batch.data[..]);
    while !entries.is_empty() {
        let (mut taken, mut pages) = (0, 0);
        for entry in entries.iter().take(PART_ENTRIES) {
            let page = usize::from(PageBatch::has_data(*entry));
            if pages + page > PART_PAGES {
                break;
            }
            pages += page;
            taken += 1;
        }
        let (now, later) = entries.split_at(taken);
        let (contents, rest) = data.split_at((pages * PAGE_SIZE).min(data.len()));
        pieces.push(Piece { entries: now, data: contents });
        (entries, data) = (later, rest);
    }
    pieces
}

fn part(
    cache: &PageCache,
    buffers: &BufferPool,
    scratch: &mut Scratch,
    number: u32,
    piece: &Piece<'_>,
    effort: Effort,
) -> (Pooled, Counts) {
    let count = piece.entries.len();
    // A page never takes more than itself and a length.
    let mut out = buffers.take(HEAD + count * ENTRY + piece.data.len() + PAGE_SIZE);
    out.extend_from_slice(&number.to_le_bytes());
    out.extend_from_slice(&(count as u32).to_le_bytes());
    piece.entries.iter().for_each(|entry| out.extend_from_slice(&entry.to_le_bytes()));
    let codes = out.len();
    out.resize(codes + count, encoding::NONE);
    let mut counts = Counts::default();
    let mut pages = piece.data.chunks_exact(PAGE_SIZE);
    for (index, entry) in piece.entries.iter().enumerate() {
        if !PageBatch::has_data(*entry) {
            continue;
        }
        let Some(page) = pages.next() else { break };
        let base = cache.committed(gfn(*entry));
        let code = one(scratch, page, base, effort, &mut out);
        out[codes + index] = code;
        *match code {
            encoding::ZERO => &mut counts.zero,
            encoding::UNCHANGED => &mut counts.unchanged,
            encoding::SPARSE => &mut counts.sparse,
            encoding::XOR => &mut counts.xor,
            encoding::LZ4 => &mut counts.lz4,
            _ => &mut counts.raw,
        } += 1;
    }
    (out, counts)
}

fn one(scratch: &mut Scratch, page: &[u8], base: Option<&[u8]>, effort: Effort, out: &mut Vec<u8>) -> u8 {
    if delta::is_zero(page) {
        return encoding::ZERO;
    }
    match delta::sparse(page, base.unwrap_or(&super::ZERO_PAGE), &mut scratch.runs) {
        Difference::Same => return encoding::UNCHANGED,
        Difference::Runs(length) => {
            out.extend_from_slice(&(length as u16).to_le_bytes());
            out.extend_from_slice(&scratch.runs[..length]);
            return encoding::SPARSE;
        }
        Difference::Large => {}
    }
    if effort == Effort::Dense && scratch.tries() {
        let Scratch { table, difference, block, failures, .. } = scratch;
        if let Some(base) = base {
            delta::xor(page, base, difference);
            if lz4(&*difference, block, table, out) {
                *failures = 0;
                return encoding::XOR;
            }
        }
        if lz4(page, block, table, out) {
            *failures = 0;
            return encoding::LZ4;
        }
        *failures += 1;
    }
    out.extend_from_slice(page);
    encoding::RAW
}

/// Appends length and block, unless that is not worth it.
fn lz4(page: &[u8], block: &mut [u8], table: &mut CompressTable, out: &mut Vec<u8>) -> bool {
    match compress_into_with_table(page, block, table) {
        Ok(length) if length <= LZ4_MAX => {
            out.extend_from_slice(&(length as u16).to_le_bytes());
            out.extend_from_slice(&block[..length]);
            true
        }
        _ => false,
    }
}
