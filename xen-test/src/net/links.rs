//! Bridges, ports, and the links between the three parties.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail};

use super::{CLIENT_ADDRESS, CLIENT_ADDRESS6, MANAGEMENT_HARNESS, NetNs};

/// Someone on the data network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Party {
    /// Host a and its guests.
    A,
    /// Host b and its guests.
    B,
    /// The client process, outside both hosts.
    Client,
}

impl Party {
    const ALL: [Self; 3] = [Self::A, Self::B, Self::Client];

    /// `a`, `b` or `client`.
    pub fn name(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
            Self::Client => "client",
        }
    }

    /// The party's port on the data bridge.
    fn port(self) -> &'static str {
        match self {
            Self::A => "data-a",
            Self::B => "data-b",
            Self::Client => "client-port",
        }
    }

    fn index(self) -> usize {
        match self {
            Self::A => 0,
            Self::B => 1,
            Self::Client => 2,
        }
    }
}

impl std::str::FromStr for Party {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "a" => Ok(Self::A),
            "b" => Ok(Self::B),
            "client" => Ok(Self::Client),
            _ => bail!("'{text}' is no party: use a, b or client"),
        }
    }
}

/// Which pairs are cut, indexed by the party that is *not* in the pair.
type Cuts = [bool; 3];

/// The networks of a run.
#[derive(Debug)]
pub struct Links {
    netns: Arc<NetNs>,
    parties: Vec<Party>,
    cuts: Mutex<Cuts>,
}

impl Links {
    /// Makes both bridges, the client's interface and a pair of taps for each host (`data-X`,
    /// `mgmt-X`).
    pub fn new(netns: Arc<NetNs>, hosts: &[&str]) -> Result<Self> {
        let mut batch = String::from(
            "link set lo up\n\
             link add data type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
             link add mgmt type bridge stp_state 0 forward_delay 0 mcast_snooping 0\n\
             link add client type veth peer name client-port\n\
             link set client-port master data up\n",
        );
        for host in hosts {
            for network in ["data", "mgmt"] {
                let tap = format!("{network}-{host}");
                batch.push_str(&format!("tuntap add {tap} mode tap\n"));
                batch.push_str(&format!("link set {tap} master {network} up\n"));
            }
        }
        batch.push_str(&format!(
            "link set data up\nlink set mgmt up\nlink set client up\n\
             addr add {CLIENT_ADDRESS}/24 dev client\n\
             addr add {CLIENT_ADDRESS6}/64 dev client nodad\n\
             addr add {MANAGEMENT_HARNESS}/24 dev mgmt\n"
        ));
        // The hosts must not find a way around a cut link through the management network.
        let isolate: String = hosts.iter().map(|host| format!("link set dev mgmt-{host} isolated on\n")).collect();
        netns.call(move || {
            // No address on the data bridge itself, not even a link-local one: it is a wire.
            let quiet = |dir: &str, name: &str| std::fs::write(format!("/proc/sys/net/ipv6/conf/{dir}/{name}"), "0");
            // Absent when the kernel has no IPv6: then there is nothing to quieten.
            let _ = quiet("default", "accept_dad");
            let _ = quiet("all", "accept_dad");
            batched("ip", &batch)?;
            batched("bridge", &isolate)
        })??;
        let parties =
            Party::ALL.into_iter().filter(|party| *party == Party::Client || hosts.contains(&party.name())).collect();
        Ok(Self { netns, parties, cuts: Mutex::default() })
    }

    /// Cuts the link between two parties: nothing passes between them, in either direction, and
    /// neither sees a carrier change. Takes effect before it returns.
    pub fn cut(&self, one: Party, other: Party) -> Result<()> {
        self.change(one, other, true)
    }

    /// Undoes [`Links::cut`].
    pub fn join(&self, one: Party, other: Party) -> Result<()> {
        self.change(one, other, false)
    }

    /// Undoes every cut.
    pub fn join_all(&self) -> Result<()> {
        let mut cuts = self.cuts.lock().expect("no panic while held");
        self.apply([false; 3])?;
        *cuts = [false; 3];
        Ok(())
    }

    fn change(&self, one: Party, other: Party, cut: bool) -> Result<()> {
        let third = third(one, other).context("a link has two different ends")?;
        let mut cuts = self.cuts.lock().expect("no panic while held");
        let mut wanted = *cuts;
        wanted[third.index()] = cut;
        self.apply(wanted)?;
        *cuts = wanted;
        Ok(())
    }

    fn apply(&self, cuts: Cuts) -> Result<()> {
        let mut batch = String::new();
        for party in self.parties.iter().copied() {
            let (isolated, up) = port_state(party, cuts);
            batch.push_str(&format!(
                "link set dev {} isolated {} state {}\n",
                party.port(),
                if isolated { "on" } else { "off" },
                // BR_STATE_FORWARDING and BR_STATE_DISABLED of linux/if_bridge.h; unlike taking the
                // interface down this leaves the carrier alone, as a cut far away would.
                if up { 3 } else { 0 },
            ));
        }
        self.netns.call(move || batched("bridge", &batch))?
    }
}

fn third(one: Party, other: Party) -> Option<Party> {
    if one == other {
        return None;
    }
    Party::ALL.into_iter().find(|party| *party != one && *party != other)
}

/// (isolated, forwarding) of a party's port. Isolated ports do not talk to each other: one cut pair
/// is two isolated ports; with more cuts a party without any link left is switched off.
fn port_state(party: Party, cuts: Cuts) -> (bool, bool) {
    let all_cuts = cuts.iter().filter(|cut| **cut).count();
    let own_cuts = (0..3).filter(|pair| *pair != party.index() && cuts[*pair]).count();
    (all_cuts == 1 && own_cuts == 1, own_cuts < 2)
}

/// Runs `ip` or `bridge` on a list of commands, in the calling thread's namespace.
fn batched(program: &str, commands: &str) -> Result<()> {
    let mut child = Command::new(program)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {program}"))?;
    child.stdin.take().expect("piped").write_all(commands.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("{program} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the bridge forwards between two ports in these states.
    fn connected(one: Party, other: Party, cuts: Cuts) -> bool {
        let (one, other) = (port_state(one, cuts), port_state(other, cuts));
        one.1 && other.1 && !(one.0 && other.0)
    }

    #[test]
    fn every_combination_of_cuts_cuts_just_those_pairs() {
        for bits in 0..8 {
            let cuts: Cuts = std::array::from_fn(|pair| bits & (1 << pair) != 0);
            for (one, other) in [(Party::A, Party::B), (Party::A, Party::Client), (Party::B, Party::Client)] {
                let cut = cuts[third(one, other).unwrap().index()];
                assert_eq!(connected(one, other, cuts), !cut, "{one:?}-{other:?} with {cuts:?}");
            }
        }
    }
}
