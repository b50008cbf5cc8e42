//! Answers for people: tables and sentences, colours on a terminal only.

use std::io::IsTerminal;

use crate::api::{Role, StatusRow};
use crate::ops::{Event, EventKind};

/// Paints text when standard output is a terminal.
fn paint(text: &str, colour: u8) -> String {
    if std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        format!("\x1b[{colour}m{text}\x1b[0m")
    } else {
        text.to_string()
    }
}

const RED: u8 = 31;
const GREEN: u8 = 32;

/// One event as a line.
#[must_use]
pub fn event(event: &Event) -> String {
    let kind = serde_json::to_value(event.kind).ok().and_then(|v| v.as_str().map(str::to_string)).unwrap_or_default();
    let kind = match event.kind {
        EventKind::Unprotected | EventKind::Holding | EventKind::ActivationFailed => paint(&kind.to_uppercase(), RED),
        EventKind::Protected | EventKind::Activated => paint(&kind, GREEN),
        _ => kind,
    };
    let seconds = event.time_ms / 1000 % 86_400;
    format!(
        "{:02}:{:02}:{:02}.{:03} {} {kind}: {}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        event.time_ms % 1000,
        event.domain.name,
        event.detail
    )
}

fn age(ms: u64) -> String {
    if ms < 10_000 { format!("{ms} ms") } else { format!("{} s", ms / 1000) }
}

/// The status table.
#[must_use]
pub fn status(rows: &[StatusRow]) -> String {
    if rows.is_empty() {
        return "No domain is protected by or backed up on this host.".into();
    }
    let mut cells =
        vec![["DOMAIN", "ROLE", "PEER", "PROTECTED", "STATE", "EPOCH", "AGE", "PAUSE", "HELD"].map(String::from)];
    for row in rows {
        let (role, safe) = match row.role {
            Role::Primary => ("primary", if row.protected { "yes" } else { "NO" }),
            Role::Backup if row.state == "active" => ("backup", "runs here"),
            Role::Backup => ("backup", if row.protected { "ready" } else { "not yet" }),
        };
        cells.push([
            row.domain.clone(),
            role.into(),
            row.peer.clone(),
            safe.into(),
            row.state.clone(),
            row.acked.map_or("-".into(), |e| e.to_string()),
            row.acked_age_ms.map_or("-".into(), age),
            row.last_epoch.as_ref().map_or("-".into(), |r| format!("{:.1} ms", r.paused_us() as f64 / 1000.0)),
            if row.role == Role::Primary { format!("{} B", row.held_bytes) } else { "-".into() },
        ]);
    }
    let mut widths = [0; 9];
    for line in &cells {
        for (width, cell) in widths.iter_mut().zip(line) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    for (i, line) in cells.iter().enumerate() {
        let padded: Vec<String> = line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        let text = padded.join("  ");
        let colour = i.checked_sub(1).map(|i| if rows[i].protected { GREEN } else { RED });
        out += &colour.map_or(text.trim_end().to_string(), |c| paint(text.trim_end(), c));
        out.push('\n');
        if let Some(row) = i.checked_sub(1).map(|i| &rows[i])
            && !row.detail.is_empty()
        {
            out += &format!("  {}\n", row.detail);
        }
    }
    out.trim_end().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Generation, ProtectionId};

    #[test]
    fn an_unprotected_row_says_no_and_why() {
        let row = StatusRow {
            domain: "web".into(),
            uuid: ProtectionId::nil(),
            domid: None,
            role: Role::Primary,
            peer: "hostb".into(),
            state: "alone".into(),
            protected: false,
            generation: Generation(4),
            acked: None,
            acked_age_ms: None,
            held_packets: 0,
            held_bytes: 0,
            dropped_packets: 0,
            last_epoch: None,
            detail: "the backup is lost: silence for 1000 ms".into(),
        };
        let text = status(&[row]);
        assert!(text.contains("NO") && text.contains("silence for 1000 ms"), "{text}");
        assert!(!text.contains('\x1b'), "no colours in a pipe");
    }
}
