//! Which host the guest speaks from: its frames as they leave each host, before the network joins them.

use std::time::Instant;

use super::frame::Mac;
use super::packet::PacketError;
use super::sniffer::Sniffer;
use crate::net::Party;

/// Listens at both hosts' ports for frames of one guest.
pub struct Speakers {
    a: Sniffer,
    b: Sniffer,
}

/// A stretch of time in which only one host spoke for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// Which host.
    pub host: Party,
    /// Its first frame.
    pub from: Instant,
    /// Its last frame.
    pub to: Instant,
    /// How many frames.
    pub frames: usize,
}

impl Speakers {
    /// Listens from here on. In the namespace of the hosts' ports.
    ///
    /// # Errors
    /// [`PacketError`]: no such port, or not privileged.
    pub fn start(guest: Mac) -> Result<Self, PacketError> {
        Ok(Self { a: Sniffer::start("data-a", guest)?, b: Sniffer::start("data-b", guest)? })
    }

    /// Who spoke when, in order: one turn, unless the guest has moved. A guest with two live copies takes many.
    ///
    /// # Errors
    /// What makes the record incomplete, so that it proves nothing.
    pub fn turns(&self) -> anyhow::Result<Vec<Turn>> {
        let mut all = Vec::new();
        for (host, sniffer) in [(Party::A, &self.a), (Party::B, &self.b)] {
            let capture = sniffer.capture();
            anyhow::ensure!(capture.dropped == 0, "{} frames of host {} were missed", capture.dropped, host.name());
            if let Some(why) = capture.failed {
                anyhow::bail!("listening at host {} ended: {why}", host.name());
            }
            all.extend(capture.frames.iter().map(|frame| (frame.at, host)));
        }
        all.sort_by_key(|(at, _)| *at);
        Ok(turns(&all))
    }
}

fn turns(spoken: &[(Instant, Party)]) -> Vec<Turn> {
    let mut turns: Vec<Turn> = Vec::new();
    for &(at, host) in spoken {
        match turns.last_mut() {
            Some(turn) if turn.host == host => {
                turn.to = at;
                turn.frames += 1;
            }
            _ => turns.push(Turn { host, from: at, to: at, frames: 1 }),
        }
    }
    turns
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn each_change_of_host_is_a_turn() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let spoken = [(at(0), Party::A), (at(1), Party::A), (at(5), Party::B), (at(6), Party::A)];
        let hosts: Vec<_> = turns(&spoken).iter().map(|t| (t.host, t.frames)).collect();
        assert_eq!(hosts, [(Party::A, 2), (Party::B, 1), (Party::A, 1)]);
        assert!(turns(&[]).is_empty());
    }
}
