//! Which pages to read.

use std::collections::BTreeSet;

use super::{MAX_PAGES, gfn};
use crate::ids::{Epoch, Nonce};
use crate::stream::PageBatch;

/// Below 4 GiB guests have no ordinary RAM from here on: device memory, the frame buffer, and the pages that Xen's toolstack and the
/// device model write to (xenstore, console, ioreq; `HVM_BELOW_4G_MMIO_START` in `public/hvm/e820.h`).
const SPECIAL: std::ops::Range<u64> = 0xf_0000..0x10_0000;
/// The largest page number that is kept, 1 TiB: the bits then take 32 MiB.
const MOST: u64 = 1 << 28;
/// Shots at a bit that is set before the next one from a random place is taken.
const SHOTS: u32 = 32;

/// The pages that the peer has been sent contents of, so that its copy holds them. One bit each.
#[derive(Clone, Debug, Default)]
pub struct Held {
    bits: Vec<u64>,
    count: u64,
}

impl Held {
    /// None.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The batch was sent: pages with contents are held from now on, the others no more.
    pub fn sent(&mut self, batch: &PageBatch) {
        for entry in &batch.entries {
            let number = gfn(*entry);
            if number >= MOST || SPECIAL.contains(&number) {
                continue;
            }
            let (word, bit) = ((number / 64) as usize, 1 << (number % 64));
            if self.bits.len() <= word {
                self.bits.resize(word + 1, 0);
            }
            let was = self.bits[word] & bit != 0;
            if PageBatch::has_data(*entry) {
                self.bits[word] |= bit;
                self.count += u64::from(!was);
            } else {
                self.bits[word] &= !bit;
                self.count -= u64::from(was);
            }
        }
    }

    /// How many.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether this one is.
    #[must_use]
    pub fn contains(&self, gfn: u64) -> bool {
        self.bits.get((gfn / 64) as usize).is_some_and(|word| word & 1 << (gfn % 64) != 0)
    }

    /// The first held page at or after `from`, beginning anew at the end.
    fn next(&self, from: u64) -> Option<u64> {
        let words = self.bits.len();
        let start = (from / 64) as usize;
        let first = self.bits.get(start)? & (u64::MAX << (from % 64));
        if first != 0 {
            return Some(start as u64 * 64 + u64::from(first.trailing_zeros()));
        }
        (1..=words).map(|step| (start + step) % words).find(|word| self.bits[*word] != 0).map(|word| {
            // All the way around: the first word's lower bits count too.
            word as u64 * 64 + u64::from(self.bits[word].trailing_zeros())
        })
    }
}

/// Picks pages at random, the same ones for the same session and epoch.
#[derive(Clone, Debug)]
pub struct Chooser {
    seed: u64,
}

impl Chooser {
    /// For one session.
    #[must_use]
    pub fn new(nonce: Nonce) -> Self {
        let (high, low) = nonce.0.as_u64_pair();
        Self { seed: high ^ low }
    }

    /// Up to `count` (and at most [`MAX_PAGES`]) different pages, each held, in no order; fewer when there are fewer.
    #[must_use]
    pub fn choose(&self, held: &Held, epoch: Epoch, count: usize) -> Vec<u64> {
        let mut chosen = Vec::new();
        let mut seen = BTreeSet::new();
        let limit = held.bits.len() as u64 * 64;
        if held.count == 0 {
            return chosen;
        }
        let mut random = SplitMix(self.seed ^ epoch.0.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        for _ in 0..count.min(MAX_PAGES) {
            let shot = (0..SHOTS).map(|_| random.below(limit)).find(|gfn| held.contains(*gfn));
            let Some(gfn) = shot.or_else(|| held.next(random.below(limit))) else { break };
            if seen.insert(gfn) {
                chosen.push(gfn);
            }
        }
        chosen
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): small, and good enough to pick pages.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `limit`, which is not 0, all but evenly.
    fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }
}
