//! The persistent write-intent log (hazard F16): a superset, on stable storage, of the regions that may differ.
//!
//! A region's mark is on disk before the first write to it begins, and goes lazily once the region is clean again, so
//! that a guest that writes the same regions over and over costs no writes here.

use super::meta::{PAGE_BYTES, PAGE_REGIONS, PageImage, decode_page, encode_page, pages};

struct Page {
    wanted: Vec<u8>,
    /// What is certainly on disk. While a write is in flight, that write may replace it at any time.
    durable: Vec<u8>,
    in_flight: Option<Vec<u8>>,
}

/// The log of one disk.
pub struct Intent {
    log: u128,
    pages: Vec<Page>,
}

fn bit(region: u32) -> (usize, usize, u8) {
    let within = region % PAGE_REGIONS;
    ((region / PAGE_REGIONS) as usize, (within / 8) as usize, 1 << (within % 8))
}

impl Intent {
    /// The log as found on disk: `blocks` are its pages in order. Missing and damaged pages count as all marked.
    #[must_use]
    pub fn load(log: u128, regions: u32, blocks: &[Vec<u8>]) -> Self {
        let pages = (0..pages(regions)).map(|page| {
            let durable = decode_page(log, page, blocks.get(page as usize).map_or(&[], Vec::as_slice));
            let mut wanted = durable.clone();
            // A lost page also marks what comes after the disk's end.
            for (byte, bits) in wanted.iter_mut().enumerate() {
                let left = i64::from(regions) - i64::from(page * PAGE_REGIONS) - byte as i64 * 8;
                *bits &= if left >= 8 { 0xff } else { (1u16 << left.max(0)).wrapping_sub(1) as u8 };
            }
            Page { wanted, durable, in_flight: None }
        });
        Self { log, pages: pages.collect() }
    }

    /// Whether the region is marked, or is about to be.
    #[must_use]
    pub fn is_wanted(&self, region: u32) -> bool {
        let (page, byte, mask) = bit(region);
        self.pages[page].wanted[byte] & mask != 0
    }

    /// Whether the region's mark is on disk and stays there.
    #[must_use]
    pub fn is_ready(&self, region: u32) -> bool {
        let (page, byte, mask) = bit(region);
        let page = &self.pages[page];
        let stays = page.in_flight.as_ref().is_none_or(|bits| bits[byte] & mask != 0);
        page.wanted[byte] & page.durable[byte] & mask != 0 && stays
    }

    /// Marks the region. What is returned has to be written, and [`Intent::persisted`] called.
    pub fn want(&mut self, region: u32) -> Option<PageImage> {
        let (page, byte, mask) = bit(region);
        self.pages[page].wanted[byte] |= mask;
        if self.is_ready(region) { None } else { self.start(page) }
    }

    /// The region is clean: its mark may go with the next write of its page.
    pub fn unwant(&mut self, region: u32) {
        let (page, byte, mask) = bit(region);
        self.pages[page].wanted[byte] &= !mask;
    }

    /// Pages with marks that may go. Call now and then.
    pub fn tidy(&mut self) -> Vec<PageImage> {
        (0..self.pages.len()).filter_map(|page| self.start(page)).collect()
    }

    fn start(&mut self, at: usize) -> Option<PageImage> {
        let page = &mut self.pages[at];
        if page.in_flight.is_some() || page.wanted == page.durable {
            return None;
        }
        page.in_flight = Some(page.wanted.clone());
        Some(encode_page(self.log, at as u32, &page.wanted))
    }

    /// The write of a page is over. After a failed one only marks that both the old and the new page had are certain.
    /// What is returned has to be written next.
    pub fn persisted(&mut self, page: u32, ok: bool) -> Option<PageImage> {
        let at = page as usize;
        let page = &mut self.pages[at];
        let bits = page.in_flight.take()?;
        if !ok {
            for (durable, new) in page.durable.iter_mut().zip(bits) {
                *durable &= new;
            }
            return None;
        }
        page.durable = bits;
        let lacking = (0..PAGE_BYTES).any(|i| page.wanted[i] & !page.durable[i] != 0);
        if lacking { self.start(at) } else { None }
    }

    /// The regions that are marked, or about to be, below `regions`.
    pub fn marked(&self, regions: u32) -> impl Iterator<Item = u32> + '_ {
        (0..regions).filter(|r| self.is_wanted(*r))
    }

    /// Number of regions that are marked on disk, or about to be.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.pages.iter().flat_map(|page| &page.wanted).map(|byte| u64::from(byte.count_ones())).sum()
    }

    /// Whether every wanted mark is on disk.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.pages.iter().all(|page| {
            page.in_flight.is_none()
                && page.wanted.iter().zip(&page.durable).all(|(wanted, durable)| wanted & !durable == 0)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REGIONS: u32 = PAGE_REGIONS + 8;

    fn clean() -> (Intent, Vec<Vec<u8>>) {
        let blocks: Vec<_> = (0..2).map(|p| encode_page(1, p, &[0; PAGE_BYTES]).bytes).collect();
        (Intent::load(1, REGIONS, &blocks), blocks)
    }

    #[test]
    fn a_lost_log_marks_everything() {
        let intent = Intent::load(1, 10, &[]);
        assert_eq!((intent.marked(10).count(), intent.count()), (10, 10));
    }

    #[test]
    fn marks_wanted_while_their_page_is_written_are_written_next() {
        let (mut intent, _) = clean();
        let first = intent.want(3).unwrap();
        assert!(intent.want(4).is_none());
        assert!(intent.want(PAGE_REGIONS).is_some(), "another page");
        assert!(!intent.is_ready(3));
        let second = intent.persisted(first.page, true).unwrap();
        assert!(intent.is_ready(3) && !intent.is_ready(4));
        assert!(intent.persisted(second.page, true).is_none());
        assert!(intent.is_ready(4));
    }

    proptest! {
        /// Whatever happens to writes in flight, a region that is ready is marked in what a crash leaves.
        #[test]
        fn a_ready_region_survives_every_crash(
            steps in prop::collection::vec((0u8..5, prop::sample::select(vec![0u32, 1, 9, PAGE_REGIONS, PAGE_REGIONS + 1])), 1..60),
        ) {
            let (mut intent, mut disk) = clean();
            let mut flight: Vec<PageImage> = Vec::new();
            for (what, region) in steps {
                match what {
                    0 | 1 => flight.extend(intent.want(region)),
                    2 => intent.unwant(region),
                    3 => flight.extend(intent.tidy()),
                    _ => if let Some(image) = flight.pop() {
                        let ok = region != 9;
                        // A failed write may have reached the disk or not.
                        if ok || region % 2 == 1 {
                            disk[image.page as usize] = image.bytes;
                        }
                        flight.extend(intent.persisted(image.page, ok));
                    },
                }
                for lands in [false, true] {
                    let mut after = disk.clone();
                    if lands {
                        for image in &flight {
                            after[image.page as usize] = image.bytes.clone();
                        }
                    }
                    let found = Intent::load(1, REGIONS, &after);
                    for region in [0, 1, 9, PAGE_REGIONS, PAGE_REGIONS + 1] {
                        prop_assert!(!intent.is_ready(region) || found.is_wanted(region));
                    }
                }
            }
        }
    }
}
