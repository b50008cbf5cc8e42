//! Watches a running protection from outside: tells those who follow the status of every change, and publishes what grows slowly.

use std::sync::Arc;

use super::Daemon;
use crate::ops::{DomainRef, EventKind};
use crate::protect::driver::{Handle, Snapshot};
use crate::protect::options::ProtectOptions;

/// An epoch is slow when its output was held for this many intervals.
const SLOW: u64 = 5;

/// A crossing of a threshold, told once until the figure has fallen to half of it.
#[derive(Debug, Default)]
struct Crossing {
    above: bool,
}

impl Crossing {
    /// Whether to tell.
    fn look(&mut self, figure: u64, threshold: u64) -> bool {
        let tell = !self.above && figure > threshold;
        self.above = figure > threshold || (self.above && figure > threshold / 2);
        tell
    }
}

/// What has been told of one protection.
#[derive(Debug, Default)]
struct Told {
    slow: Crossing,
    high: Crossing,
}

impl Told {
    fn look(&mut self, snapshot: &Snapshot, options: &ProtectOptions) -> Vec<(EventKind, String)> {
        let mut events = Vec::new();
        if let Some(report) = snapshot.report.as_ref().filter(|r| r.armed) {
            let held =
                (report.capture_us + report.resume_us + report.send_us + report.ack_us + report.commit_us) / 1000;
            let interval = options.longest_interval().as_millis() as u64;
            if self.slow.look(held, SLOW * interval) {
                events.push((
                    EventKind::EpochSlow,
                    format!("output was held for {held} ms, at an interval of {interval} ms: {report}"),
                ));
            }
        }
        let (packets, bytes, _) = snapshot.held;
        let limit = u64::from(options.netbuffer_limit);
        if self.high.look(bytes, limit / 4 * 3) {
            events.push((
                EventKind::BufferHighWater,
                format!(
                    "{packets} packets, {bytes} bytes are held; beyond {limit} bytes for an interface they are lost"
                ),
            ));
        }
        events
    }
}

/// Follows a protection to its end.
pub(super) async fn observe(daemon: Arc<Daemon>, domain: DomainRef, options: ProtectOptions, handle: Arc<Handle>) {
    let mut snapshot = handle.snapshot.clone();
    let mut told = Told::default();
    let mut counted = None;
    loop {
        let now = snapshot.borrow_and_update().clone();
        if let Some(report) = now.report.as_ref().filter(|report| counted != Some(report.epoch)) {
            counted = Some(report.epoch);
            daemon.metrics.epoch(&domain.name, report);
        }
        for (kind, detail) in told.look(&now, &options) {
            daemon.log.publish(domain.clone(), kind, detail);
        }
        daemon.changed.send_modify(|count| *count += 1);
        if snapshot.changed().await.is_err() {
            daemon.changed.send_modify(|count| *count += 1);
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protect::report::EpochReport;

    fn kinds(told: &mut Told, held_ms: u64, bytes: u64) -> Vec<EventKind> {
        let report = EpochReport { armed: true, ack_us: held_ms * 1000, ..EpochReport::default() };
        let snapshot = Snapshot { report: Some(report), held: (1, bytes, 0), ..Snapshot::default() };
        let options = ProtectOptions { interval_ms: 100, netbuffer_limit: 1000, ..ProtectOptions::default() };
        told.look(&snapshot, &options).into_iter().map(|(kind, _)| kind).collect()
    }

    #[test]
    fn a_crossing_is_told_once_until_it_is_well_over() {
        let mut told = Told::default();
        assert_eq!(kinds(&mut told, 500, 750), []);
        assert_eq!(kinds(&mut told, 501, 751), [EventKind::EpochSlow, EventKind::BufferHighWater]);
        assert_eq!(kinds(&mut told, 900, 900), []);
        assert_eq!(kinds(&mut told, 400, 500), [], "still near");
        assert_eq!(kinds(&mut told, 600, 800), [], "the same slow stretch");
        assert_eq!(kinds(&mut told, 100, 100), []);
        assert_eq!(kinds(&mut told, 600, 800), [EventKind::EpochSlow, EventKind::BufferHighWater]);
    }
}
