//! What survives a crash beside the disk itself, and its layout in the metadata file.
//!
//! The file has blocks of 4096 bytes: two slots for the head, of which the valid one with the greater sequence number
//! counts, then pages of marks. A block is written alone, and is valid or not by its own checksum. A page of marks that
//! is not valid means that all its regions are marked; without a valid head nothing is known, and everything has to be
//! compared. So no write of a single block, torn or lost, can make a difference between the copies go unnoticed (F16).
//!
//! Integers are little-endian.
//!
//! | head, offset | size | field |
//! |---|---|---|
//! | 0 | 8 | `RMUSDISK` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | CRC-32 of the block with this field zero |
//! | 16 | 8 | sequence number |
//! | 24 | 16 | the log's id: pages of another log are not valid |
//! | 40 | 8 | disk size in bytes |
//! | 48 | 4 | block size in bytes |
//! | 52 | 4 | region size in bytes |
//! | 56 | 16 | lineage, 0: none |
//! | 72 | 1 | role: 0 none, 1 source, 2 target |
//! | 73 | 1 | flags: 1 synced, 2 applying |
//! | 80 | 8 | epoch up to which the target's copy is durable, if bit 4 of the flags is set |
//!
//! | page of marks, offset | size | field |
//! |---|---|---|
//! | 0 | 8 | `RMUSMARK` |
//! | 8 | 16 | the log's id |
//! | 24 | 4 | number of the page |
//! | 28 | 4 | CRC-32 of the block with this field zero |
//! | 32 | 4064 | a bit per region, lowest first; 1: marked |

use super::extent::{Geometry, GeometryError};

/// Bytes per block of the metadata file.
pub const BLOCK: usize = 4096;
/// Bytes of marks in a page.
pub const PAGE_BYTES: usize = BLOCK - 32;
/// Regions per page of marks.
pub const PAGE_REGIONS: u32 = PAGE_BYTES as u32 * 8;

const HEAD_MAGIC: &[u8; 8] = b"RMUSDISK";
const PAGE_MAGIC: &[u8; 8] = b"RMUSMARK";
const VERSION: u32 = 1;

/// What this host's copy is to the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Role {
    /// Neither: never used, or detached.
    None = 0,
    /// The guest writes it.
    Source = 1,
    /// It follows the peer's.
    Target = 2,
}

/// The head of the metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// Grows with every write.
    pub sequence: u64,
    /// Drawn when the file was made.
    pub log: u128,
    /// The disk's.
    pub geometry: Geometry,
    /// Two copies of the same lineage are alike outside the union of their marks. 0: alike to nothing.
    pub lineage: u128,
    /// What this copy is.
    pub role: Role,
    /// Target: no synchronisation is unfinished (R4).
    pub synced: bool,
    /// Target: batches may be half applied. An unclean end leaves it set.
    pub applying: bool,
    /// Target: the epoch that the copy is at, if it is at one.
    pub epoch: Option<u64>,
}

/// A block of metadata to be written.
#[derive(Clone, PartialEq, Eq)]
pub struct PageImage {
    /// Number of the page of marks.
    pub page: u32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

impl std::fmt::Debug for PageImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageImage({})", self.page)
    }
}

impl PageImage {
    /// Where it goes, in bytes from the start of the metadata file.
    #[must_use]
    pub fn offset(&self) -> u64 {
        (2 + u64::from(self.page)) * BLOCK as u64
    }
}

impl Head {
    /// The head of a disk that nothing is known about.
    #[must_use]
    pub fn fresh(geometry: Geometry, log: u128) -> Self {
        let (sequence, lineage) = (0, 0);
        Self { sequence, log, geometry, lineage, role: Role::None, synced: false, applying: false, epoch: None }
    }

    /// Where this head goes: the slots alternate.
    #[must_use]
    pub fn offset(&self) -> u64 {
        (self.sequence % 2) * BLOCK as u64
    }

