//! What a captured Ethernet frame says.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Instant;

use xen_test_guest::protocol::{CounterLine, Datagram};

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let bytes: Option<Vec<u8>> = s
            .split(':')
            .map(|p| u8::from_str_radix(p, 16).ok().filter(|_| p.len() == 2 && !p.starts_with('+')))
            .collect();
        bytes
            .and_then(|b| b.try_into().ok())
            .map(Self)
            .ok_or_else(|| format!("{s:?} is no Ethernet address, expected XX:XX:XX:XX:XX:XX"))
    }
}

/// One frame.
#[derive(Debug, Clone, PartialEq)]
pub struct Frame {
    /// When the kernel received it.
    pub at: Instant,
    /// Who sent it.
    pub from: Mac,
    /// To whom.
    pub to: Mac,
    /// Its ethertype (behind a VLAN tag, if the tag is in the frame).
    pub ethertype: u16,
    /// Its length on the wire.
    pub len: usize,
    /// What is in it.
    pub content: Content,
}

/// The part of a frame that was understood.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// ARP over Ethernet for IPv4.
    Arp {
        /// A request (or an announcement), else an answer.
        request: bool,
        /// Whose address it claims.
        sender: Ipv4Addr,
        /// Whose address it asks for.
        target: Ipv4Addr,
    },
    /// A TCP segment.
    Tcp {
        /// Its sender.
        from: SocketAddr,
        /// Its receiver.
        to: SocketAddr,
        /// Sequence number of its first byte: with `len`, what makes a
        /// retransmission recognisable.
        seq: u32,
        /// The flags byte (FIN 1, SYN 2, RST 4, PSH 8, ACK 16).
        flags: u8,
        /// Bytes of payload.
        len: usize,
        /// Protocol lines in the payload.
        said: Vec<Said>,
    },
    /// A UDP datagram.
    Udp {
        /// Its sender.
        from: SocketAddr,
        /// Its receiver.
        to: SocketAddr,
        /// Bytes of payload.
        len: usize,
        /// The message in it.
        said: Vec<Said>,
    },
    /// ICMPv6 (neighbour discovery and more).
    Icmp6 {
        /// Type of the message (135 solicitation, 136 advertisement).
        kind: u8,
        /// Its sender.
        from: Ipv6Addr,
        /// The address that a solicitation asks, or an advertisement speaks,
        /// for.
        target: Option<Ipv6Addr>,
    },
    /// Anything else.
    Other,
}

/// A line of the guest's protocol found in a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Said {
    /// A counter line.
    Counter(CounterLine),
    /// An echo or beacon message.
    Message(Datagram),
}

impl Frame {
    /// Reads a frame captured at `at`. Never fails: what is not understood,
    /// or cut short, is [`Content::Other`].
    pub fn parse(at: Instant, bytes: &[u8]) -> Self {
        let mac = |i: usize| Mac(std::array::from_fn(|k| bytes.get(i + k).copied().unwrap_or(0)));
        let mut ethertype = be16(bytes, 12).unwrap_or(0);
        let mut payload = 14;
        while matches!(ethertype, 0x8100 | 0x88a8) {
            ethertype = be16(bytes, payload + 2).unwrap_or(0);
            payload += 4;
        }
        let body = bytes.get(payload..).unwrap_or(&[]);
        let content = match ethertype {
            0x0806 => arp(body),
            0x0800 => ip4(body),
            0x86dd => ip6(body),
            _ => None,
        };
        Self { at, from: mac(6), to: mac(0), ethertype, len: bytes.len(), content: content.unwrap_or(Content::Other) }
    }
}

fn be16(b: &[u8], i: usize) -> Option<u16> {
    Some(u16::from_be_bytes(b.get(i..i + 2)?.try_into().ok()?))
}

fn v4(b: &[u8], i: usize) -> Option<Ipv4Addr> {
    Some(Ipv4Addr::from(<[u8; 4]>::try_from(b.get(i..i + 4)?).ok()?))
}

fn v6(b: &[u8], i: usize) -> Option<Ipv6Addr> {
    Some(Ipv6Addr::from(<[u8; 16]>::try_from(b.get(i..i + 16)?).ok()?))
}

/// RFC 826.
fn arp(b: &[u8]) -> Option<Content> {
    let op = be16(b, 6)?;
    (b.get(..6)? == [0, 1, 8, 0, 6, 4]).then_some(())?;
    Some(Content::Arp { request: op == 1, sender: v4(b, 14)?, target: v4(b, 24)? })
}

fn ip4(b: &[u8]) -> Option<Content> {
    let header = usize::from(b.first()? & 15) * 4;
    // The padding of a short frame is no payload.
    let end = usize::from(be16(b, 2)?).clamp(header, b.len().max(header));
    if be16(b, 6)? & 0x1fff != 0 {
        return None; // a later fragment has no ports
    }
    transport(*b.get(9)?, v4(b, 12)?.into(), v4(b, 16)?.into(), b.get(header..end)?)
}

fn ip6(b: &[u8]) -> Option<Content> {
    let end = (40 + usize::from(be16(b, 4)?)).min(b.len());
    let (from, to, mut body) = (v6(b, 8)?, v6(b, 24)?, b.get(40..end)?);
    let mut protocol = *b.get(6)?;
    // Hop-by-hop options (multicast reports carry them), routing, destination
    // options: RFC 8200 section 4, the length counts 8 bytes beyond the first.
    while matches!(protocol, 0 | 43 | 60) {
        protocol = *body.first()?;
        body = body.get((usize::from(*body.get(1)?) + 1) * 8..)?;
    }
    if protocol == 58 {
        let kind = *body.first()?;
        let target = if matches!(kind, 135 | 136) { v6(body, 8) } else { None };
        return Some(Content::Icmp6 { kind, from, target });
    }
    transport(protocol, from.into(), to.into(), body)
}

fn transport(protocol: u8, from: IpAddr, to: IpAddr, b: &[u8]) -> Option<Content> {
    let from = SocketAddr::new(from, be16(b, 0)?);
    let to = SocketAddr::new(to, be16(b, 2)?);
    match protocol {
        6 => {
            let seq = u32::from_be_bytes(b.get(4..8)?.try_into().ok()?);
            let payload = b.get(usize::from(b.get(12)? >> 4) * 4..)?;
            Some(Content::Tcp { from, to, seq, flags: *b.get(13)?, len: payload.len(), said: lines(payload) })
        }
        17 => {
            let payload = b.get(8..)?;
            Some(Content::Udp { from, to, len: payload.len(), said: lines(payload) })
        }
        _ => None,
    }
}

/// The whole protocol lines of a payload. A segment may begin within a line,
/// and the rest of a counter line can look like one: a first line whose
/// successor does not follow it is left out.
fn lines(payload: &[u8]) -> Vec<Said> {
    let Ok(text) = std::str::from_utf8(payload) else { return Vec::new() };
    let mut said: Vec<Said> = text
        .split_inclusive('\n')
        .filter(|l| l.ends_with('\n'))
        .filter_map(|l| l.parse().map(Said::Counter).or_else(|_| l.parse().map(Said::Message)).ok())
        .collect();
    if let [Said::Counter(a), Said::Counter(b), ..] = said.as_slice()
        && a.n + 1 != b.n
    {
        said.remove(0);
    }
    said
}
