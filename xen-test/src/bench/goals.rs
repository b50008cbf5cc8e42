//! What was to be reached: ratios within one run.

use serde::Serialize;

use super::measure::Row;
use super::subject::{Subject, Way};

/// The interval that `xl remus` has unless told otherwise.
pub(super) const STOCK_INTERVAL_MS: u64 = 200;

/// One goal. `measured` is `null` where this run has no rows for it; then it is not met.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Goal {
    /// What it is about.
    pub name: String,
    /// The bound, in words.
    pub goal: String,
    /// What this run has.
    pub measured: Option<f64>,
    /// Whether it is within the bound.
    pub met: bool,
}

fn of(rows: &[Row], subject: Subject, way: Way, pages: u64) -> impl Iterator<Item = &Row> {
    rows.iter().filter(move |row| row.subject == subject && row.way == way && row.load.pages_per_epoch == pages)
}

/// The median over all loads of this size of ours by stock's, row by row.
fn ratio(rows: &[Row], way: Way, pages: u64, of_row: impl Fn(&Row) -> f64) -> Option<f64> {
    let mut ratios: Vec<f64> = of(rows, Subject::Native, way, pages)
        .filter_map(|ours| {
            let stock = of(rows, Subject::Stock, way, pages).find(|row| row.load == ours.load)?;
            let (ours, stock) = (of_row(ours), of_row(stock));
            (ours > 0.0 && stock > 0.0).then(|| ours / stock)
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    ratios.get(ratios.len() / 2).copied()
}

/// What the automatic interval adds to a round trip, by what the fixed one adds that stock has by default, output being held in both.
fn added_trip(rows: &[Row], way: Way, pages: u64) -> Option<f64> {
    let fixed = of(rows, Subject::Held, way, pages).find(|row| row.load.interval_ms == STOCK_INTERVAL_MS)?;
    let same = |subject| of(rows, subject, way, pages).find(|row| row.load == fixed.load);
    let (auto, free) = (same(Subject::Auto)?, same(Subject::Unprotected)?);
    let answered = [fixed, auto, free].iter().all(|row| row.round_trip.count > 0);
    let added = |row: &Row| row.round_trip.p50_ms - free.round_trip.p50_ms;
    (answered && added(fixed) > 0.0).then(|| added(auto) / added(fixed))
}

/// Bytes on the wire by the bytes of the pages that were written.
fn wire(rows: &[Row], bytes_per_page: usize) -> Option<f64> {
    rows.iter()
        .filter(|row| row.subject == Subject::Native && row.way == Way::Ssh)
        .find(|row| row.load.bytes_per_page == bytes_per_page)
        .and_then(|row| row.last_epoch.as_ref())
        .filter(|epoch| epoch.pages > 0)
        .map(|epoch| epoch.bytes as f64 / (epoch.pages as f64 * 4096.0))
}

/// The goals that this benchmark can decide, with the native engine as ours.
#[must_use]
pub fn goals(rows: &[Row]) -> Vec<Goal> {
    let mut goals = Vec::new();
    let mut most = |name: &str, bound: f64, measured: Option<f64>| {
        let met = measured.is_some_and(|m| m <= bound);
        goals.push(Goal { name: name.into(), goal: format!("at most {bound}"), measured, met });
    };
    let p50 = |row: &Row| row.epochs.stall_p50_ms;
    let suspended = |row: &Row| row.epochs.suspended_p50_ms;
    most("stall p50 by stock's, blackhole, 4000 pages", 0.6, ratio(rows, Way::Blackhole, 4000, p50));
    most("stall p50 by stock's, blackhole, 20000 pages", 0.4, ratio(rows, Way::Blackhole, 20_000, p50));
    most("stall p50 by stock's, ssh, 4000 pages", 0.25, ratio(rows, Way::Ssh, 4000, p50));
    most("suspended part by stock's, blackhole, 4000 pages", 0.25, ratio(rows, Way::Blackhole, 4000, suspended));
    let helper = of(rows, Subject::SaveHelper, Way::Blackhole, 4000).find_map(|row| row.last_epoch.clone());
    let native = of(rows, Subject::Native, Way::Blackhole, 4000).find_map(|row| row.last_epoch.clone());
    let capture = helper.zip(native).filter(|(h, _)| h.capture_us > 0);
    most(
        "capture by the save helper's, blackhole, 4000 pages",
        0.5,
        capture.map(|(helper, native)| native.capture_us as f64 / helper.capture_us as f64),
    );
    most("wire bytes by raw, 16 bytes changed per page", 0.2, wire(rows, 16));
    most("wire bytes by raw, whole pages changed", 1.02, wire(rows, 4096));
    // Debian's stock holds no output: what it would add is what holding it for the same interval adds.
    let trip = |pages| added_trip(rows, Way::Ssh, pages);
    most("added round trip p50, auto by 200 ms, ssh, idle guest", 0.25, trip(0));
    most("added round trip p50, auto by 200 ms, ssh, 500 pages", 0.25, trip(500));
    let rate = ratio(rows, Way::Blackhole, 0, |row| row.epochs.per_second);
    goals.push(Goal {
        name: "checkpoints per second by stock's, idle guest".into(),
        goal: "at least 2".into(),
        measured: rate,
        met: rate.is_some_and(|r| r >= 2.0),
    });
    goals
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Load;
    use crate::bench::measure::{Epochs, example};
    use crate::client::Spread;
    use xen_test_guest::protocol::Order;

    fn row(subject: Subject, stall_p50_ms: f64) -> Row {
        Row { subject, epochs: Epochs { count: 9, stall_p50_ms, ..Epochs::default() }, ..example() }
    }

    #[test]
    fn the_added_round_trip_is_what_protection_adds() {
        let row = |subject, p50_ms| Row {
            way: Way::Ssh,
            load: Load { pages_per_epoch: 0, interval_ms: STOCK_INTERVAL_MS, bytes_per_page: 16, order: Order::Rand },
            round_trip: Spread { count: 9, p50_ms, ..Spread::default() },
            ..row(subject, 0.0)
        };
        let all = [row(Subject::Unprotected, 10.0), row(Subject::Held, 210.0), row(Subject::Auto, 50.0)];
        assert_eq!(added_trip(&all, Way::Ssh, 0), Some(0.2));
        assert_eq!(added_trip(&all, Way::Blackhole, 0), None);
        assert_eq!(added_trip(&all[..2], Way::Ssh, 0), None);
        let silent = Row { round_trip: Spread::default(), ..row(Subject::Auto, 0.0) };
        assert_eq!(added_trip(&[all[0].clone(), all[1].clone(), silent], Way::Ssh, 0), None, "nothing was answered");
    }

    #[test]
    fn a_goal_is_met_by_a_measured_ratio_only() {
        let met = |rows: &[Row]| goals(rows)[0].clone();
        let got = met(&[row(Subject::Stock, 100.0), row(Subject::Native, 50.0)]);
        assert_eq!((got.measured, got.met), (Some(0.5), true));
        assert!(!met(&[row(Subject::Stock, 100.0), row(Subject::Native, 70.0)]).met);
        let none = met(&[row(Subject::Native, 50.0)]);
        assert_eq!((none.measured, none.met), (None, false));
    }
}
