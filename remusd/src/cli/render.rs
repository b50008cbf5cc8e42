//! Answers for people: one line for each thing, colours on a terminal only.

use std::io::IsTerminal;

use crate::api::{MayRun, Role, StatusRow};
use crate::ops::operation::{Job, JobState, Progress};
use crate::ops::{Event, EventKind, OperationKind};

/// Whether to use colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paint(pub bool);

const RED: u8 = 31;
const GREEN: u8 = 32;
const YELLOW: u8 = 33;

impl Paint {
    /// On a terminal, unless `NO_COLOR` (no-color.org) is set.
    #[must_use]
    pub fn of_stdout() -> Self {
        Self(std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none())
    }

    pub(crate) fn with(self, text: &str, colour: u8) -> String {
        if self.0 { format!("\x1b[{colour}m{text}\x1b[0m") } else { text.to_owned() }
    }

    fn maybe(self, text: &str, colour: Option<u8>) -> String {
        colour.map_or_else(|| text.to_owned(), |colour| self.with(text, colour))
    }
}

fn clock(time_ms: u64) -> String {
    let seconds = time_ms / 1000 % 86_400;
    format!("{:02}:{:02}:{:02}.{:03}", seconds / 3600, seconds / 60 % 60, seconds % 60, time_ms % 1000)
}

/// One event as a line; the time is UTC.
#[must_use]
pub fn event(event: &Event, paint: Paint) -> String {
    let name = event.kind.name().replace('_', "-");
    let (name, colour) = match event.kind {
        kind if kind.is_alarm() => (name.to_uppercase(), Some(RED)),
        EventKind::Protected | EventKind::Activated => (name, Some(GREEN)),
        EventKind::JobFailed | EventKind::Degraded | EventKind::PrimarySuspect => (name, Some(YELLOW)),
        _ => (name, None),
    };
    format!("{} {} {}: {}", clock(event.time_ms), event.domain.name, paint.maybe(&name, colour), event.detail)
}

/// A duration in the unit that suits it.
#[must_use]
pub fn age(ms: u64) -> String {
    match ms {
        0..10_000 => format!("{ms} ms"),
        10_000..600_000 => format!("{} s", ms / 1000),
        600_000..36_000_000 => format!("{} min", ms / 60_000),
        _ => format!("{} h", ms / 3_600_000),
    }
}

/// A size in the unit that suits it.
#[must_use]
pub fn size(bytes: u64) -> String {
    match bytes {
        0..10_240 => format!("{bytes} B"),
        10_240..10_485_760 => format!("{} KiB", bytes >> 10),
        10_485_760..10_737_418_240 => format!("{} MiB", bytes >> 20),
        _ => format!("{} GiB", bytes >> 30),
    }
}

