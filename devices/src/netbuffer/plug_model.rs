//! A model of the kernel's plug qdisc, `net/sched/sch_plug.c` of Linux 6.1, for tests and simulation.
//!
//! It counts like the kernel does, including what makes sch_plug dangerous: the counters are per qdisc, not
//! per packet; a second BUFFER before a RELEASE_ONE overwrites the first one's count; a reset empties the
//! queue and leaves the counters.

use std::collections::VecDeque;

/// What can be asked of a plug qdisc (`TCQ_PLUG_*` of `linux/pkt_sched.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlugOp {
    /// Close the current epoch: what arrives later belongs to the next.
    Buffer,
    /// Let the packets of the last closed epoch go.
    ReleaseOne,
    /// Let everything go, also what arrives later.
    ReleaseIndefinite,
}

/// The state of one plug qdisc with packets of type `P`. New ones are plugged.
#[derive(Debug, Clone)]
pub struct PlugModel<P> {
    queue: VecDeque<(P, u32)>,
    limit: u32,
    packet_cost: u32,
    backlog: u32,
    drops: u64,
    pkts_current_epoch: u32,
    pkts_last_epoch: u32,
    pkts_to_release: u32,
    unplug_indefinite: bool,
    throttled: bool,
}

impl<P> PlugModel<P> {
    /// A new qdisc that holds at most `limit` bytes.
    #[must_use]
    pub fn new(limit: u32) -> Self {
        Self::with_packet_cost(limit, 0)
    }

    /// The same, with a size table by which each packet counts `packet_cost` bytes more once it is held. The
    /// one that arrives is held against the limit by its bare length.
    #[must_use]
    pub fn with_packet_cost(limit: u32, packet_cost: u32) -> Self {
        Self {
            queue: VecDeque::new(),
            limit,
            packet_cost,
            backlog: 0,
            drops: 0,
            pkts_current_epoch: 0,
            pkts_last_epoch: 0,
            pkts_to_release: 0,
            unplug_indefinite: false,
            throttled: true,
        }
    }

    /// A packet of `len` bytes arrives. Returns whether it was queued; over the limit it is dropped.
    pub fn enqueue(&mut self, packet: P, len: u32) -> bool {
        if u64::from(self.backlog) + u64::from(len) > u64::from(self.limit) {
            self.drops += 1;
            return false;
        }
        if !self.unplug_indefinite {
            self.pkts_current_epoch += 1;
        }
        self.backlog += len + self.packet_cost;
        self.queue.push_back((packet, len));
        true
    }

    /// The device asks for the next packet to send.
    pub fn dequeue(&mut self) -> Option<P> {
        if self.throttled {
            return None;
        }
        if !self.unplug_indefinite {
            if self.pkts_to_release == 0 {
                self.throttled = true;
                return None;
            }
            self.pkts_to_release -= 1;
        }
        let (packet, len) = self.queue.pop_front()?;
        self.backlog -= len + self.packet_cost;
        Some(packet)
    }

    /// Everything the device can get now.
    pub fn drain(&mut self) -> Vec<P> {
        std::iter::from_fn(|| self.dequeue()).collect()
    }

    /// A change request.
    pub fn apply(&mut self, op: PlugOp) {
        match op {
            PlugOp::Buffer => {
                self.pkts_last_epoch = self.pkts_current_epoch;
                self.pkts_current_epoch = 0;
                if self.unplug_indefinite {
                    self.throttled = true;
                }
                self.unplug_indefinite = false;
            }
            PlugOp::ReleaseOne => {
                self.pkts_to_release += self.pkts_last_epoch;
                self.pkts_last_epoch = 0;
                self.throttled = false;
            }
            PlugOp::ReleaseIndefinite => {
                self.unplug_indefinite = true;
                self.pkts_to_release = 0;
                self.pkts_last_epoch = 0;
                self.pkts_current_epoch = 0;
                self.throttled = false;
            }
        }
    }

    /// The device goes down and up, or its queue length changes: `qdisc_reset_queue`. The counters stay.
    pub fn reset(&mut self) {
        self.queue.clear();
        self.backlog = 0;
    }

    /// Packets held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Whether nothing is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Bytes held, with what each packet costs besides.
    #[must_use]
    pub fn backlog(&self) -> u32 {
        self.backlog
    }

    /// Packets dropped because of the limit.
    #[must_use]
    pub fn drops(&self) -> u64 {
        self.drops
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(plug: &mut PlugModel<u32>, epoch: u32, n: usize) {
        for _ in 0..n {
            assert!(plug.enqueue(epoch, 100));
        }
    }

    /// Figures measured on Debian's 6.1.192: 5 packets, BUFFER, 7, BUFFER, 3; RELEASE_ONE lets 7 go, 5 of the
    /// first epoch and 2 of the second; another RELEASE_ONE lets none go.
    #[test]
    fn two_buffers_release_packets_of_the_wrong_epoch() {
        let mut plug = PlugModel::new(1 << 20);
        fill(&mut plug, 0, 5);
        assert!(plug.drain().is_empty(), "a new plug is closed");
        plug.apply(PlugOp::Buffer);
        fill(&mut plug, 1, 7);
        plug.apply(PlugOp::Buffer);
        fill(&mut plug, 2, 3);
        assert_eq!(plug.len(), 15);
        plug.apply(PlugOp::ReleaseOne);
        assert_eq!(plug.drain(), [0, 0, 0, 0, 0, 1, 1]);
        plug.apply(PlugOp::ReleaseOne);
        assert!(plug.drain().is_empty());
        plug.apply(PlugOp::ReleaseIndefinite);
        assert_eq!(plug.drain().len(), 8);
        fill(&mut plug, 3, 1);
        assert_eq!(plug.drain(), [3], "open");
        plug.apply(PlugOp::Buffer);
        fill(&mut plug, 4, 1);
        assert!(plug.drain().is_empty(), "closed again");
    }

    #[test]
    fn a_reset_makes_the_counters_lie() {
        let mut plug = PlugModel::new(1 << 20);
        fill(&mut plug, 0, 4);
        plug.apply(PlugOp::Buffer);
        plug.reset();
        fill(&mut plug, 1, 6);
        plug.apply(PlugOp::ReleaseOne);
        assert_eq!(plug.drain(), [1, 1, 1, 1], "of an epoch not even closed");
    }

    #[test]
    fn the_limit_is_in_bytes_and_drops_the_newest() {
        let mut plug = PlugModel::new(250);
        assert!(plug.enqueue(1, 100) && plug.enqueue(2, 100));
        assert!(!plug.enqueue(3, 100));
        assert!(plug.enqueue(4, 50), "what still fits is taken");
        assert_eq!((plug.drops(), plug.backlog(), plug.len()), (1, 250, 3));
        plug.apply(PlugOp::ReleaseIndefinite);
        assert_eq!(plug.drain(), [1, 2, 4]);
        assert!(plug.is_empty());
    }
}
