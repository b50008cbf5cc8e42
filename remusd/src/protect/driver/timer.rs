//! The time between the end of one epoch and the suspend of the next: what is known of it is told to [`Pace`](super::super::pace::Pace),
//! which decides.

use std::time::{Duration, Instant};

use super::super::machine::{Event, State};
use super::super::pace::Released;
use super::Driver;

pub(super) fn us(from: Option<Instant>, to: Option<Instant>) -> u64 {
    match (from, to) {
        (Some(from), Some(to)) => to.saturating_duration_since(from).as_micros() as u64,
        _ => 0,
    }
}

impl Driver {
    /// To the next suspend: of the next epoch, or of the one that the guest did not suspend for.
    pub(super) fn start_timer(&mut self) {
        let now = Instant::now();
        let current = &self.current;
        if let (State::Idle(_), Some(suspend_asked), Some(resumed)) =
            (self.machine.state(), current.suspend_asked, current.resumed)
        {
            let micros = us(current.suspended, current.copied) + us(current.resumed, current.acked);
            self.pace.released(Released {
                now,
                suspend_asked,
                resumed,
                shipped: Duration::from_micros(micros),
                pages: current.cost.pages,
            });
            self.timer = self.pace.due().map(|due| due.0);
        } else {
            self.timer = Some(now + self.parts.options.longest_interval());
        }
    }

    pub(super) fn on_timer(&mut self) -> Event {
        self.timer = None;
        if matches!(self.machine.state(), State::Idle(_)) {
            self.pace.cut(Instant::now());
        }
        Event::Timer
    }

    /// There may be a reason to end the epoch earlier now.
    pub(super) fn move_timer(&mut self) {
        if matches!(self.machine.state(), State::Idle(_)) && self.timer.is_some() {
            self.timer = self.pace.due().map(|due| due.0);
        }
    }
}
