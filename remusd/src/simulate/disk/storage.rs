//! A disk with a volatile cache, and the metadata beside it: what a host's power loss leaves, and what it takes.

use bytes::Bytes;
use devices::mirror::core::extent::{Extent, Geometry};
use devices::mirror::core::meta::{BLOCK as META_BLOCK, Head, PAGE_BYTES, PageImage, Role, encode_page, pages};
use devices::mirror::core::record::{Payload, Record, digest};
use devices::mirror::core::target::{Checked, HeadState};

use super::{BLOCK, BLOCKS};

/// Contents of a block: the tag of the write that wrote it.
pub type Tag = u32;

/// All blocks of a disk.
pub type Contents = [Tag; BLOCKS];

/// Two blocks to a region, so that a write may touch two of them; far smaller than the product allows, which makes a disk's every
/// case cheap.
#[must_use]
pub fn geometry() -> Geometry {
    Geometry { size: BLOCK as u64 * BLOCKS as u64, block: BLOCK as u32, region: 2 * BLOCK as u32 }
}

/// The blocks of a range.
pub fn blocks(extent: Extent) -> std::ops::Range<usize> {
    extent.offset as usize / BLOCK..extent.end() as usize / BLOCK
}

/// The range of so many blocks.
#[must_use]
pub fn extent(block: usize, count: usize) -> Extent {
    Extent::new((block * BLOCK) as u64, (count * BLOCK) as u32)
}

/// What a write of this tag writes.
#[must_use]
pub fn data(tag: Tag, count: usize) -> Bytes {
    u64::from(tag).to_le_bytes().repeat(count).into()
}

/// A host's disk.
pub struct Storage {
    /// As it is read.
    pub now: Contents,
    /// As a power loss leaves it, but for what of the cache gets there after all.
    pub stable: Contents,
    cached: Vec<(usize, Tag)>,
    /// The head of the metadata.
    pub head: Head,
    /// The pages of marks.
    pub pages: Vec<Vec<u8>>,
}

impl Storage {
    /// A disk with contents, and with metadata of this log, whose marks are clear.
    #[must_use]
    pub fn new(log: u128, role: Role, contents: Contents) -> Self {
        let mut head = Head::fresh(geometry(), log);
        head.role = role;
        let mut this = Self { now: contents, stable: contents, cached: Vec::new(), head, pages: Vec::new() };
        this.clear_pages();
        this
    }

    /// Clears all marks.
    pub fn clear_pages(&mut self) {
        let page = |page| encode_page(self.head.log, page, &[0; PAGE_BYTES]).bytes;
        self.pages = (0..pages(geometry().regions())).map(page).collect();
    }

    /// Writes blocks.
    pub fn write(&mut self, extent: Extent, tag: impl Fn(usize) -> Tag) {
        for (at, block) in blocks(extent).enumerate() {
            self.now[block] = tag(at);
            self.cached.push((block, tag(at)));
        }
    }

    /// Reads a range, as bytes.
    #[must_use]
    pub fn read(&self, extent: Extent) -> Vec<u8> {
        self.now[blocks(extent)].iter().flat_map(|tag| u64::from(*tag).to_le_bytes()).collect()
    }

    /// Everything written so far survives.
    pub fn flush(&mut self) {
        for (block, tag) in self.cached.drain(..) {
            self.stable[block] = tag;
        }
    }

    /// Whether nothing is only in the cache.
    #[must_use]
    pub fn is_flushed(&self) -> bool {
        self.cached.is_empty()
    }

    /// Power is lost: of what was in the cache anything may have got to the disk.
    pub fn crash(&mut self, mut lands: impl FnMut() -> bool) {
        for (block, tag) in std::mem::take(&mut self.cached) {
            if lands() {
                self.stable[block] = tag;
            }
        }
        self.now = self.stable;
    }

    /// Saves the part of the head that a target decides.
    pub fn save(&mut self, state: HeadState) {
        self.head.sequence += 1;
        self.head.role = if state.source { Role::Source } else { Role::Target };
        (self.head.synced, self.head.applying, self.head.epoch) = (state.synced, state.applying, state.epoch);
    }

    /// Makes it a copy that whoever connects overwrites.
    pub fn demote(&mut self) {
        self.save(HeadState { synced: false, applying: false, epoch: None, source: false });
    }

    /// Saves a page of marks.
    pub fn save_page(&mut self, image: &PageImage) {
        self.pages[image.page as usize].clone_from(&image.bytes);
    }

    /// A page of marks that was being saved when power was lost: half of it is new.
    pub fn tear_page(&mut self, image: &PageImage, second: bool) {
        let half = if second { META_BLOCK / 2..META_BLOCK } else { 0..META_BLOCK / 2 };
        self.pages[image.page as usize][half.clone()].copy_from_slice(&image.bytes[half]);
    }

    /// Does records in order.
    pub fn apply(&mut self, records: &[Record]) -> Vec<Checked> {
        let mut checks = Vec::new();
        for record in records {
            match record {
                Record::Write { extent, payload: Payload::Data(data) } => {
                    let tag = |at: usize| data.get(at * BLOCK..at * BLOCK + 4).map_or(0, little_endian);
                    self.write(*extent, tag);
                }
                Record::Write { extent, payload: Payload::Zeroes } => self.write(*extent, |_| 0),
                Record::Check { id, extent, digest: expected, verify } => {
                    let same = digest(&self.read(*extent)) == *expected;
                    checks.push(Checked { id: *id, same, verify: *verify });
                }
                Record::SyncDone | Record::End(_) => {}
            }
        }
        checks
    }
}

fn little_endian(bytes: &[u8]) -> Tag {
    bytes.iter().rev().fold(0, |tag, byte| tag << 8 | Tag::from(*byte))
}
