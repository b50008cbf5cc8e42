//! One order for everything that touches the same bytes (hazard F17).
//!
//! Overlapping requests are done one after the other, in the order in which they asked; those that do not overlap
//! are not held up. The primary locks guest writes and synchronisation reads, the backup the records that it applies,
//! so both sides apply overlapping writes in the same order.

use std::collections::VecDeque;

use super::extent::Extent;

/// Names one request for a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

/// The locks of one disk. Small numbers (requests in flight) are expected: all operations are linear in them.
#[derive(Debug, Default)]
pub struct RangeLocks {
    next: u64,
    held: Vec<(Ticket, Extent)>,
    waiting: VecDeque<(Ticket, Extent)>,
}

impl RangeLocks {
    /// Asks for `extent`. `true` if it is held at once; else a later [`RangeLocks::release`] names the ticket.
    pub fn acquire(&mut self, extent: Extent) -> (Ticket, bool) {
        let ticket = Ticket(self.next);
        self.next += 1;
        let free = !self.held.iter().chain(&self.waiting).any(|(_, other)| other.overlaps(extent));
        if free {
            self.held.push((ticket, extent));
        } else {
            self.waiting.push_back((ticket, extent));
        }
        (ticket, free)
    }

    /// Gives a lock back, or takes back the wish for it. Returns the tickets that are held from now on, oldest first.
    pub fn release(&mut self, ticket: Ticket) -> Vec<Ticket> {
        self.held.retain(|(t, _)| *t != ticket);
        self.waiting.retain(|(t, _)| *t != ticket);
        let mut granted = Vec::new();
        let mut still: VecDeque<(Ticket, Extent)> = VecDeque::new();
        for (ticket, extent) in std::mem::take(&mut self.waiting) {
            let free = !self.held.iter().chain(&still).any(|(_, other)| other.overlaps(extent));
            if free {
                self.held.push((ticket, extent));
                granted.push(ticket);
            } else {
                still.push_back((ticket, extent));
            }
        }
        self.waiting = still;
        granted
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.held.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Overlapping requests never hold together, go in the order in which they asked, and all get their turn.
        #[test]
        fn overlapping_requests_take_turns_in_order(
            steps in prop::collection::vec((0u64..24, 1u32..6, any::<bool>(), any::<prop::sample::Index>()), 1..80),
        ) {
            let mut locks = RangeLocks::default();
            let (mut asked, mut held, mut granted) = (Vec::new(), Vec::new(), Vec::new());
            let mut check = |held: &mut Vec<(Ticket, Extent)>, new: (Ticket, Extent)| {
                for (_, other) in held.iter() {
                    assert!(!other.overlaps(new.1));
                }
                granted.push(new);
                held.push(new);
            };
            let release = |locks: &mut RangeLocks, held: &mut Vec<(Ticket, Extent)>, at: usize| {
                let (ticket, _) = held.remove(at);
                locks.release(ticket)
            };
            for (offset, length, ask, index) in steps {
                if ask || held.is_empty() {
                    let extent = Extent::new(offset, length);
                    let (ticket, now) = locks.acquire(extent);
                    asked.push((ticket, extent));
                    if now {
                        check(&mut held, (ticket, extent));
                    }
                } else {
                    let at = index.index(held.len());
                    for ticket in release(&mut locks, &mut held, at) {
                        let extent = asked.iter().find(|(t, _)| *t == ticket).unwrap().1;
                        check(&mut held, (ticket, extent));
                    }
                }
            }
            while !held.is_empty() {
                for ticket in release(&mut locks, &mut held, 0) {
                    let extent = asked.iter().find(|(t, _)| *t == ticket).unwrap().1;
                    check(&mut held, (ticket, extent));
                }
            }
            prop_assert_eq!(granted.len(), asked.len());
            prop_assert!(locks.is_idle());
            for (i, (a, x)) in granted.iter().enumerate() {
                for (b, y) in &granted[..i] {
                    prop_assert!(!x.overlaps(*y) || b < a);
                }
            }
        }
    }
}
