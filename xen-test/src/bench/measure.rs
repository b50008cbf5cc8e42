//! One row: a load under a subject, watched for a while.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use remusd::api::Role;
use serde::Serialize;
use xen_test_guest::protocol::Stall;

use super::Load;
use super::subject::{Checkpoints, Subject, Way};
use crate::client::{Control, EchoClient, Spread};
use crate::host::Host;
use crate::pair::Pair;
use crate::protection::{Guest, PATIENCE, at, row as status_row};

/// Shortest gap in the guest's loop that is looked at: above a slice of its scheduler, in milliseconds.
const THRESHOLD_MS: f64 = 8.0;
/// Requests of the echo client per second.
const ECHO_HZ: f64 = 20.0;

/// What the checkpoints did to the guest: one figure for each epoch, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Epochs {
    /// Checkpoints seen.
    pub count: usize,
    /// Checkpoints per second.
    pub per_second: f64,
    /// Median stall: from the guest's freeze to its thaw.
    pub stall_p50_ms: f64,
    /// 99th percentile.
    pub stall_p99_ms: f64,
    /// Longest.
    pub stall_max_ms: f64,
    /// Median of the part for which the guest stood suspended: all but its own freeze and thaw.
    pub suspended_p50_ms: f64,
}

/// One measurement.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Who made the checkpoints.
    pub subject: Subject,
    /// Where they went.
    pub way: Way,
    /// What the guest did.
    pub load: Load,
    /// What it felt.
    pub epochs: Epochs,
    /// Pages that the guest's program wrote in each epoch, on average.
    pub written_per_epoch: f64,
    /// Busy work done in a second.
    pub work_per_second: f64,
    /// Round trips of a client outside.
    pub round_trip: Spread,
    /// Bytes that left the host for the other one, per epoch. With [`Way::Ssh`] only.
    pub wire_bytes_per_epoch: Option<f64>,
    /// The newest epoch as remusd reports it. With remusd only.
    pub last_epoch: Option<remusd::protect::report::EpochReport>,
    /// Its intervals since it began. With remusd only.
    pub interval: Option<remusd::protect::pace::IntervalReport>,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} {} at {} pages, {} ms: {} epochs, stall p50 {:.1} p99 {:.1} max {:.1} ms (suspended {:.1}), {:.2}/s, {:.0} pages written per epoch, round trip p50 {:.1} ms",
            self.way,
            self.subject.name(),
            self.load.pages_per_epoch,
            self.load.interval_ms,
            self.epochs.count,
            self.epochs.stall_p50_ms,
            self.epochs.stall_p99_ms,
            self.epochs.stall_max_ms,
            self.epochs.suspended_p50_ms,
            self.epochs.per_second,
            self.written_per_epoch,
            self.round_trip.p50_ms,
        )
    }
}

/// A gap this close to the one in which the guest stood suspended belongs to the same checkpoint, in milliseconds of the guest's time.
const NEXT_MS: f64 = 10.0;

/// One figure for each checkpoint: the gap in which the guest stood suspended and what is right beside it. All others are the
/// scheduler's: a busy guest has them all the time, so that whatever touches one of them must not count.
fn epochs(stalls: &[Stall], watched_ms: f64) -> Epochs {
    let end = |stall: &Stall| stall.t_ns as f64 / 1e6;
    // The guest's clock stands still while it is suspended.
    let start = |stall: &Stall| end(stall) - (stall.ms - stall.suspended_ms);
    let own = |stall: &Stall| stall.suspended_ms <= 1.0;
    let mut checkpoints: Vec<(f64, f64)> = Vec::new();
    for (index, stall) in stalls.iter().enumerate().filter(|(_, stall)| !own(stall)) {
        let before = index.checked_sub(1).and_then(|index| stalls.get(index));
        let before = before.filter(|before| own(before) && start(stall) - end(before) < NEXT_MS);
        let after = stalls.get(index + 1).filter(|after| own(after) && start(after) - end(stall) < NEXT_MS);
        let beside: f64 = [before, after].into_iter().flatten().map(|stall| stall.ms).sum();
        checkpoints.push((stall.ms + beside, stall.suspended_ms));
    }
    let spread = |pick: fn(&(f64, f64)) -> f64| {
        Spread::of(checkpoints.iter().map(|g| Duration::from_secs_f64(pick(g) / 1000.0)))
    };
    let (total, suspended) = (spread(|g| g.0), spread(|g| g.1));
    Epochs {
        count: checkpoints.len(),
        per_second: if watched_ms > 0.0 { checkpoints.len() as f64 * 1000.0 / watched_ms } else { 0.0 },
        stall_p50_ms: total.p50_ms,
        stall_p99_ms: total.p99_ms,
        stall_max_ms: total.max_ms,
        suspended_p50_ms: suspended.p50_ms,
    }
}

