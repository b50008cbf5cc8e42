//! Which events the machines have met in which states.

use std::collections::BTreeMap;
use std::fmt::{self, Debug, Write};

use super::world::World;

/// How often each machine has met each event in each state.
pub type Coverage = BTreeMap<(&'static str, String, String), u64>;

/// Takes the name of a variant and drops what is in it.
struct Name<'a>(&'a mut String);

impl Write for Name<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = text.find([' ', '(', '{']);
        self.0.push_str(&text[..end.unwrap_or(text.len())]);
        // An error ends the formatting: the rest, pages perhaps, is never looked at.
        if end.is_some() { Err(fmt::Error) } else { Ok(()) }
    }
}

fn name(of: &impl Debug) -> String {
    let mut text = String::new();
    let _ = write!(Name(&mut text), "{of:?}");
    text
}

/// An event's name; of a frame also which.
#[must_use]
pub fn short(event: &crate::backup::machine::Event) -> String {
    match event {
        crate::backup::machine::Event::Frame(frame) => format!("Frame({})", frame.name()),
        other => name(other),
    }
}

impl World {
    /// A machine in this state meets this event.
    pub(super) fn cover<S: Debug, E: Debug + 'static>(&mut self, machine: &'static str, state: &S, event: &E) {
        let Some(coverage) = &mut self.coverage else { return };
        let event = match (event as &dyn std::any::Any).downcast_ref() {
            Some(event) => short(event),
            None => name(event),
        };
        *coverage.entry((machine, name(state), event)).or_default() += 1;
    }
}
