//! Asks for the guest's hardware address at a rate, by ARP or neighbour
//! discovery, past the kernel's own cache, and notes every answer.

use std::io::{self, PipeWriter};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::frame::{Content, Frame, Mac};
use super::journal::Journal;
use super::packet::{Interface, PacketError, PacketSocket};

/// A question or an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    /// We asked.
    Asked(Instant),
    /// Somebody claimed the address (also unasked, for all to hear).
    Answered(Instant, Mac),
}

/// What the probing has shown so far.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ProbeReport {
    /// Questions.
    pub asked: u64,
    /// Answers.
    pub answered: u64,
    /// Hardware addresses that answered.
    pub macs: Vec<String>,
}

/// Probes on a thread of its own until dropped.
pub struct NeighbourProber {
    journal: Journal<Probe>,
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl NeighbourProber {
    /// Asks for `target` on `interface`, once at once and then `every` so
    /// often. For IPv6 the interface needs an address of its own; for IPv4
    /// it is enough to have none (the question is then an ARP probe).
    ///
    /// # Errors
    /// [`PacketError`].
    pub fn start(interface: &str, target: IpAddr, every: Duration) -> Result<Self, PacketError> {
        let err = |what| move |source| PacketError::Socket { interface: interface.into(), what, source };
        let ours = Interface::find(interface)?;
        let question = match target {
            IpAddr::V4(target) => {
                arp_request(ours.mac, ours.ip4.first().copied().unwrap_or(Ipv4Addr::UNSPECIFIED), target)
            }
            IpAddr::V6(target) => {
                // Ask from the target's own scope: the guest may have no
                // route to the other.
                let local = |a: &&Ipv6Addr| a.is_unicast_link_local() == target.is_unicast_link_local();
                let from = ours.ip6.iter().find(local).or(ours.ip6.first());
                let from = from.ok_or_else(|| PacketError::NoAddress(interface.into()))?;
                solicitation(ours.mac, *from, target)
            }
        };
        let mut socket = PacketSocket::open(interface, &ours)?;
        let (stopped, stop) = io::pipe().map_err(err("making a pipe"))?;
        let journal = Journal::new();
        let theirs = journal.clone();
        let run = move || {
            let mut due = Instant::now();
            loop {
                if Instant::now() >= due {
                    theirs.push(Probe::Asked(Instant::now()));
                    // An interface that is down for now is no end.
                    let _ = socket.send(&question);
                    due = (due + every).max(Instant::now());
                }
                match socket.receive(Some(due), &stopped) {
                    Ok(Some(raw)) if !raw.outgoing => {
                        let frame = Frame::parse(raw.at, raw.bytes);
                        if claims(&frame, target) {
                            theirs.push(Probe::Answered(frame.at, frame.from));
                        }
                    }
                    Ok(_) => {}
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => return,
                    Err(e) => return theirs.end(e.to_string()),
                }
            }
        };
        let thread = thread::Builder::new().name("probe".into()).spawn(run).map_err(err("making a thread"))?;
        Ok(Self { journal, stop: Some(stop), thread: Some(thread) })
    }

    /// Questions and answers so far.
    pub fn probes(&self) -> Vec<Probe> {
        self.journal.read(<[Probe]>::to_vec)
    }

    /// When and by whom the address was first claimed after `when`, waiting
    /// up to `timeout`.
    pub fn first_answer_after(&self, when: Instant, timeout: Duration) -> Option<(Instant, Mac)> {
        self.journal.wait(Instant::now() + timeout, |all| {
            all.iter().find_map(|p| match p {
                Probe::Answered(at, mac) if *at > when => Some((*at, *mac)),
                _ => None,
            })
        })
    }

    /// Sums up.
    pub fn report(&self) -> ProbeReport {
        let mut report = ProbeReport { asked: 0, answered: 0, macs: Vec::new() };
        for p in self.probes() {
            match p {
                Probe::Asked(_) => report.asked += 1,
                Probe::Answered(_, mac) => {
                    report.answered += 1;
                    report.macs.push(mac.to_string());
                }
            }
        }
        report.macs.sort();
        report.macs.dedup();
        report
    }
}

impl Drop for NeighbourProber {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has told its story on stderr.
            let _ = thread.join();
        }
    }
}

fn claims(frame: &Frame, target: IpAddr) -> bool {
    match frame.content {
        Content::Arp { sender, .. } => target == IpAddr::V4(sender),
        Content::Icmp6 { kind: 136, target: Some(t), .. } => target == IpAddr::V6(t),
        _ => false,
    }
}

/// RFC 826, to everybody.
fn arp_request(mac: Mac, from: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut f = Vec::with_capacity(60);
    f.extend([0xff; 6]);
    f.extend(mac.0);
    f.extend([0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 1]);
    f.extend(mac.0);
    f.extend(from.octets());
    f.extend([0; 6]);
    f.extend(target.octets());
    f.resize(60, 0);
    f
}

/// RFC 4861 section 4.3, to the target's solicited-node group.
fn solicitation(mac: Mac, from: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
    let t = target.octets();
    let group = Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, t[13], t[14], t[15]]);
    let mut icmp = vec![135, 0, 0, 0, 0, 0, 0, 0];
    icmp.extend(t);
    icmp.extend([1, 1]); // option: our hardware address, 8 bytes
    icmp.extend(mac.0);
    let sum = checksum(from, group, &icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());

    let mut f = Vec::with_capacity(14 + 40 + icmp.len());
    f.extend([0x33, 0x33, 0xff, t[13], t[14], t[15]]);
    f.extend(mac.0);
    f.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, 58, 255]);
    f.extend(from.octets());
    f.extend(group.octets());
    f.extend(icmp);
    f
}

/// The ICMPv6 checksum: RFC 8200 section 8.1.
fn checksum(from: Ipv6Addr, to: Ipv6Addr, icmp: &[u8]) -> u16 {
    let len = u32::try_from(icmp.len()).unwrap_or(u32::MAX);
    let pseudo = [&from.octets()[..], &to.octets(), &len.to_be_bytes(), &[0, 0, 0, 58], icmp].concat();
    let mut sum: u32 = pseudo.chunks(2).map(|c| u32::from(c[0]) << 8 | c.get(1).map_or(0, |b| u32::from(*b))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