    /// The block.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut block = vec![0; BLOCK];
        put(&mut block, 0, HEAD_MAGIC);
        put(&mut block, 8, &VERSION.to_le_bytes());
        put(&mut block, 16, &self.sequence.to_le_bytes());
        put(&mut block, 24, &self.log.to_le_bytes());
        put(&mut block, 40, &self.geometry.size.to_le_bytes());
        put(&mut block, 48, &self.geometry.block.to_le_bytes());
        put(&mut block, 52, &self.geometry.region.to_le_bytes());
        put(&mut block, 56, &self.lineage.to_le_bytes());
        block[72] = self.role as u8;
        block[73] = u8::from(self.synced) | u8::from(self.applying) << 1 | u8::from(self.epoch.is_some()) << 2;
        put(&mut block, 80, &self.epoch.unwrap_or(0).to_le_bytes());
        seal(&mut block, 12);
        block
    }

    /// A head, if the block is a valid one.
    ///
    /// # Errors
    /// [`MetaError::Version`] for a valid block of another version: it must not be taken for a torn one.
    pub fn decode(block: &[u8]) -> Result<Option<Self>, MetaError> {
        if block.len() != BLOCK || &block[..8] != HEAD_MAGIC || !is_sealed(block, 12) {
            return Ok(None);
        }
        let version = u32::from_le_bytes(get(block, 8));
        if version != VERSION {
            return Err(MetaError::Version(version));
        }
        let role = match block[72] {
            0 => Role::None,
            1 => Role::Source,
            2 => Role::Target,
            _ => return Ok(None),
        };
        let geometry = Geometry::new(
            u64::from_le_bytes(get(block, 40)),
            u32::from_le_bytes(get(block, 48)),
            u32::from_le_bytes(get(block, 52)),
        )?;
        let flags = block[73];
        Ok(Some(Self {
            sequence: u64::from_le_bytes(get(block, 16)),
            log: u128::from_le_bytes(get(block, 24)),
            geometry,
            lineage: u128::from_le_bytes(get(block, 56)),
            role,
            synced: flags & 1 != 0,
            applying: flags & 2 != 0,
            epoch: (flags & 4 != 0).then(|| u64::from_le_bytes(get(block, 80))),
        }))
    }

    /// The newer of the two slots.
    ///
    /// # Errors
    /// As for [`Head::decode`].
    pub fn newest(slots: [&[u8]; 2]) -> Result<Option<Self>, MetaError> {
        let [a, b] = slots;
        Ok([Self::decode(a)?, Self::decode(b)?].into_iter().flatten().max_by_key(|h| h.sequence))
    }
}

/// The metadata cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MetaError {
    /// Written by another version of this program.
    #[error("the disk's metadata has format version {0}, this program knows version 1: use the program that wrote it")]
    Version(u32),
    /// It describes a disk that cannot be.
    #[error("the disk's metadata describes an impossible disk: {0}")]
    Geometry(#[from] GeometryError),
}

/// Number of pages of marks for so many regions.
#[must_use]
pub fn pages(regions: u32) -> u32 {
    regions.div_ceil(PAGE_REGIONS)
}

/// A page of marks as a block.
#[must_use]
pub fn encode_page(log: u128, page: u32, bits: &[u8]) -> PageImage {
    let mut block = vec![0; BLOCK];
    put(&mut block, 0, PAGE_MAGIC);
    put(&mut block, 8, &log.to_le_bytes());
    put(&mut block, 24, &page.to_le_bytes());
    put(&mut block, 32, bits);
    seal(&mut block, 28);
    PageImage { page, bytes: block }
}

/// The marks of a page. All are set if the block is not valid.
#[must_use]
pub fn decode_page(log: u128, page: u32, block: &[u8]) -> Vec<u8> {
    let valid = block.len() == BLOCK
        && &block[..8] == PAGE_MAGIC
        && block[8..24] == log.to_le_bytes()
        && block[24..28] == page.to_le_bytes()
        && is_sealed(block, 28);
    if valid { block[32..].to_vec() } else { vec![0xff; PAGE_BYTES] }
}

