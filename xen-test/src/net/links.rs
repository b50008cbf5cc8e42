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

/// Bridge of the data network, and one that leads nowhere.
const DATA: &str = "data";
const VOID: &str = "void";

/// Which pairs are cut, indexed by the party that is *not* in the pair.
type Cuts = [bool; 3];

/// The networks of a run.
#[derive(Debug)]
pub struct Links {
    netns: Arc<NetNs>,
    parties: Vec<Party>,
    cuts: Mutex<Cuts>,
}

/// The interfaces that are there whatever the hosts are, as commands of `ip`.
const INTERFACES: &str = "\
link set lo up
link add data type bridge stp_state 0 forward_delay 0 mcast_snooping 0
link add void type bridge stp_state 0 forward_delay 0 mcast_snooping 0
link add mgmt type bridge stp_state 0 forward_delay 0 mcast_snooping 0
link add client type veth peer name client-port
link set client-port master data up
";

impl Links {
    /// Makes both bridges, the client's interface and a pair of taps for each host (`data-X`,
    /// `mgmt-X`).
    pub fn new(netns: Arc<NetNs>, hosts: &[&str]) -> Result<Self> {
        let mut batch = String::new();
        for host in hosts {
            for network in ["data", "mgmt"] {
                let tap = format!("{network}-{host}");
                batch.push_str(&format!("tuntap add {tap} mode tap\n"));
                batch.push_str(&format!("link set {tap} master {network} up\n"));
            }
        }
        batch.push_str(&format!(
            "link set data up\nlink set void up\nlink set mgmt up\nlink set client up\n\
             addr add {CLIENT_ADDRESS}/24 dev client\n\
             addr add {CLIENT_ADDRESS6}/64 dev client nodad\n\
             addr add {MANAGEMENT_HARNESS}/24 dev mgmt\n"
        ));
        // The hosts must not find a way around a cut link through the management network.
        let isolate: String = hosts.iter().map(|host| format!("link set dev mgmt-{host} isolated on\n")).collect();
        netns.call(move || {
            only_own_addresses()?;
            batched("ip", INTERFACES)?;
            // Absent when the kernel has no IPv6: then the client's address says so.
            let _ = std::fs::write("/proc/sys/net/ipv6/conf/client/disable_ipv6", "0");
            batched("ip", &batch)?;
            batched("bridge", &isolate)
        })??;
        let parties =
            Party::ALL.into_iter().filter(|party| *party == Party::Client || hosts.contains(&party.name())).collect();
        Ok(Self { netns, parties, cuts: Mutex::default() })
    }

    /// Cuts the link between two parties: nothing passes between them, in either direction. Takes
    /// effect before it returns (milliseconds). Hosts see no carrier change; the client sees a short
    /// one when it loses its last link, or gets it back.
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
        self.apply(*cuts, [false; 3])?;
        *cuts = [false; 3];
        Ok(())
    }

    fn change(&self, one: Party, other: Party, cut: bool) -> Result<()> {
        let third = third(one, other).context("a link has two different ends")?;
        let mut cuts = self.cuts.lock().expect("no panic while held");
        let mut wanted = *cuts;
        wanted[third.index()] = cut;
        self.apply(*cuts, wanted)?;
        *cuts = wanted;
        Ok(())
    }

    fn apply(&self, current: Cuts, cuts: Cuts) -> Result<()> {
        // Port flags hold while a host is off and its tap has no carrier; a port's forwarding state
        // would not: the kernel refuses to set it then, and sets it anew with the carrier.
        let moves = |party: &Party| port_state(*party, current).bridge != port_state(*party, cuts).bridge;
        let (moved, kept): (Vec<Party>, Vec<Party>) = self.parties.iter().partition(|party| moves(party));
        // Down while its flags are those of a new port, so that nothing slips through.
        let leave = lines(&moved, |party| {
            let bridge = port_state(party, cuts).bridge;
            format!("link set {0} down\nlink set {0} master {bridge}\n", party.port())
        });
        let all: Vec<Party> = kept.into_iter().chain(moved.iter().copied()).collect();
        let flags = lines(&all, |party| {
            let isolated = if port_state(party, cuts).isolated { "on" } else { "off" };
            format!("link set dev {} isolated {isolated}\n", party.port())
        });
        let back = lines(&moved, |party| format!("link set {} up\n", party.port()));
        self.netns.call(move || {
            [("ip", leave), ("bridge", flags), ("ip", back)]
                .iter()
                .filter(|(_, lines)| !lines.is_empty())
                .try_for_each(|(program, lines)| batched(program, lines))
        })?
    }
}

/// Keeps the bridges and ports from taking part themselves: to the namespace they are interfaces like
/// the client's own, and would answer for its address and take packets for it past a cut link.
/// Called in the namespace before any interface is made.
fn only_own_addresses() -> Result<()> {
    // IPv4: answer ARP only where the address is, take packets only where their answer would go.
    for (name, value) in [("arp_ignore", "1"), ("rp_filter", "1")] {
        std::fs::write(format!("/proc/sys/net/ipv4/conf/all/{name}"), value)
            .with_context(|| format!("cannot set {name}"))?;
    }
    // IPv6: off except where it is switched on. Absent when the kernel has no IPv6 at all.
    let set = |name: &str, value: &str| std::fs::write(format!("/proc/sys/net/ipv6/conf/default/{name}"), value);
    if set("accept_dad", "0").is_ok() {
        set("disable_ipv6", "1").context("cannot switch IPv6 off on the bridges")?;
    }
    Ok(())
}

fn lines(parties: &[Party], line: impl Fn(Party) -> String) -> String {
    parties.iter().map(|party| line(*party)).collect()
}

fn third(one: Party, other: Party) -> Option<Party> {
    if one == other {
        return None;
    }
    Party::ALL.into_iter().find(|party| *party != one && *party != other)
}

/// Where a party's port is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PortState {
    bridge: &'static str,
    /// Isolated ports of a bridge do not talk to each other.
    isolated: bool,
}

/// One cut pair: two isolated ports. Two cuts: the party that has both is alone on another bridge.
/// Three: all are isolated.
fn port_state(party: Party, cuts: Cuts) -> PortState {
    let all_cuts = cuts.iter().filter(|cut| **cut).count();
    let own_cuts = (0..3).filter(|pair| *pair != party.index() && cuts[*pair]).count();
    PortState {
        bridge: if all_cuts == 2 && own_cuts == 2 { VOID } else { DATA },
        isolated: own_cuts > 0 && all_cuts != 2,
    }
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
        one.bridge == other.bridge && !(one.isolated && other.isolated)
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
