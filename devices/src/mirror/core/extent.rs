//! Where on a disk: byte ranges, and the geometry that both sides must share.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

/// A byte range of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u32,
}

impl Extent {
    /// A range.
    #[must_use]
    pub fn new(offset: u64, length: u32) -> Self {
        Self { offset, length }
    }

    /// First byte after it. Saturates: an extent outside of its disk is found by [`Geometry::check`].
    #[must_use]
    pub fn end(self) -> u64 {
        self.offset.saturating_add(u64::from(self.length))
    }

    /// Whether the two have a byte in common.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }
}

/// What a disk looks like. Both hosts must have the same (hazard F17): a guest's driver sends requests again on the
/// backup, which fail if a sector is larger there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    /// Bytes.
    pub size: u64,
    /// Smallest unit of a request in bytes: 512 or 4096.
    pub block: u32,
    /// Bytes per mark, a power of two from [`UNIT`] to 64 MiB. The last region may be shorter.
    pub region: u32,
}

/// Bytes that are compared or copied at once when synchronising. A region is a multiple of it.
pub const UNIT: u32 = 256 * 1024;

/// Bytes per mark unless something else is asked for.
pub const DEFAULT_REGION: u32 = 1024 * 1024;

/// A geometry or a request that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GeometryError {
    /// The size is no multiple of the block size, or zero.
    #[error("the disk has {size} bytes, which is no multiple of its block size {block}; round its size down")]
    Size {
        /// Bytes.
        size: u64,
        /// Bytes.
        block: u32,
    },
    /// An unsupported block size.
    #[error("the block size is {0}; it must be 512 or 4096")]
    Block(u32),
    /// An unsupported region size, or one that makes too many regions.
    #[error("the region size is {0}; it must be a power of two from 256 KiB to 64 MiB, and leave at most 2^31 regions")]
    Region(u32),
    /// The request is empty or not made of whole blocks.
    #[error("the request of {length} bytes at {offset} is not made of whole blocks of {block} bytes")]
    Unaligned {
        /// Bytes.
        offset: u64,
        /// Bytes.
        length: u32,
        /// Bytes.
        block: u32,
    },
    /// The request reaches beyond the end.
    #[error("the request of {length} bytes at {offset} ends after the disk's end {size}")]
    Beyond {
        /// Bytes.
        offset: u64,
        /// Bytes.
        length: u32,
        /// Bytes.
        size: u64,
    },
}

impl Geometry {
    /// A geometry that is consistent in itself.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn new(size: u64, block: u32, region: u32) -> Result<Self, GeometryError> {
        if block != 512 && block != 4096 {
            return Err(GeometryError::Block(block));
        }
        if size == 0 || !size.is_multiple_of(u64::from(block)) {
            return Err(GeometryError::Size { size, block });
        }
        let fits = size.div_ceil(u64::from(region.max(1))) <= 1 << 31;
        if !region.is_power_of_two() || !(UNIT..=64 << 20).contains(&region) || !fits {
            return Err(GeometryError::Region(region));
        }
        Ok(Self { size, block, region })
    }

    /// Checks a request.
    ///
    /// # Errors
    /// When it is empty, not made of whole blocks, or ends beyond the disk.
    pub fn check(&self, extent: Extent) -> Result<(), GeometryError> {
        let Extent { offset, length } = extent;
        let block = u64::from(self.block);
        if length == 0 || !offset.is_multiple_of(block) || !u64::from(length).is_multiple_of(block) {
            return Err(GeometryError::Unaligned { offset, length, block: self.block });
        }
        match offset.checked_add(u64::from(length)) {
            Some(end) if end <= self.size => Ok(()),
            _ => Err(GeometryError::Beyond { offset, length, size: self.size }),
        }
    }

    /// Number of regions.
    #[must_use]
    pub fn regions(&self) -> u32 {
        self.size.div_ceil(u64::from(self.region)) as u32
    }

    /// The regions that a checked extent touches.
    #[must_use]
    pub fn regions_of(&self, extent: Extent) -> RangeInclusive<u32> {
        let region = u64::from(self.region);
        (extent.offset / region) as u32..=((extent.end() - 1) / region) as u32
    }

    /// The units of one region, in order.
    pub fn units_of(&self, region: u32) -> impl Iterator<Item = Extent> + use<> {
        let first = u64::from(region) * u64::from(self.region);
        let end = (first + u64::from(self.region)).min(self.size);
        (first..end)
            .step_by(UNIT as usize)
            .map(move |offset| Extent::new(offset, (end - offset).min(u64::from(UNIT)) as u32))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_cover_a_short_last_region_and_nothing_else() {
        let geometry = Geometry::new(3 * 1024 * 1024 + 4096, 4096, DEFAULT_REGION).unwrap();
        assert_eq!(geometry.regions(), 4);
        assert_eq!(geometry.units_of(0).count(), 4);
        assert_eq!(geometry.units_of(3).collect::<Vec<_>>(), [Extent::new(3 * 1024 * 1024, 4096)]);
        let all: u64 = (0..4).flat_map(|r| geometry.units_of(r)).map(|u| u64::from(u.length)).sum();
        assert_eq!(all, geometry.size);
    }

    #[test]
    fn requests_outside_or_between_blocks_are_refused() {
        let geometry = Geometry::new(1 << 20, 4096, UNIT).unwrap();
        assert!(geometry.check(Extent::new(4096, 4096)).is_ok());
        assert!(matches!(geometry.check(Extent::new(512, 4096)), Err(GeometryError::Unaligned { .. })));
        assert!(matches!(geometry.check(Extent::new(0, 0)), Err(GeometryError::Unaligned { .. })));
        assert!(matches!(geometry.check(Extent::new(1 << 20, 4096)), Err(GeometryError::Beyond { .. })));
        assert!(matches!(geometry.check(Extent::new(!4095, 4096)), Err(GeometryError::Beyond { .. })));
        assert_eq!(geometry.regions_of(Extent::new(u64::from(UNIT) - 4096, 8192)), 0..=1);
    }

    #[test]
    fn geometries_that_cannot_be_are_refused() {
        assert!(matches!(Geometry::new(1 << 20, 1024, UNIT), Err(GeometryError::Block(1024))));
        assert!(matches!(Geometry::new(1000, 512, UNIT), Err(GeometryError::Size { .. })));
        assert!(matches!(Geometry::new(1 << 20, 512, 4096), Err(GeometryError::Region(4096))));
        assert!(matches!(Geometry::new(u64::MAX - 511, 512, UNIT), Err(GeometryError::Region(UNIT))));
    }
}
