//! What becomes known of an epoch once it is committed.

use std::time::{Duration, Instant};

use super::super::report::EpochReport;
use super::super::trace::Finished;
use super::Driver;
use super::timer::us;
use crate::ids::Epoch;
use crate::ops::EventKind;

impl Driver {
    /// Tells status, trace and log of an epoch whose commit began at `committing` and took `commit`.
    pub(super) fn finish_report(&mut self, epoch: Epoch, committing: Instant, commit: Duration) {
        let current = &self.current;
        let pause = self.engine.as_ref().and_then(|engine| engine.stats().pause);
        let report = EpochReport {
            epoch,
            armed: current.armed,
            suspend_us: us(current.suspend_asked, current.suspended),
            capture_us: us(current.suspended, current.copied),
            postsuspend_us: us(current.suspended, current.postsuspended),
            log_us: pause.map(|pause| pause.log.as_micros() as u64),
            copy_us: pause.map(|pause| pause.copy.as_micros() as u64),
            state_us: pause.map(|pause| pause.state.as_micros() as u64),
            resume_us: us(current.copied, current.resumed),
            preresume_us: us(current.copied, current.preresumed),
            encode_us: current.cost.encode.as_micros() as u64,
            send_us: us(current.resumed, current.sent),
            ack_us: us(current.sent, current.acked),
            commit_us: commit.as_micros() as u64,
            pages: current.cost.pages,
            bytes: current.cost.bytes,
        };
        tracing::debug!(domain = self.parts.domain.name, "{report}");
        if let Some(asked) = current.suspend_asked {
            let encoding = current.cost.began;
            self.trace.push(Finished { asked, encoding, committing, report: report.clone() });
        }
        let stats = self.parts.devices.stats();
        let sum = stats.iter().fold((0, 0, 0), |sum: (u64, u64, u64), (_, s)| {
            (sum.0 + s.queued, sum.1 + s.queued_bytes, sum.2 + s.dropped)
        });
        if sum.2 > self.drops_seen {
            self.tell(
                EventKind::BufferDrops,
                format!(
                    "{} packets of held output lost; raise the limit or checkpoint more often",
                    sum.2 - self.drops_seen
                ),
            );
            self.drops_seen = sum.2;
        }
        let acked = current.acked;
        let interval = self.pace.report().clone();
        self.snapshot.send_modify(|snapshot| {
            snapshot.acked = acked.map(|at| (epoch, at));
            snapshot.report = Some(report);
            snapshot.held = sum;
            snapshot.interval = interval;
        });
    }
}
