//! What `top` shows: the rows, and for each protection the figures of its latest epochs.

use std::collections::{BTreeMap, VecDeque};

use crate::api::{Role, StatusRow};
use crate::ids::{Epoch, Generation, ProtectionId};

/// Epochs kept: more than a terminal has columns.
const KEPT: usize = 400;

/// One figure over the latest epochs, oldest first.
#[derive(Clone, Debug, Default)]
pub(super) struct Series(VecDeque<u64>);

impl Series {
    fn push(&mut self, value: u64) {
        self.0.push_back(value);
        if self.0.len() > KEPT {
            self.0.pop_front();
        }
    }

    /// The newest `width`.
    pub(super) fn latest(&self, width: usize) -> Vec<u64> {
        self.0.iter().skip(self.0.len().saturating_sub(width)).copied().collect()
    }

    pub(super) fn last(&self) -> Option<u64> {
        self.0.back().copied()
    }

    pub(super) fn max(&self) -> u64 {
        self.0.iter().copied().max().unwrap_or(0)
    }
}

/// The figures of one protection.
#[derive(Clone, Debug, Default)]
pub(super) struct History {
    seen: Option<(Generation, Epoch)>,
    /// Microseconds that the guest stood still.
    pub(super) pause: Series,
    /// Dirty pages.
    pub(super) pages: Series,
    /// Bytes on the wire.
    pub(super) wire: Series,
    /// Bytes of held output.
    pub(super) held: Series,
    /// Microseconds from the last byte to the acknowledgement.
    pub(super) ack: Series,
}

/// All that is shown.
#[derive(Clone, Debug, Default)]
pub(super) struct Top {
    pub(super) rows: Vec<StatusRow>,
    selected: Option<(ProtectionId, bool)>,
    histories: BTreeMap<ProtectionId, History>,
}

fn key(row: &StatusRow) -> (ProtectionId, bool) {
    (row.uuid, row.role == Role::Primary)
}

impl Top {
    /// Takes the rows as they are now. An epoch counts once, however often it is told.
    pub(super) fn update(&mut self, rows: Vec<StatusRow>) {
        self.histories.retain(|uuid, _| rows.iter().any(|row| row.uuid == *uuid));
        for row in &rows {
            let Some(report) = &row.last_epoch else { continue };
            let history = self.histories.entry(row.uuid).or_default();
            let now = (row.generation, report.epoch);
            if history.seen == Some(now) {
                continue;
            }
            history.seen = Some(now);
            history.pause.push(report.paused_us());
            history.pages.push(report.pages);
            history.wire.push(report.bytes);
            history.held.push(row.held_bytes);
            history.ack.push(report.ack_us);
        }
        self.rows = rows;
    }

    /// The row whose figures are shown: the one that was chosen, else the first that has figures, else the first.
    pub(super) fn selected(&self) -> Option<usize> {
        let chosen = self.rows.iter().position(|row| Some(key(row)) == self.selected);
        let with_figures = || self.rows.iter().position(|row| row.last_epoch.is_some());
        chosen.or_else(with_figures).or(if self.rows.is_empty() { None } else { Some(0) })
    }

    /// Moves the choice.
    pub(super) fn select(&mut self, by: isize) {
        let Some(at) = self.selected() else { return };
        let to = at.saturating_add_signed(by).min(self.rows.len() - 1);
        self.selected = Some(key(&self.rows[to]));
    }

    /// The figures of a row.
    pub(super) fn history(&self, row: &StatusRow) -> Option<&History> {
        self.histories.get(&row.uuid).filter(|_| row.role == Role::Primary)
    }
}
