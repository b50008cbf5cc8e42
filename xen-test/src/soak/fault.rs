//! What a soak does to the parties, and how it is undone.

use std::fmt;
use std::time::Duration;

use anyhow::Result;

use crate::net::Party;
use crate::protection::{Arena, start_daemon};

/// One thing that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A link is cut for a time.
    Cut(Party, Party),
    /// A host is cut from everybody for a time.
    Isolate(Party),
    /// A host stands still for a time.
    Freeze(Party),
    /// Both hosts stand still for a time.
    FreezeBoth,
    /// A host loses its power and is switched on again.
    PowerOff(Party),
    /// `kill -9` of a host's daemon, which is started again.
    KillDaemon(Party),
    /// `kill -9` of the primary's save helper.
    KillHelper(Party),
    /// `kill -9` of the backup's receiver.
    KillReceiver(Party),
    /// The witness is gone for a time.
    WitnessDown,
    /// The witness does not answer for a time.
    WitnessFrozen,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cut(one, other) => write!(f, "{} cut from {}", one.name(), other.name()),
            Self::Isolate(host) => write!(f, "{} cut from everybody", host.name()),
            Self::Freeze(host) => write!(f, "{} frozen", host.name()),
            Self::FreezeBoth => f.write_str("both hosts frozen"),
            Self::PowerOff(host) => write!(f, "{} loses its power", host.name()),
            Self::KillDaemon(host) => write!(f, "remusd killed on {}", host.name()),
            Self::KillHelper(host) => write!(f, "save helper killed on {}", host.name()),
            Self::KillReceiver(host) => write!(f, "receiver killed on {}", host.name()),
            Self::WitnessDown => f.write_str("witness down"),
            Self::WitnessFrozen => f.write_str("witness frozen"),
        }
    }
}

/// Numbers that a seed decides (SplitMix64, Steele et al. 2014).
#[derive(Debug)]
pub struct Dice(u64);

impl Dice {
    /// The numbers of this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// One of `0..below`.
    pub fn below(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below.max(1)
    }

    /// A fault, given where the guest runs, and how long it lasts.
    pub fn fault(&mut self, primary: Party) -> (Fault, Duration) {
        let backup = other(primary);
        let all = [
            Fault::Cut(Party::A, Party::B),
            Fault::Cut(primary, Party::Client),
            Fault::Cut(backup, Party::Client),
            Fault::Isolate(primary),
            Fault::Isolate(backup),
            Fault::Freeze(primary),
            Fault::Freeze(backup),
            Fault::FreezeBoth,
            Fault::PowerOff(primary),
            Fault::PowerOff(backup),
            Fault::KillDaemon(primary),
            Fault::KillDaemon(backup),
            Fault::KillHelper(primary),
            Fault::KillReceiver(backup),
            Fault::WitnessDown,
            Fault::WitnessFrozen,
        ];
        let fault = all[self.below(all.len() as u64) as usize];
        // From a blink to well past detection.
        (fault, Duration::from_millis(200 + self.below(15_000)))
    }
}

/// The other host.
#[must_use]
pub fn other(host: Party) -> Party {
    if host == Party::A { Party::B } else { Party::A }
}

impl Fault {
    /// Brings it about.
    pub fn begin(self, arena: &mut Arena<'_>) -> Result<()> {
        let pair = arena.pair();
        match self {
            Self::Cut(one, two) => pair.cut(one, two),
            Self::Isolate(host) => {
                pair.cut(host, other(host))?;
                pair.cut(host, Party::Client)
            }
            Self::Freeze(host) => arena.host(host).freeze(),
            Self::FreezeBoth => pair.each(|host| host.freeze()),
            Self::PowerOff(host) => {
                arena.host(host).power_off();
                Ok(())
            }
            Self::KillDaemon(host) => arena.host(host).kill9_program("remusd"),
            // They come and go: not to be there just now is no failure of the soak.
            Self::KillHelper(host) => arena.host(host).run("pkill -9 libxl-save-help").map(drop),
            Self::KillReceiver(host) => arena.host(host).run("pkill -9 -f 'xl migrate-receive'").map(drop),
            Self::WitnessDown => {
                arena.etcd.stop();
                Ok(())
            }
            Self::WitnessFrozen => arena.etcd.freeze(true),
        }
    }

    /// Undoes it: everybody is there again. What it did stays done.
    pub fn end(self, arena: &mut Arena<'_>) -> Result<()> {
        let pair = arena.pair();
        match self {
            Self::Cut(one, two) => pair.join(one, two),
            Self::Isolate(host) => {
                pair.join(host, Party::Client)?;
                pair.join(host, other(host))
            }
            Self::Freeze(host) => arena.host(host).thaw(),
            Self::FreezeBoth => pair.each(|host| host.thaw()),
            Self::PowerOff(host) => {
                arena.host(host).boot()?;
                start_daemon(arena.host(host))
            }
            Self::KillDaemon(host) => start_daemon(arena.host(host)),
            Self::KillHelper(_) | Self::KillReceiver(_) => Ok(()),
            Self::WitnessDown => arena.etcd.run(),
            Self::WitnessFrozen => arena.etcd.freeze(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_says_it_all_and_every_fault_comes() {
        let faults = |seed| {
            let mut dice = Dice::new(seed);
            (0..500).map(|_| dice.fault(Party::A)).collect::<Vec<_>>()
        };
        assert_eq!(faults(7), faults(7));
        assert_ne!(faults(7), faults(8));
        let mut kinds: Vec<String> = faults(1).iter().map(|(fault, _)| fault.to_string()).collect();
        kinds.sort();
        kinds.dedup();
        assert_eq!(kinds.len(), 16);
    }
}
