//! Draws `top`: the protections, and the selected one's figures as sparklines. Fits itself to the terminal.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::Line;
use ratatui::widgets::{Cell, Paragraph, Row, Sparkline, Table};

use super::model::{History, Series, Top};
use crate::api::{MayRun, Role, StatusRow};
use crate::cli::render::{age, at_risk, direction, interval, may_run, protection, size};

/// From so many columns on there is room for all.
const WIDE: u16 = 100;

/// Columns of a figure's name and values.
const LABEL: u16 = 38;

fn colour(row: &StatusRow, colours: bool) -> Style {
    let style = Style::default();
    match (row.role, row.protected, row.may_run) {
        _ if !colours => style,
        (_, true, _) => style.fg(Color::Green),
        (Role::Primary, false, MayRun::Here) | (_, _, MayRun::Undecided) => style.fg(Color::Red),
        _ => style,
    }
}

fn pause(row: &StatusRow) -> String {
    row.last_epoch.as_ref().map_or("-".into(), |r| micros(r.paused_us()))
}

fn micros(us: u64) -> String {
    format!("{:.1} ms", us as f64 / 1000.0)
}

/// Everything.
pub(super) fn draw(frame: &mut Frame, top: &Top, colours: bool) {
    let area = frame.area();
    let wanted = u16::try_from(top.rows.len()).unwrap_or(u16::MAX).saturating_add(1);
    let figures = if top.selected().is_some() { 7 } else { 0 };
    let rows = wanted.min(area.height.saturating_sub(2 + figures).max(2));
    let [head, table, note, figures, foot] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Length(rows),
        Constraint::Length(1),
        Constraint::Min(0),
        Constraint::Length(1),
    ])
    .areas(area);
    let count = |test: &dyn Fn(&StatusRow) -> bool| top.rows.iter().filter(|row| test(row)).count();
    let safe = count(&|row| row.role == Role::Primary && row.protected);
    let open = count(&|row| row.role == Role::Primary && !row.protected && row.may_run == MayRun::Here);
    let copies = count(&|row| row.role == Role::Backup);
    let text = format!("remus top   {safe} protected, {open} unprotected, {copies} copies here");
    frame.render_widget(Paragraph::new(text).style(Style::default().add_modifier(Modifier::BOLD)), head);
    if top.rows.is_empty() {
        frame.render_widget(Paragraph::new("No domain is protected by or backed up on this host."), table);
    } else {
        draw_rows(frame, table, top, colours);
    }
    if let Some(row) = top.selected().and_then(|at| top.rows.get(at)) {
        frame.render_widget(Paragraph::new(row.detail.clone()), note);
        match top.history(row) {
            Some(history) => draw_figures(frame, figures, row, history, colours),
            None => {
                let text = format!("{}: the figures of its epochs are on the primary", row.domain);
                frame.render_widget(Paragraph::new(text), figures);
            }
        }
    }
    frame.render_widget(Paragraph::new("q quit   up, down: another domain"), foot);
}

fn draw_rows(frame: &mut Frame, area: Rect, top: &Top, colours: bool) {
    let wide = area.width >= WIDE;
    let heading: &[&str] = match wide {
        true => &["DOMAIN", "IS", "FROM -> TO", "EPOCH", "STALE", "LOST NOW", "MAY RUN", "PAUSE"],
        false => &["DOMAIN", "IS", "STALE", "PAUSE"],
    };
    let selected = top.selected();
    // The selected one is always seen.
    let room = usize::from(area.height.saturating_sub(1));
    let first = selected.map_or(0, |at| (at + 1).saturating_sub(room));
    let lines = top.rows.iter().enumerate().skip(first).map(|(at, row)| {
        let stale = row.stale_ms.map_or("-".into(), age);
        let mark = if Some(at) == selected { "> " } else { "  " };
        let name = format!("{mark}{}", row.domain);
        let cells = match wide {
            true => vec![
                name,
                protection(row),
                direction(row),
                row.acked.map_or("-".into(), |e| e.to_string()),
                stale,
                at_risk(row),
                may_run(row),
                pause(row),
            ],
            false => vec![name, protection(row), stale, pause(row)],
        };
        Row::new(cells.into_iter().map(Cell::from)).style(colour(row, colours))
    });
    let widths: Vec<Constraint> = match wide {
        true => [16, 28, 20, 8, 9, 22, 12, 9].into_iter().map(Constraint::Max).collect(),
        false => vec![Constraint::Fill(2), Constraint::Fill(3), Constraint::Length(8), Constraint::Length(9)],
    };
    let head =
        heading.iter().enumerate().map(|(at, text)| Cell::from(format!("{}{text}", if at == 0 { "  " } else { "" })));
    frame.render_widget(Table::new(lines, widths).header(Row::new(head)), area);
}

/// A figure's name, its values, and how one is written.
type Figure<'a> = (&'a str, &'a Series, &'a dyn Fn(u64) -> String);

fn draw_figures(frame: &mut Frame, area: Rect, row: &StatusRow, history: &History, colours: bool) {
    let plain = |value: u64| value.to_string();
    let figures: [Figure<'_>; 5] = [
        ("pause", &history.pause, &micros),
        ("dirty pages", &history.pages, &plain),
        ("on the wire", &history.wire, &size),
        ("output held", &history.held, &size),
        ("ack latency", &history.ack, &micros),
    ];
    // As high as there is room for, and all alike.
    let each = (area.height.saturating_sub(1) / 5).clamp(1, 4);
    let mut lines = vec![Constraint::Length(1)];
    lines.extend(figures.iter().map(|_| Constraint::Length(each)));
    let areas = Layout::vertical(lines).split(area);
    let heading = format!("{}, the latest epochs (interval: {}):", row.domain, interval(row));
    frame.render_widget(Paragraph::new(heading), areas[0]);
    let label = LABEL.min(area.width / 2);
    for ((name, series, show), area) in figures.into_iter().zip(areas.iter().skip(1)) {
        if area.height == 0 {
            continue;
        }
        let [left, right] = Layout::horizontal([Constraint::Length(label), Constraint::Min(0)]).areas(*area);
        let now = series.last().map_or("-".into(), show);
        let text = match label >= LABEL {
            true => format!("{name:<12}{now:>9}  max {:>9}", show(series.max())),
            false => format!("{name:<12}{now:>9}"),
        };
        frame.render_widget(Paragraph::new(Line::from(text)), left);
        let data = series.latest(usize::from(right.width));
        let style = if colours { Style::default().fg(Color::Cyan) } else { Style::default() };
        frame.render_widget(Sparkline::default().data(&data).style(style), right);
    }
}
