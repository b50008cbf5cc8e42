//! The mode that the primary proposes (hazard F19): durable here before it is acknowledged.

use super::{Action, Actions, Machine, Report, State};
use crate::link::{Frame, Token};

impl Machine {
    /// The mode that counts here.
    #[must_use]
    pub fn token(&self) -> Token {
        self.token
    }

    pub(super) fn token_proposed(&mut self, seq: u64, token: Token) -> Actions {
        // Giving the claim up counts at once, being given one only when it is on disk.
        if token == Token::Primary {
            self.token = token;
        }
        self.proposed = Some((seq, token));
        vec![Action::SaveToken { seq, token }]
    }

    pub(super) fn token_saved(&mut self, seq: u64) -> Actions {
        let Some((ours, token)) = self.proposed else { return Vec::new() };
        if ours != seq {
            return Vec::new();
        }
        self.proposed = None;
        // An activation goes on under the mode that it began with.
        if !matches!(self.state, State::Syncing | State::Armed | State::Waiting) {
            return Vec::new();
        }
        self.token = token;
        let mut actions = Vec::new();
        if self.state != State::Waiting {
            actions.push(Action::Send(Frame::TokenAck { seq }));
        }
        actions.push(Action::Report(Report::Token(token)));
        actions
    }

    pub(super) fn token_unsaved(&mut self, text: String) -> Actions {
        self.proposed = None;
        vec![Action::Report(Report::TokenUnsaved(text))]
    }
}