fn put(block: &mut [u8], at: usize, bytes: &[u8]) {
    block[at..at + bytes.len()].copy_from_slice(bytes);
}

fn get<const N: usize>(block: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&block[at..at + N]);
    out
}

fn checksum(block: &[u8], at: usize) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&block[..at]);
    hasher.update(&[0; 4]);
    hasher.update(&block[at + 4..]);
    hasher.finalize()
}

fn seal(block: &mut [u8], at: usize) {
    let sum = checksum(block, at);
    put(block, at, &sum.to_le_bytes());
}

fn is_sealed(block: &[u8], at: usize) -> bool {
    get(block, at) == checksum(block, at).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> Head {
        let mut head = Head::fresh(Geometry::new(10 << 20, 512, 1 << 20).unwrap(), 0x1122);
        head.sequence = 7;
        head.lineage = 0x3344;
        head.role = Role::Target;
        head.applying = true;
        head.epoch = Some(99);
        head
    }

    #[test]
    fn head_has_the_documented_layout() {
        let block = head().encode();
        assert_eq!(&block[..12], b"RMUSDISK\x01\0\0\0");
        assert_eq!(block[16], 7);
        assert_eq!(block[24..26], [0x22, 0x11]);
        assert_eq!(block[40..48], (10u64 << 20).to_le_bytes());
        assert_eq!(block[48..56], [0, 2, 0, 0, 0, 0, 16, 0]);
        assert_eq!(block[56..58], [0x44, 0x33]);
        assert_eq!(block[72..74], [2, 0b110]);
        assert_eq!(block[80], 99);
        assert_eq!(Head::decode(&block), Ok(Some(head())));
        // A change of this constant is a change of the format.
        assert_eq!(u32::from_le_bytes(get(&block, 12)), 854_353_817);
    }

    #[test]
    fn any_damage_makes_a_block_invalid() {
        let good = head().encode();
        let marks = encode_page(5, 0, &[0; PAGE_BYTES]);
        for at in (0..BLOCK).step_by(7).chain(0..90) {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            assert_eq!(Head::decode(&bad), Ok(None), "byte {at}");
            let mut bad = marks.bytes.clone();
            bad[at] ^= 0x10;
            assert_eq!(decode_page(5, 0, &bad), [0xff; PAGE_BYTES], "byte {at}");
        }
        // The second half of the block is still the one before.
        let mut torn = good.clone();
        let mut older = head();
        older.epoch = None;
        torn[..64].copy_from_slice(&older.encode()[..64]);
        assert_eq!(Head::decode(&torn), Ok(None));
    }

    #[test]
    fn pages_of_another_log_or_place_count_as_marked() {
        let page = encode_page(5, 1, &[0; PAGE_BYTES]);
        assert_eq!(page.offset(), 3 * 4096);
        assert_eq!(decode_page(5, 1, &page.bytes), [0; PAGE_BYTES]);
        assert_eq!(decode_page(6, 1, &page.bytes), [0xff; PAGE_BYTES]);
        assert_eq!(decode_page(5, 0, &page.bytes), [0xff; PAGE_BYTES]);
    }

    #[test]
    fn the_newer_slot_counts_and_a_torn_one_does_not() {
        let old = head();
        let mut new = head();
        new.sequence = 8;
        assert_eq!(Head::newest([&new.encode(), &old.encode()]), Ok(Some(new.clone())));
        let mut torn = new.encode();
        torn[200] = 1;
        assert_eq!(Head::newest([&torn, &old.encode()]), Ok(Some(old)));
        assert_eq!(Head::newest([&torn, &torn]), Ok(None));
    }

    #[test]
    fn another_version_is_an_error_and_not_a_torn_block() {
        let mut block = head().encode();
        block[8] = 2;
        seal(&mut block, 12);
        assert_eq!(Head::decode(&block), Err(MetaError::Version(2)));
    }
}