/// Lines of cells under a heading, in columns; the last column is as long as it is.
fn columns<const N: usize>(heading: [&str; N], lines: &[([String; N], Option<u8>)], paint: Paint) -> String {
    let mut widths = heading.map(|cell| cell.chars().count());
    for (cells, _) in lines {
        for (width, cell) in widths.iter_mut().zip(cells) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: [&str; N]| {
        let padded: Vec<_> = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        padded.join("  ").trim_end().to_owned()
    };
    let mut out = vec![line(heading)];
    for (cells, colour) in lines {
        out.push(paint.maybe(&line(cells.each_ref().map(String::as_str)), *colour));
    }
    out.join("\n")
}

/// Whether it is protected, in a word or two.
#[must_use]
pub fn protection(row: &StatusRow) -> String {
    match (row.role, row.protected, row.may_run) {
        (Role::Primary, true, _) => "protected".into(),
        (Role::Primary, false, MayRun::Here) if row.state == "unprotected" => "UNPROTECTED".into(),
        (Role::Primary, false, MayRun::Here | MayRun::Undecided) => format!("UNPROTECTED ({})", row.state),
        (Role::Backup, true, _) => "ready".into(),
        _ => row.state.clone(),
    }
}

/// From where to where.
#[must_use]
pub fn direction(row: &StatusRow) -> String {
    match row.role {
        Role::Primary => format!("here -> {}", row.peer),
        Role::Backup => format!("{} -> here", row.peer),
    }
}

/// What would be lost if the primary host died now.
#[must_use]
pub fn at_risk(row: &StatusRow) -> String {
    match (row.role, row.stale_ms, row.may_run) {
        (Role::Primary, Some(ms), _) => format!("{}, {} packets", age(ms), row.held_packets),
        (Role::Primary, None, MayRun::Here | MayRun::Undecided) => "EVERYTHING".into(),
        (Role::Backup, Some(ms), MayRun::Peer) => age(ms),
        _ => "-".into(),
    }
}

/// Who may run it.
#[must_use]
pub fn may_run(row: &StatusRow) -> String {
    match row.may_run {
        MayRun::Here => "here".into(),
        MayRun::Peer => row.peer.clone(),
        MayRun::Undecided => "UNDECIDED".into(),
        MayRun::Nobody => "nobody".into(),
    }
}

/// From the release of one epoch to the suspend of the next, on average.
#[must_use]
pub fn interval(row: &StatusRow) -> String {
    let Some(report) = &row.interval else { return "-".into() };
    let mean = report.mean_ms.map_or("-".into(), age);
    if report.auto { format!("auto, {mean}") } else { mean }
}

fn colour(row: &StatusRow) -> Option<u8> {
    match (row.role, row.protected, row.may_run) {
        (_, true, _) => Some(GREEN),
        (Role::Primary, false, MayRun::Here) | (_, _, MayRun::Undecided) => Some(RED),
        _ => None,
    }
}

/// The status: a line for each protection.
#[must_use]
pub fn status(rows: &[StatusRow], paint: Paint) -> String {
    if rows.is_empty() {
        return "No domain is protected by or backed up on this host.".into();
    }
    let lines: Vec<_> = rows
        .iter()
        .map(|row| {
            let cells = [
                row.domain.clone(),
                protection(row),
                direction(row),
                row.acked.map_or("-".into(), |e| e.to_string()),
                row.stale_ms.map_or("-".into(), age),
                at_risk(row),
                may_run(row),
                row.last_epoch.as_ref().map_or("-".into(), |r| format!("{:.1} ms", r.paused_us() as f64 / 1000.0)),
                interval(row),
                row.detail.clone(),
            ];
            (cells, colour(row))
        })
        .collect();
    columns(
        ["DOMAIN", "IS", "FROM -> TO", "EPOCH", "STALE", "LOST NOW", "MAY RUN", "PAUSE", "INTERVAL", "NOTE"],
        &lines,
        paint,
    )
}

/// How far a job is; of one on a disk, whose progress is in bytes, also how fast it goes and for how long still.
fn progress(job: &Job, Progress { pages: done, total, .. }: Progress) -> String {
    let done = done.min(total);
    let percent = format!("{} %", done * 100 / total);
    if !matches!(job.kind, OperationKind::DiskSync | OperationKind::DiskVerify) {
        return percent;
    }
    let rate = (done * 1000).checked_div(job.ran_ms).unwrap_or_default();
    let left = match (job.state, ((total - done) * 1000).checked_div(rate)) {
        (JobState::Running, Some(ms)) => format!(", {} to go", age(ms)),
        _ => String::new(),
    };
    format!("{percent} of {}, {}/s{left}", size(total), size(rate))
}

/// The jobs: a line for each.
#[must_use]
pub fn jobs(jobs: &[Job], paint: Paint) -> String {
    if jobs.is_empty() {
        return "No job is under way or has ended since remusd was started.".into();
    }
    let lines: Vec<_> = jobs
        .iter()
        .map(|job| {
            let (state, colour) = match job.state {
                JobState::Running => ("running", None),
                JobState::Aborting => ("aborting", Some(YELLOW)),
                JobState::Completed => ("completed", None),
                JobState::Cancelled => ("cancelled", Some(YELLOW)),
                JobState::Failed => ("failed", Some(RED)),
            };
            let progress = job.progress.filter(|p| p.total > 0).map_or("-".into(), |p| progress(job, p));
            let by = job.initiator.map_or("remusd".into(), |by| format!("uid {}", by.uid));
            let cells = [
                job.id.to_string(),
                job.kind.to_string(),
                job.domain.name.clone(),
                state.into(),
                clock(job.started_ms),
                age(job.ran_ms),
                progress,
                if job.abortable { "yes" } else { "no" }.into(),
                by,
                job.detail.clone(),
            ];
            (cells, colour)
        })
        .collect();
    columns(["JOB", "DOES", "DOMAIN", "STATE", "SINCE", "FOR", "DONE", "ABORTABLE", "BY", "NOTE"], &lines, paint)
}

#[cfg(test)]
pub(super) mod tests;
