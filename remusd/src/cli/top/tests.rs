use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::draw::draw;
use super::model::Top;
use crate::cli::render::tests::{backup, primary, unprotected};
use crate::ids::Epoch;
use crate::protect::report::EpochReport;

/// Forty epochs that rise and fall.
fn top() -> Top {
    let mut top = Top::default();
    for n in 0..40u64 {
        let mut row = primary();
        let wave = n % 10 + 1;
        row.acked = Some(Epoch(n));
        row.held_bytes = wave * 1500;
        row.last_epoch = Some(EpochReport {
            epoch: Epoch(n),
            armed: true,
            capture_us: wave * 900,
            resume_us: 300,
            ack_us: (11 - wave) * 400,
            pages: wave * 100,
            bytes: wave * 200_000,
            ..EpochReport::default()
        });
        // Told twice, counted once.
        top.update(vec![row.clone(), unprotected(), backup()]);
        top.update(vec![row, unprotected(), backup()]);
    }
    top
}

fn screen(top: &Top, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, top, false)).unwrap();
    terminal.backend().to_string()
}

#[test]
fn a_wide_terminal_shows_everything() {
    insta::assert_snapshot!(screen(&top(), 130, 20));
}

#[test]
fn a_narrow_terminal_shows_what_matters() {
    insta::assert_snapshot!(screen(&top(), 60, 14));
}

#[test]
fn a_tiny_terminal_breaks_nothing() {
    for (width, height) in [(1, 1), (10, 2), (20, 5), (300, 3)] {
        screen(&top(), width, height);
    }
    insta::assert_snapshot!(screen(&Top::default(), 60, 4));
}

#[test]
fn the_choice_stays_with_its_domain() {
    let mut top = top();
    assert_eq!(top.selected(), Some(0), "the one with figures");
    top.select(1);
    top.select(5);
    assert_eq!(top.selected(), Some(2));
    top.update(vec![backup(), primary()]);
    assert_eq!(top.selected(), Some(0), "it has moved");
    top.select(-9);
    assert_eq!(top.selected(), Some(0));
    top.update(vec![]);
    assert_eq!(top.selected(), None);
}
