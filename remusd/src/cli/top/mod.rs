//! `remus top`: how every protection stands, live, with what each epoch cost.

mod draw;
mod model;

#[cfg(test)]
mod tests;

use std::io::IsTerminal;
use std::path::Path;

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use tokio::sync::mpsc;

use self::model::Top;
use super::render::Paint;
use crate::api::client::{Call, hung_up};
use crate::api::{ApiError, ErrorCode, Reply, Request};

/// Runs until the user ends it, or the daemon does.
///
/// # Errors
/// `Invalid` without a terminal; what the daemon says.
pub(super) async fn run(socket: &Path, domain: Option<String>) -> Result<u8, ApiError> {
    if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        let text = "top needs a terminal; `remus status` shows the same once, `remus events --follow` what happens";
        return Err(ApiError::new(ErrorCode::Invalid, text));
    }
    let mut call = Call::start(socket, &Request::WatchStatus { domain }).await?;
    let (send, mut keys) = mpsc::unbounded_channel();
    // Reading a key blocks; the thread ends with the program.
    std::thread::spawn(move || {
        while let Ok(event) = event::read() {
            if send.send(event).is_err() {
                return;
            }
        }
    });
    let mut top = Top::default();
    let colours = Paint::of_stdout().0;
    let mut terminal = ratatui::init();
    let ended = loop {
        if let Err(error) = terminal.draw(|frame| draw::draw(frame, &top, colours)) {
            break Err(ApiError::new(ErrorCode::Failed, format!("the terminal: {error}")));
        }
        tokio::select! {
            reply = call.next() => match reply {
                Ok(Some(Reply::Rows(rows))) => top.update(rows),
                Ok(Some(Reply::Error(error))) | Err(error) => break Err(error),
                Ok(Some(_)) => {}
                Ok(None) => break Err(hung_up()),
            },
            key = keys.recv() => match key {
                Some(Event::Key(key)) if key.kind == KeyEventKind::Press => match key.code {
                    KeyCode::Char('q') | KeyCode::Esc => break Ok(0),
                    KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => break Ok(0),
                    KeyCode::Up | KeyCode::Char('k') => top.select(-1),
                    KeyCode::Down | KeyCode::Char('j') => top.select(1),
                    _ => {}
                },
                // Drawn anew with the new size.
                Some(_) => {}
                None => break Ok(0),
            },
        }
    };
    ratatui::restore();
    ended
}
