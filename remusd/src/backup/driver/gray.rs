//! What the backup makes of a primary that is neither well nor gone (hazard F22).

use std::time::Duration;

use super::Driver;
use crate::gray::Seen;
use crate::link::Heartbeat;
use crate::ops::EventKind;

impl Driver {
    pub(super) fn observe(&mut self, beat: Heartbeat) {
        self.tell_gray(Seen::Beat(beat));
    }

    pub(super) fn starved(&mut self, by: Duration) {
        self.tell_gray(Seen::Starved(by));
    }

    pub(super) fn placed(&mut self, reachable: bool) {
        self.tell_gray(Seen::Reachable(reachable));
    }

    fn tell_gray(&mut self, seen: Seen) {
        for change in self.gray.see(seen) {
            self.publish(EventKind::GrayFailure, change.to_string());
        }
    }
}
