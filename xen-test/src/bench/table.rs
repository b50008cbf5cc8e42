//! The rows as a table for people.

use std::fmt::Write as _;

use super::Report;
use super::measure::Row;
use super::subject::Subject;

/// Markdown: a line for each row, its stall also as a ratio to stock's, and the goals below.
#[must_use]
pub fn table(report: &Report) -> String {
    let mut out = String::from(
        "| way | load | who | checkpoints/s | stall p50 | p99 | max ms | suspended p50 ms | by stock | work | round trip p50 ms | wire KiB/epoch |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for row in &report.rows {
        let load = row.load;
        let same = |subject: Subject| -> Option<&Row> {
            report.rows.iter().find(|r| r.subject == subject && r.way == row.way && r.load == load)
        };
        let by_stock = same(Subject::Stock)
            .filter(|stock| stock.epochs.stall_p50_ms > 0.0 && row.epochs.count > 0)
            .map_or("-".into(), |stock| format!("{:.2}", row.epochs.stall_p50_ms / stock.epochs.stall_p50_ms));
        let work = same(Subject::Unprotected)
            .filter(|free| free.work_per_second > 0.0)
            .map_or("-".into(), |free| format!("{:.0} %", row.work_per_second / free.work_per_second * 100.0));
        let what = match load.pages_per_epoch {
            0 => format!("idle, {} ms", load.interval_ms),
            pages => format!("{pages} pages, {:?}, {} B, {} ms", load.order, load.bytes_per_page, load.interval_ms),
        };
        let e = &row.epochs;
        let _ = writeln!(
            out,
            "| {:?} | {what} | {} | {:.2} | {:.1} | {:.1} | {:.1} | {:.1} | {by_stock} | {work} | {:.1} | {} |",
            row.way,
            row.subject.name(),
            e.per_second,
            e.stall_p50_ms,
            e.stall_p99_ms,
            e.stall_max_ms,
            e.suspended_p50_ms,
            row.round_trip.p50_ms,
            row.wire_bytes_per_epoch.map_or("-".into(), |bytes| format!("{:.0}", bytes / 1024.0)),
        );
    }
    out.push_str("\n| goal | bound | measured | met |\n|---|---|---|---|\n");
    for goal in &report.goals {
        let measured = goal.measured.map_or("not in this run".into(), |m| format!("{m:.3}"));
        let _ =
            writeln!(out, "| {} | {} | {measured} | {} |", goal.name, goal.goal, if goal.met { "yes" } else { "no" });
    }
    out
}