fn sent(host: &Host) -> Result<f64> {
    let text = host.sh("cat /sys/class/net/eth0/statistics/tx_bytes")?;
    text.trim().parse().with_context(|| format!("bytes sent by host {}: {text}", host.name()))
}

pub(super) fn row(
    pair: &Pair,
    guest: &Guest<'_>,
    subject: Subject,
    way: Way,
    load: Load,
    watch: Duration,
) -> Result<Row> {
    let spec = load.spec();
    // The first copy with an idle guest: it is not what is measured.
    guest.dirty(0, spec.bytes_per_page, spec.mem_mb)?;
    let checkpoints = Checkpoints::start(pair, subject, way, load)?;
    let outcome = watched(pair, guest, subject, way, load, watch);
    let ended = checkpoints.end(pair, guest);
    let row = outcome?;
    ended?;
    Ok(row)
}

fn watched(pair: &Pair, guest: &Guest<'_>, subject: Subject, way: Way, load: Load, watch: Duration) -> Result<Row> {
    guest.ask(move |c| c.dirty(load.spec()))?;
    let echo_at = at(guest.spec.ip, guest.ports().echo_tcp);
    // Work and stall meter would take the one vCPU from each other: one after the other.
    let work_from = guest.ask(Control::work_start)?;
    let began = Instant::now();
    std::thread::sleep(watch / 3);
    let work_to = guest.ask(Control::work_stop)?;
    let worked = began.elapsed().as_secs_f64();
    let echo = pair.client_ns().call(move || EchoClient::tcp(echo_at, ECHO_HZ, 0, PATIENCE))??;
    std::thread::sleep(watch / 3);
    let round_trip = echo.report().rtt;
    drop(echo);
    guest.ask(|c| c.stall_start(THRESHOLD_MS))?;
    let written_from = guest.ask(Control::dirty_info)?.written;
    let sent_from = if way == Way::Ssh { Some(sent(pair.a())?) } else { None };
    guest.ask(|c| c.stall_read(true))?;
    std::thread::sleep(watch);
    let report = guest.ask(Control::stall_stop)?;
    let written = guest.ask(Control::dirty_info)?.written - written_from;
    let sent_bytes = match sent_from {
        Some(from) => Some(sent(pair.a())? - from),
        None => None,
    };
    let epochs = epochs(&report.stalls, report.watched_ms);
    let each = |total: f64| if epochs.count == 0 { 0.0 } else { total / epochs.count as f64 };
    let status = if subject.is_ours() { status_row(pair.a(), "guest", Role::Primary)? } else { None };
    let (last_epoch, interval) = status.map_or((None, None), |row| (row.last_epoch, row.interval));
    Ok(Row {
        subject,
        way,
        load,
        epochs,
        written_per_epoch: each(written as f64),
        work_per_second: (work_to.units - work_from.units) as f64 / worked,
        round_trip,
        wire_bytes_per_epoch: sent_bytes.map(each),
        last_epoch,
        interval,
    })
}

/// A row to vary in tests: some stock `xl remus` under a load of 4000 pages.
#[cfg(test)]
pub(super) fn example() -> Row {
    use xen_test_guest::protocol::Order;
    Row {
        subject: Subject::Stock,
        way: Way::Blackhole,
        load: Load { pages_per_epoch: 4000, interval_ms: 500, bytes_per_page: 16, order: Order::Rand },
        epochs: Epochs::default(),
        written_per_epoch: 0.0,
        work_per_second: 0.0,
        round_trip: Spread::default(),
        wire_bytes_per_epoch: None,
        last_epoch: None,
        interval: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stall(end_ms: f64, ms: f64, suspended_ms: f64) -> Stall {
        Stall { t_ns: (end_ms * 1e6) as u64, ms, suspended_ms }
    }

    #[test]
    fn gaps_of_one_checkpoint_are_one_figure_and_the_schedulers_are_none() {
        let stalls = [
            // Freeze, pause and thaw of one checkpoint; the guest's clock stood still for 60 ms of it.
            stall(100.0, 10.0, 0.0),
            stall(125.0, 80.0, 60.0),
            stall(140.0, 9.0, 0.0),
            // A slice of the scheduler.
            stall(250.0, 9.0, 0.0),
            stall(380.0, 70.0, 50.0),
            // A busy guest's: one slice after the other, none right beside the checkpoint.
            stall(400.0, 9.0, 0.0),
            stall(412.0, 9.0, 0.0),
            stall(424.0, 9.0, 0.0),
        ];
        let epochs = epochs(&stalls, 2000.0);
        assert_eq!((epochs.count, epochs.per_second), (2, 1.0));
        assert!((epochs.stall_p50_ms - 70.0).abs() < 1e-6 && (epochs.stall_max_ms - 99.0).abs() < 1e-6, "{epochs:?}");
        assert!((epochs.suspended_p50_ms - 50.0).abs() < 1e-6);
    }
}
